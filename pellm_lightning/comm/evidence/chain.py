"""Chain of round certificates: its file, one JSON object per line, and its verification.

A line is ``{"terms": ...}``, ``{"identity": ...}`` or ``{"round": ..., "signatures": ...}``; what a round
refers to comes before it.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pellm_lightning.comm.evidence.certificate import (
    EvidenceError,
    FederationTerms,
    Identity,
    RoundCertificate,
    RoundStatement,
    canonical,
)

FILE_NAME = "evidence.jsonl"
"""Name of the file next to an adapter, and in a party's state_dir."""

# Longer than any certificate of 128 parties, or terms of 100,000 parameters.
_MAX_LINE = 32 << 20
_ORDER = "the lines are not in the one order and form that evidence has"


class Trust(Protocol):
    """Whose keys are trusted: ``comm.signing_keys.Authorities`` or ``TrustedKeys``."""

    def refusal(self, name: str, key: str, certificate: bytes | None) -> str | None:
        """Return why a key is not accepted as a party's; None if it is."""


@dataclass
class Chain:
    """Certificates of a federation in order, with the terms and identities that these refer to.

    Example:
        >>> Chain.parse("").certificates
        []
    """

    terms: dict[str, FederationTerms] = field(default_factory=dict)
    """By hash."""
    identities: dict[str, Identity] = field(default_factory=dict)
    """By hash."""
    certificates: list[RoundCertificate] = field(default_factory=list)

    @property
    def head(self) -> str | None:
        """Hash of the last statement; None of an empty chain."""
        return self.certificates[-1].statement.hash if self.certificates else None

    @classmethod
    def parse(cls, text: str) -> "Chain":
        """Parse the file.

        Raises:
            EvidenceError: If a line is malformed; the message has its number.
        """
        chain, written, waiting = cls(), set[str](), list[str]()
        *lines, rest = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                added = chain._add(line)
                if isinstance(added, str):
                    waiting.append(added)
                elif waiting != [*chain._needed(added, written)]:
                    raise EvidenceError(_ORDER)
                else:
                    written.update(added.references)  # nor may one that is missing come later
                    waiting.clear()
            except EvidenceError as error:
                raise EvidenceError(f"line {number} is no evidence: {error}") from error
        if rest:
            raise EvidenceError("its last line has no end: it was cut off, or is no evidence")
        if waiting:
            raise EvidenceError(_ORDER)
        return chain

    @property
    def text(self) -> str:
        """The chain as the file's text; terms and identities stand before the round that first needs them."""
        return "".join(f"{line}\n" for line in self.lines(self.certificates, set()))

    def lines(self, certificates: Iterable[RoundCertificate], written: set[str]) -> list[str]:
        """Return the lines of certificates, each after those that it refers to.

        Args:
            certificates: Some that refer to this chain's terms and identities.
            written: Hashes of terms and identities that were written before; what these lines have is added.
        """
        lines: list[str] = []
        for certificate in certificates:
            needed = self._needed(certificate, written)
            lines += [
                canonical({"terms" if isinstance(of, FederationTerms) else "identity": vars(of)})
                for of in needed.values()
            ]
            written.update(needed)
            lines.append(certificate.line)
        return lines

    def _needed(
        self, certificate: RoundCertificate, written: Collection[str]
    ) -> dict[str, FederationTerms | Identity]:
        """Return by hash what a certificate refers to, in order, but for what was written before."""
        needed: dict[str, FederationTerms | Identity] = {}
        for key in certificate.references:
            of = self.terms.get(key) or self.identities.get(key)
            if of is not None and key not in written:
                needed[key] = of
        return needed

    def add_terms(self, terms: FederationTerms) -> str:
        """Add terms that certificates refer to; return their hash."""
        self.terms[terms.hash] = terms
        return terms.hash

    def add_identity(self, identity: Identity) -> str:
        """Add an identity that signatures refer to; return its hash."""
        self.identities[identity.hash] = identity
        return identity.hash

    def _add(self, line: str) -> RoundCertificate | str:
        """Add what is in a line; return the certificate, or the hash of what one refers to."""
        if len(line) > _MAX_LINE:
            raise EvidenceError(f"it has {len(line)} characters")
        try:
            value = json.loads(line)
            form = canonical(value)
        except (ValueError, RecursionError) as error:
            raise EvidenceError(f"it is no JSON ({error})") from error
        if form != line:
            raise EvidenceError(_ORDER)
        kinds = value.keys() if isinstance(value, dict) else ()
        if kinds == {"terms"}:
            return self.add_terms(FederationTerms.from_json(value["terms"]))
        if kinds == {"identity"}:
            return self.add_identity(Identity.from_json(value["identity"]))
        if kinds != {"round", "signatures"}:
            raise EvidenceError("it holds no terms, no identity and no round")
        self.certificates.append(RoundCertificate.from_json(value))
        return self.certificates[-1]


def verify(
    chain: Chain, trust: Trust | None = None, first: int = 0, before: RoundStatement | None = None
) -> None:
    """Verify a chain: every link, every signature, and a quorum of them for each round.

    A round by other terms than those before needs a quorum by both: else one party alone could write terms
    by which its own signature is enough.

    Args:
        chain: The chain.
        trust: Whose keys are trusted; None takes each party's key from the chain itself.
        first: The round with which it begins, if nothing comes before.
        before: Statement, verified before, that it continues; the chain has the terms of it.

    Raises:
        EvidenceError: If anything does not hold; the message names round and party.
    """
    accepted: set[str] = set()
    for certificate in chain.certificates:
        _check_link(certificate.statement, before, first)
        terms = chain.terms.get(certificate.statement.terms)
        if terms is None:
            raise EvidenceError(
                f"round {certificate.statement.round}: the terms that it refers to are missing"
            )
        _verify_certificate(certificate, terms, chain.identities, trust, accepted)
        lacks = lacking(certificate, chain, before)
        if lacks:
            raise EvidenceError(f"round {certificate.statement.round}: {lacks}")
        before = certificate.statement


