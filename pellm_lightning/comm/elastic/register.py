"""Registers: small JSON values in a store that may be killed and restarted at any time."""

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from pellm_lightning.comm.polling import Reminder, polls

log = logging.getLogger(__name__)

KEPT_TERMS = 16
"""Number of terms for which views and decisions are kept, for processes that were suspended."""

_MAX_BYTES = 4 << 20
_LIFE = "life"
_NOTHING = "-"


class RestartedError(Exception):
    """The store has begun a new life: what was written before is gone."""


class UnreachableError(Exception):
    """The store cannot be reached."""


class Register:
    """Registers of a key-value store, each value as JSON.

    A store that was restarted is empty. So every key has as prefix the name of the store's life, which the
    first client draws at random; nothing of two lives is ever mixed.

    Args:
        store: Any torch ``Store``; not used by anybody else, since a client serves one call at a time.
        prefix: What all keys begin with: two federations can share one rendezvous.

    Example::

        register = Register(store)
        register.renew()
        decision = register.claim("decision/1", {"commit": digest})  # the one that stands
    """

    def __init__(self, store: dist.Store, prefix: str = "") -> None:
        self._store = store
        self._prefix = prefix
        self.life = ""
        """Name of the life of the store that is read and written."""

    def renew(self) -> bool:
        """Read the name of the store's life; return whether it has changed.

        Raises:
            UnreachableError: If the store cannot be reached.
        """
        with _reached():
            life = self._store.compare_set(self._prefix + _LIFE, "", secrets.token_hex(8)).decode()
        changed = bool(self.life) and life != self.life
        self.life = life
        return changed

    def read(self, *keys: str) -> list[Any]:
        """Return the values, None where there is none.

        Raises:
            RestartedError: If the store has begun a new life.
            UnreachableError: If the store cannot be reached.
        """
        with _reached():
            life, *values = self._get([self._prefix + _LIFE, *(self._key(key) for key in keys)])
        if life is None or life.decode() != self.life:
            raise RestartedError
        return [_parsed(value) for value in values]

    def write(self, key: str, value: object) -> None:
        """Set a value, which no other party writes."""
        with _reached():
            self._store.set(self._key(key), _json(value))

    def claim(self, key: str, value: object) -> Any:
        """Set a value unless there is one; return the value that stands."""
        with _reached():
            return _parsed(self._store.compare_set(self._key(key), "", _json(value)))

    def swap(self, key: str, old: object, new: object) -> Any:
        """Compare and swap a value; return the value that stands."""
        with _reached():
            return _parsed(self._store.compare_set(self._key(key), _json(old), _json(new)))

    def delete(self, *keys: str) -> None:
        """Remove values."""
        with _reached():
            for key in keys:
                self._store.delete_key(self._key(key))

    def close(self) -> None:
        """Close the client; torch's own cannot be closed."""
        _close(self._store)

    def _key(self, key: str) -> str:
        return f"{self._prefix}{self.life}/{key}"

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


def _parsed(value: bytes | None) -> Any:
    """Return what a peer wrote, None for what is no JSON of a decent size: it may be anything."""
    if value is None or len(value) > _MAX_BYTES:
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise UnreachableError(str(error)) from error
