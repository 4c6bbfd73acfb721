"""Frames with which a party asks a relay for a meeting with another party; what follows is theirs alone.

::

    party: HELLO                     relay: HELLO | challenge: 16 bytes
    party: a frame of ticket, peer, room and proof
                                     relay: ADMITTED, and JOINED as soon as the peer is in the same room

A ticket is handed out by the rendezvous, over the party's authenticated connection, together with the key of
the proof. So neither is of use to whoever reads along: a proof answers one challenge.
"""

import hashlib
import hmac
from dataclasses import dataclass

from pellm_lightning.comm.rendezvous.frames import FrameError, pack, unpack

# The first byte tells it from TLS (0x16) and from a hello of the rendezvous.
HELLO = b"RELAY\x00\x01"
CHALLENGE_BYTES = 16
ADMITTED, JOINED = b"A", b"J"
MAX_REQUEST_BYTES = 1024
"""Of a request; a name has up to 63 bytes, the rest is of fixed size."""


@dataclass(frozen=True)
class Ticket:
    """Leave to use a relay for a while.

    Args:
        text: Shown to the relay.
        key: Never sent to it: it knows it from the text.
    """

    text: bytes
    key: bytes


def room_of(group: str) -> bytes:
    """Return the room where members of a group meet; the relay need not know the group's name."""
    return hashlib.sha256(group.encode()).digest()


def request(ticket: Ticket, challenge: bytes, peer: str, group: str) -> bytes:
    """Return the frame that asks for a meeting."""
    room = room_of(group)
    return pack(0, [ticket.text, peer.encode(), room, proof(ticket.key, challenge, peer.encode(), room)])


def requested(body: bytes) -> list[bytes]:
    """Return ticket, peer, room and proof of a request's body.

    Raises:
        FrameError: If it is no request.
    """
    fields = [field for field in unpack(body)[1] if field is not None]
    if len(fields) != 4:
        raise FrameError(f"a request to a relay of {len(fields)} fields")
    return fields


def proof(key: bytes, challenge: bytes, peer: bytes, room: bytes) -> bytes:
    """Return what only the holder of a ticket's key can answer to a challenge."""
    return hmac.digest(key, b"\x00".join((challenge, peer, room)), "sha256")
