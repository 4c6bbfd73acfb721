"""Batches that a resumed fit goes on with."""

from collections.abc import Iterator
from typing import Any

from party_threads import batches

SIZES = ((4, 2, 1, 4, 3), (8, 1, 2, 5, 5))
"""Two parties' batches; each epoch's weights differ."""


class StatefulLoader:
    """Batches in order; goes on after a resume where the checkpoint was saved."""

    def __init__(self, party: int) -> None:
        self.batches = list(batches(SIZES[party], seed=party))
        self.next = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        # Nobody asks for more than len(self) batches, so the code after the last yield would never run.
        for index in range(self.next % len(self), len(self)):
            self.next = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]
