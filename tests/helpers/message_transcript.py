"""A transcript of what leaves a party: tensors given to a lane or shown, words put into the store."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from pellm_lightning import Federation
from pellm_lightning.comm.torchrun.federation import SLOT_BYTES
from pellm_lightning.comm.torchrun.gloo import GlooGroup
from pellm_lightning.comm.torchrun.shared_memory import SharedMemoryLane


@dataclass(frozen=True)
class Message:
    """One tensor handed to a lane, or written for all to see, as it was at that moment."""

    party: int
    lane: int
    """Tells the lane it went through from the others; 0 of one that lies in shared memory."""
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


# What torch's Gloo groups call the collectives of a lane.
_COLLECTIVES = {
    "all_reduce": "allreduce",
    "broadcast": "broadcast",
    "all_gather": "allgather",
    "all_to_all": "alltoall_base",
}


def tapped(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Tap all lanes, and what is written into shared memory; the list fills as the parties talk."""
    messages: list[Message] = []
    for lane in (GlooGroup, SharedMemoryLane):
        for name, collective in _COLLECTIVES.items():
            monkeypatch.setattr(lane, name, _noting(getattr(lane, name), collective, messages))
        monkeypatch.setattr(lane, "all_gather_bytes", _noting_bytes(lane.all_gather_bytes, messages))
    barrier = Federation.barrier

    def noting_barrier(self: Federation, written: Sequence[torch.Tensor] = ()) -> None:
        for values in written:
            messages.append(Message(self.party, 0, "shared memory", True, values.detach().clone()))
        barrier(self, written)

    monkeypatch.setattr(Federation, "barrier", noting_barrier)
    return messages


def _noting(call: Callable[..., Any], collective: str, messages: list[Message]) -> Callable[..., Any]:
    """Return a lane's method that notes every tensor it is given."""

    def noting(lane: Any, *arguments: Any) -> Any:
        own = not (collective == "broadcast" and arguments[1] != lane.rank)
        into = 1 if collective == "allgather" else 0
        for index, leaf in enumerate(tree_leaves(arguments)):
            if isinstance(leaf, torch.Tensor):
                values, sent = leaf.detach().clone(), own and index >= into
                messages.append(Message(lane.rank, id(lane), collective, sent, values))
        return call(lane, *arguments)

    return noting


def _noting_bytes(call: Callable[..., list[bytes]], messages: list[Message]) -> Callable[..., list[bytes]]:
    """Return a lane's method that notes the metadata it is given, as long as it counts."""

    def noting(lane: Any, message: bytes, size: int) -> list[bytes]:
        values = torch.tensor(list(message.ljust(size, b"\0")), dtype=torch.uint8)
        messages.append(Message(lane.rank, id(lane), "metadata", True, values))
        return call(lane, message, size)

    return noting


class NotedStore(dist.Store):
    """A HashStore that keeps every value ever written to it."""

    def __init__(self) -> None:
        super().__init__()
        self._store = dist.HashStore()
        self.written: list[tuple[str, bytes]] = []

    def set(self, key: str, value: str) -> None:
        self.written.append((key, value.encode() if isinstance(value, str) else bytes(value)))
        self._store.set(key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.written.append((key, desired.encode() if isinstance(desired, str) else bytes(desired)))
        return self._store.compare_set(key, expected, desired)

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
