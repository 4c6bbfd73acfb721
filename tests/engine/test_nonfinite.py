"""Rounds in which a party holds NaN, infinity, or what float32 cannot hold."""

import math

import pytest
import torch
from manual_rounds import bits, started, write_
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Federation, FederationError, RoundReport


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_party_with_nan_is_left_out_and_healed(
    bad: float, caplog: pytest.LogCaptureFixture, small_pieces: None
) -> None:
    # Weights 1, 3, 2; they hold 1, 2, 4. Round 0 lacks party 1: (1*1 + 2*4) / 3 = 3.
    # Then all add 1, 2, 4 to 3, and all count: 3 + (1*1 + 3*2 + 2*4) / 6 = 5.5.
    def act(federation: Federation) -> list[RoundReport]:
        party = federation.party
        parameters = {"a": torch.zeros(40), "b": torch.zeros(3)}
        aggregator = started(federation, parameters)
        write_(parameters, {name: torch.full_like(p, 2.0**party) for name, p in parameters.items()})
        if party == 1:
            parameters["a"][17] = bad
        healed = aggregator.step([1, 3, 2][party], loss=1.0 + party)
        for p in parameters.values():
            torch.testing.assert_close(p, torch.full_like(p, 3.0))
            p += 2.0**party
        after = aggregator.step([1, 3, 2][party])
        for p in parameters.values():
            torch.testing.assert_close(p, torch.full_like(p, 5.5))
        return [healed, after]

    for party, (healed, after) in enumerate(run_parties(3, act)):
        assert healed.excluded == (1,)
        assert (healed.active_parties, healed.total_weight) == (2, 3.0)
        assert healed.weight == [1, 0, 2][party]
        assert (after.excluded, after.active_parties, after.total_weight) == ((), 3, 6.0)
        assert f"[party {party}]" in caplog.text
    assert caplog.text.count("the parameters of party 1 hold NaN or infinity") == 3
    assert caplog.text.count("'a'") == 1, "only party 1 can tell which of its parameters it is"


def test_nan_at_all_parties_stops_all_and_changes_nothing() -> None:
    # Afterwards the parties repair their parameters to 1, 2, 4 and go on: (1 + 3*2 + 0*4) / 4 = 7/4.
    def act(federation: Federation) -> Tensor:
        party = federation.party
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        w.copy_(torch.tensor([1.0, math.nan, math.inf, float(party)]))
        before = bits(w)
        with pytest.raises(FederationError, match=r"Round 0: .*party 0, 1 .*No parameter was changed"):
            aggregator.step([1, 3, 0][party])
        assert bits(w) == before
        assert aggregator.round == 0
        w.fill_(2.0**party)
        assert aggregator.step([1, 3, 0][party]).round == 0
        return w

    for result in run_parties(3, act):
        torch.testing.assert_close(result, torch.full((4,), 7 / 4))


@pytest.mark.parametrize("weights", [[0, 3, 0], [1, 3, 2]])
def test_nan_can_be_made_an_error(weights: list[float]) -> None:
    # With weights 0, 3, 0 nothing is left to take over, so it is an error in any case.
    mode = "raise" if weights[0] else "exclude"

    def act(federation: Federation) -> str:
        w = torch.zeros(4)
        aggregator = started(federation, {"weight": w}, on_nonfinite=mode)
        w.fill_(math.nan if federation.party == 1 else 1.0)
        before = bits(w)
        with pytest.raises(FederationError) as caught:
            aggregator.step(weights[federation.party])
        assert bits(w) == before
        return str(caught.value)

    messages = run_parties(3, act)
    assert all("party 1 hold NaN or infinity" in message for message in messages)
    assert "'weight'" in messages[1]


def test_nan_at_a_party_of_weight_0_hurts_nobody() -> None:
    def act(federation: Federation) -> Tensor:
        w = torch.zeros(3)
        aggregator = started(federation, {"w": w})
        w.fill_([1.0, 2.0, math.nan][federation.party])
        report = aggregator.step([1, 3, 0][federation.party])
        assert (report.excluded, report.active_parties) == ((), 2)
        return w

    for result in run_parties(3, act):
        torch.testing.assert_close(result, torch.full((3,), 7 / 4))  # (1*1 + 3*2) / 4


def test_huge_is_not_infinite() -> None:
    # (1*4e30 + 3*0) / 4 = 1e30, though the square of 4e30 is beyond float32.
    def act(federation: Federation) -> Tensor:
        w = torch.zeros(3)
        aggregator = started(federation, {"w": w}, on_nonfinite="raise")
        w.fill_(4e30 * (1 - federation.party))
        assert aggregator.step([1, 3][federation.party]).excluded == ()
        return w

    for result in run_parties(2, act):
        torch.testing.assert_close(result, torch.full((3,), 1e30))


def test_float64_beyond_float32_counts_as_infinite() -> None:
    def act(federation: Federation) -> Tensor:
        w = torch.zeros(3, dtype=torch.float64)
        aggregator = started(federation, {"w": w})
        w.fill_([1.0, 1e300, 4.0][federation.party])
        assert aggregator.step([1, 3, 2][federation.party]).excluded == (1,)
        return w

    for result in run_parties(3, act):
        torch.testing.assert_close(result, torch.full((3,), 3.0, dtype=torch.float64))  # (1*1 + 2*4) / 3


def test_an_update_beyond_float32_does_not_poison_the_others() -> None:
    # 3e38 and its negative are finite, but their difference, party 1's update, is not.
    def act(federation: Federation) -> Tensor:
        w = torch.full((3,), 3e38)
        aggregator = started(federation, {"w": w})
        w.fill_([2e38, -3e38][federation.party])
        aggregator.step(1)
        return w

    first, second = run_parties(2, act)
    assert torch.isfinite(first).all()
    assert bits(first) == bits(second)
