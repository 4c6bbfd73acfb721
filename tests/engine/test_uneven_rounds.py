"""Rounds of parties that do not make equally many, and metrics beside them."""

import math
import time

import pytest
import torch
from manual_rounds import bits, random, sgd, started
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Federation, FederationError, RoundReport


def test_parties_with_different_numbers_of_rounds() -> None:
    # Parties 0, 1, 2 make 3, 5 and 1 rounds, have weights 1, 3, 2 and move by 1, 2, 3 in each.
    # Round 0, all: (1*1 + 3*2 + 2*3) / 6 = 13/6. Rounds 1 and 2, parties 0 and 1: (1*1 + 3*2) / 4 = 7/4 each.
    # Rounds 3 and 4, party 1 alone: 2 each. Together 13/6 + 7/2 + 4 = 29/3.
    def act(federation: Federation) -> tuple[Tensor, list[RoundReport]]:
        party = federation.party
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, quorum=1)
        reports = []
        for _ in range([3, 5, 1][party]):
            w += 1 + party
            reports.append(aggregator.step([1, 3, 2][party], loss=float(party)))
        reports.extend(aggregator.drain())
        assert list(aggregator.drain()) == []
        return w, reports

    results = run_parties(3, act)
    for party, (result, reports) in enumerate(results):
        torch.testing.assert_close(result, torch.full((4,), 29 / 3))
        assert bits(result) == bits(results[0][0])
        assert [r.round for r in reports] == [0, 1, 2, 3, 4]
        assert [r.active_parties for r in reports] == [3, 2, 2, 1, 1]
        assert [r.total_weight for r in reports] == [6, 4, 4, 3, 3]
        own = [[1, 1, 1, 0, 0], [3, 3, 3, 3, 3], [2, 0, 0, 0, 0]][party]
        assert [r.weight for r in reports] == own
        # Losses are the parties' numbers: (0*1 + 1*3 + 2*2) / 6, then (0 + 1*3) / 4, then 1.
        assert [r.loss for r in reports] == pytest.approx([7 / 6, 3 / 4, 3 / 4, 1, 1], rel=1e-6)


def test_a_drained_party_may_leave_its_parameters_dirty() -> None:
    # What a party did after its last round is not averaged in, but overwritten: weight 0 sends zeros.
    def act(federation: Federation) -> Tensor:
        w = torch.zeros(2)
        aggregator = started(federation, {"w": w}, quorum=1)
        if federation.party == 1:
            w.fill_(math.nan)
            assert [r.excluded for r in aggregator.drain()] == [()]
        else:
            w.fill_(8.0)
            aggregator.step(1)
            list(aggregator.drain())
        return w

    for result in run_parties(2, act):
        assert torch.equal(result, torch.full((2,), 8.0))


def test_metrics_meet_a_round_and_a_drained_party() -> None:
    # Party 0 asks for metrics twice before its round, party 1 goes straight to the round, party 2 is through.
    # Party 0's values stand alone; then the round: (1*1 + 3*2) / 4 = 7/4. At last all ask: see below.
    def act(federation: Federation) -> tuple[list[dict[str, float]], Tensor]:
        party = federation.party
        w = torch.zeros(2)
        aggregator = started(federation, {"w": w})
        w.fill_(2.0**party)
        seen = []
        if party == 0:
            time.sleep(0.1)  # the others are there first
            seen.append(aggregator.mean({"loss": (2.5, 4)}))
            seen.append(aggregator.mean({"loss": (1.5, 4), "accuracy": (0.5, 2)}))
        if party < 2:
            aggregator.step([1, 3][party])
        if party == 1:
            seen.append(aggregator.mean({"loss": (7.0, 1)}))
        list(aggregator.drain())
        seen.append(aggregator.mean({"loss": (float(party), 1 + party)}))
        return seen, w

    # (1*0 + 2*1 + 3*2) / 6 = 4/3.
    expected = [
        [{"loss": 2.5}, {"loss": 1.5, "accuracy": 0.5}, {"loss": 4 / 3}],
        [{"loss": 7.0}, {"loss": 4 / 3}],
        [{"loss": 4 / 3}],
    ]
    for (seen, result), wanted in zip(run_parties(3, act), expected, strict=True):
        assert seen == wanted
        torch.testing.assert_close(result, torch.full((2,), 7 / 4))


def test_a_mean_of_names_that_only_some_have() -> None:
    # loss: (2*1 + 1*4) / 3 = 2; party 2 has none, which counts neither above nor below the line. accuracy:
    # party 0 alone, since party 2 validated no sample and so has no number. speed: nobody counts.
    values = [
        {"loss": (1.0, 2), "accuracy": (0.5, 2)},
        {"speed": (3.0, 0), "loss": (4.0, 1)},
        {"accuracy": (math.nan, 0)},
    ]

    def act(federation: Federation) -> list[dict[str, float]]:
        aggregator = started(federation, {"w": torch.zeros(1)})
        return [aggregator.mean(values[federation.party]), aggregator.mean({})]

    for means in run_parties(3, act):
        assert means == [{"loss": 2.0, "accuracy": 0.5}, {}]


def test_one_party_only() -> None:
    def act(federation: Federation) -> None:
        w = random(0, 50)
        aggregator = started(federation, {"w": w}, outer_optimizer=sgd(lr=0.5))
        start = w.clone()
        w += 1
        report = aggregator.step(3, loss=2.0)
        torch.testing.assert_close(w, start + 0.5)  # half of the way
        assert (report.active_parties, report.total_weight, report.bytes_sent) == (1, 3.0, 0)
        assert report.loss == 2.0
        assert aggregator.mean({"loss": (3.0, 2), "none": (1.0, 0)}) == {"loss": 3.0}
        assert list(aggregator.drain()) == []
        w.fill_(math.nan)
        with pytest.raises(FederationError, match="party 0 hold NaN"):
            aggregator.step(1)

    run_parties(1, act)
