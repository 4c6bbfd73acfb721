"""Authenticated key agreement: pairwise secret keys from signed Diffie-Hellman, ephemeral for each attempt.

Each party broadcasts an ephemeral X25519 key (RFC 7748), checks that its own came back unchanged, then signs
the transcript of all ephemeral keys with its Ed25519 key. A signature is valid for this transcript only, so
impersonated, replayed and substituted keys are rejected. Two parties' shared secret gives their mask key by
HKDF-SHA256 (RFC 5869). Ephemeral keys are deleted with the attempt (forward secrecy): stealing a signing key
later does not decrypt what was sent before.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from pellm_lightning.comm import Collectives, FederationError
from pellm_lightning.comm.signing_keys import CertifiedKeys, SigningKey, TrustedKeys
from pellm_lightning.exchange.secure.fixed_point import KEY_BYTES

_PUBLIC_BYTES = 32
_SIGNATURE_BYTES = 64
_CONTEXT = "pellm-lightning/secure-aggregation/2"


def agree(
    federation: Collectives, signing_key: SigningKey, trusted: TrustedKeys | CertifiedKeys, settings: str
) -> dict[int, bytes]:
    """Return the secret key shared with each other party of the attempt, KEY_BYTES, by its index.

    Args:
        federation: Collectives of the attempt's members; each must call it.
        signing_key: This party's private key.
        trusted: All parties' public keys, or the authority that certifies them.
        settings: Text that must be equal at all parties; the signatures cover it.

    Raises:
        FederationError: If a party cannot be authenticated.
    """
    ephemeral = X25519PrivateKey.generate()
    mine = ephemeral.public_key().public_bytes_raw() + trusted.shown
    shown = all_gather_bytes(federation, mine, len(mine))
    transcript = _digest(settings, federation.names, shown)
    signature = signing_key.sign(_statement(transcript, federation.name))
    signatures = all_gather_bytes(federation, signature, _SIGNATURE_BYTES)
    certificates = (of_party[_PUBLIC_BYTES:] for of_party in shown)
    try:
        keys = trusted.verified(dict(zip(federation.names, certificates, strict=True)))
    except ValueError as error:
        raise FederationError(
            f"Party {federation.name} cannot authenticate the others: {error}. Nothing was sent. Have the"
            " certificate renewed by the federation's authority, and give all parties the same ca.pem."
        ) from error
    for name, signature in zip(federation.names, signatures, strict=True):
        if not keys.verify(name, signature, _statement(transcript, name)):
            raise FederationError(
                f"Party {federation.name} cannot authenticate party {name}: this round's keys and members are"
                f" not signed by {keys.get(name)}, its key by trusted_keys or its certificate. Nothing was"
                f" sent. Either party {name} has another key, then correct trusted_keys at all parties; or"
                " somebody on the network modifies messages."
            )
    return {
        party: shared_key(ephemeral, of_party[:_PUBLIC_BYTES], transcript, federation.party, party)
        for party, of_party in enumerate(shown)
        if party != federation.party
    }


def shared_key(ephemeral: X25519PrivateKey, public: bytes, transcript: bytes, one: int, other: int) -> bytes:
    """Derive the secret key of two parties, KEY_BYTES; the same at both.

    Raises:
        FederationError: If the public key has small order.
    """
    low, high = sorted((one, other))
    try:
        secret = ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # all zeros, RFC 7748 section 6.1
        raise FederationError(
            f"Party {other} sent a public key of small order, which gives no secret."
        ) from error
    info = f"{_CONTEXT}|{low}|{high}".encode()
    return HKDF(hashes.SHA256(), length=KEY_BYTES, salt=transcript, info=info).derive(secret)


def all_gather_bytes(federation: Collectives, mine: bytes, size: int) -> list[bytes]:
    """Gather bytes of equal length from all parties; check that this party's came back unchanged.

    Raises:
        FederationError: If this party's were modified in transit. Others may have received the modified ones,
            which its next signature must not cover.
    """
    rows = torch.zeros(federation.num_parties, size // 8, dtype=torch.int64)
    rows[federation.party] = torch.frombuffer(bytearray(mine), dtype=torch.int64)
    federation.all_reduce_(rows)  # one row each: the sum is all of them
    gathered = [_bytes_of(row) for row in rows]
    if gathered[federation.party] != mine:
        raise FederationError(
            f"What party {federation.name} sent to the others came back modified. Nothing of its values was"
            " revealed. A party runs another version of pellm-lightning, or somebody on the network modifies"
            " messages: connect the parties by TLS, or by a network that you trust."
        )
    return gathered


def _bytes_of(row: Tensor) -> bytes:
    return row.numpy().tobytes()


def _digest(settings: str, names: Sequence[str], shown: Sequence[bytes]) -> bytes:
    content = [_CONTEXT, settings, list(names), [of_party.hex() for of_party in shown]]
    return hashlib.sha256(json.dumps(content).encode()).digest()


def _statement(transcript: bytes, name: str) -> bytes:
    """Return what a party signs; it begins with its use, since the same key signs in TLS."""
    return f"{_CONTEXT}\0".encode() + transcript + name.encode()
