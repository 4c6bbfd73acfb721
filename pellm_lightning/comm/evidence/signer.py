"""Signer: a party's key for round certificates, and whom it believes the others' keys to be of."""

from typing import TYPE_CHECKING

from pellm_lightning import __version__
from pellm_lightning.comm.evidence.certificate import Identity, RoundStatement, Signature, encode

if TYPE_CHECKING:
    from pellm_lightning.comm.signing_keys import CertifiedKeys, SigningKey, TrustedKeys


class RoundSigner:
    """Signer of round statements with the key that a party has already.

    Args:
        name: The party.
        key: Its private key.
        trust: The public keys of all parties, or the authority that certifies them.
    """

    def __init__(self, name: str, key: "SigningKey", trust: "TrustedKeys | CertifiedKeys") -> None:
        from pellm_lightning.comm.signing_keys import CertifiedKeys  # an optional dependency

        self._key, self.trust = key, trust
        certificate = encode(trust.certificate) if isinstance(trust, CertifiedKeys) else None
        self.identity = Identity(name, key.public_key, certificate, __version__)
        """This party as a signer."""

    def sign(self, statement: RoundStatement) -> Signature:
        """Return this party's signature of a statement."""
        raw = self._key.sign(self.identity.message(statement.hash))
        return Signature(self.identity.hash, encode(raw))
