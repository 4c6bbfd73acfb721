"""Registers: small JSON values in a store that may be killed and restarted at any time."""

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.distributed as dist

from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.polling import Reminder, polls
from pellm_lightning.comm.relay.client import NoRelayError, RelayAccess, RelayRoute
from pellm_lightning.comm.rendezvous.frames import Op
from pellm_lightning.comm.rendezvous.key_value_store import MAX_AWAIT_BYTES
from pellm_lightning.comm.tls import TLS

log = logging.getLogger(__name__)

KEPT_TERMS = 16
"""Number of terms for which views and decisions are kept, for processes that were suspended."""

_MAX_BYTES = 4 << 20
# Many more levels than any value has, and fewer than what Python can copy or print.
_MAX_LEVELS = 64
_LIFE = "life"
_NOTHING = "-"


@dataclass(frozen=True)
class Write:
    """Setting of a value that no other party writes.

    Example:
        >>> Write("vote/@a", {"digest": "1f"}).key
        'vote/@a'
    """

    key: str
    value: object


@dataclass(frozen=True)
class Swap:
    """Compare-and-swap of a value that every party may write; ``old`` None stands for no value.

    Example:
        >>> Swap("term", 1, 2).new
        2
    """

    key: str
    old: object
    new: object


@dataclass(frozen=True)
class Delete:
    """Removal of a value.

    Example:
        >>> Delete("view/1").key
        'view/1'
    """

    key: str


Action: TypeAlias = Write | Swap | Delete


@dataclass(frozen=True)
class Fence:
    """Fencing token: the mark of the one process that may write for its party.

    Example:
        >>> Fence("a", "1f").mark
        '"1f"'
    """

    name: str
    """The party."""
    incarnation: str

    @property
    def key(self) -> str:
        """Where the mark stands."""
        return f"owner/@{self.name}"

    @property
    def mark(self) -> str:
        """The mark as it is stored."""
        return _json(self.incarnation)

    def check(self, mark: bytes | None) -> None:
        """Raise if another process' mark stands.

        Raises:
            ReplacedError: If it does.
        """
        if mark != self.mark.encode():
            raise ReplacedError(
                f"Another process has taken the place of party {self.name} while this one sent no heartbeat;"
                " this one stops. Give every party a name of its own, and start each once."
            )


class RestartedError(Exception):
    """The store has begun a new life: what was written before is gone."""


class UnreachableError(Exception):
    """The store cannot be reached."""


class ReplacedError(FederationError):
    """Another process has taken this party's place; there must never be two."""


