"""Who decides how much: the shares in the start line and in the rounds' lines, and the warning above 90 %."""

import logging
from pathlib import Path
from typing import Any

import pytest
from party_threads import Classifier, data, fit_parties, quiet_trainer
from secure_exchange import masked

from pellm_lightning import RoundReport, Weighting
from pellm_lightning.aggregation import Median


def lines(caplog: pytest.LogCaptureFixture, party: int = 0) -> list[str]:
    start = f"[party {party}] "
    return [r.getMessage().removeprefix(start) for r in caplog.records if r.getMessage().startswith(start)]


def federate(
    tmp_path: Path, samples: list[int], trainer: Any = None, **arguments: Any
) -> list[list[RoundReport]]:
    def fit(party: int, federated: Any) -> list[RoundReport]:
        callback = federated(**arguments)
        options = {"max_epochs": 1} | (trainer or {})
        quiet_trainer(tmp_path, [callback], **options).fit(Classifier(), data(samples[party], seed=party))
        return list(callback.rounds)

    return fit_parties(len(samples), fit)


def test_shares_are_shown_before_and_after_a_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")
    federate(tmp_path, [6, 10, 4])  # batches of 4; the last of an epoch may be smaller
    assert "shares of the weights, as expected: party 1 50 %, party 0 30 %, party 2 20 %" in lines(caplog)
    assert any(", weight 6 of 20 (shares 30 %, 50 %, 20 %), " in line for line in lines(caplog))
    assert "decide nearly alone" not in caplog.text


def test_by_steps_the_size_of_a_batch_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")
    federate(tmp_path, [4, 1, 4], {"max_steps": 2, "max_epochs": 2}, every_n_steps=1)
    assert "shares of the weights, as expected: party 0 44.4 %, party 2 44.4 %, party 1 11.1 %" in lines(
        caplog
    )


def test_one_that_decides_nearly_alone_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    federate(tmp_path, [2, 92, 4])
    told = [line for line in lines(caplog) if "decide nearly alone" in line]
    assert len(told) == 2
    assert told[0].startswith(
        "Party 1 will have 93.9 % of the weights, so its data decide nearly alone. If that"
    )
    assert told[1].startswith("Round 0: party 1 has 93.9 % of the weights")
    assert "weighting=Weighting(max_share=0.5)" in told[1]


@pytest.mark.parametrize("weighting", [Weighting(max_share=0.5), Weighting(by="uniform"), "uniform"])
def test_a_cap_ends_that(tmp_path: Path, caplog: pytest.LogCaptureFixture, weighting: Any) -> None:
    for reports in federate(tmp_path, [2, 92, 4], weighting=weighting):
        shares = [weight / reports[0].total_weight for weight in reports[0].weights]
        assert max(shares) == pytest.approx(
            0.5 if isinstance(weighting, Weighting) and weighting.max_share else 1 / 3
        )
    assert "decide nearly alone" not in caplog.text


def test_hidden_weights_stay_hidden(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")
    federate(tmp_path, [2, 92, 4], exchange=masked())
    assert "share" not in caplog.text


def test_a_party_alone_decides_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")
    federate(tmp_path, [8])
    assert "share" not in caplog.text


def test_a_robust_rule_without_a_cap_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")
    federate(tmp_path, [4, 4, 4], aggregation=Median())
    assert caplog.text.count("respects weights, and a party may claim any") == 1
    assert "they are aggregated by Median(frozen_a=False, mixing=0)" in lines(caplog)
    caplog.clear()
    federate(tmp_path, [4, 4, 4], aggregation=Median(), weighting=Weighting(max_share=0.4))
    assert "a party may claim any" not in caplog.text
