"""Trips to the rendezvous: a few per party and round, and to join, however many parties there are."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from party_threads import in_threads

from pellm_lightning import Aggregator
from pellm_lightning.comm import ElasticFederation, Membership
from pellm_lightning.comm.rendezvous.client import RendezvousStore
from pellm_lightning.comm.rendezvous.frames import Op
from pellm_lightning.comm.rendezvous.server import RendezvousServer

ROUNDS = 8
MOST_PER_ROUND = 5
MOST_TO_JOIN = 20
"""Of both connections of a party, from the first to the end of ``start``."""


class CountingStore(RendezvousStore):
    """A client of the rendezvous that counts its requests, each of which is one trip."""

    def __init__(self, address: str, counts: list[Op]) -> None:
        self.counts = counts
        super().__init__(address)

    def _ask(self, op: Op, *fields: Any, **keywords: Any) -> Any:
        self.counts.append(op)
        return super()._ask(op, *fields, **keywords)


@pytest.fixture
def address() -> Iterator[str]:
    with RendezvousServer("127.0.0.1", 0) as server:
        yield server.address


def trips(
    address: str,
    parties: int,
    train: Callable[[int, int], None] = lambda *_: None,
    *,
    size: int = 10,
) -> tuple[list[list[Op]], list[list[list[Op]]]]:
    """Run rounds; return each party's trips to join, and those of each of its rounds, without heartbeats."""
    roster = [f"p{i}" for i in range(parties)]
    joins: list[list[Op]] = [[] for _ in roster]
    rounds: list[list[list[Op]]] = [[] for _ in roster]
    together = threading.Barrier(parties)

    def party(index: int) -> None:
        clients: list[list[Op]] = []

        def connect() -> RendezvousStore:
            clients.append([])
            return CountingStore(address, clients[-1])

        # Heartbeats are so rare that none falls into the rounds.
        membership = Membership(heartbeat_ttl_s=60, wait_s=30)
        federation = ElasticFederation(connect, roster[index], roster, membership=membership)
        w = torch.zeros(size)
        aggregator = Aggregator(federation, {"w": w})
        aggregator.start()
        joins[index] = [op for client in clients for op in client]
        for number in range(ROUNDS):
            before = [len(client) for client in clients]
            together.wait(30)
            train(index, number)
            aggregator.step(1.0)
            rounds[index].append(clients[0][before[0] :])
            assert len(clients[1]) - before[1] <= 1, "more than a heartbeat"
        federation.abort()

    in_threads([partial(party, index) for index in range(parties)])
    return joins, rounds


@pytest.mark.parametrize("parties", [1, 2, 4, 8])
def test_a_round_is_a_few_trips_however_many_parties(address: str, parties: int) -> None:
    _, rounds = trips(address, parties)
    most = max(len(of_round) for of_party in rounds for of_round in of_party)
    assert most <= MOST_PER_ROUND, rounds


@pytest.mark.parametrize("parties", [2, 8])
def test_joining_is_as_many_trips_however_many_parties(address: str, parties: int) -> None:
    joins, _ = trips(address, parties)
    assert max(map(len, joins)) <= MOST_TO_JOIN, joins


def test_who_waits_for_a_slow_party_asks_seldom(address: str) -> None:
    """It waits at the rendezvous, and looks twice a second for who has joined and who is alive."""
    slow_s = 1.2

    def train(index: int, number: int) -> None:
        if (index, number) == (0, 3):
            time.sleep(slow_s)

    _, rounds = trips(address, 2, train)
    assert len(rounds[0][3]) <= MOST_PER_ROUND
    looks = slow_s / Membership(heartbeat_ttl_s=60).patience_s
    assert MOST_PER_ROUND < len(rounds[1][3]) <= MOST_PER_ROUND + 2 * looks


def test_a_decided_term_has_ended_for_those_who_come_next(address: str) -> None:
    """Another federation at the same rendezvous, of other parameters, finds no view of the last one."""
    for size in (10, 11):
        trips(address, 2, size=size)
    with RendezvousServer("127.0.0.1", 0) as server:
        trips(server.address, 2)
        store = RendezvousStore(server.address)
        life = store.get("life").decode()
        term = int(store.get(f"{life}/term"))
        assert store.try_get(f"{life}/view/{term}") is None
        assert store.try_get(f"{life}/view/{term - 1}") is not None
        store.close()
