"""Parties of several hosts, which are threads that say they are on these: host memory first, then Gloo."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from party_threads import in_threads
from torch import Tensor

from pellm_lightning import Aggregator, Federation
from pellm_lightning.comm import PartyLostError
from pellm_lightning.comm.torchrun import host_sockets, shared_memory
from pellm_lightning.comm.torchrun.gloo import GlooGroup
from pellm_lightning.comm.torchrun.shared_memory import SharedMemoryLane
from pellm_lightning.comm.torchrun.two_level import TwoLevelLane

Act = Callable[[Federation], Any]


def on_hosts(hosts: Sequence[int], act: Act, *, timeout_s: float = 20) -> list[Any]:
    """Return what each party comes to, or the error that it meets; ``hosts`` is the host of each."""
    here, host, store = threading.local(), host_sockets._host, dist.HashStore()
    results: list[Any] = [None] * len(hosts)

    def party(index: int) -> None:
        here.host = hosts[index]
        federation = Federation(store, index, len(hosts), timeout_s=timeout_s)
        try:
            results[index] = act(federation)
            federation.close()
        except Exception as error:
            results[index] = error
            federation.abort(str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_sockets, "_host", lambda: [*host(), here.host])
        in_threads([lambda i=i: party(i) for i in range(len(hosts))])
    return results


def lane(federation: Federation) -> Any:
    return federation._lanes[0]


@settings(max_examples=10)
@given(
    hosts=st.lists(st.integers(0, 2), min_size=2, max_size=6),
    sizes=st.lists(st.sampled_from([0, 1, 7, 3000, 1_200_003]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int32, torch.int64]),
)
def test_sums_are_those_of_numbers_added_by_hand(
    hosts: list[int], sizes: list[int], dtype: torch.dtype
) -> None:
    def values(party: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(party)
        return [
            (1000 * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype) for size in sizes
        ]

    def act(federation: Federation) -> list[Tensor]:
        mine = values(federation.party)
        federation.all_reduce_each_(mine)
        return mine

    results = on_hosts(hosts, act)
    for index, first in enumerate(results[0]):
        expected = sum(values(party)[index].double() for party in range(len(hosts)))
        torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-2 * (dtype == torch.float32))
        assert all(torch.equal(first, result[index]) for result in results), "parties differ"


@pytest.mark.parametrize(
    ("hosts", "kinds"),
    [
        ([0, 0, 0], "SSS"),
        ([0, 1, 2], "GGG"),
        ([0, 1, 0], "TTT"),  # party 1 is alone on its host
        ([1, 0, 0, 1], "TTTT"),
    ],
)
def test_memory_is_used_where_two_share_a_host(hosts: list[int], kinds: str) -> None:
    classes = {"S": SharedMemoryLane, "G": GlooGroup, "T": TwoLevelLane}
    found = on_hosts(hosts, lambda federation: type(lane(federation)))
    assert found == [classes[kind] for kind in kinds]


def test_one_party_of_each_host_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[tuple[int, int]] = []
    all_reduce = GlooGroup.all_reduce

    def noted(group: GlooGroup, tensor: Tensor) -> Any:
        sums.append((group._size, group.rank))
        return all_reduce(group, tensor)

    monkeypatch.setattr(GlooGroup, "all_reduce", noted)
    on_hosts([0, 1, 0, 1, 1], lambda federation: federation.all_reduce_(torch.ones(5)))
    assert sorted(sums) == [(2, 0), (2, 1)]


def test_rounds_give_the_mean_and_the_other_collectives_work() -> None:
    def act(federation: Federation) -> tuple[list[float], list[int], list[float]]:
        w = torch.arange(4.0) + federation.party
        aggregator = Aggregator(federation, {"w": w})
        aggregator.start()
        for _ in range(2):
            w += 1 + federation.party
            aggregator.step(1.0)
        told = federation.all_gather(torch.full((federation.party,), 1.0), [0, 1, 2, 3])
        heard = federation.broadcast_(torch.full((2,), float(federation.party)), source=3)
        return w.tolist(), [len(part) for part in told], heard.tolist()

    for w, sizes, heard in on_hosts([0, 1, 0, 1], act):
        assert w == [5.0, 6.0, 7.0, 8.0]  # each round adds (1 + 2 + 3 + 4) / 4 = 2.5
        assert sizes == [0, 1, 2, 3]
        assert heard == [3.0, 3.0]


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_who_leaves_is_noticed_on_all_hosts(lost: int) -> None:
    """0 and 1 are the first of their hosts, 3 is not."""

    def act(federation: Federation) -> float:
        federation.barrier()
        if federation.party == lost:
            federation.abort("the disk is full")
            return 0.0
        began = time.monotonic()
        with pytest.raises(PartyLostError, match="the disk is full"):
            federation.all_reduce_(torch.ones(3))
        return time.monotonic() - began

    assert all(seconds < 5 for seconds in on_hosts([0, 1, 0, 1], act))


def test_a_host_without_memory_means_gloo_for_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reserved, tries = shared_memory._reserved, []

    def once(size_bytes: int) -> int:
        tries.append(size_bytes)
        if len(tries) == 2:
            raise OSError("no memory")
        return reserved(size_bytes)

    monkeypatch.setattr(shared_memory, "_reserved", once)
    with caplog.at_level(logging.WARNING, logger="pellm_lightning"):
        found = on_hosts([0, 0, 1, 1], lambda f: (type(lane(f)), float(f.all_reduce_(torch.tensor(1.0)))))
    assert found == [(GlooGroup, 4.0)] * 4
    assert caplog.text.count("cannot share") == 1
