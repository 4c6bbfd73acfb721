"""Frames of the rendezvous protocol: bounded and binary, one per request and answer.

After a hello of fixed bytes from both ends, a frame is its length, a tag and byte fields::

    length of what follows: 4 bytes | tag: 1 byte | (length: 4 bytes | bytes) per field

Numbers are unsigned and big-endian; the length ``2**32 - 1`` stands for a value that is missing. A request's
tag is its ``Op``, an answer's is DONE, or REFUSED or, if there is no room, FULL with the reason as text.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum

VERSION = 3
HELLO = b"pellm-rv" + VERSION.to_bytes(2, "big")

# A key is a path of a few names of up to 63 characters.
MAX_KEY_BYTES = 512
# Values are small; tensors take another way.
MAX_VALUE_BYTES = 4 << 20
# Many more than the keys of any request; so an answer's fields are also bounded.
MAX_FIELDS = 1024
# The largest request replaces one value by another.
MAX_FRAME_BYTES = 2 * MAX_VALUE_BYTES + 4096

DONE = 0
REFUSED = 1
FULL = 2

_MISSING = 2**32 - 1
_LENGTH = struct.Struct("!I")
LENGTH_BYTES = _LENGTH.size


class Op(IntEnum):
    """Requests to a rendezvous; only AWAIT waits, for a time that the server bounds."""

    SET = 1
    COMPARE_SET = 2
    ADD = 3
    DELETE = 4
    CHECK = 5
    MULTI_GET = 6
    NUM_KEYS = 7
    EXPECT = 8
    TRANSACT = 9
    AWAIT = 10
    TICKET = 11


class FrameError(Exception):
    """Bytes that are no frame of this protocol: their sender is something else, or broken, or hostile."""


def pack(tag: int, fields: Sequence[bytes | None]) -> bytes:
    """Return the frame of a tag and its fields, ready to send."""
    body = pack_body(tag, fields)
    return _LENGTH.pack(len(body)) + body


def pack_body(tag: int, fields: Sequence[bytes | None]) -> bytes:
    """Return what follows a frame's length; each field of a TRANSACT is one."""
    parts = [bytes([tag])]
    for field in fields:
        parts.append(_LENGTH.pack(_MISSING if field is None else len(field)))
        if field is not None:
            parts.append(field)
    return b"".join(parts)


def length(head: bytes) -> int:
    """Return how many bytes follow the first ``LENGTH_BYTES`` of a frame.

    Raises:
        FrameError: If it is more, or less, than a frame can have.
    """
    size = int(_LENGTH.unpack(head)[0])
    if not 1 <= size <= MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {size} bytes")
    return size


def unpack(body: bytes) -> tuple[int, list[bytes | None]]:
    """Return the tag and the fields of what follows a frame's length.

    Raises:
        FrameError: If the fields do not fill the body exactly, or are too many.
    """
    if not body:
        raise FrameError("no tag")
    fields: list[bytes | None] = []
    at = 1
    while at < len(body):
        if len(fields) == MAX_FIELDS or at + LENGTH_BYTES > len(body):
            raise FrameError("too many fields, or half a length")
        size = int(_LENGTH.unpack_from(body, at)[0])
        at += LENGTH_BYTES
        if size == _MISSING:
            fields.append(None)
            continue
        if at + size > len(body):
            raise FrameError("a field that is longer than its frame")
        fields.append(body[at : at + size])
        at += size
    return body[0], fields


def check_key(key: bytes) -> None:
    """Refuse a key that is empty or too long.

    Raises:
        ValueError: If it is.
    """
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        raise ValueError(
            f"The key {key[:40]!r}... of {len(key)} bytes must have 1 to {MAX_KEY_BYTES}. Use shorter names."
        )


def check_value(key: bytes, value: bytes) -> None:
    """Refuse a value that is too long.

    Raises:
        ValueError: If it is.
    """
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(
            f"The value of {key!r} has {len(value)} bytes, more than the {MAX_VALUE_BYTES} that a rendezvous"
            " takes. Tensors cross between parties directly."
        )