class Register:
    """Registers of a key-value store, each value as JSON.

    A store that was restarted is empty. So every key has as prefix the name of the store's life, which the
    first client draws at random; nothing of two lives is ever mixed.

    With a store that has transactions, a request is one trip, however much it reads and writes, and what
    waits does so at the server. With others it is made of several, and polls.

    Args:
        store: Any torch ``Store``; not used by anybody else, since a client serves one call at a time.
        prefix: What all keys begin with: two federations can share one rendezvous.

    Example::

        register = Register(store)
        register.renew()
        (decision,), (term,) = register.transact([Swap("decision/1", None, {"commit": digest})], ["term"])
    """

    def __init__(self, store: dist.Store, prefix: str = "") -> None:
        self._store = store
        self._prefix = prefix
        self._fence: Fence | None = None
        self._noted: dict[str, bytes | None] = {}
        self.life = ""
        """Name of the life of the store that is read and written."""

    def fence(self, fence: Fence) -> None:
        """Write nothing any more once another process has taken this one's place."""
        self._fence = fence

    def renew(self) -> bool:
        """Read the name of the store's life; return whether it has changed.

        Raises:
            ReplacedError: If another process of this party was quicker in the new life.
            UnreachableError: If the store cannot be reached.
        """
        with _reached():
            life = self._store.compare_set(self._prefix + _LIFE, "", secrets.token_hex(8)).decode()
            changed = bool(self.life) and life != self.life
            self.life, self._noted = life, {}
            if self._fence is not None:
                mark = self._store.compare_set(self._key(self._fence.key), "", self._fence.mark)
                self._fence.check(mark)
        return changed

    def transact(self, actions: Sequence[Action], read: Sequence[str] = ()) -> tuple[list[Any], list[Any]]:
        """Write and read; return the value that stands after each ``Swap``, and those read, None for none.

        Raises:
            RestartedError: If the store has begun a new life; nothing is written then.
            ReplacedError: If another process has taken this party's place; nothing is written then.
            UnreachableError: If the store cannot be reached.
        """
        act = self._in_one_trip if hasattr(self._store, "transact") else self._one_by_one
        with _reached():
            swapped, values = act(actions, [self._key(key) for key in read])
        self._noted = dict(zip(read, values, strict=True)) if read else self._noted
        swaps = [action.key for action in actions if isinstance(action, Swap)]
        self._noted |= dict(zip(swaps, swapped, strict=True))
        return [*map(_parsed, swapped)], [*map(_parsed, values)]

    def read(self, *keys: str) -> list[Any]:
        """Return the values, None where there is none; raises as ``transact``."""
        return self.transact([], keys)[1]

    def write(self, key: str, value: object) -> None:
        """Set a value, which no other party writes; raises as ``transact``."""
        self.transact([Write(key, value)])

    def claim(self, key: str, value: object) -> Any:
        """Set a value unless there is one; return the value that stands. Raises as ``transact``."""
        return self.swap(key, None, value)

    def swap(self, key: str, old: object, new: object) -> Any:
        """Compare and swap a value; return the value that stands. Raises as ``transact``."""
        return self.transact([Swap(key, old, new)])[0][0]

    def delete(self, *keys: str) -> None:
        """Remove values; raises as ``transact``."""
        self.transact([Delete(key) for key in keys])

    def wait(self, seconds: float, *keys: str) -> list[Any]:
        """Return the values as soon as one is not as it was read or swapped last, or the time is over.

        Raises:
            RestartedError: If the store has begun a new life.
            UnreachableError: If the store cannot be reached.
        """
        full = [self._prefix + _LIFE, *(self._key(key) for key in keys)]
        before = [self.life.encode(), *(self._noted.get(key) for key in keys)]
        values = before
        size_bytes = sum(
            len(key.encode()) + len(value or b"") for key, value in zip(full, before, strict=True)
        )
        with _reached():
            # A peer decides how large a value is, so it must not decide whether the request is refused.
            if hasattr(self._store, "await_change") and size_bytes <= MAX_AWAIT_BYTES:
                values = self._store.await_change(dict(zip(full, before, strict=True)), seconds)
            else:
                for _ in polls(seconds):
                    values = self._get(full)
                    if values != before:
                        break
        if values[0] != before[0]:
            raise RestartedError
        self._noted |= dict(zip(keys, values[1:], strict=True))
        return [*map(_parsed, values[1:])]

    def relay_route(self, name: str, tls: TLS | None) -> RelayRoute | None:
        """Return the way to other parties by the store's relay; None for a store that never has one."""
        store: Any = self._store

        def ask() -> RelayAccess:
            try:
                access: RelayAccess = store.relay_access(name)
            except FederationError as error:
                raise NoRelayError(str(error).rstrip(".")) from error
            except dist.DistError as error:
                raise OSError(str(error)) from error
            return access

        return RelayRoute(ask, tls) if hasattr(store, "relay_access") else None

    def close(self) -> None:
        """Close the client; torch's own cannot be closed."""
        _close(self._store)

    def _key(self, key: str) -> str:
        return f"{self._prefix}{self.life}/{key}"

    def _expected(self, actions: Sequence[Action]) -> dict[str, str]:
        """Return what must be there before anything is done: this life, and if it writes, its own mark."""
        fence = self._fence if actions else None
        return {self._prefix + _LIFE: self.life} | ({self._key(fence.key): fence.mark} if fence else {})

    def _check(self, life: bytes | None, *mark: bytes | None) -> None:
        """Raise if what must be there is not; without a mark in this life it is to be claimed anew."""
        if life != self.life.encode() or (mark and not mark[0]):
            raise RestartedError
        if mark and self._fence is not None:
            self._fence.check(mark[0])

    def _in_one_trip(
        self, actions: Sequence[Action], keys: Sequence[str]
    ) -> tuple[list[bytes | None], list[bytes | None]]:
        store: Any = self._store
        expected = self._expected(actions)
        requests = [(Op.EXPECT, _encoded(*item)) for item in expected.items()]
        requests += [self._request(action) for action in actions]
        answers = store.transact([*requests, *([(Op.MULTI_GET, _encoded(*keys))] if keys else [])])
        self._check(*(answer[0] for answer in answers[: len(expected)]))
        done = zip(actions, answers[len(expected) :], strict=False)
        swapped = [answer[0] for action, answer in done if isinstance(action, Swap)]
        values = list(answers[-1]) if keys else []
        if len(values) < len(keys):  # they did not fit into one frame
            values += store.try_multi_get(keys[len(values) :])
        return swapped, values

    def _request(self, action: Action) -> tuple[Op, list[bytes]]:
        key = self._key(action.key)
        if isinstance(action, Write):
            return Op.SET, _encoded(key, _json(action.value))
        if isinstance(action, Swap):
            return Op.COMPARE_SET, _encoded(key, _old(action), _json(action.new))
        return Op.DELETE, _encoded(key)

    def _one_by_one(
        self, actions: Sequence[Action], keys: Sequence[str]
    ) -> tuple[list[bytes | None], list[bytes | None]]:
        expected = self._expected(actions)
        swapped: list[bytes | None] = []
        if actions:
            self._check(*self._get([*expected]))
        for action in actions:
            key = self._key(action.key)
            if isinstance(action, Write):
                self._store.set(key, _json(action.value))
            elif isinstance(action, Swap):
                swapped.append(self._store.compare_set(key, _old(action), _json(action.new)))
            else:
                self._store.delete_key(key)
        if not keys and actions:
            return swapped, []
        life, *values = self._get([self._prefix + _LIFE, *keys])
        self._check(life)
        return swapped, values

    def _get(self, keys: Sequence[str]) -> list[bytes | None]:
        many = getattr(self._store, "try_multi_get", None)
        if many is not None:
            found: list[bytes | None] = many(keys)
            return found
        # torch's own stores wait for what is missing, or was deleted since it was looked for. Comparing does
        # not: of what is missing it returns what was expected, here something that is no JSON.
        values = [self._store.compare_set(key, _NOTHING, _NOTHING) for key in keys]
        return [None if value.decode(errors="replace") == _NOTHING else value for value in values]


