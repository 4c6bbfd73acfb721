"""Key-value store of a rendezvous: its values, write permissions and limits. No sockets here."""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pellm_lightning.comm.rendezvous.frames import (
    LENGTH_BYTES,
    MAX_FIELDS,
    MAX_FRAME_BYTES,
    FrameError,
    Op,
    check_key,
    check_value,
    unpack,
)

# A round of 24 parties leaves about a hundred keys, which are deleted two rounds later.
MAX_KEYS = 20_000
# What the host of a rendezvous can spare; it keeps everything in memory.
MAX_BYTES = 256 << 20
# A request is kept in memory while it waits, so it must be small.
MAX_AWAIT_BYTES = 64 << 10

_INT64 = range(-(2**63), 2**63)
_NUMBER = re.compile(rb"-?[0-9]{1,19}")
_MILLISECONDS = re.compile(rb"[0-9]{1,9}")
_FIELDS = {Op.SET: 2, Op.COMPARE_SET: 3, Op.ADD: 2, Op.DELETE: 1, Op.NUM_KEYS: 0, Op.EXPECT: 2}


class RefusedError(Exception):
    """A valid request that is not done; the reason is for the client."""


@dataclass
class _Used:
    """What a party has used of its quota."""

    keys: int = 0
    size_bytes: int = 0


class FullError(RefusedError):
    """A request for which there is no room now; there may be later."""


