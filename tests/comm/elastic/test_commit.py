"""The commit protocol by itself: whatever the order of votes and failures, an attempt has one decision."""

import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.comm.elastic.commit import CommitProtocol, decision_key
from pellm_lightning.comm.elastic.membership import LocalParty, Membership
from pellm_lightning.comm.elastic.quorum_view import QuorumMember, QuorumView
from pellm_lightning.comm.elastic.register import KEPT_TERMS, Register, RestartedError
from pellm_lightning.comm.rendezvous.client import RendezvousStore
from pellm_lightning.comm.rendezvous.server import RendezvousServer

NAMES = ["a", "b", "c"]
NO_TIME = 0.0


class Peers:
    """Who is dead, as a test says."""

    def __init__(self) -> None:
        self.lost: set[str] = set()

    def dead(self, view: QuorumView) -> list[str]:
        return [name for name in view.members if name in self.lost]

    def fate(self, name: str) -> str:
        return "it has sent no heartbeat"


class Attempt:
    """One attempt of three members over one store."""

    def __init__(self, store: Any = None) -> None:
        self.peers = Peers()
        store = dist.HashStore() if store is None else store
        entries = {
            name: QuorumMember(1, f"{name}1", "host:1", "", None, 0, "", "exchange", "", True, {})
            for name in NAMES
        }
        self.view = QuorumView.of(1, "new", entries)
        self.registers = {name: Register(store) for name in NAMES}
        peers: Any = self.peers
        self.protocols = {}
        for name, register in self.registers.items():
            register.renew()
            self.protocols[name] = CommitProtocol(
                register, peers, LocalParty(name, NAMES, 2, Membership(), f"{name}1")
            )
        self.registers["a"].claim("term", 1)

    def vote(self, **digests: str) -> None:
        for name, digest in digests.items():
            self.protocols[name].vote(self.view, digest)

    def decisions(self) -> list[dict[str, Any]]:
        """What each member takes for the decision, if it waits no longer."""
        return [protocol.await_decision(self.view, NO_TIME) for protocol in self.protocols.values()]

    def written(self) -> Any:
        """The decision that stands, if there is one."""
        return self.registers["a"].read(decision_key(self.view))[0]


@pytest.fixture
def attempt() -> Attempt:
    return Attempt()


def test_equal_votes_of_all_are_committed(attempt: Attempt) -> None:
    assert attempt.written() is None
    attempt.vote(a="x", b="x", c="x")
    assert attempt.decisions() == [{"commit": "x"}] * 3
    assert attempt.written() == {"commit": "x"}


def test_unequal_votes_are_not_committed(attempt: Attempt) -> None:
    attempt.vote(a="x", b="y", c="x")
    said = "the parties computed different results (party a: x, party b: y, party c: x)"
    assert attempt.decisions() == [{"abort": said, "diverged": True}] * 3
    assert attempt.protocols["a"].dissenters(attempt.view) == ["b"]
    attempt.vote(c="z")
    assert attempt.protocols["a"].dissenters(attempt.view) is None, "there is no majority"


def test_a_member_that_dies_before_its_vote_aborts(attempt: Attempt) -> None:
    attempt.vote(a="x", c="x")
    attempt.peers.lost.add("b")
    aborted = {"abort": "party b was lost: it has sent no heartbeat", "blamed": []}
    assert attempt.decisions() == [aborted] * 3


def test_a_member_that_dies_after_its_vote_does_not(attempt: Attempt) -> None:
    attempt.vote(a="x", b="x", c="x")
    attempt.peers.lost.add("b")
    assert attempt.decisions() == [{"commit": "x"}] * 3


def test_a_member_that_does_not_vote_in_time_is_blamed(attempt: Attempt) -> None:
    attempt.vote(a="x", c="x")
    late = {"abort": "party b did not vote within 0 s", "blamed": ["b"], "by": "a", "late": True}
    assert attempt.decisions() == [late] * 3
    attempt.vote(b="x")  # too late: a decision stands
    assert attempt.decisions() == [late] * 3


def test_who_aborts_after_the_commit_learns_of_it(attempt: Attempt) -> None:
    attempt.vote(a="x", b="x", c="x")
    attempt.decisions()
    assert attempt.protocols["b"].abort(attempt.view, "no connection", ["c"], "b") == {"commit": "x"}


def test_who_votes_after_an_abort_learns_of_it(attempt: Attempt) -> None:
    aborted = attempt.protocols["b"].abort(attempt.view, "no connection", ["c"], "b")
    assert aborted == {"abort": "no connection", "blamed": ["c"], "by": "b"}
    attempt.vote(a="x", b="x", c="x")
    assert attempt.decisions() == [aborted] * 3


