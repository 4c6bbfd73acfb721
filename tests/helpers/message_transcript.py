"""A transcript of what leaves a party: tensors handed to torch's Gloo group, words put into the store."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from pellm_lightning.comm.torchrun.federation import SLOT_BYTES
from pellm_lightning.comm.torchrun.gloo import GlooGroup


@dataclass(frozen=True)
class Message:
    """One tensor handed to the group, as it was at that moment."""

    party: int
    lane: int
    """Tells the group it went through from the others."""
    collective: str
    sent: bool
    """False for a buffer that is only received into."""
    values: torch.Tensor


def metadata_of(message: Message) -> Any:
    """Return what a party sent as it joined a quorum, its intent and metadata; None of another message."""
    if message.values.dtype != torch.uint8 or not message.sent:
        return None
    assert message.values.numel() == SLOT_BYTES
    mine = bytes(message.values.tolist())
    return json.loads(mine[4 : 4 + int.from_bytes(mine[:4], "little")])


class Tap:
    """Stands before a ProcessGroupGloo and notes every tensor of every call, whatever the collective."""

    def __init__(self, group: Any, party: int, messages: list[Message]) -> None:
        self._group, self._party, self._messages = group, party, messages

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            own = not (name == "broadcast" and arguments[1] != self._party)
            into = len(tree_leaves(arguments[0])) if name == "allgather" else 0
            for index, leaf in enumerate(tree_leaves(arguments)):
                if isinstance(leaf, torch.Tensor):
                    values, sent = leaf.detach().clone(), own and index >= into
                    self._messages.append(Message(self._party, id(self._group), name, sent, values))
            return getattr(self._group, name)(*arguments)

        return call


def tapped(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Tap every Gloo group built from now on; the list fills as the parties talk."""
    messages: list[Message] = []
    build = GlooGroup.__init__

    def build_tapped(self: GlooGroup, store: dist.Store, rank: int, *arguments: Any) -> None:
        build(self, store, rank, *arguments)
        self._group = Tap(self._group, rank, messages)

    monkeypatch.setattr(GlooGroup, "__init__", build_tapped)
    return messages


class NotedStore(dist.Store):
    """A HashStore that keeps every value ever written to it."""

    def __init__(self) -> None:
        super().__init__()
        self._store = dist.HashStore()
        self.written: list[tuple[str, bytes]] = []

    def set(self, key: str, value: str) -> None:
        self.written.append((key, value.encode() if isinstance(value, str) else bytes(value)))
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        return self._store.get(key)

    def add(self, key: str, value: int) -> int:
        return self._store.add(key, value)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self._store.wait(keys, *timeout)

    def deleteKey(self, key: str) -> bool:  # so torch calls it
        return self._store.delete_key(key)
