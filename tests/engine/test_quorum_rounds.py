"""Rounds that fewer than a quorum of the parties have trained for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from manual_rounds import bits, sgd, started
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Aggregator, Federation, RoundReport
from pellm_lightning.comm import resolve_quorum
from pellm_lightning.engine.metrics import MAX_WEIGHT
from pellm_lightning.exchange import TopK

Rounds = list[RoundReport]


def fit(federation: Federation, rounds: int, to: float, **options: object) -> tuple[Tensor, Rounds]:
    """Train as a Trainer does: each round goes to the optimum, until all are made or none is of use."""
    w = torch.zeros(3)
    aggregator = started(federation, {"w": w}, **options)
    reports: Rounds = []
    for number in range(rounds):
        w.fill_(to)
        reports.append(aggregator.step(1.0, steps_left=10.0 * (rounds - 1 - number)))
        if reports[-1].last:
            break
    reports.extend(aggregator.drain())
    return w, reports


@pytest.mark.parametrize(("parties", "majority"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (24, 13)])
def test_a_majority_is_more_than_half(parties: int, majority: int) -> None:
    assert resolve_quorum("majority", parties) == majority
    assert 2 * majority > parties >= 2 * (majority - 1)
    assert resolve_quorum(1, parties) == 1


@pytest.mark.parametrize("quorum", [0, -1, True, 1.5, "all", None, 4])
def test_a_quorum_that_cannot_be(quorum: object) -> None:
    def act(federation: Federation) -> None:
        with pytest.raises(ValueError, match="quorum="):
            Aggregator(federation, {"w": torch.zeros(1)}, quorum=quorum)  # type: ignore[arg-type]

    run_parties(3, act)


@pytest.mark.parametrize("outer", [sgd(lr=1.0), sgd(lr=1.0, momentum=0.9)], ids=["FedAvg", "FedAvgM"])
def test_who_trains_on_alone_decides_nothing(outer: object, caplog: pytest.LogCaptureFixture) -> None:
    """Parties 0, 1, 2 want 1, 1 and 9 and make 4, 4 and 16 rounds, all of weight 1."""

    def act(federation: Federation) -> tuple[Tensor, Rounds, Tensor]:
        together = started(federation, {"w": (w := torch.zeros(3))}, outer_optimizer=outer)
        for _ in range(4):
            w.fill_([1.0, 1.0, 9.0][federation.party])
            together.step(1.0)
        list(together.drain())
        party = federation.party
        return *fit(federation, [4, 4, 16][party], [1.0, 1.0, 9.0][party], outer_optimizer=outer), w

    results = run_parties(3, act)
    for w, reports, four_rounds in results:
        assert bits(w) == bits(four_rounds), "the result is not that of the last round of a quorum"
        assert bits(w) == bits(results[0][0])
        assert [r.trained_parties for r in reports] == [3, 3, 3, 3, 1]
        assert [r.active_parties for r in reports] == [3, 3, 3, 3, 0]
        assert [r.quorum for r in reports] == [2] * 5
        assert [r.last for r in reports] == [False] * 4 + [True], "party 2 was not told to stop"
        assert (reports[-1].weight, reports[-1].total_weight, reports[-1].outer_lr) == (0, 0, None)
    words = [record.getMessage() for record in caplog.records if "quorum=2" in record.getMessage()]
    assert len(words) == 3, "each party says it, once"
    for message in words:
        assert "Round 4: 1 of 3 parties trained in it (party 2)" in message
        assert "result of round 3" in message
        # It has made 5 of 16 rounds of 10 steps.
        assert "party 2 stops with about 110 steps left" in message
        assert "max_steps" in message
        assert "every_n_epochs" in message
        assert "quorum=1" in message


def test_a_quorum_of_one_lets_the_last_party_decide() -> None:
    def act(federation: Federation) -> tuple[Tensor, Rounds]:
        party = federation.party
        return fit(federation, [1, 1, 3][party], [1.0, 1.0, 9.0][party], quorum=1)

    for w, reports in run_parties(3, act):
        assert torch.equal(w, torch.full((3,), 9.0))
        assert [r.trained_parties for r in reports] == [3, 1, 1]
        assert not any(r.last for r in reports)


@given(
    rounds=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    quorum=st.integers(1, 4),
)
def test_each_result_is_that_of_the_last_round_of_a_quorum(rounds: list[int], quorum: int) -> None:
    """Whoever makes how many rounds: replayed with plain numbers."""
    parties, quorum = len(rounds), min(quorum, len(rounds))
    optima = [float(3**party) for party in range(parties)]
    expected = 0.0
    for number in range(max(rounds)):
        training = [optima[party] for party in range(parties) if rounds[party] > number]
        if len(training) < quorum:
            break
        expected = sum(training) / len(training)

    def act(federation: Federation) -> tuple[Tensor, Rounds]:
        return fit(federation, rounds[federation.party], optima[federation.party], quorum=quorum)

    results = run_parties(parties, act)
    for w, _ in results:
        torch.testing.assert_close(w, torch.full((3,), expected))
        assert bits(w) == bits(results[0][0])


def test_nan_below_a_quorum_is_healed_and_twice_in_a_row_the_end(caplog: pytest.LogCaptureFixture) -> None:
    # Of two parties both are the majority. They go from 0 to 2 and 4: 3. Party 1 is NaN: both back to 3. From
    # there to 2 and 4 again: 3, now with weights 3 and 1: 2.5. Twice NaN: the end, at 2.5.
    def act(federation: Federation) -> tuple[list[float], Rounds]:
        w = torch.zeros(3)
        aggregator = started(federation, {"w": w})
        held, reports = [], []
        for number in range(5):
            w.fill_([2.0, 4.0][federation.party])
            if number in (1, 3, 4) and federation.party == 1:
                w[1] = math.nan
            reports.append(aggregator.step([3.0, 1.0][federation.party] if number else 1.0))
            assert len(set(w.tolist())) == 1
            held.append(float(w[0]))
        return held, reports

    for held, reports in run_parties(2, act):
        assert held == [3.0, 3.0, 2.5, 2.5, 2.5]
        assert [r.last for r in reports] == [False, False, False, False, True]
        assert [r.trained_parties for r in reports] == [2, 1, 2, 1, 1]
        assert [r.active_parties for r in reports] == [2, 0, 2, 0, 0]
        assert [r.excluded for r in reports] == [(), (1,), (), (1,), (1,)]
    assert "party 1 holds NaN or infinity" in caplog.text
    assert "the federation continues" in caplog.text


def test_what_an_exchange_still_owes_is_owed_after_a_round_without_a_quorum() -> None:
    """A party's codes of the round that moved nothing leave no residual behind."""

    def act(federation: Federation) -> tuple[dict[str, object], dict[str, object]]:
        w = torch.zeros(512)
        aggregator = started(federation, {"w": w}, exchange=TopK())
        w.add_(torch.randn(512, generator=torch.Generator().manual_seed(federation.party)))
        aggregator.step(1.0)
        before = aggregator.state_dict()["error_feedback"][0]
        w.add_(torch.randn(512, generator=torch.Generator().manual_seed(7)))
        if federation.party == 1:
            w[3] = math.nan
        assert aggregator.step(1.0).trained_parties == 1
        return before, aggregator.state_dict()["error_feedback"][0]

    for before, after in run_parties(2, act):
        assert float(before["residuals"].norm()) > 0  # type: ignore[attr-defined]
        assert torch.equal(before["residuals"], after["residuals"])  # type: ignore[arg-type]


