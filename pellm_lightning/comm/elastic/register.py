"""Small JSON values in a store that may be killed and restarted at any time."""

import contextlib
import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

KEPT_TERMS = 16
"""For how many terms plans and decisions are kept: for those who slept."""

_MAX_BYTES = 4 << 20
_LIFE = "life"
_NOTHING = "-"


class RestartedError(Exception):
    """The store has begun a new life: what was written before is gone."""


class UnreachableError(Exception):
    """The store cannot be reached."""


class Register:
    """What the parties write down for each other, each value as JSON.

    A store that was restarted is empty. So every value lies under the name of the life in which it was
    written, which the first party to come draws at random; nothing of two lives is ever mixed.

    Args:
        store: Any torch ``Store``; not used by anybody else, since a client serves one call at a time.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.life = ""
        """Name of the life of the store that is read and written."""

    def renew(self) -> bool:
        """Learn in which life the store is; return whether it is another than before.

        Raises:
            UnreachableError: If the store cannot be reached.
        """
        with _reached():
            drawn = secrets.token_hex(8)
            life = self._store.compare_set(_LIFE, "", drawn).decode()
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
            life, *values = self._get([_LIFE, *(self._key(key) for key in keys)])
        if life is None or life.decode() != self.life:
            raise RestartedError
        return [_parsed(value) for value in values]

    def write(self, key: str, value: object) -> None:
        """Set a value, which no other party writes."""
        with _reached():
            self._store.set(self._key(key), _json(value))

    def claim(self, key: str, value: object) -> Any:
        """Set a value that stands once and for all; return the one of whoever came first."""
        with _reached():
            return _parsed(self._store.compare_set(self._key(key), "", _json(value)))

    def swap(self, key: str, old: object, new: object) -> Any:
        """Replace a value, unless another party has done so already; return what stands."""
        with _reached():
            return _parsed(self._store.compare_set(self._key(key), _json(old), _json(new)))

    def delete(self, *keys: str) -> None:
        """Remove values."""
        with _reached():
            for key in keys:
                self._store.delete_key(self._key(key))

    def _key(self, key: str) -> str:
        return f"{self.life}/{key}"

    def _get(self, keys: Sequence[str]) -> list[bytes | None]:
        many = getattr(self._store, "try_multi_get", None)
        if many is not None:
            found: list[bytes | None] = many(keys)
            return found
        # torch's own stores wait for what is missing, or was deleted since it was looked for. Comparing does
        # not: of what is missing it returns what was expected, here something that is no JSON.
        values = [self._store.compare_set(key, _NOTHING, _NOTHING) for key in keys]
        return [None if value.decode(errors="replace") == _NOTHING else value for value in values]


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
