"""Key-value store of a rendezvous: its values, write permissions and limits. No sockets here."""

import re
from collections.abc import Callable, Sequence

from pellm_lightning.comm.rendezvous.frames import (
    MAX_FRAME_BYTES,
    FrameError,
    Op,
    check_key,
    check_value,
)

# A round of 24 parties leaves about a hundred keys, which are deleted two rounds later.
MAX_KEYS = 20_000
# What the host of a rendezvous can spare; it keeps everything in memory.
MAX_BYTES = 256 << 20

_INT64 = range(-(2**63), 2**63)
_NUMBER = re.compile(rb"-?[0-9]{1,19}")
_FIELDS = {Op.SET: 2, Op.COMPARE_SET: 3, Op.ADD: 2, Op.DELETE: 1, Op.NUM_KEYS: 0}


class RefusedError(Exception):
    """A valid request that is not done; the reason is for the client."""


class KeyValueStore:
    """Dictionary with write permissions and limits.

    Every request is done or refused as a whole. Clients are known by name, or not at all (None): then
    everything is allowed.

    A key with a path component ``@name`` belongs to that party: only it may write or delete it. All other
    keys are everybody's, but can only be compared and set, or deleted: so nobody overwrites a value without
    having read it. Everybody may read everything.
    """

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def answer(self, op: int, fields: Sequence[bytes | None], who: str | None) -> list[bytes | None]:
        """Process a request of ``who``; return the fields of the answer.

        SET (key, value): none. COMPARE_SET (key, expected, desired): the value now stored, empty if there is
        none. ADD (key, decimal number): the sum. DELETE (key): "1" if it was there, else "0". CHECK (keys):
        "1" or "0" each. MULTI_GET (keys): the values, None where missing, of as many of the first keys as fit
        into a frame. NUM_KEYS: a decimal number.

        Raises:
            RefusedError: If it is not allowed or over a limit; nothing is changed then.
            FrameError: If it is no request of this protocol.
        """
        given = [field for field in fields if field is not None]
        if op not in _METHODS or len(given) != len(fields) or len(given) != _FIELDS.get(Op(op), len(given)):
            raise FrameError(f"no request: {op} with {len(fields)} fields")
        try:
            for key in given if op in (Op.CHECK, Op.MULTI_GET) else given[:1]:
                check_key(key)
            for value in given[1:] if op in (Op.SET, Op.COMPARE_SET) else ():
                check_value(given[0], value)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        if op in _WRITES and who is not None:
            _check_writer(Op(op), given[0], who)
        return _METHODS[Op(op)](self, given)

    def _set(self, fields: list[bytes]) -> list[bytes | None]:
        self._store(*fields)
        return []

    def _compare_set(self, fields: list[bytes]) -> list[bytes | None]:
        key, expected, desired = fields
        if self._values.get(key, b"") == expected:
            self._store(key, desired)
        return [self._values.get(key, b"")]

    def _add(self, fields: list[bytes]) -> list[bytes | None]:
        key, more = fields
        now = self._values.get(key, b"0")
        if not _NUMBER.fullmatch(now) or not _NUMBER.fullmatch(more):
            raise RefusedError(
                f"Only whole numbers can be added: {key!r} holds {now[:40]!r}, add {more[:40]!r}."
            )
        total = int(now) + int(more)
        if total not in _INT64:
            raise RefusedError(
                f"The sum {total} under {key!r} does not fit into 64 bits. Start a new counter."
            )
        self._store(key, b"%d" % total)
        return [b"%d" % total]

    def _delete(self, fields: list[bytes]) -> list[bytes | None]:
        value = self._values.pop(fields[0], None)
        if value is None:
            return [b"0"]
        self._size_bytes -= len(fields[0]) + len(value)
        return [b"1"]

    def _check(self, fields: list[bytes]) -> list[bytes | None]:
        return [b"1" if key in self._values else b"0" for key in fields]

    def _multi_get(self, fields: list[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = []
        left_bytes = MAX_FRAME_BYTES - 1
        for key in fields:
            value = self._values.get(key)
            left_bytes -= 4 + len(value or b"")
            if left_bytes < 0:
                break
            found.append(value)
        return found

    def _num_keys(self, fields: list[bytes]) -> list[bytes | None]:
        return [b"%d" % len(self)]

    def _store(self, key: bytes, value: bytes) -> None:
        old = self._values.get(key)
        size_bytes = self._size_bytes + len(value)
        size_bytes += len(key) if old is None else -len(old)
        if old is None and len(self) >= MAX_KEYS:
            raise RefusedError(f"There are {MAX_KEYS} keys already. Delete those of past rounds.")
        # What makes it smaller is allowed even when it is full.
        if size_bytes > max(MAX_BYTES, self._size_bytes):
            raise RefusedError(f"The {MAX_BYTES >> 20} MiB of this rendezvous are used up. Delete old keys.")
        self._values[key] = value
        self._size_bytes = size_bytes


_METHODS: dict[Op, Callable[[KeyValueStore, list[bytes]], list[bytes | None]]] = {
    Op.SET: KeyValueStore._set,
    Op.COMPARE_SET: KeyValueStore._compare_set,
    Op.ADD: KeyValueStore._add,
    Op.DELETE: KeyValueStore._delete,
    Op.CHECK: KeyValueStore._check,
    Op.MULTI_GET: KeyValueStore._multi_get,
    Op.NUM_KEYS: KeyValueStore._num_keys,
}
_WRITES = (Op.SET, Op.COMPARE_SET, Op.ADD, Op.DELETE)


def _check_writer(op: Op, key: bytes, who: str) -> None:
    owners = [part[1:] for part in key.split(b"/") if part.startswith(b"@")]
    if any(owner != who.encode() for owner in owners):
        raise RefusedError(
            f"The key {key!r} belongs to another party than {who}. Write keys under @{who} only."
        )
    if not owners and op not in (Op.COMPARE_SET, Op.DELETE):
        raise RefusedError(
            f"{op.name}: the key {key!r} is everybody's, so it can only be compared and set, or deleted. Use"
            f" compare_set, or a key under @{who}."
        )
