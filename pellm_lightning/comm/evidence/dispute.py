"""Dispute over a round: signed statements of one attempt that differ, as a file that anybody can check.

Each member signs one statement of an attempt. So two by one party are proof that it equivocated; those of
several parties are proof of who stated what. The lines are those of the chain.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from pellm_lightning.comm.evidence.certificate import (
    EvidenceError,
    Identity,
    RoundCertificate,
    RoundStatement,
    Signature,
)
from pellm_lightning.comm.evidence.chain import Chain, Trust, is_signed, refused

# Of a statement; a peer has written it.
_MAX_TEXT = 1 << 16


def dispute_of(
    votes: Mapping[str, Iterable[Mapping[str, Any]]],
    own: RoundStatement,
    identities: Mapping[str, Identity],
) -> Chain:
    """Return what members have signed of an attempt, a certificate for each statement; others are ignored.

    Args:
        votes: By member, each vote that was seen of it, with a "statement" and its "signature".
        own: This party's statement of the attempt.
        identities: The members as signers.
    """
    found: dict[str, RoundCertificate] = {}
    dispute = Chain()
    for name, of_member in votes.items():
        for vote in of_member if name in identities else ():
            try:
                statement = _statement(vote.get("statement"))
                signature = Signature(identities[name].hash, str(vote.get("signature")))
                fits = is_signed(statement.hash, signature.raw, identities[name])
            except EvidenceError:
                continue
            if fits and (statement.run, statement.attempt) == (own.run, own.attempt):
                found.setdefault(statement.hash, RoundCertificate(statement)).signatures[name] = signature
                dispute.add_identity(identities[name])
    dispute.certificates = [found[key] for key in sorted(found)]
    return dispute


def equivocators(dispute: Chain) -> list[str]:
    """Return who has signed more than one of the statements."""
    signers = [name for certificate in dispute.certificates for name in certificate.signatures]
    return sorted({name for name in signers if signers.count(name) > 1})


def verify_dispute(dispute: Chain, trust: Trust | None = None) -> list[str]:
    """Verify every signature of a dispute; return what it proves, in lines.

    Args:
        dispute: Certificates of one attempt, with fewer signatures than a quorum each.
        trust: Whose keys are trusted; None takes each party's key from the dispute itself.

    Raises:
        EvidenceError: If it is none, or a signature does not hold.
    """
    statements = {certificate.statement.hash: certificate.statement for certificate in dispute.certificates}
    if not 1 < len(statements) == len(dispute.certificates):
        raise EvidenceError("it has not two statements that differ")
    if len({(statement.run, statement.attempt) for statement in statements.values()}) > 1:
        raise EvidenceError("its statements are not of one attempt")
    for certificate in dispute.certificates:
        _check_signatures(certificate, dispute.identities, trust)
    fields = [asdict(statement) for statement in statements.values()]
    differing = [name for name in fields[0] if any(other[name] != fields[0][name] for other in fields)]
    first = dispute.certificates[0].statement
    lines = [
        f"Attempt {first.attempt} at round {first.round} of run {first.run}: its members have signed"
        f" {len(statements)} statements, which differ in {', '.join(differing)}."
    ]
    for certificate in dispute.certificates:
        result, signers = certificate.statement.result[:16], ", ".join(sorted(certificate.signatures))
        lines.append(f"  result {result!r}... (statement {certificate.statement.hash[:16]}...): {signers}")
    twice = equivocators(dispute)
    if twice:
        return [*lines, f"{', '.join(twice)} has signed more than one: it equivocated."]
    return [*lines, "Nobody has signed more than one: who is wrong has erred or lied, which looks the same."]


def _statement(text: Any) -> RoundStatement:
    """Return the statement that a peer has written.

    Raises:
        EvidenceError: If it has written none.
    """
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        raise EvidenceError("no statement")
    try:
        return RoundStatement.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise EvidenceError(str(error)) from error


def _check_signatures(
    certificate: RoundCertificate, identities: Mapping[str, Identity], trust: Trust | None
) -> None:
    if not certificate.signatures:
        raise EvidenceError(f"nobody has signed the statement {certificate.statement.hash[:16]}...")
    for name, signature in certificate.signatures.items():
        identity = identities.get(signature.identity)
        if identity is None or identity.name != name:
            raise EvidenceError(f"the signature of {name!r} is by an unknown or another's key")
        refusal = refused(identity, trust)
        if refusal is not None:
            raise EvidenceError(f"the key of {name!r} is not accepted: {refusal}")
        if not is_signed(certificate.statement.hash, signature.raw, identity):
            raise EvidenceError(f"the signature of {name!r} does not fit")
