"""Prefix store: a part of a rendezvous with keys of its own."""

from collections.abc import Sequence

from typing_extensions import Self, override

from pellm_lightning.comm.rendezvous.polling_store import PollingStore


class PrefixStore(PollingStore):
    """Client that sees only keys below a prefix, so that two federations can share one rendezvous.

    Args:
        store: A client of the rendezvous, closed with this one.
        name: The prefix.
    """

    def __init__(self, store: PollingStore, name: str) -> None:
        super().__init__(store._timeout_s)
        self._store = store
        self._name = name

    @override
    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(self._inside(key), value)

    @override
    def try_multi_get(self, keys: Sequence[str]) -> list[bytes | None]:
        return self._store.try_multi_get([self._inside(key) for key in keys])

    @override
    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        return self._store.compare_set(self._inside(key), expected_value, desired_value)

    @override
    def add(self, key: str, amount: int) -> int:
        return self._store.add(self._inside(key), amount)

    @override
    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._inside(key))

    @override
    def num_keys(self) -> int:
        return self._store.num_keys()

    @override
    def clone(self) -> Self:
        return type(self)(self._store.clone(), self._name)

    @override
    def close(self) -> None:
        self._store.close()

    def _inside(self, key: str) -> str:
        return f"{self._name}/{key}"
