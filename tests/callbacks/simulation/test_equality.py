"""A simulation in one process, in two and with real parties gives the same numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_parties import Setting, furthest, real, simulated

from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    FrozenA,
    GeometricMedian,
    HeterogeneousRank,
    Krum,
    LowRankMean,
    Mean,
    Median,
    NormBound,
    ShareA,
    TrimmedMean,
)
from pellm_lightning.loop.simulation.settings import Simulation

SGD = torch.optim.SGD
RULES: dict[str, Callable[[], Aggregation | None]] = {
    "mean": Mean,
    "default": lambda: None,
    "power": lambda: LowRankMean(solver="power"),
    "procrustes": lambda: LowRankMean(factorization="procrustes"),
    "frozen A": FrozenA,
    "alternating": Alternating,
    "share A": ShareA,
    "ranks": HeterogeneousRank,
    "norm bound": NormBound,
    "median": Median,
    "trimmed mean": lambda: TrimmedMean(malicious=1),
    "geometric median": GeometricMedian,
    "Krum": lambda: Krum(malicious=1),
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_what_real_parties_get(name: str) -> None:
    setting = Setting(Simulation(num_parties=5), rule=RULES[name])
    reference = real(setting)
    (alone,), (first, second) = simulated(setting), simulated(setting, workers=2)
    assert furthest(alone.shared, reference.shared) == 0, "sums have the same order in one process"
    assert furthest(first.shared, second.shared) == 0
    assert furthest(first.shared, alone.shared) <= 1e-6
    for mine, of_others in zip(alone.reports, reference.reports, strict=True):
        assert mine.weights == of_others.weights
        assert mine.influence == of_others.influence
        assert mine.losses == pytest.approx(of_others.losses, abs=1e-6)


@pytest.mark.parametrize("name", ["mean", "default", "alternating", "share A", "Krum"])
def test_partial_participation_gives_what_real_parties_get(name: str) -> None:
    simulation = Simulation(num_parties=9, sampled=5, seed=3, availability=0.8, failure_rate=0.2)
    setting = Setting(simulation, rounds=5, rule=RULES[name])
    reference = real(setting)
    (alone,), (first, _) = simulated(setting), simulated(setting, workers=2)
    assert furthest(alone.shared, reference.shared) <= 1e-6
    assert furthest(first.shared, alone.shared) <= 1e-6
    for number, report in enumerate(alone.reports):
        draw = simulation.draw(number)
        assert report.parties == draw.parties
        counted = {party for party, weight in zip(report.parties, report.weights, strict=True) if weight}
        assert counted == draw.training == {*range(9)} & draw.training
        assert report.trained_parties == len(draw.training)


@pytest.mark.parametrize(
    "arguments",
    [
        {"outer_optimizer": partial(SGD, lr=0.7, momentum=0.9, nesterov=True)},
        {"outer_optimizer": partial(torch.optim.Adam, lr=0.05), "inner_optimizer_state": "reset"},
        {"weighting": "uniform"},
    ],
)
def test_outer_optimizers_and_weights(arguments: dict[str, Any]) -> None:
    setting = Setting(Simulation(num_parties=4, sampled=3), rounds=4, steps=None, arguments=arguments, rule=Mean)
    (alone,), (first, _) = simulated(setting), simulated(setting, workers=2)
    assert furthest(first.shared, alone.shared) <= 1e-6
