"""A party finds its place in its data again, whatever others have drawn in the meantime."""

from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from pellm_lightning.loop.simulation.party_batches import PartyBatches
from pellm_lightning.loop.simulation.random_state import random_state, seed_all, set_random_state

CPU = torch.device("cpu")


def shuffled() -> Any:
    return DataLoader(range(10), batch_size=3, shuffle=True)


def own_generator() -> Any:
    return DataLoader(range(10), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(5))


def by_epoch() -> Any:
    data = list(range(10))
    return DataLoader(data, batch_size=3, sampler=DistributedSampler(data, 1, 0, seed=4))


def plain(batch: Any) -> list[int]:
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


@pytest.mark.parametrize("make", [shuffled, own_generator, by_epoch, lambda: [1, 2, 3]])
@pytest.mark.parametrize("turn", [1, 3, 4, 5])
def test_turns_give_the_batches_of_one_pass_after_another(make: Any, turn: int) -> None:
    seed_all(7)
    whole = PartyBatches(make(), None, CPU)
    expected = [(plain(batch), torch.rand(1).item()) for batch in islice(whole, 20)]
    found: list[Any] = []
    seed_all(7)
    place, own = None, random_state(CPU)
    while len(found) < 20:
        set_random_state(own, CPU)
        batches = PartyBatches(make(), place, CPU)
        found += [(plain(batch), torch.rand(1).item()) for batch in islice(batches, turn)]
        place, own = batches.place(), random_state(CPU)
        seed_all(len(found))  # somebody else's turn
    assert found[:20] == expected


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batch"):
        next(PartyBatches([], None, CPU))
