"""The processes of a party: who acts, and what the others learn."""

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pellm_lightning.comm import FederationError, TooFewPartiesError
from pellm_lightning.comm.party import Party
from pellm_lightning.comm.topology import Topology

LEADER, FOLLOWER = Topology(1, 2, 0, 2), Topology(1, 2, 1, 2)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the leader has sent; the follower, which comes next, gets it."""
    sent: list[bytes] = []

    def broadcast(values: list[Any]) -> None:
        if sent:
            values[:] = pickle.loads(sent.pop())
        else:
            sent.append(pickle.dumps(values))

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    return sent


def test_a_party_of_one_acts_without_a_broadcast() -> None:
    party = Party(Topology())
    assert party.on_leader(lambda: 7) == 7
    assert party.on_leader(divmod, 7, 2) == (3, 1)
    assert party.sum([1.0, 2.5]) == [1.0, 2.5]
    vector = torch.ones(2)
    assert party.broadcast_(vector) is vector


@pytest.mark.usefixtures("wire")
def test_the_leader_acts_and_all_get_the_result() -> None:
    assert Party(LEADER).on_leader(lambda: {"round": 3}) == {"round": 3}
    assert Party(FOLLOWER).on_leader(lambda: pytest.fail("only the leader acts")) == {"round": 3}


@pytest.mark.usefixtures("wire")
def test_an_error_of_the_leader_is_raised_by_all() -> None:
    def fail() -> None:
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        Party(LEADER).on_leader(fail)
    with pytest.raises(FederationError, match="The leader of party 1 failed: ArithmeticError: broken"):
        Party(FOLLOWER).on_leader(lambda: pytest.fail("only the leader acts"))


@pytest.mark.usefixtures("wire")
def test_too_few_parties_are_the_same_error_in_all_processes() -> None:
    def fail() -> None:
        raise TooFewPartiesError("1 of 3 came", parties=("b", "c"))

    for party in (LEADER, FOLLOWER):
        with pytest.raises(TooFewPartiesError, match=r"^1 of 3 came$"):
            Party(party).on_leader(fail)


@pytest.mark.usefixtures("wire")
def test_arguments_are_those_of_the_leader() -> None:
    assert Party(LEADER).on_leader(int, "11", base=2) == 3
    assert Party(FOLLOWER).on_leader(int, "0", base=2) == 3
