"""Chains of round certificates for tests, signed by keys that tests hold."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pellm_lightning.comm.evidence.certificate import (
    FederationTerms,
    Identity,
    RoundCertificate,
    RoundStatement,
    Signature,
    encode,
)
from pellm_lightning.comm.evidence.chain import Chain
from pellm_lightning.comm.keys import public_text

ROSTER = ("a", "b", "c")


class Parties:
    """Three parties with keys of their own, who sign what a test lets them."""

    def __init__(self, seed: int = 0, **terms: Any) -> None:
        self.keys = {
            name: Ed25519PrivateKey.from_private_bytes(bytes([seed, place] * 16))
            for place, name in enumerate(ROSTER)
        }
        self.identities = {
            name: Identity(name, public_text(key.public_key()), None, "0.1.0")
            for name, key in self.keys.items()
        }
        parameters = (("model.base_model.lora_A.default.weight", "F32", (2, 3)),)
        self.terms = FederationTerms(**{"roster": ROSTER, "quorum": 2, "settings": {"tls": True},
                                        "parameters": parameters} | terms)  # fmt: skip

    @property
    def public(self) -> dict[str, str]:
        return {name: identity.key for name, identity in self.identities.items()}

    def sign(self, statement: RoundStatement, name: str, by: Identity | None = None) -> Signature:
        identity = by or self.identities[name]
        return Signature(identity.hash, encode(self.keys[name].sign(identity.message(statement.hash))))

    def certificate(self, statement: RoundStatement, signers: Sequence[str] = ROSTER) -> RoundCertificate:
        return RoundCertificate(statement, {name: self.sign(statement, name) for name in signers})

    def following(self, before: RoundStatement | None, **fields: Any) -> RoundStatement:
        """Return the statement of the next round, with some fields that are otherwise."""
        index = 0 if before is None else before.round + 1
        statement = RoundStatement(
            run="1f/1/2e",
            round=index,
            attempt=2 * index + 1,
            members=ROSTER,
            counted=ROSTER[:2],
            weights=(8.0, 0.5, 0.0),
            base=f"{index:064x}",
            result=f"{index + 1:064x}",
            rule="LowRankMean()",
            epsilon=0.5 * index,
            protocol=7,
            terms=self.terms.hash,
            previous=None if before is None else before.hash,
        )
        return replace(statement, **fields)

    def chain(self, rounds: int = 3, signers: Sequence[Sequence[str]] = ()) -> Chain:
        """Return a good chain; ``signers`` of each round, all if not given."""
        chain = Chain()
        chain.add_terms(self.terms)
        for identity in self.identities.values():
            chain.add_identity(identity)
        before = None
        for index in range(rounds):
            before = self.following(before)
            chain.certificates.append(self.certificate(before, signers[index] if signers else ROSTER))
        return chain