def lacking(certificate: RoundCertificate, chain: Chain, before: RoundStatement | None) -> str | None:
    """Return which signatures a certificate lacks for a quorum, None if none.

    Args:
        certificate: The certificate; its signatures are good.
        chain: Has the terms that it and the statement before refer to.
        before: That statement; None if there is none.
    """
    statement, signed = certificate.statement, certificate.signatures.keys()
    terms = chain.terms.get(statement.terms)
    if terms is None:
        return "the terms that it refers to are missing"
    if len(signed) < terms.quorum:
        missing = ", ".join(name for name in statement.members if name not in signed)
        return f"{len(signed)} signatures, but a quorum is {terms.quorum}; missing: {missing}"
    if before is None or before.terms == statement.terms:
        return None
    former = chain.terms.get(before.terms)
    agreed = [name for name in signed if former is not None and name in former.roster]
    if former is not None and len(agreed) >= former.quorum:
        return None
    needed = "a quorum" if former is None else f"the {former.quorum} signatures"
    return (
        f"it has other terms than round {before.round}, without {needed} that were needed then, but only"
        f" those of: {', '.join(agreed)}"
    )


def _verify_certificate(
    certificate: RoundCertificate,
    terms: FederationTerms,
    identities: Mapping[str, Identity],
    trust: Trust | None,
    accepted: set[str],
) -> None:
    """Verify one certificate but for a quorum: what it states is possible, and its members have signed it.

    Args:
        certificate: The certificate.
        terms: Those that it refers to.
        identities: Of the signers, by hash.
        trust: Whose keys are trusted; None trusts every key.
        accepted: Hashes of identities that have been accepted already; more are added.

    Raises:
        EvidenceError: If it does not hold.
    """
    statement, where = certificate.statement, f"round {certificate.statement.round}"
    _check_members(statement, terms)
    for name, signature in certificate.signatures.items():
        if name not in statement.members:
            raise EvidenceError(f"{where}: {name!r} has signed, but was no member of the round")
        identity = identities.get(signature.identity)
        if identity is None or identity.name != name:
            raise EvidenceError(f"{where}: the signature of {name!r} is by an unknown or another's key")
        if identity.hash not in accepted:
            refusal = refused(identity, trust)
            if refusal is not None:
                raise EvidenceError(f"{where}: the key of {name!r} is not accepted: {refusal}")
            accepted.add(identity.hash)
        if not is_signed(statement.hash, signature.raw, identity):
            raise EvidenceError(
                f"{where}: the signature of {name!r} does not fit: what was signed has been changed, or the"
                " signature is another key's"
            )


def refused(identity: Identity, trust: Trust | None) -> str | None:
    """Return why a signer is not who its identity says; None if it is, as far as ``trust`` knows."""
    from pellm_lightning.comm.signing_keys import decode_certificate, key_in  # an optional dependency

    try:
        certificate = None if identity.certificate is None else decode_certificate(identity.certificate)
        if certificate is not None and key_in(certificate, identity.name) != identity.key:
            return "its certificate has another key"
    except ValueError as error:
        return str(error)
    return None if trust is None else trust.refusal(identity.name, identity.key, certificate)


def is_signed(statement: str, signature: bytes, identity: Identity) -> bool:
    """Tell whether a signer has signed a statement, given its hash."""
    from pellm_lightning.comm.signing_keys import is_signature  # an optional dependency

    return is_signature(identity.name, identity.key, signature, identity.message(statement))


def _check_link(statement: RoundStatement, before: RoundStatement | None, first: int) -> None:
    """Raise unless a statement follows another one, or is the first."""
    expected = first if before is None else before.round + 1
    if statement.round > expected:
        last = statement.round - 1
        gone = f"round {last} is" if last == expected else f"rounds {expected} to {last} are"
        raise EvidenceError(f"{gone} missing: round {statement.round} comes instead")
    if statement.round < expected:
        raise EvidenceError(f"round {statement.round} comes where round {expected} must be")
    if statement.previous != (None if before is None else before.hash):
        raise EvidenceError(f"round {statement.round} does not follow what stands before it: it was changed")
    if before is None:
        return
    if statement.run != before.run or statement.attempt <= before.attempt:
        raise EvidenceError(f"round {statement.round} is of another run, or of an earlier attempt")
    if statement.base != before.result:
        raise EvidenceError(
            f"round {statement.round} begins with other parameters than round {before.round} ended"
        )


def _check_members(statement: RoundStatement, terms: FederationTerms) -> None:
    """Raise unless members and weights are possible under the terms."""
    where, roster = f"round {statement.round}", terms.roster
    if terms.quorum < 1 or len(set(roster)) < len(roster):
        raise EvidenceError(f"{where}: its terms have no quorum, or a party twice")
    if list(statement.members) != [name for name in roster if name in statement.members]:
        strangers = [name for name in statement.members if name not in roster]
        raise EvidenceError(f"{where}: members that are not on the roster, or not in its order: {strangers}")
    if list(statement.counted) != [name for name in statement.members if name in statement.counted]:
        raise EvidenceError(f"{where}: parties count that were no members")
    weights = statement.weights
    if weights is None:
        return
    if len(weights) != len(statement.members):
        raise EvidenceError(f"{where}: {len(weights)} weights of {len(statement.members)} members")
    if statement.counted != tuple(n for n, w in zip(statement.members, weights, strict=True) if w > 0):
        raise EvidenceError(f"{where}: who counts is not who has a weight")