@pytest.mark.parametrize(
    "vote",
    [
        {"term": 2, "incarnation": "b1", "digest": "x"},
        {"term": 1, "incarnation": "b0", "digest": "x"},
        {"term": "1", "incarnation": "b1", "digest": "x"},
        ["x"],
        None,
    ],
    ids=["of another term", "of another process", "of no term", "no vote", "nothing"],
)
def test_only_votes_in_this_term_by_this_process_count(attempt: Attempt, vote: Any) -> None:
    attempt.vote(a="x", c="x")
    attempt.registers["b"].write("vote/@b", vote)
    assert all("abort" in decision for decision in attempt.decisions())


@pytest.mark.parametrize("signature", ["\xe9" * 700_000, {"of": "b"}, None])
def test_what_is_no_signature_is_not_passed_on(signature: Any) -> None:
    """The decision would be larger than a rendezvous takes: whoever decides would end."""
    with RendezvousServer("127.0.0.1", 0) as server, closing(RendezvousStore(server.address)) as store:
        attempt = Attempt(store)
        for name in NAMES:
            attempt.protocols[name].vote(attempt.view, "x", f"of {name}")
        raw = json.dumps(
            {"term": 1, "incarnation": "b1", "digest": "x", "signature": signature}, ensure_ascii=False
        )
        store.set(attempt.registers["b"]._key("vote/@b"), raw)
        decision = attempt.protocols["c"].await_decision(attempt.view, NO_TIME)
        assert decision == {"commit": "x", "signatures": {"a": "of a", "c": "of c"}}


def test_a_reason_to_abort_is_cut_to_what_can_be_read(attempt: Attempt) -> None:
    assert len(attempt.protocols["a"].abort(attempt.view, "x" * 5_000_000)["abort"]) == 4096


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["await", "abort", "die"]), st.sampled_from(NAMES)),
        st.tuples(st.sampled_from(["vote x", "vote y"]), st.sampled_from(NAMES)),
    ),
    max_size=12,
)


@given(STEPS)
def test_whatever_happens_all_read_one_decision(steps: list[tuple[str, str]]) -> None:
    attempt = Attempt()
    votes: dict[str, str] = {}
    read = []
    for step, name in steps:
        protocol = attempt.protocols[name]
        if step.startswith("vote") and name not in votes:  # a process votes once
            votes[name] = step[-1]
            attempt.vote(**{name: step[-1]})
        elif step == "await":
            read.append(protocol.await_decision(attempt.view, NO_TIME))
        elif step == "abort":
            read.append(protocol.abort(attempt.view, "a test"))
        elif step == "die":
            attempt.peers.lost.add(name)
        if any("commit" in decision for decision in read):
            assert votes.keys() == set(NAMES), "committed before all had voted"
            assert len(set(votes.values())) == 1
    assert all(decision == read[0] for decision in read)


# ---- from term to term


def test_a_term_ends_once_whoever_ends_it(attempt: Attempt) -> None:
    for protocol in attempt.protocols.values():
        protocol.end(attempt.view)
    assert attempt.registers["a"].read("term") == [2]


def test_who_has_missed_the_decision_is_in_doubt(attempt: Attempt) -> None:
    attempt.registers["a"].write("term", 1 + KEPT_TERMS)
    attempt.vote(a="x", b="x", c="x")
    assert attempt.protocols["a"].await_decision(attempt.view, NO_TIME) == {"commit": "x"}
    attempt.registers["a"].delete("decision/1")
    attempt.registers["a"].write("term", 2 + KEPT_TERMS)  # by now it may have been deleted
    with pytest.raises(RestartedError):
        attempt.protocols["a"].await_decision(attempt.view, NO_TIME)


def nothing() -> None:
    pass


def test_who_is_left_out_waits_for_the_decision(attempt: Attempt) -> None:
    attempt.protocols["b"].abort(attempt.view, "a test")
    attempt.protocols["a"].await_end(attempt.view, NO_TIME, nothing)
    assert attempt.registers["a"].read("term") == [2]


def test_who_is_left_out_ends_a_term_whose_members_have_died(attempt: Attempt) -> None:
    looks: list[Callable[[], None]] = [nothing, nothing, lambda: attempt.peers.lost.add("c")]
    attempt.protocols["a"].await_end(attempt.view, NO_TIME, lambda: (looks.pop(0) if looks else nothing)())
    assert attempt.registers["a"].read("term") == [2]
    decision = attempt.written()
    assert decision["abort"] == "party c was lost: it has sent no heartbeat"
