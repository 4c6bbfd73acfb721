"""A simulation in one process, in two and with real parties gives the same numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
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
    "trimmed mean": lambda: TrimmedMean(num_malicious=1),
    "geometric median": GeometricMedian,
    "Krum": lambda: Krum(num_malicious=1),
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_what_real_parties_get(name: str) -> None:
    setting = Setting(Simulation(num_parties=5), optimizer="SGD", rule=RULES[name])
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
    setting = Setting(simulation, rounds=5, optimizer="SGD", rule=RULES[name])
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
        {"weighting": "uniform", "inner_optimizer_state": "reset"},
        {"weighting": "uniform"},
    ],
)
def test_outer_optimizers_weights_and_moments(arguments: dict[str, Any]) -> None:
    """Adam amplifies differences of rounding, so two processes are compared with SGD."""
    simulation = Simulation(num_parties=4, sampled=3)
    for optimizer in ("AdamW", "SGD"):
        setting = Setting(simulation, 4, None, optimizer, arguments, Mean)
        (alone,) = simulated(setting)
        assert furthest(alone.shared, real(setting).shared) <= 2e-6
    first, second = simulated(setting, workers=2)
    assert furthest(first.shared, second.shared) == 0
    assert furthest(first.shared, alone.shared) <= 1e-6


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    parties=st.integers(3, 40),
    share=st.floats(0.05, 1.0),
    workers=st.integers(2, 3),
    seed=st.integers(0, 99),
    weights=st.booleans(),
    rule=st.sampled_from(["mean", "default", "share A", "geometric median"]),
)
def test_any_number_of_processes(
    parties: int, share: float, workers: int, seed: int, weights: bool, rule: str
) -> None:
    sampled = min(max(workers, round(share * parties)), 12, parties)
    by_index = [1.0 + party for party in range(parties)] if weights else None
    simulation = Simulation(parties, sampled, seed, by_index)
    setting = Setting(simulation, rounds=3, steps=2, optimizer="SGD", rule=RULES[rule])
    (alone,), several = simulated(setting), simulated(setting, workers=workers)
    for worker in several:
        assert furthest(worker.shared, alone.shared) <= 1e-6
        assert [report.parties for report in worker.reports] == [
            simulation.draw(number).parties for number in range(3)
        ]
