"""What a round reports: norms, losses and seconds."""

import math

import pytest
import torch
from manual_rounds import random, sgd, started
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Federation, RoundReport


def test_norms_by_hand() -> None:
    # From 0, 0 party 0 (weight 1) goes to 3, 4: its update has norm 5. Party 1 (weight 3) goes to 1, 2:
    # sqrt(5). Party 2 (weight 0) goes to 0, -2: 2. The mean is (3 + 3*1)/4 = 1.5, (4 + 3*2)/4 = 2.5. Away
    # from it are party 0 by 1.5, 1.5: sqrt(4.5); party 1 by -0.5, -0.5: sqrt(0.5); party 2 by -1.5, -4.5:
    # sqrt(22.5).
    ends = [[3.0, 4.0], [1.0, 2.0], [0.0, -2.0]]

    def act(federation: Federation) -> RoundReport:
        w = torch.zeros(2)
        aggregator = started(federation, {"w": w}, outer_optimizer=sgd(lr=0.1))
        w.copy_(torch.tensor(ends[federation.party]))
        return aggregator.step([1, 3, 0][federation.party])

    reports = run_parties(3, act)
    assert [r.update_norm for r in reports] == pytest.approx([5, math.sqrt(5), 2], rel=1e-6)
    assert [r.distance for r in reports] == pytest.approx(
        [math.sqrt(4.5), math.sqrt(0.5), math.sqrt(22.5)], rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_equal_float64(dtype: torch.dtype, small_pieces: None) -> None:
    def act(federation: Federation) -> tuple[Tensor, Tensor, RoundReport]:
        parameters = {"a": random(0, 11, 13).to(dtype), "b": random(1, 5), "c": random(2, 3, 7).t()}
        aggregator = started(federation, parameters)
        for p in parameters.values():
            p += random(3 + federation.party, *p.shape).to(p.dtype)
        aggregator.step(1 + federation.party)  # so that the anchor is no copy of the start
        anchor = torch.cat([p.double().flatten() for p in parameters.values()])
        for p in parameters.values():
            p += random(9 + federation.party, *p.shape).to(p.dtype)
        local = torch.cat([p.double().flatten() for p in parameters.values()])
        return anchor, local, aggregator.step(1 + federation.party)

    (anchor, x, first), (_, y, second) = run_parties(2, act)
    mean = (x + 2 * y) / 3
    assert first.update_norm == pytest.approx(float((x - anchor).norm()), rel=1e-5)
    assert second.update_norm == pytest.approx(float((y - anchor).norm()), rel=1e-5)
    assert first.distance == pytest.approx(float((x - mean).norm()), rel=1e-5)
    assert second.distance == pytest.approx(float((y - mean).norm()), rel=1e-5)


def test_norms_of_huge_updates_are_not_nan() -> None:
    # 1e25 squared is beyond float32, the norm is not: sqrt(4) * 1e25 at party 0, 0 at party 1. The mean is
    # half way between them.
    def act(federation: Federation) -> RoundReport:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        w.fill_(1e25 * (1 - federation.party))
        return aggregator.step(1)

    reports = run_parties(2, act)
    assert [r.update_norm for r in reports] == pytest.approx([2e25, 0.0])
    assert [r.distance for r in reports] == pytest.approx([1e25, 1e25])


def test_losses_are_averaged_by_weight() -> None:
    # Round 0: (1*2.0 + 3*4.0) / 4 = 3.5; party 2 has weight 0. Round 1: party 1 gave none: 2.0.
    # Round 2: party 0's is no number: 4.0. Round 3: nobody gave one.
    losses = [[2.0, 4.0, 9.0], [2.0, None, 9.0], [math.nan, 4.0, math.inf], [None, None, 9.0]]

    def act(federation: Federation) -> list[float | None]:
        aggregator = started(federation, {"w": torch.zeros(2)})
        weight = [1, 3, 0][federation.party]
        return [aggregator.step(weight, loss=row[federation.party]).loss for row in losses]

    for means in run_parties(3, act):
        assert means[:3] == pytest.approx([3.5, 2.0, 4.0], rel=1e-6)
        assert means[3] is None


def test_parties_tell_each_other_weights_losses_and_the_last_distances() -> None:
    # From 0 with weights 1, 1 party 0 goes to 2, party 1 to 6: the mean is 4, both are 2 away. Then party 0
    # stays and party 1, which gives no loss, goes from 4 to 10: 3 away, which the next round would tell.
    def act(federation: Federation) -> list[RoundReport]:
        w = torch.zeros(1)
        aggregator = started(federation, {"w": w})
        w.fill_([2.0, 6.0][federation.party])
        first = aggregator.step(1.0, loss=0.5 + federation.party)
        w.add_([0.0, 6.0][federation.party])
        second = aggregator.step(2.0 * federation.party, loss=[0.25, math.nan][federation.party])
        return [first, second]

    for party, (first, second) in enumerate(run_parties(2, act)):
        assert (first.weights, first.losses, first.distances) == ((1.0, 1.0), (0.5, 1.5), (None, None))
        assert (second.weights, second.losses, second.distances) == ((0.0, 2.0), (0.25, None), (2.0, 2.0))
        assert first.local_loss == 0.5 + party


def test_global_parameters_have_the_parameters_names_and_shapes() -> None:
    def act(federation: Federation) -> None:
        parameters = {"a": random(0, 3, 5), "b": random(1, 2).bfloat16(), "c": random(2, 4, 6).t()}
        aggregator = started(federation, parameters)
        for parameter in parameters.values():
            parameter += federation.party
        aggregator.step(1.0)
        assert aggregator.global_parameters.keys() == parameters.keys()
        for name, values in aggregator.global_parameters.items():
            assert values.dtype == torch.float32
            assert torch.equal(values.to(parameters[name].dtype), parameters[name])

    run_parties(2, act)