class KeyValueStore:
    """Dictionary with write permissions and limits.

    Every request is done or refused as a whole. Clients are known by name, or not at all (None): then
    everything is allowed.

    A key with a path component ``@name`` belongs to that party: only it may write or delete it. All other
    keys are everybody's, but can only be compared and set, or deleted: so nobody overwrites a value without
    having read it. Everybody may read everything.

    What a party has written last counts against its quota, by the name in the key or else by its own, so that
    none can use up the room of the others.

    Args:
        parties: How many parties there are, if that is known: each has an equal part of the room.
    """

    TRANSACTED = (Op.EXPECT, Op.SET, Op.COMPARE_SET, Op.DELETE, Op.MULTI_GET)
    """What a transaction is made of: nothing that does harm if it is done twice, as an answer may be lost."""

    def __init__(self, parties: int = 0) -> None:
        self._parties = parties
        self._values: dict[bytes, bytes] = {}
        self._payers: dict[bytes, bytes] = {}
        self._used: dict[bytes, _Used] = {}
        self._who: str | None = None
        self._size_bytes = 0
        self._watches: dict[bytes, dict[Callable[[], None], None]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def answer(self, op: int, fields: Sequence[bytes | None], who: str | None) -> list[bytes | None]:
        """Process a request of ``who``; return the fields of the answer.

        SET (key, value): none. COMPARE_SET (key, expected, desired): the value now stored, empty if there is
        none. ADD (key, decimal number): the sum. DELETE (key): "1" if it was there, else "0". CHECK (keys):
        "1" or "0" each. MULTI_GET (keys): the values, None where missing, of as many of the first keys as fit
        into a frame. NUM_KEYS: a decimal number. EXPECT (key, value): the value now stored, empty if there is
        none. TRANSACT (requests): the answers, up to and including that of the first EXPECT of another value,
        each as the number of its fields and the fields.
        AWAIT (milliseconds, and for each key the key and its last known value): as MULTI_GET; the connection
        handler has waited before.

        Raises:
            RefusedError: If it is not allowed or over a limit; nothing is changed then.
            FrameError: If it is no request of this protocol.
        """
        self._who = who
        if op == Op.TRANSACT:
            return self._transact([unpack(field or b"") for field in fields], who)
        if op == Op.AWAIT:
            return self._multi_get([*awaited(fields)[1]])
        given = _checked(op, fields, who)
        return _METHODS[Op(op)](self, given)

    def is_as(self, known: Mapping[bytes, bytes | None]) -> bool:
        """Tell whether all of these keys still have the values that a client knows, None for none."""
        return all(self._values.get(key) == value for key, value in known.items())

    @contextlib.contextmanager
    def watching(self, keys: Collection[bytes], changed: Callable[[], None]) -> Iterator[None]:
        """Call ``changed`` whenever one of the keys is written or deleted within the block."""
        for key in keys:
            self._watches.setdefault(key, {})[changed] = None
        try:
            yield
        finally:
            for key in keys:
                del self._watches[key][changed]
                if not self._watches[key]:
                    del self._watches[key]

    def _transact(
        self, requests: Sequence[tuple[int, list[bytes | None]]], who: str | None
    ) -> list[bytes | None]:
        """Process requests in order; all of their changes are made, or none."""
        if any(op not in self.TRANSACTED for op, _ in requests):
            raise FrameError("a request that cannot be part of a transaction")
        if sum(1 + len(fields) for _, fields in requests) > MAX_FIELDS:
            raise FrameError("a transaction of too many fields")
        checked = [(Op(op), _checked(op, fields, who)) for op, fields in requests]
        before = {
            given[0]: (self._values.get(given[0]), self._payers.get(given[0], b""))
            for op, given in checked
            if op in _WRITES
        }
        answers: list[bytes | None] = []
        left_bytes = MAX_FRAME_BYTES - 1
        try:
            for op, given in checked:
                left_bytes -= LENGTH_BYTES + 4
                answer = (
                    self._multi_get(given, left_bytes) if op == Op.MULTI_GET else _METHODS[op](self, given)
                )
                left_bytes -= sum(LENGTH_BYTES + len(value or b"") for value in answer)
                if left_bytes < 0:
                    raise RefusedError("The values that a transaction answers do not fit into a frame.")
                answers += [b"%d" % len(answer), *answer]  # the store's own values, which cost no memory
                if op == Op.EXPECT and answer != [given[1]]:
                    break
        except RefusedError:
            self._restore(before)
            raise
        return answers

    def _restore(self, before: Mapping[bytes, tuple[bytes | None, bytes]]) -> None:
        """Undo what a refused transaction has changed."""
        for key in before:
            self._delete([key])
        for key, (value, payer) in before.items():
            if value is not None:
                self._put(key, value, payer)

    def _expect(self, fields: list[bytes]) -> list[bytes | None]:
        return [self._values.get(fields[0], b"")]

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
        if fields[0] not in self._values:
            return [b"0"]
        self._remove(fields[0])
        self._notify(fields[0])
        return [b"1"]

    def _check(self, fields: list[bytes]) -> list[bytes | None]:
        return [b"1" if key in self._values else b"0" for key in fields]

    def _multi_get(self, fields: list[bytes], left_bytes: int = MAX_FRAME_BYTES - 1) -> list[bytes | None]:
        found: list[bytes | None] = []
        for key in fields:
            value = self._values.get(key)
            left_bytes -= LENGTH_BYTES + len(value or b"")
            if left_bytes < 0:
                break
            found.append(value)
        return found

    def _num_keys(self, fields: list[bytes]) -> list[bytes | None]:
        return [b"%d" % len(self)]

    def _store(self, key: bytes, value: bytes) -> None:
        old, payer = self._values.get(key), self._payer(key)
        size_bytes = len(key) + len(value)
        more_bytes = size_bytes - (0 if old is None else len(key) + len(old))
        if old is None and len(self) >= MAX_KEYS:
            raise FullError(f"There are {MAX_KEYS} keys already. Delete those of past rounds.")
        # What makes it smaller is allowed even when it is full.
        if more_bytes > 0 and self._size_bytes + more_bytes > MAX_BYTES:
            raise FullError(f"The {MAX_BYTES >> 20} MiB of this rendezvous are used up. Delete old keys.")
        used, paid = self._used.get(payer, _Used()), self._payers.get(key) == payer
        more_keys, more_bytes = (0, more_bytes) if paid else (1, size_bytes)
        if payer and self._parties and (more_keys or more_bytes > 0):
            keys, room = MAX_KEYS // (self._parties + 1), MAX_BYTES // (self._parties + 1)
            if used.keys + more_keys > keys or used.size_bytes + more_bytes > room:
                raise FullError(
                    f"Party {payer.decode(errors='replace')} has used its part of this rendezvous:"
                    f" {used.keys} of {keys} keys, {used.size_bytes} of {room} bytes. Delete old keys."
                )
        self._put(key, value, payer)

    def _payer(self, key: bytes) -> bytes:
        """Return against whose quota a key counts that is written now; empty if nobody's."""
        owners = _owners(key)
        return owners[0] if owners else (self._who or "").encode()

    def _put(self, key: bytes, value: bytes, payer: bytes) -> None:
        if key in self._values:
            self._remove(key)
        self._values[key], self._payers[key] = value, payer
        self._count(payer, 1, len(key) + len(value))
        self._notify(key)

    def _remove(self, key: bytes) -> None:
        self._count(self._payers.pop(key), -1, -len(key) - len(self._values.pop(key)))

    def _count(self, payer: bytes, keys: int, size_bytes: int) -> None:
        self._size_bytes += size_bytes
        used = self._used.setdefault(payer, _Used())
        used.keys, used.size_bytes = used.keys + keys, used.size_bytes + size_bytes
        if not used.keys:
            del self._used[payer]

    def _notify(self, key: bytes) -> None:
        for changed in tuple(self._watches.get(key, ())):
            changed()


_METHODS: dict[Op, Callable[[KeyValueStore, list[bytes]], list[bytes | None]]] = {
    Op.SET: KeyValueStore._set,
    Op.COMPARE_SET: KeyValueStore._compare_set,
    Op.ADD: KeyValueStore._add,
    Op.DELETE: KeyValueStore._delete,
    Op.CHECK: KeyValueStore._check,
    Op.MULTI_GET: KeyValueStore._multi_get,
    Op.NUM_KEYS: KeyValueStore._num_keys,
    Op.EXPECT: KeyValueStore._expect,
}
_WRITES = (Op.SET, Op.COMPARE_SET, Op.ADD, Op.DELETE)


def awaited(fields: Sequence[bytes | None]) -> tuple[float, dict[bytes, bytes | None]]:
    """Return the seconds of an AWAIT, and the value that its sender knows of each key.

    Raises:
        FrameError: If it is no such request.
        RefusedError: If it is too large, or a key is.
    """
    milliseconds, *pairs = fields or [None]
    keys = [key for key in pairs[::2] if key is not None]
    if len(pairs) != 2 * len(keys) or not keys or not _MILLISECONDS.fullmatch(milliseconds or b""):
        raise FrameError(f"no request to wait: {len(fields)} fields")
    if sum(len(field or b"") for field in pairs) > MAX_AWAIT_BYTES:
        raise RefusedError(f"A request that waits has {MAX_AWAIT_BYTES} bytes at most. Wait for fewer keys.")
    try:
        for key in keys:
            check_key(key)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    return int(milliseconds or b"0") / 1000, dict(zip(keys, pairs[1::2], strict=True))


def _checked(op: int, fields: Sequence[bytes | None], who: str | None) -> list[bytes]:
    """Return the fields of a valid request that its sender may make."""
    given = [field for field in fields if field is not None]
    if op not in _METHODS or len(given) != len(fields) or len(given) != _FIELDS.get(Op(op), len(given)):
        raise FrameError(f"no request: {op} with {len(fields)} fields")
    try:
        for key in given if op in (Op.CHECK, Op.MULTI_GET) else given[:1]:
            check_key(key)
        for value in given[1:] if op in (Op.SET, Op.COMPARE_SET, Op.EXPECT) else ():
            check_value(given[0], value)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if op in _WRITES and who is not None:
        _check_writer(Op(op), given[0], who)
    return given


def _owners(key: bytes) -> list[bytes]:
    """Return the parties to which a key belongs, by its path."""
    return [part[1:] for part in key.split(b"/") if part.startswith(b"@")]


def _check_writer(op: Op, key: bytes, who: str) -> None:
    owners = _owners(key)
    if any(owner != who.encode() for owner in owners):
        raise RefusedError(
            f"The key {key!r} belongs to another party than {who}. Write keys under @{who} only."
        )
    if not owners and op not in (Op.COMPARE_SET, Op.DELETE):
        raise RefusedError(
            f"{op.name}: the key {key!r} is everybody's, so it can only be compared and set, or deleted. Use"
            f" compare_set, or a key under @{who}."
        )
