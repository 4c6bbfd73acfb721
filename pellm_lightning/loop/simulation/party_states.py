"""PartyStates: what each simulated party keeps between the rounds for which it is drawn."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pellm_lightning.tensors.nested import leaves

PartyState: TypeAlias = dict[str, Any]
"""State of a party: tensors, numbers, strings, and dicts and lists of these."""


class PartyStates:
    """Store of the parties' states, in memory and beyond a bound on disk.

    Args:
        folder: Where states lie that have no room in memory; made when the first one does.
        memory_bytes: What the tensors of all states may take in memory.

    Example:
        >>> states = PartyStates("nowhere", memory_bytes=1000)
        >>> states.put(7, {"round": 3, "moment": torch.zeros(2)})
        >>> states.pop(7)["round"], states.pop(8)
        (3, None)
    """

    def __init__(self, folder: str | Path, memory_bytes: float) -> None:
        self._folder = Path(folder)
        self._memory_bytes = memory_bytes
        self._in_memory: OrderedDict[int, tuple[PartyState, int]] = OrderedDict()
        self._held_bytes = 0
        self._on_disk: set[int] = set()

    def __contains__(self, party: object) -> bool:
        return party in self._in_memory or party in self._on_disk

    def put(self, party: int, state: PartyState) -> None:
        """Keep a party's state; those that were put in before all others give way."""
        self.pop(party)
        size = sum(leaf.nbytes for leaf in leaves(state) if isinstance(leaf, Tensor))
        self._in_memory[party] = state, size
        self._held_bytes += size
        while self._held_bytes > self._memory_bytes:
            oldest, (evicted, evicted_size) = self._in_memory.popitem(last=False)
            self._held_bytes -= evicted_size
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(evicted, self._path(oldest))
            self._on_disk.add(oldest)

    def pop(self, party: int) -> PartyState | None:
        """Return a party's state, and keep it no longer; None if there is none."""
        if party in self._in_memory:
            state, size = self._in_memory.pop(party)
            self._held_bytes -= size
            return state
        if party not in self._on_disk:
            return None
        state = self._read(party)
        self._on_disk.discard(party)
        os.unlink(self._path(party))
        return state

    def state_dict(self) -> dict[int, PartyState]:
        """Return all states by party, which stay what they are until they are put in again."""
        in_memory = {party: state for party, (state, _) in self._in_memory.items()}
        return {party: self._read(party) for party in sorted(self._on_disk)} | in_memory

    def load_state_dict(self, states: Mapping[int, PartyState]) -> None:
        """Keep these states instead of all others."""
        self.clear()
        for party, state in states.items():
            self.put(party, state)

    def clear(self) -> None:
        """Keep no state any longer, nor a file."""
        for party in self._on_disk:
            os.unlink(self._path(party))
        self._in_memory.clear()
        self._on_disk.clear()
        self._held_bytes = 0

    def _read(self, party: int) -> PartyState:
        state: PartyState = torch.load(self._path(party), weights_only=True)
        return state

    def _path(self, party: int) -> Path:
        return self._folder / f"party-{party}.pt"
