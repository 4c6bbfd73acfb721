"""Keys that two parties share and nobody else knows, made anew for every attempt.

Each party shows a fresh X25519 key (RFC 7748), sees that what came back holds it unchanged, then signs by its
Ed25519 identity everything that all have shown. A signature is good for this very set of fresh keys only, so
neither a stranger, nor a recorded key, nor one that was swapped on its way passes. From what two parties'
fresh keys have in common comes the key of their mask by HKDF-SHA256 (RFC 5869). The fresh keys are forgotten
with the attempt: who steals an identity later cannot open what was sent before.
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
from pellm_lightning.exchange.secure.fixed_point import KEY_BYTES
from pellm_lightning.exchange.secure.signing_keys import SigningKey, TrustedKeys

_PUBLIC_BYTES = 32
_SIGNATURE_BYTES = 64
_CONTEXT = "pellm-lightning/masked/1"


def agree(
    federation: Collectives, identity: SigningKey, peers: TrustedKeys, settings: str
) -> dict[int, bytes]:
    """Return the key that this party shares with each other one that meets, KEY_BYTES, by its index.

    Args:
        federation: The parties that meet; each must call it.
        identity: This party's private key.
        peers: All parties' public keys.
        settings: What all must have the same, in words; the signatures cover it.

    Raises:
        FederationError: If a party is not who it says.
    """
    fresh = X25519PrivateKey.generate()
    shown = tell(federation, fresh.public_key().public_bytes_raw(), _PUBLIC_BYTES)
    transcript = _digest(settings, federation.names, shown)
    signatures = tell(federation, identity.sign(_statement(transcript, federation.name)), _SIGNATURE_BYTES)
    for name, signature in zip(federation.names, signatures, strict=True):
        if not peers.signed(name, signature, _statement(transcript, name)):
            raise FederationError(
                f"Party {federation.name} cannot tell whether party {name} is party {name}: what both were"
                f" told of this round's keys and members is not signed by {peers.of(name)}, which is pinned"
                f" for it. Nothing of this round was sent. Either another key belongs to party {name}, then"
                " correct peers at all parties; or somebody on the way changes what the parties tell each"
                " other."
            )
    return {
        party: shared_key(fresh, public, transcript, federation.party, party)
        for party, public in enumerate(shown)
        if party != federation.party
    }


def shared_key(fresh: X25519PrivateKey, public: bytes, transcript: bytes, one: int, other: int) -> bytes:
    """Return the key of two parties, KEY_BYTES; the same at both.

    Raises:
        FederationError: If the public key is one that gives no secret.
    """
    low, high = sorted((one, other))
    try:
        secret = fresh.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # all zeros, RFC 7748 section 6.1
        raise FederationError(f"Party {other} showed a key of small order, which gives no secret.") from error
    info = f"{_CONTEXT}|{low}|{high}".encode()
    return HKDF(hashes.SHA256(), length=KEY_BYTES, salt=transcript, info=info).derive(secret)


def tell(federation: Collectives, mine: bytes, size: int) -> list[bytes]:
    """Tell all parties some bytes, the same number of each party's; return all of theirs, in order.

    Raises:
        FederationError: If this party's were changed on their way. Others may hold the changed ones for its
            own, and what it signs or does next would speak for these.
    """
    rows = torch.zeros(federation.num_parties, size // 8, dtype=torch.int64)
    rows[federation.party] = torch.frombuffer(bytearray(mine), dtype=torch.int64)
    federation.all_reduce_(rows)  # one row each: the sum is all of them
    told = [_bytes_of(row) for row in rows]
    if told[federation.party] != mine:
        raise FederationError(
            f"What party {federation.name} told the others came back changed. Nothing of its values was"
            " revealed. A party runs another version of pellm-lightning, or somebody on the way changes what"
            " the parties tell each other: connect them by TLS, or by a network that you trust."
        )
    return told


def _bytes_of(row: Tensor) -> bytes:
    return row.numpy().tobytes()


def _digest(settings: str, names: Sequence[str], shown: Sequence[bytes]) -> bytes:
    words = [_CONTEXT, settings, list(names), [key.hex() for key in shown]]
    return hashlib.sha256(json.dumps(words).encode()).digest()


def _statement(transcript: bytes, name: str) -> bytes:
    return transcript + name.encode()
