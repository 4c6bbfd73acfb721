"""What the heartbeat reads for the main thread, in which life of the store."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from job_threads import Rendezvous, TransactingClient

from pellm_lightning.comm import Membership
from pellm_lightning.comm.elastic.heartbeat import Heartbeat, heartbeat_key
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.register import Register, RestartedError

ROSTER = ["a", "b"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connected(rendezvous: Rendezvous) -> Register:
    register = Register(TransactingClient(rendezvous, "a", lambda *_: None))  # type: ignore[arg-type]
    register.renew()
    return register


@pytest.fixture
def rendezvous() -> Rendezvous:
    return Rendezvous()


@pytest.fixture
def peers(rendezvous: Rendezvous) -> Iterator[Heartbeat]:
    """A heartbeat that is sent when its status changes, and not by itself within a test."""
    me = LocalParty("a", ROSTER, 1, Membership(heartbeat_ttl_s=600))
    heartbeat = Heartbeat(connected(rendezvous), me, "joining")
    yield heartbeat
    heartbeat.stop(reason=None)


def restarted(peers: Heartbeat) -> bool:
    try:
        peers.watched()
    except RestartedError:
        return True
    return False


def test_who_notices_a_restart_first_has_not_missed_another(rendezvous: Rendezvous, peers: Heartbeat) -> None:
    rendezvous.restart()
    main = connected(rendezvous)
    peers.watch("decision/1", main.life)
    assert peers.watched() is None, "the heartbeat has yet to notice the restart"
    main.claim("decision/1", {"abort": "why"})
    peers.publish_status(phase="exchanging")
    until(lambda: peers.watched() == {"abort": "why"})
    rendezvous.restart()
    peers.publish_status(phase="committing")
    until(lambda: restarted(peers))


def test_a_heartbeat_that_notices_a_restart_first_says_so(rendezvous: Rendezvous, peers: Heartbeat) -> None:
    main = connected(rendezvous)
    rendezvous.restart()
    peers.publish_status(phase="exchanging")
    until(lambda: peers._register.life != main.life)
    peers.watch("decision/1", main.life)
    until(lambda: restarted(peers))


class CountingClient(TransactingClient):
    """A client that counts its trips."""

    trips = 0

    def transact(self, requests: Any) -> list[list[bytes | None]]:
        self.trips += 1
        return super().transact(requests)

    def await_change(self, known: Any, seconds: float) -> list[bytes | None]:
        self.trips += 1
        return super().await_change(known, seconds)


def test_who_waits_for_another_of_its_name_does_so_at_the_rendezvous(rendezvous: Rendezvous) -> None:
    connected(rendezvous).write(heartbeat_key("a"), {"incarnation": "before", "beat": 7})
    client = CountingClient(rendezvous, "a", lambda *_: None)
    register = Register(client)  # type: ignore[arg-type]
    register.renew()
    began = time.monotonic()
    heartbeat = Heartbeat(register, LocalParty("a", ROSTER, 1, Membership(heartbeat_ttl_s=0.8)), "joining")
    assert time.monotonic() - began > 0.35, "the other might be alive"
    assert client.trips < 8
    heartbeat.stop(reason=None)
