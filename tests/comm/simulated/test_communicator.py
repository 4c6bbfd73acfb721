"""Collectives of simulated parties are those of parties with a process each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from party_threads import run_parties
from torch import Tensor
from torch.distributed import HashStore

from pellm_lightning import Federation
from pellm_lightning.comm import Communicator
from pellm_lightning.comm.simulated.communicator import SimulatedCommunicator
from pellm_lightning.comm.simulated.held_parties import HeldParties


def held_by(workers: Communicator, places: int) -> tuple[HeldParties, list[SimulatedCommunicator]]:
    held = HeldParties(workers, num_parties=50, places=places)
    held.assign([3 * place + 1 for place in range(places)])
    return held, [SimulatedCommunicator(held, place) for place in held.local]


def everything(communicator: Communicator) -> list[Any]:
    """One of each collective, with values that differ by party."""
    party, count = communicator.party, communicator.num_parties
    generator = torch.Generator().manual_seed(party)
    x = torch.randn(1001, generator=generator)
    each = [torch.randn(7, generator=generator).double(), torch.arange(5) * party]
    communicator.all_reduce_each_(iter(each))
    column = torch.randn(4, 3, generator=generator).T
    sent = [torch.full((party + to,), float(10 * party + to)) for to in range(count)]
    return [
        communicator.all_reduce_(x.clone()),
        communicator.all_reduce_(column),
        *each,
        communicator.broadcast_(x.clone(), source=count - 1),
        *communicator.all_to_all(sent, [source + party for source in range(count)]),
        *communicator.all_gather(x[: 2 * party], [2 * other for other in range(count)]),
        communicator.gather_json("k", [party]),
        [*communicator.join_quorum("exchange", None, {"weight": party}).metadata.values()],
    ]


def assert_alike(found: list[Any], expected: list[Any], same: Callable[[Tensor, Tensor], bool]) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert same(mine, other) if isinstance(mine, Tensor) else mine == other


@pytest.mark.parametrize("places", [1, 2, 5])
def test_one_process_has_the_bits_of_many(places: int) -> None:
    expected = run_parties(places, everything)
    held, communicators = held_by(Federation(HashStore(), 0, 1), places)
    found = held.run([partial(everything, one) for one in communicators])
    for mine, of_party in zip(found, expected, strict=True):
        assert_alike(mine, of_party, torch.equal)


@pytest.mark.parametrize(("workers", "places"), [(2, 5), (3, 3), (3, 7)])
def test_processes_divide_the_parties(workers: int, places: int) -> None:
    def worker(federation: Federation) -> list[list[Any]]:
        held, communicators = held_by(federation, places)
        return held.run([partial(everything, one) for one in communicators])

    found = [of_place for of_worker in run_parties(workers, worker) for of_place in of_worker]
    expected = run_parties(places, everything)
    for mine, of_party in zip(found, expected, strict=True):
        assert_alike(mine, of_party, partial(torch.allclose, atol=1e-6))
    for position in range(3):  # sums have the same bits at all
        assert all(torch.equal(of_place[position], found[0][position]) for of_place in found)


def test_names_are_those_of_the_parties_of_the_round() -> None:
    held, (first, second) = held_by(Federation(HashStore(), 0, 1), 2)
    assert (first.name, second.name, second.place, second.party) == ("1", "4", (4, 50), 1)
    held.assign([40, 2])
    assert (first.names, first.members, first.max_parties) == (["40", "2"], [40, 2], 2)
    with pytest.raises(ValueError, match="2 different parties"):
        held.assign([1, 1])


def test_an_error_of_one_party_ends_all_and_is_raised() -> None:
    held, (first, second) = held_by(Federation(HashStore(), 0, 1), 2)

    def fail() -> None:
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        held.run([partial(first.all_reduce_, torch.ones(1)), fail])
    assert held.run([partial(one.all_reduce_, torch.ones(1)) for one in (first, second)]) == [2, 2]


def test_more_processes_than_parties_are_refused() -> None:
    def worker(federation: Federation) -> None:
        with pytest.raises(ValueError, match="Sample 3 parties or more"):
            HeldParties(federation, num_parties=9, places=2)

    run_parties(3, worker)