def test_resumed_between_two_rounds_without_a_quorum() -> None:
    """That the one before had none is part of the state: the next is the second in a row."""
    states: dict[int, dict[str, object]] = {}

    def broken_round(aggregator: Aggregator, w: Tensor, party: int) -> bool:
        w.fill_(math.nan if party else 1.0)
        return aggregator.step(1.0).last

    def first(federation: Federation) -> None:
        aggregator = started(federation, {"w": (w := torch.zeros(3))})
        assert not broken_round(aggregator, w, federation.party)
        states[federation.party] = aggregator.state_dict()

    def second(federation: Federation) -> None:
        aggregator = Aggregator(federation, {"w": (w := torch.zeros(3))})
        aggregator.load_state_dict(states[federation.party])
        aggregator.start()
        assert broken_round(aggregator, w, federation.party)

    run_parties(2, first)
    run_parties(2, second)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e308, 2 * MAX_WEIGHT])
def test_weights_are_bounded(weight: float) -> None:
    def act(federation: Federation) -> None:
        aggregator = started(federation, {"w": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"must be 0 to"):
            aggregator.step(weight)
        assert aggregator.step(MAX_WEIGHT).total_weight == MAX_WEIGHT

    run_parties(1, act)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308])
def test_a_metric_that_is_not_finite_is_left_out_and_named(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    # (2*1 + 1*4) / 3 = 2 without party 2; nobody has a finite "worst".
    def act(federation: Federation) -> dict[str, float]:
        aggregator = started(federation, {"w": torch.zeros(1)})
        loss = [(1.0, 2), (4.0, 1), (bad, 5)][federation.party]
        return aggregator.mean({"loss": loss, "worst": (math.nan, 1)})

    for means in run_parties(3, act):
        assert means["loss"] == 2.0
        assert math.isnan(means["worst"])
    assert caplog.text.count("loss is no finite number (or its weight none) at party 2") == 3
    assert caplog.text.count("so its mean is NaN") == 3


@pytest.mark.parametrize("weight", [1e308, math.inf, math.nan, -1.0])
def test_a_metric_of_a_weight_beyond_bounds_is_left_out(weight: float) -> None:
    def act(federation: Federation) -> dict[str, float]:
        aggregator = started(federation, {"w": torch.zeros(1)})
        return aggregator.mean({"loss": [(1.0, 2), (4.0, 1), (-7.0, weight)][federation.party]})

    assert run_parties(3, act) == [{"loss": 2.0}] * 3
