"""Round certificates: what a committed round was, and the signatures of its members. JSON and hashes only.

A certificate has three parts, each a line of JSON in one form (sorted keys, no spaces), so that a byte that
is changed is seen: the *statement* of the round, the *terms* of the federation, to whose hash the statement
refers, and the *identities* of the signers. A signature (Ed25519, RFC 8032) covers the statement and the
signer's identity. A statement has the hash of the one before it, as a block of a hash chain has.
"""

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CONTEXT = "pellm-lightning/round-certificate/1"
"""Begins what is signed: the same key signs in TLS and in secure aggregation."""

SIGNATURE_BYTES = 64


class EvidenceError(ValueError):
    """Evidence that does not hold."""


@dataclass(frozen=True)
class RoundStatement:
    """Statement of one committed round, the same at all its members.

    Example:
        >>> statement = RoundStatement(
        ...     "run", 0, 1, ("a",), ("a",), (8.0,), "0f", "1e", "Mean()", None, 6, "2d", None
        ... )
        >>> RoundStatement.from_json(json.loads(statement.text)) == statement
        True
    """

    run: str
    """Run id of the federation."""
    round: int
    """Index of the round, from 0."""
    attempt: int
    """Number of the attempt that was committed."""
    members: tuple[str, ...]
    """Who took part, in the order of the roster."""
    counted: tuple[str, ...]
    """Whose updates are in the result."""
    weights: tuple[float, ...] | None
    """Weight of each member; None where the exchange hides them."""
    base: str
    """Digest of the global parameters before the round."""
    result: str
    """Digest of the global parameters after it."""
    rule: str
    """The aggregation."""
    epsilon: float | None
    """Privacy budget spent up to this round; None without differential privacy."""
    protocol: int
    """Version of the protocol between the parties."""
    terms: str
    """Hash of the ``FederationTerms``."""
    previous: str | None
    """Hash of the statement before; None for the first round."""

    @property
    def text(self) -> str:
        """The statement as the one JSON text that is hashed."""
        return canonical(vars(self))

    @property
    def hash(self) -> str:
        """SHA-256 of the text."""
        return _sha256(self.text)

    @classmethod
    def from_json(cls, value: Any) -> "RoundStatement":
        """Return the statement in a JSON object.

        Raises:
            EvidenceError: If it is none.
        """
        _check_fields(cls, value)
        texts = [value[name] for name in ("run", "base", "result", "rule", "terms")]
        numbers = [value[name] for name in ("round", "attempt", "protocol")]
        weights, epsilon, previous = value["weights"], value["epsilon"], value["previous"]
        fine = (
            all(isinstance(text, str) for text in texts)
            and all(_is_count(number) for number in numbers)
            and all(_are_texts(value[name]) for name in ("members", "counted"))
            and (weights is None or (isinstance(weights, list) and all(map(_is_amount, weights))))
            and (epsilon is None or _is_amount(epsilon))
            and (previous is None or isinstance(previous, str))
        )
        if not fine:
            raise EvidenceError("a field of the statement has a value that it cannot have")
        tuples = {name: tuple(value[name]) for name in ("members", "counted")}
        return cls(**value | tuples | {"weights": None if weights is None else tuple(weights)})


@dataclass(frozen=True)
class FederationTerms:
    """Terms of a federation to which statements refer: who may take part, and what is trained how."""

    roster: tuple[str, ...]
    """Names of all parties."""
    quorum: int
    """Number of parties that must sign a round."""
    settings: Mapping[str, Any]
    """What all parties have agreed on, by name."""
    parameters: tuple[tuple[str, str, tuple[int, ...]], ...]
    """Name, dtype and shape of each trained parameter, sorted by name; dtypes by safetensors' names."""

    @property
    def text(self) -> str:
        """The terms as the one JSON text that is hashed."""
        return canonical(vars(self))

    @property
    def hash(self) -> str:
        """SHA-256 of the text."""
        return _sha256(self.text)

    @classmethod
    def from_json(cls, value: Any) -> "FederationTerms":
        """Return the terms in a JSON object.

        Raises:
            EvidenceError: If it has none.
        """
        _check_fields(cls, value)
        parameters = value["parameters"]
        if not (
            _are_texts(value["roster"])
            and _is_count(value["quorum"])
            and isinstance(value["settings"], dict)
            and isinstance(parameters, list)
            and all(_is_parameter(parameter) for parameter in parameters)
        ):
            raise EvidenceError("a field of the terms has a value that it cannot have")
        of = tuple((name, dtype, tuple(shape)) for name, dtype, shape in parameters)
        return cls(tuple(value["roster"]), value["quorum"], value["settings"], of)