def connect_register(
    connect: Callable[[], dist.Store], wait_s: float, name: str, prefix: str = ""
) -> Register:
    """Return a register over a client of its own; wait if the rendezvous is not up yet.

    Raises:
        UnreachableError: If it cannot be reached within ``wait_s``.
    """
    unreachable: UnreachableError | None = None
    reminder = Reminder(first_s=0)
    for _ in polls(wait_s):
        store = None
        try:
            store = connect()
            register = Register(store, prefix)
            register.renew()
            return register
        except (dist.DistError, UnreachableError) as error:
            if reminder.due():
                log.warning("[party %s] waits for the rendezvous, up to %g s: %s", name, wait_s, error)
            unreachable = UnreachableError(str(error))
            _close(store)
    raise unreachable or UnreachableError("no attempt was made")


def _close(store: dist.Store | None) -> None:
    close = getattr(store, "close", None)
    if close is not None:
        close()


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _old(swap: Swap) -> str:
    return "" if swap.old is None else _json(swap.old)


def _encoded(*texts: str) -> list[bytes]:
    return [text.encode() for text in texts]


def _parsed(value: bytes | None) -> Any:
    """Return what a peer wrote, None for what is no JSON of a decent size and depth: it may be anything."""
    if value is None or len(value) > _MAX_BYTES:
        return None
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return None
    few = value.count(b"[") + value.count(b"{") <= _MAX_LEVELS
    return parsed if few or _has_levels(parsed, _MAX_LEVELS) else None


def _has_levels(value: Any, most: int) -> bool:
    """Tell whether containers are nested in each other ``most`` times at most."""
    if not isinstance(value, dict | list):
        return True
    return most > 0 and all(
        _has_levels(item, most - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise UnreachableError(str(error)) from error
