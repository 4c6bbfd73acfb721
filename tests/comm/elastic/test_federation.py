"""Parties in separate jobs: whatever happens to whom and when, a round is everybody's or nobody's."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from job_threads import (
    TTL_S,
    Act,
    Client,
    Life,
    Rendezvous,
    TransactingClient,
    World,
    dawdles,
    die,
    loses_rendezvous,
    sleeps,
    without_rendezvous,
)
from lora_oracles import adapter, drift
from manual_rounds import OtherBits
from party_threads import in_threads, run_parties
from torch import Tensor

from pellm_lightning import Aggregator
from pellm_lightning.aggregation import HeterogeneousRank, LowRankMean, Mean
from pellm_lightning.comm import (
    ElasticFederation,
    FederationError,
    Membership,
    MismatchError,
    TooFewPartiesError,
)
from pellm_lightning.comm.elastic.commit import CommitProtocol
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.quorum_view import QuorumMember, QuorumView
from pellm_lightning.comm.elastic.register import KEPT_TERMS, Register
from pellm_lightning.comm.mesh.mesh import Mesh

MANY = 1_000_000
BRIEF_S = 0.25
"""A TTL for those whose death the others are to notice, in tests where a false alarm is no harm."""


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def nesterov(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


# ---- nobody is lost


@pytest.mark.parametrize("transacts", [True, False])
def test_rounds_equal_their_replay(world: Callable[..., World], transacts: bool) -> None:
    w = world(4, rounds=6, transacts=transacts)
    w.start("p0", "p1", "p2")
    w.start("p3", weight=0.0)
    w.join()
    assert w.judged().rounds == 6
    assert [entry.weights for entry in w.settled if entry.weights] == [[1, 2, 3, 0]] * 24


def test_connections_are_kept_from_round_to_round(world: Callable[..., World]) -> None:
    w = world(3, rounds=5)
    groups: list[str] = []

    def see(life: Life) -> None:
        assert life.federation is not None
        groups.append(life.federation._current_view.group)

    w.start("p0", faults={f"settled@{number}": see for number in range(6)})
    w.start("p1", "p2")
    w.join()
    assert len(groups) == 6
    assert len(set(groups)) == 1


def test_a_restart_ends_no_term_by_a_commit_of_before() -> None:
    rendezvous = Rendezvous()
    alone = ElasticFederation(lambda: TransactingClient(rendezvous, "a", lambda *_: None), "a", ["a"])  # type: ignore[arg-type,return-value]
    for _ in range(3):
        alone.join_quorum("exchange", None, {})
        alone.commit("digest")
    rendezvous.restart()
    for term in (1, 2, 3, 4):
        alone.join_quorum("metadata", None, {})
        assert alone._current_view.term == term
    alone.close()


def test_uneven_parties_drain(world: Callable[..., World]) -> None:
    w = world(3, rounds=6, quorum=1, accept_split_brain=True)
    w.start("p0", rounds=2)
    w.start("p1", rounds=4)
    w.start("p2")
    w.join()
    w.judged()
    assert [len(life.reports) for life in w.lives] == [6, 6, 6]
    last = [entry.weights for entry in w.settled if entry.round == 5]
    assert last == [[0, 0, 3]] * 3


def test_who_trains_on_alone_moves_nothing(world: Callable[..., World]) -> None:
    w = world(3, rounds=6)
    w.start("p0", "p1", rounds=2)
    w.start("p2")
    w.join()
    w.judged()
    for life in w.lives:
        assert [report.trained_parties for report in life.reports] == [3, 3, 1, 1, 1, 1]
        assert [report.last for report in life.reports] == [False, False, True, True, True, True]
    assert [entry.weights for entry in w.settled if entry.round == 5] == [[0, 0, 0]] * 3


def test_metrics_cross_while_others_are_in_rounds(world: Callable[..., World]) -> None:
    w = world(3, rounds=4)
    means: dict[str, dict[str, float]] = {}

    def asks(life: Life) -> None:
        assert life.aggregator is not None
        means[life.name] = life.aggregator.mean({"loss": (2.0 + life.index, 1.0 + life.index)})

    w.start("p0", "p2", faults={"training@2": asks})
    w.start("p1")
    w.join()
    w.judged()
    # p0 says 2 with weight 1, p2 says 4 with weight 3, and p1 is in a round: (2 + 12) / 4, if both meet.
    assert means.keys() == {"p0", "p2"}
    assert all(mean["loss"] in (2.0, 3.5, 4.0) for mean in means.values())


def test_a_party_with_nan_is_left_out_and_healed(world: Callable[..., World]) -> None:
    w = world(3, rounds=3)
    w.start("p0", "p1")
    w.start("p2", train=lambda life: life.w.fill_(float("nan")))
    w.join()
    w.judged()
    assert [entry.weights for entry in w.settled if entry.weights] == [[1, 2, 0]] * 9
    assert [report.excluded for report in w.lives[0].reports] == [(2,)] * 3


def errs(life: Life) -> None:
    """Change the result by the least that there is, as other hardware or libraries may."""
    assert life.aggregator is not None
    life.aggregator.global_vector[5:6].view(torch.int32).bitwise_xor_(1)


def test_different_results_are_not_committed_and_the_round_is_repeated(
    world: Callable[..., World], tmp_path: Path
) -> None:
    w = world(3, rounds=5, state_dir=tmp_path)
    w.start("p0", "p1")
    w.start("p2", faults={"keeping@3": errs})
    w.join()
    assert w.judged().rounds == 5
    assert [entry.weights for entry in w.settled if entry.round == 5] == [[1, 2, 3]] * 3


def test_who_computes_other_results_is_excluded(world: Callable[..., World], tmp_path: Path) -> None:
    w = world(3, rounds=5, state_dir=tmp_path)
    w.start("p0", "p1")
    (wrong,) = w.start("p2", faults={})

    def errs_again(life: Life) -> None:
        errs(life)
        life.faults["keeping@3"] = errs_again

    wrong.faults["keeping@3"] = errs_again
    error = wrong.join().error
    assert isinstance(error, FederationError)
    assert "Party p2 and the majority of the parties computed different results" in str(error)
    w.lives.remove(wrong)
    w.join()
    assert w.judged().rounds == 5
    assert [entry.members for entry in w.settled if entry.round == 5] == [["p0", "p1"]] * 2


def test_a_rendezvous_lost_while_they_look_for_who_is_wrong(
    world: Callable[..., World], tmp_path: Path
) -> None:
    """The attempt is repeated."""
    w = world(3, rounds=5, state_dir=tmp_path)
    (asks,) = w.start("p0")
    w.start("p1")
    (wrong,) = w.start("p2", faults={})
    w.until(lambda: asks.federation is not None)
    protocol: Any = asks.federation._commit_protocol  # type: ignore[union-attr]
    dissenters, lost = protocol.dissenters, [0]

    def loses(view: Any) -> Any:
        lost[0] += 1
        wrong.join()  # it has read the decision, so nobody is in doubt
        w.rendezvous.restart()
        return dissenters(view)

    def errs_again(life: Life) -> None:
        errs(life)
        life.faults["keeping@3"] = errs_again

    protocol.dissenters = loses
    wrong.faults["keeping@3"] = errs_again
    assert isinstance(wrong.join().error, FederationError)
    w.lives.remove(wrong)
    w.join()
    assert lost[0] == 1
    assert w.judged().rounds == 5


def test_of_two_that_differ_nobody_is_right(world: Callable[..., World], tmp_path: Path) -> None:
    w = world(2, rounds=MANY, state_dir=tmp_path)
    trained: dict[str, Tensor] = {}

    def trains(life: Life) -> None:
        trained[life.name] = life.w.clone()

    def errs_again(life: Life) -> None:
        errs(life)
        life.faults["keeping@3"] = errs_again

    w.start("p0", faults={"exchanging@2": trains})
    w.start("p1", faults={"exchanging@2": trains, "keeping@3": errs_again})
    for life in w.lives:
        error = life.join().error
        assert isinstance(error, FederationError)
        assert "The parties computed different results from the same values" in str(error)
        assert "No parameter was changed" in str(error)
        assert torch.equal(life.w, trained[life.name])
    assert w.reached == 2


def test_an_outer_step_that_has_other_bits_at_a_party_is_committed(
    world: Callable[..., World], tmp_path: Path
) -> None:
    """What each computes for itself may differ by its processor; all go on with one of them."""
    w = world(3, rounds=3, state_dir=tmp_path)
    for name in ("p0", "p1", "p2"):
        w.start(name, outer_optimizer=partial(OtherBits, here=name == "p1"))
    w.join()
    assert w.reached == 3
    states = [life.aggregator.state_dict() for life in w.lives]  # type: ignore[union-attr]
    for state in states[1:]:
        assert torch.equal(state["global"], states[0]["global"])
        one, other = (
            of["fragments"][0]["outer_optimizer"]["state"][0]["momentum_buffer"] for of in (state, states[0])
        )
        assert torch.equal(one, other)


# ---- late, and back


def test_who_comes_late_takes_over_everything(world: Callable[..., World]) -> None:
    w = world(3, rounds=MANY, wait_s=1.0)
    early = w.start("p0", "p1", pace_s=0.02, outer_optimizer=adam)
    w.wait_for(3)
    (late,) = w.start("p2", outer_optimizer=adam)
    w.until(lambda: w.counts("p2"))
    w.finish()
    assert late.reports[0].round > 2
    states = [life.aggregator.state_dict() for life in (*early, late)]  # type: ignore[union-attr]
    for state in states[1:]:
        assert torch.equal(state["global"], states[0]["global"])
        assert state["version"] == states[0]["version"]
        moments, of_first = (s["fragments"][0]["outer_optimizer"]["state"][0] for s in (state, states[0]))
        assert moments["step"] == of_first["step"]
        assert torch.equal(moments["exp_avg_sq"], of_first["exp_avg_sq"])
    assert torch.equal(late.parameters, early[0].parameters)
    assert len({entry.digest for entry in w.settled if entry.round == w.reached}) == 1


@pytest.mark.parametrize("durable", [False, True])
def test_who_was_killed_comes_back(world: Callable[..., World], tmp_path: Path, durable: bool) -> None:
    w = world(3, rounds=MANY, state_dir=tmp_path if durable else None)
    w.start("p0", "p1", pace_s=0.02)
    (killed,) = w.start("p2", faults={"training@3": die})
    killed.join()
    before = w.reached
    w.start("p2")
    w.until(lambda: w.counts("p2", since=before + 1))
    w.finish()
    w.judged()


def test_all_resume_a_checkpoint_in_the_middle_of_a_round(world: Callable[..., World]) -> None:
    first = world(3, rounds=4)
    saved: dict[str, Any] = {}

    def saves(life: Life) -> None:
        assert life.aggregator is not None
        saved[life.name] = life.aggregator.state_dict()

    first.start(faults={"training@2": saves})
    first.join()
    second = world(3, rounds=4)
    for name in second.roster:
        second.start(name, resume=saved[name])
    second.join()
    ends = [[e.digest for e in w.settled if e.round == 4] for w in (first, second)]
    assert len(set(ends[0] + ends[1])) == 1
    assert min(entry.round for entry in second.settled) == 2


def test_all_are_killed_and_go_on_from_their_state_dirs(world: Callable[..., World], tmp_path: Path) -> None:
    w = world(4, rounds=MANY, state_dir=tmp_path)
    w.start(pace_s=0.02)
    w.wait_for(4)
    w.kill()
    w.rendezvous.restart()
    before = w.reached
    w.start("p0", "p1", "p2", pace_s=0.02)
    w.wait_for(before + 2)
    w.start("p3")
    w.until(lambda: w.counts("p3", since=before))
    w.finish()
    w.judged()
    assert not list(tmp_path.glob("*/*.safetensors"))  # it has ended


def test_all_are_killed_and_one_of_four_has_lost_its_disk(
    world: Callable[..., World], tmp_path: Path
) -> None:
    w = world(4, rounds=MANY, state_dir=tmp_path)
    w.start(pace_s=0.02)
    w.wait_for(4)
    w.kill()
    shutil.rmtree(tmp_path / "p1")
    before = w.reached
    w.start(pace_s=0.02)
    w.until(lambda: w.counts("p1", since=before))
    w.finish()
    w.judged()


def test_what_a_dead_party_alone_has_made_never_replaces_what_was_committed(
    world: Callable[..., World], tmp_path: Path
) -> None:
    """Attempts are counted through the death of all, and of the rendezvous: the later must count for more."""
    w = world(3, rounds=MANY, state_dir=tmp_path)

    # All have computed round 2; p0 makes it durable and dies, the others die before that. The many meetings
    # before, none of which has left anything durable, have all been attempts.
    def asks(life: Life) -> None:
        assert life.aggregator is not None
        for _ in range(9):
            life.aggregator.mean({})

    w.start("p0", faults={"training@2": asks, "voting@3": die})
    w.start("p1", "p2", faults={"keeping@3": die})
    for life in w.lives:
        life.join()
    w.rendezvous.restart()
    w.start("p1", "p2", pace_s=0.15)
    w.wait_for(3)  # p1 and p2 have committed a round 2 of their own
    w.start("p0", pace_s=0.05)
    w.until(lambda: w.counts("p0", since=3))
    w.finish(1)
    w.judged()


def test_a_party_that_dies_in_the_first_meeting_comes_back_to_the_same_federation(
    world: Callable[..., World], tmp_path: Path
) -> None:
    w = world(3, rounds=MANY, state_dir=tmp_path)
    (killed,) = w.start("p0", faults={"voting@0": die})
    w.start("p1", "p2", pace_s=0.02)
    killed.join()
    w.wait_for(2)
    w.start("p0")
    w.until(lambda: w.counts("p0"))
    w.finish()
    w.judged()


def test_one_with_state_among_many_without_is_no_federation_to_go_on_with(
    world: Callable[..., World], tmp_path: Path
) -> None:
    first = world(3, rounds=MANY, state_dir=tmp_path)
    first.start(pace_s=0.02)
    first.wait_for(2)
    first.kill()
    second = world(3, rounds=4, wait_s=2.0)
    second.start("p0", state_dir=tmp_path / "p0")
    second.start("p1", "p2")
    for life in second.lives:
        error = life.join().error
        assert isinstance(error, FederationError)
        assert not second.entries
    told = [str(life.error) for life in second.lives]
    assert any("Party p0 has the state of an unfinished federation" in words for words in told), told


def test_two_federations_are_not_mixed(world: Callable[..., World], tmp_path: Path) -> None:
    for half in ("one", "other"):
        w = world(3, rounds=MANY, state_dir=tmp_path / half)
        w.start(pace_s=0.02)
        w.wait_for(2)
        w.kill()
    w = world(3, rounds=6, wait_s=2.0)
    for name, half in (("p0", "one"), ("p1", "one"), ("p2", "other")):
        w.start(name, state_dir=tmp_path / half / name)
    for life in w.lives:
        life.join()
    assert isinstance(w.lives[2].error, MismatchError)
    assert "hold the state of different federations" in str(w.lives[2].error)
    assert [life.error for life in w.lives[:2]] == [None, None]


# ---- who differs


def test_one_that_differs_is_told_and_the_others_go_on(world: Callable[..., World]) -> None:
    w = world(4, rounds=3, wait_s=2.0)
    w.start("p0", "p1", "p2")
    (other,) = w.start("p3", config={"every_n_steps": 7})
    for life in w.lives:
        life.join()
    assert isinstance(other.error, MismatchError)
    assert "every_n_steps" in str(other.error)
    assert [life.error for life in w.lives[:3]] == [None] * 3
    assert w.judged().rounds == 3


def test_one_of_another_shape_is_told(world: Callable[..., World]) -> None:
    w = world(3, rounds=3, wait_s=2.0)
    w.start("p0", "p1")
    (other,) = w.start("p2", size=7)
    for life in w.lives:
        life.join()
    assert isinstance(other.error, MismatchError)
    assert "(7" in str(other.error) or "[7" in str(other.error)
    assert w.judged().rounds == 3


def test_without_a_majority_of_the_same_all_are_told(world: Callable[..., World]) -> None:
    w = world(3, rounds=3, wait_s=1.5)
    for index, name in enumerate(w.roster):
        w.start(name, config={"every_n_steps": index})
    for life in w.lives:
        life.join()
    errors = [life.error for life in w.lives]
    assert all(isinstance(error, MismatchError | TooFewPartiesError) for error in errors), errors
    assert any("every_n_steps" in str(error) for error in errors)
    assert not w.entries


# ---- too few


def test_two_of_four_never_go_on(world: Callable[..., World]) -> None:
    w = world(4, rounds=MANY, wait_s=0.6)
    w.start("p0", "p1", pace_s=0.02)
    w.start("p2", "p3", pace_s=0.02, faults={"training@3": die})
    for life in w.lives:
        life.join()
    for life in w.lives[:2]:
        assert isinstance(life.error, TooFewPartiesError)
        assert "has waited 1 s (wait_s) for 3 of the 4 parties; missing: p" in str(life.error)
        assert "p3 (it has sent no heartbeat for" in str(life.error)
    assert w.reached == 3
    w.judged()


def test_two_of_four_go_on_if_told_to(world: Callable[..., World]) -> None:
    w = world(4, rounds=6, quorum=2, accept_split_brain=True)
    w.start("p0", "p1")
    w.start("p2", "p3", faults={"training@3": die})
    w.join()
    assert w.judged().rounds == 6


def test_a_minority_does_not_begin(world: Callable[..., World]) -> None:
    w = world(4, rounds=3, wait_s=0.4)
    w.start("p0", "p1")
    for life in w.lives:
        assert isinstance(life.join().error, TooFewPartiesError)
        assert "it was never seen" in str(life.error)
    assert not w.entries


def test_who_lives_but_does_not_come_cannot_be_waited_for_forever(world: Callable[..., World]) -> None:
    w = world(3, rounds=MANY, wait_s=0.6, round_timeout_s=0.4)
    over = threading.Event()
    (other,) = w.start("p0", pace_s=0.02)
    w.start("p1", faults={"training@3": die})
    (stuck,) = w.start("p2", faults={"training@3": lambda _: over.wait(20)})
    other.join(5)
    over.set()
    assert isinstance(other.error, TooFewPartiesError)
    assert "p2 (it did not join" in str(other.error)
    stuck.join()


def test_a_lost_party_stops_all_if_told_to(world: Callable[..., World]) -> None:
    # The others live under a busy processor, too: the one that is lost must be the one that died.
    w = world(3, rounds=MANY, on_party_loss="stop", heartbeat_ttl_s=2.0)
    w.start("p0", "p1", pace_s=0.02)
    w.start("p2", faults={"training@3": die})
    for life in w.lives:
        life.join()
    for life in w.lives[:2]:
        assert isinstance(life.error, FederationError)
        assert "Party p2 was lost" in str(life.error)
        assert "on_party_loss='stop'" in str(life.error)
    w.judged()


# ---- late and asleep


def test_a_straggler_is_left_out_and_comes_back(world: Callable[..., World]) -> None:
    w = world(3, rounds=MANY, round_timeout_s=0.25)
    w.start("p0", "p1", pace_s=0.05)
    w.start("p2", pace_s=0.02, faults={"training@3": dawdles(0.8)})
    w.until(lambda: any(entry.members == ["p0", "p1"] for entry in w.settled))
    before = w.reached
    w.until(lambda: w.counts("p2", since=before))
    w.finish()
    w.judged()


@pytest.mark.parametrize(
    "where", ["training@3", "member:after@3", "exchanging@3", "vote:before@4", "vote:after@4"]
)
def test_who_slept_finds_itself_outside_and_comes_back(world: Callable[..., World], where: str) -> None:
    w = world(4, rounds=MANY, heartbeat_ttl_s=BRIEF_S)
    w.start("p0", "p1", "p2", pace_s=0.02)
    (slept,) = w.start("p3", faults={where: sleeps(1.7 * BRIEF_S)})
    w.until(lambda: any(entry.members == ["p0", "p1", "p2"] for entry in w.settled))
    w.until(lambda: w.counts("p3", since=6))
    w.finish()
    w.judged()
    assert not slept.faults


def test_who_slept_through_many_epochs(world: Callable[..., World]) -> None:
    w = world(3, rounds=MANY)
    w.start("p0", "p1", pace_s=0.005)
    w.start("p2", faults={"view:before@3": sleeps(3 * TTL_S)})
    w.until(lambda: w.reached > 30)
    before = w.reached
    began = time.monotonic()
    w.until(lambda: w.counts("p2", since=before))
    assert time.monotonic() - began < 2
    w.finish()
    w.judged()


# ---- fault points

POINTS = [
    "training@2",
    "member:before@2",
    "member:after@2",
    "view:before@2",
    "view:after@2",
    "forming@0",
    "forming@2",
    "exchanging@2",
    "voting@3",
    "vote:before@3",
    "vote:after@3",
    "decision:before@3",
    "decision:after@3",
    "settled@3",
    "writing@3",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(world: Callable[..., World], tmp_path: Path, point: str) -> None:
    made = POINTS.index(point) >= POINTS.index("voting@3")  # before, a disk makes no difference
    state_dir = tmp_path if made else None
    w = world(3, rounds=MANY, state_dir=state_dir, wait_s=20.0, heartbeat_ttl_s=BRIEF_S)
    w.start("p0", "p2", pace_s=0.03)
    (killed,) = w.start("p1", pace_s=0.03, faults={point: die})
    # Only whoever is first writes view or decision.
    w.until(lambda: killed.dead or (w.reached > 3 and ":" in point and killed.faults.clear() is None))
    killed.join() if killed.dead else None
    if killed.dead:
        w.start("p1", pace_s=0.01)
    before = w.reached
    w.until(lambda: w.counts("p1", since=before))
    w.finish()
    w.judged()


@pytest.mark.parametrize("role", ["handing", "receiving", "transfer"])
def test_killed_during_the_transfer_of_state(world: Callable[..., World], role: str) -> None:
    w = world(3, rounds=MANY, wait_s=0.7, heartbeat_ttl_s=BRIEF_S)
    w.start("p0", pace_s=0.03, faults={"handing": die} if role == "handing" else {})
    w.start("p1", "p2", pace_s=0.03) if role == "handing" else w.start("p1", pace_s=0.03)
    if role == "handing":
        w.wait_for(2)
        w.lives[2].stop()
        w.lives[2].join()
        w.start("p2")
        w.until(lambda: w.lives[0].dead)
        w.lives[0].join()
        w.start("p0")
    else:
        w.wait_for(2)
        (late,) = w.start("p2", faults={role: die})
        late.join()
        w.start("p2")
    before = w.reached
    w.until(lambda: w.counts("p2", since=before) and w.counts("p0", since=before))
    w.finish()
    w.judged()


AWAY = ["member:before@2", "exchanging@2", "vote:after@3", "settled@3"]


@pytest.mark.parametrize(
    ("point", "happens"),
    [
        *(pytest.param(point, loses_rendezvous, id=f"restart-{point}") for point in POINTS),
        *(pytest.param(point, without_rendezvous(0.3), id=f"away-{point}") for point in AWAY),
    ],
)
def test_rendezvous_lost_at(world: Callable[..., World], point: str, happens: Act) -> None:
    w = world(3, rounds=MANY)
    w.start(pace_s=0.02, faults={})
    w.lives[1].faults[point] = happens
    w.until(lambda: not w.lives[1].faults or w.reached > 6)
    before = w.reached
    w.wait_for(before + 2)
    w.finish()
    w.judged()


def test_rendezvous_lost_after_a_decision_to_abort(world: Callable[..., World]) -> None:
    w = world(3, rounds=MANY)
    w.start("p2", faults={"voting@3": die})
    # Its vote is given up, and the next that it writes is the number of the next meeting.
    (outlives,) = w.start("p0", faults={"term:before@3": without_rendezvous(0.3)})
    w.start("p1")
    w.until(lambda: not outlives.faults)
    w.start("p2")
    before = w.reached
    w.until(lambda: w.counts("p2", since=before))
    w.finish()
    w.judged()


# ---- what others write

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


class Twist:
    """Replaces one value, or a part of it, at the n-th reading of a kind of key."""

    def __init__(self, kind: str, nth: int, steps: list[int], new: Any) -> None:
        self.kind, self.left, self.steps, self.new = kind, nth, steps, new
        self.told = ""
        self._lock = threading.Lock()

    def __call__(self, key: str, value: bytes | None) -> bytes | None:
        if value is None or self.kind not in key.split("/"):
            return value
        with self._lock:
            self.left -= 1
            if self.left != 0:
                return value
        self.told = json.dumps(self._put(json.loads(value) if self.kind != "life" else "", self.steps))
        return self.told.encode()

    def _put(self, value: Any, steps: list[int]) -> Any:
        """Go down a path and replace what is there."""
        if not steps or not isinstance(value, dict | list) or not value:
            return self.new
        key = (list(value) if isinstance(value, dict) else range(len(value)))[steps[0] % len(value)]
        changed = dict(value) if isinstance(value, dict) else list(value)
        changed[key] = self._put(value[key], steps[1:])
        return changed


KINDS = ["member", "view", "vote", "decision", "at", "party_spec", "term", "ended", "owner"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(nth=st.integers(1, 6), steps=st.lists(st.integers(0, 20), max_size=5), new=JSON)
def test_what_others_write_is_ignored_or_an_error(kind: str, nth: int, steps: list[int], new: Any) -> None:
    """It may be anything: whoever reads it goes on, or stops with words."""
    w = World(3, rounds=3, wait_s=1.0, round_timeout_s=1.0, exchange_timeout_s=1.0, heartbeat_ttl_s=0.4)
    twist = Twist(kind, nth, steps, new)
    try:
        w.start("p0", twist=twist)
        w.start("p1", "p2")
        for life in w.lives:
            error = life.join(12).error
            assert error is None or isinstance(error, FederationError), (twist.told, repr(error))
    except AssertionError as error:
        raise AssertionError(f"{kind}: {twist.told}: {error}") from error
    finally:
        w.close()


# ---- rules and outer optimizers give what they give to parties of one launch

SIZES = {"q": (6, 8), "k": (4, 8)}


def elastic_parties(num_parties: int, act: Callable[[Any], Any]) -> list[Any]:
    """``run_parties`` with separate jobs."""
    rendezvous, roster = Rendezvous(), [f"p{i}" for i in range(num_parties)]
    results: list[Any] = [None] * num_parties

    def party(index: int) -> None:
        name = roster[index]
        membership = Membership(heartbeat_ttl_s=TTL_S, wait_s=10)
        client: Any = partial(Client, rendezvous, name, lambda *_: None)
        federation = ElasticFederation(client, name, roster, membership=membership)
        try:
            results[index] = act(federation)
        except BaseException as error:
            results[index] = error
        federation.abort()

    in_threads([partial(party, index) for index in range(num_parties)])
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed:
        raise failed[0]
    return results


@pytest.mark.parametrize(
    ("rule", "ranks", "outer_optimizer"),
    [
        (None, (2, 2, 2), None),
        (LowRankMean(), (2, 2, 2), nesterov),
        (Mean(), (2, 2, 2), adam),
        (HeterogeneousRank(), (1, 2, 3), None),
    ],
    ids=["default", "nesterov", "adam", "ranks"],
)
def test_rules_give_what_they_give_to_parties_of_one_launch(
    rule: Any, ranks: tuple[int, ...], outer_optimizer: Any
) -> None:
    arguments = {} if outer_optimizer is None else {"outer_optimizer": outer_optimizer}
    train = drift(0.1)

    def act(federation: Any) -> Any:
        party = int(federation.name[1:]) if federation.name.startswith("p") else federation.party
        parameters = adapter(party, SIZES, ranks[party])
        aggregator = Aggregator(federation, parameters, aggregation=rule, **arguments)
        aggregator.start()
        for number in range(3):
            train(party, number, parameters)
            report = aggregator.step(party + 1.0)
        return parameters, report

    fixed, elastic = run_parties(3, act), elastic_parties(3, act)
    for (one, of_one), (other, of_other) in zip(fixed, elastic, strict=True):
        for name in one:
            # The sums are the same but for their order.
            torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-6)
        assert of_other.distance == pytest.approx(of_one.distance, rel=1e-4)


def test_an_adapter_of_unlike_ranks_comes_back(world: Callable[..., World], tmp_path: Path) -> None:
    """The layout itself depends on who was there when the federation began."""
    w = world(3, rounds=MANY, state_dir=tmp_path)

    def train(life: Life) -> None:
        drift(0.1)(life.index, 0, life.arguments["parameters"])

    def start(name: str, **faults: Act) -> Life:
        rank = 1 + w.roster.index(name)
        parameters = adapter(rank, SIZES, rank)
        (life,) = w.start(
            name,
            parameters=parameters,
            aggregation=HeterogeneousRank(),
            train=train,
            pace_s=0.03,
            faults={point.replace("_", "@"): act for point, act in faults.items()},
        )
        return life

    start("p0"), start("p1")
    start("p2", training_3=die).join()
    before = w.reached
    back = start("p2")
    w.until(lambda: w.counts("p2", since=before + 1))
    w.finish()
    assert back.error is None
    assert len({entry.digest for entry in w.settled if entry.round == w.reached}) == 1


# ---- what has gone wrong once


def test_a_group_is_never_used_again_with_other_members(world: Callable[..., World]) -> None:
    w = world(4, rounds=MANY)
    groups: set[tuple[str, tuple[str, ...]]] = set()

    def see(life: Life) -> None:
        assert life.federation is not None
        groups.add((life.federation._current_view.group, tuple(life.federation.names)))
        life.faults["settled"] = see

    w.start("p0", "p1", "p2", pace_s=0.02, faults={"settled": see})
    for _ in range(3):
        (killed,) = w.start("p3", faults={"exchanging": die, "settled": see})
        killed.join()
        before = w.reached
        w.wait_for(before + 2)
    w.finish()
    w.judged()
    assert len({members for _, members in groups}) == 2
    assert len({group for group, _ in groups}) == len(groups)


def test_new_processes_do_not_begin_anew_while_one_that_has_the_state_lives(
    world: Callable[..., World],
) -> None:
    w = world(3, rounds=MANY, wait_s=0.6)
    (holder,) = w.start("p0", faults={"training@3": dawdles(1.4)})
    w.start("p1", "p2", faults={"training@3": die})
    w.lives[1].join(), w.lives[2].join()
    w.start("p1", "p2", pace_s=0.02)
    w.until(lambda: w.counts("p1", since=4))
    w.finish()
    assert holder.error is None
    assert w.judged().lineages == 1


def test_a_rendezvous_that_is_lost_again_at_once_is_waited_for(world: Callable[..., World]) -> None:
    """It comes back empty and goes away again, between two requests of the same party."""
    w = world(3, rounds=MANY)

    def flickers(life: Life) -> None:
        life.world.rendezvous.restart()
        without_rendezvous(0.3)(life)

    points = ("member:before@2", "member:after@3", "term:before@4", "vote:after@6")
    w.start("p0", pace_s=0.01, faults=dict.fromkeys(points, flickers))
    w.start("p1", "p2", pace_s=0.01)
    w.until(lambda: not w.lives[0].faults, 10)
    w.finish()
    w.judged()


@pytest.mark.parametrize(("seed", "transacts"), [(0, True), (0, False)])
def test_random_faults_at_random_points(
    world: Callable[..., World], tmp_path: Path, seed: int, transacts: bool
) -> None:
    dice = Random(seed)
    w = world(4, rounds=MANY, state_dir=tmp_path, wait_s=20.0, transacts=transacts)
    w.start(pace_s=0.01)
    acts: list[Act] = [die, die, sleeps(1.5 * TTL_S), sleeps(0.3), loses_rendezvous, without_rendezvous(0.4)]
    points = [point.partition("@")[0] for point in POINTS] + ["keeping", "handing", "receiving", "transfer"]
    lives = {life.name: life for life in w.lives}
    until = time.monotonic() + 3
    while time.monotonic() < until:
        time.sleep(dice.uniform(0.0, 0.12))
        name = dice.choice(w.roster)
        if lives[name].thread.is_alive():
            lives[name].faults[dice.choice(points)] = dice.choice(acts)
        else:
            (lives[name],) = w.start(name, pace_s=0.01)
    for life in w.lives:
        life.faults.clear()
    for name, life in lives.items():
        if life.dead:
            life.join()
            w.start(name)
    before = w.reached
    w.wait_for(before + 2)
    w.finish()
    w.judged()


def test_an_ended_federation_goes_on_from_its_checkpoints(world: Callable[..., World]) -> None:
    """At the rendezvous where it has ended: that it has is told to those only who lack the result."""
    first = world(3, rounds=2)
    first.start()
    first.join()
    second = world(3, rounds=4)
    second.rendezvous = first.rendezvous
    for life in first.lives:
        assert life.aggregator is not None
        second.start(life.name, resume=life.aggregator.state_dict())
        time.sleep(0.1)
    second.join()
    first.entries += second.entries
    assert first.judged().rounds == 4


def test_who_was_away_at_the_end_is_told(world: Callable[..., World], tmp_path: Path) -> None:
    w = world(3, rounds=4, state_dir=tmp_path)
    w.start("p0", "p1", pace_s=0.02)
    w.start("p2", faults={"training@2": die})
    w.join()
    (back,) = w.start("p2")
    error = back.join(5).error
    assert isinstance(error, FederationError)
    assert "The federation ended after 4 rounds while party p2 was away, which knows 2" in str(error)
    assert "the adapter and the last checkpoint in their run folders are also this party's" in str(error)


@pytest.mark.parametrize("victim", range(4))
def test_a_death_leaves_no_keys_behind(victim: int) -> None:
    """Who should have deleted what is old may have died instead."""
    rendezvous, names = Rendezvous(), ["p0", "p1", "p2", "p3"]
    rolls = {
        name: QuorumMember(1, "now", "host:1", "", None, 1, "", "exchange", "", True, metadata={})
        for name in names
    }
    registers = [Register(Client(rendezvous, name, lambda *_: None)) for name in names]  # type: ignore[arg-type]
    peers: Any = None
    for register in registers:
        register.renew()
    registers[0].claim("term", 1)
    for epoch in range(1, 80):
        plan = QuorumView.of(epoch, "new", rolls)
        registers[0].claim(f"view/{epoch}", plan.to_json())
        for index, (name, register) in enumerate(zip(names, registers, strict=True)):
            commit_protocol = CommitProtocol(register, peers, LocalParty(name, names, 3, Membership(), "now"))
            commit_protocol.abort(plan, "a test")
            if index != victim or not 30 <= epoch < 36:
                commit_protocol.end(plan)
    kept = {int(key.rpartition("/")[2]) for key in rendezvous.values("/view/")}
    assert kept == set(range(79 - KEPT_TERMS + 1, 80))
    assert len(rendezvous.values("/decision/")) == KEPT_TERMS


def test_a_member_that_speaks_out_of_turn_costs_an_attempt(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_reduce, wrong = Mesh.all_reduce, []

    def out_of_turn(self: Mesh, x: Tensor) -> None:
        if self._group.me == "p2" and self._sequence >= 3 and not wrong:
            wrong.append(self._sequence)
            self._sequence += 1
        all_reduce(self, x)

    monkeypatch.setattr(Mesh, "all_reduce", out_of_turn)
    all_of_them = world(3, rounds=4, wait_s=2.0, exchange_timeout_s=1.0)
    all_of_them.start()
    all_of_them.join()
    assert wrong
    assert all_of_them.judged().rounds == 4


def test_without_disks_what_two_majorities_made_is_told_apart(world: Callable[..., World]) -> None:
    """Without a disk a round can be made a second time; but never by the same number, or all would stop."""
    w = world(3, rounds=MANY)
    w.start("p0", pace_s=0.02, faults={"training@3": die})
    (late,) = w.start("p1", pace_s=0.02, faults={"training@3": sleeps(4.5 * TTL_S)})
    w.start("p2", pace_s=0.02, faults={"training@2": sleeps(2.5 * TTL_S)})
    w.lives[0].join()
    w.until(lambda: not late.faults)
    w.start("p0", pace_s=0.02)
    w.until(lambda: any("p1" not in entry.members and entry.round == 3 for entry in w.settled))
    before = w.reached
    w.until(lambda: w.counts("p1", since=before))
    w.finish()
    made = {(entry.digest, entry.round, entry.attempt) for entry in w.entries}
    assert len({entry.digest for entry in w.settled if entry.round == 3}) == 2
    assert len({(round, attempt) for _, round, attempt in made}) == len(made)
    assert len({entry.digest for entry in w.settled if entry.round == w.reached}) == 1