@dataclass(frozen=True)
class Identity:
    """Identity of a signer: its key, and by whose word it is that party's.

    Example:
        >>> Identity("clinic-a", "ed25519:...", None, "0.1.0").certificate is None
        True
    """

    name: str
    """The party."""
    key: str
    """Its public key as text, "ed25519:..."."""
    certificate: str | None
    """Its X.509 certificate (DER, in base64); None where all parties pin each other's keys."""
    software: str
    """Version of pellm-lightning that it ran."""

    @property
    def text(self) -> str:
        """The identity as the one JSON text that is hashed."""
        return canonical(vars(self))

    @property
    def hash(self) -> str:
        """SHA-256 of the text."""
        return _sha256(self.text)

    @classmethod
    def from_json(cls, value: Any) -> "Identity":
        """Return the identity in a JSON object.

        Raises:
            EvidenceError: If it has none.
        """
        _check_fields(cls, value)
        texts = [text for name, text in value.items() if name != "certificate" or text is not None]
        if not _are_texts(texts):
            raise EvidenceError("a field of the identity has a value that it cannot have")
        return cls(**value)

    def message(self, statement: str) -> bytes:
        """Return what the signer signs of a statement, given its hash."""
        return f"{CONTEXT}\0{statement}{self.hash}".encode()


@dataclass(frozen=True)
class Signature:
    """Signature of a statement by a party."""

    identity: str
    """Hash of the signer's ``Identity``."""
    value: str
    """The 64 bytes in base64."""

    @property
    def raw(self) -> bytes:
        """The bytes.

        Raises:
            EvidenceError: If it has none, or has them written in another way.
        """
        try:
            raw = base64.b64decode(self.value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise EvidenceError("a signature that is no base64") from error
        if len(raw) != SIGNATURE_BYTES or encode(raw) != self.value:
            raise EvidenceError(f"a signature that is not {SIGNATURE_BYTES} bytes")
        return raw


@dataclass
class RoundCertificate:
    """Certificate of a round: its statement, and the signatures by party."""

    statement: RoundStatement
    signatures: dict[str, Signature] = field(default_factory=dict)

    @property
    def references(self) -> list[str]:
        """Hashes of the terms and identities to which it refers, in the file's order."""
        signers = [signature.identity for _, signature in sorted(self.signatures.items())]
        return [self.statement.terms, *signers]

    @property
    def line(self) -> str:
        """The certificate as a line of the file."""
        signed = {name: vars(signature) for name, signature in self.signatures.items()}
        return canonical({"round": vars(self.statement), "signatures": signed})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RoundCertificate":
        """Return the certificate in a line.

        Raises:
            EvidenceError: If it has none.
        """
        signatures = value["signatures"]
        if not isinstance(signatures, dict):
            raise EvidenceError("the signatures are no object")
        for signature in signatures.values():
            _check_fields(Signature, signature)
            if not _are_texts([*signature.values()]):
                raise EvidenceError("a field of a signature has a value that it cannot have")
        statement = RoundStatement.from_json(value["round"])
        return cls(statement, {name: Signature(**signature) for name, signature in signatures.items()})


def canonical(value: Any) -> str:
    """Return the one JSON text of a value.

    Raises:
        ValueError: If it holds a number that is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode(raw: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(raw).decode()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_fields(kind: type, value: Any) -> None:
    if not isinstance(value, dict) or value.keys() != kind.__annotations__.keys():
        raise EvidenceError(f"it has not the fields of a {kind.__name__}")


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_amount(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _is_parameter(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and _are_texts(value[:2])
        and isinstance(value[2], list)
        and all(map(_is_count, value[2]))
    )


def weights_of(weights: Sequence[float]) -> tuple[float, ...]:
    """Return weights as a statement holds them: whole numbers and others have one way to be written."""
    return tuple(float(weight) for weight in weights)
