"""A round over N parties as threads: right to float64, to the bit the same everywhere, and no silent harm."""

import math
import time
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from manual_rounds import SOON_S, Factory, all_bits, bits, random, sgd, started, write_
from party_threads import run_parties
from torch import Tensor, nn

from pellm_lightning import Federation, FederationError, RoundReport
from pellm_lightning.comm import PartyLostError
from pellm_lightning.tensors import flat_buffer

# ---- the weighted mean

PATTERN = torch.tensor([[1.0, 10.0], [-0.5, 0.0]])
"""Party p holds 2^p times this, so that a mean tells which parties are in it and how often."""


# One party, weight 2: it holds 1, the mean is 1.
# Weights 1, 3: they hold 1 and 2, the mean is (1*1 + 3*2) / 4 = 7/4.
# Weights 1, 3, 0: party 2 holds 4, which does not count: (1*1 + 3*2 + 0*4) / 4 = 7/4.
# Weights 1, 3, 0, 2, 0.5: they hold 1, 2, 4, 8, 16: (1 + 6 + 0 + 16 + 8) / 6.5 = 31/6.5.
@pytest.mark.parametrize(
    ("weights", "mean"), [([2], 1), ([1, 3], 7 / 4), ([1, 3, 0], 7 / 4), ([1, 3, 0, 2, 0.5], 31 / 6.5)]
)
def test_weighted_mean_equals_float64(weights: list[float], mean: float) -> None:
    def act(federation: Federation) -> tuple[Tensor, RoundReport]:
        parameters = {"w": nn.Parameter(torch.full((2, 2), 5.0 + federation.party))}
        aggregator = started(federation, parameters)
        assert torch.equal(parameters["w"], torch.full((2, 2), 5.0)), "the start takes over party 0's"
        write_(parameters, {"w": PATTERN * 2**federation.party})
        report = aggregator.step(weights[federation.party])
        assert torch.equal(aggregator.global_vector, parameters["w"].detach().flatten())
        return parameters["w"].detach(), report

    results = run_parties(len(weights), act)
    for party, (result, report) in enumerate(results):
        torch.testing.assert_close(result.double(), PATTERN.double() * mean, rtol=5e-7, atol=1e-6)
        assert bits(result) == bits(results[0][0])
        assert report.round == 0
        assert report.active_parties == sum(weight > 0 for weight in weights)
        assert report.total_weight == sum(weights)
        assert report.weight == weights[party]
        assert report.excluded == ()


@st.composite
def federations(draw: st.DrawFn) -> dict[str, Any]:
    """Any number of parties with any parameters and any weights, one of them above 0."""
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    weight = st.sampled_from([0.0, 1.0, 3.0, 0.1, 7e-4, 12345.0])
    return {
        "parameters": draw(
            st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=5).filter(
                lambda drawn: any(math.prod(shape) for shape, _ in drawn)
            )
        ),
        "weights": draw(st.lists(weight, min_size=1, max_size=4).filter(any)),
        "scale": draw(st.sampled_from([1e-3, 1.0, 50.0])),
        "seed": draw(st.integers(0, 1000)),
        "chunk": draw(st.sampled_from([1, 7, 1 << 17])),
    }


@settings(max_examples=60, deadline=None)
@given(federations())
@example(
    {
        "parameters": [((5, 5), torch.bfloat16), ((), torch.float64), ((0,), torch.float32)],
        "weights": [1.0, 3.0, 0.0],
        "scale": 1.0,
        "seed": 0,
        "chunk": 7,
    }
)
def test_any_weighted_mean_equals_float64(drawn: dict[str, Any]) -> None:
    weights = drawn["weights"]
    shapes = {f"p{index}": (shape, dtype) for index, (shape, dtype) in enumerate(drawn["parameters"])}

    def values(party: int) -> dict[str, Tensor]:
        """What a party holds: party -1 stands for the start. No party moves what lies at even places."""
        made = {}
        for index, (name, (shape, dtype)) in enumerate(shapes.items()):
            start = random(drawn["seed"] + index, *shape, scale=drawn["scale"])
            local = random(drawn["seed"] + index + 100 * (party + 1), *shape, scale=drawn["scale"])
            moves = torch.arange(start.numel()).view(shape) % 2 == 1
            made[name] = torch.where(moves & torch.tensor(party >= 0), local, start).to(dtype)
        return made

    def act(federation: Federation) -> dict[str, Tensor]:
        parameters = values(-1)
        aggregator = started(federation, parameters)
        write_(parameters, values(federation.party))
        aggregator.step(weights[federation.party])
        return parameters

    with (
        mock.patch.object(flat_buffer, "_CHUNK", drawn["chunk"]),
        mock.patch.object(flat_buffer, "_BUCKET", 3 * drawn["chunk"]),
    ):
        first, *others = run_parties(len(weights), act)
    assert all(all_bits(other) == all_bits(first) for other in others)
    start, locals_ = values(-1), [values(party) for party in range(len(weights))]
    for name, result in first.items():
        held = torch.stack([local[name].double() for local in locals_])
        share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        mean = (share.view(-1, *[1] * result.dim()) * held).sum(0)
        # float32 sums of N terms as large as the anchor or a party's value, then one cast to the own dtype.
        largest = torch.maximum(held.abs().amax(0), start[name].double().abs())
        error = (len(weights) + 4) * torch.finfo(torch.float32).eps * largest
        if result.dtype in (torch.bfloat16, torch.float16):
            error += torch.finfo(result.dtype).eps / 2 * (mean.abs() + error) + 2**-25
        assert ((result.double() - mean).abs() <= error).all()
        unmoved = torch.arange(result.numel()) % 2 == 0
        assert bits(result.flatten()[unmoved]) == bits(
            start[name].float().to(result.dtype).flatten()[unmoved]
        )


def test_one_local_step_on_equal_batches_is_one_central_step() -> None:
    # The gradient of a mean over 3 batches of one size is the mean of their gradients; so one SGD step each,
    # averaged, is one SGD step on all of them.
    x, y = random(0, 3, 4, 5).double(), random(1, 3, 4).double()
    start = random(2, 5).double()

    def stepped(batch: slice) -> Tensor:
        w = start.clone().requires_grad_()
        ((x[batch].reshape(-1, 5) @ w - y[batch].reshape(-1)) ** 2).mean().backward()
        return w.detach() - 0.1 * w.grad

    def act(federation: Federation) -> Tensor:
        w = {"w": start.float()}
        aggregator = started(federation, w)
        write_(w, {"w": stepped(slice(federation.party, federation.party + 1))})
        aggregator.step(4)
        return w["w"]

    for result in run_parties(3, act):
        torch.testing.assert_close(result.double(), stepped(slice(0, 3)), rtol=1e-6, atol=1e-6)


def test_it_trains() -> None:
    # Each party alone sees one half of the plane and cannot know the whole line y = 2a - 3b.
    truth = torch.tensor([2.0, -3.0])

    def act(federation: Federation) -> Tensor:
        w = nn.Parameter(torch.zeros(2))
        inner = torch.optim.SGD([w], lr=0.1)
        aggregator = started(federation, {"w": w})
        x = random(federation.party, 64, 2)
        x[:, 1 - federation.party] = 0
        for _ in range(30):
            for _ in range(10):
                inner.zero_grad()
                ((x @ w - x @ truth) ** 2).mean().backward()
                inner.step()
            aggregator.step(1 + 2 * federation.party)
        return w.detach()

    first, second = run_parties(2, act)
    assert bits(first) == bits(second)
    torch.testing.assert_close(first, truth, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_the_same_to_the_bit(dtype: torch.dtype) -> None:
    def act(federation: Federation) -> bytes:
        parameters = {"a": random(1, 33, 7).to(dtype), "b": random(2, 5)}
        aggregator = started(federation, parameters, outer_optimizer=sgd(lr=0.7, momentum=0.9, nesterov=True))
        for number in range(4):
            for index, (name, p) in enumerate(parameters.items()):
                p.add_(random(7 * number + index + 100 * federation.party, *p.shape).to(p.dtype))
                assert name in ("a", "b")
            aggregator.step([1, 3, 0.7][federation.party])
        return all_bits(parameters) + bits(aggregator.global_vector)

    assert len({*run_parties(3, act), *run_parties(3, act)}) == 1


# ---- what nobody moved, and rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outer", [sgd(lr=1.0), sgd(lr=0.7, momentum=0.9, nesterov=True)])
def test_what_no_party_moved_keeps_its_bits(dtype: torch.dtype, outer: Factory) -> None:
    # 1/3 + 1/3 + 1/3 is not 1 in binary: a mean of the values themselves would lose their last bits.
    still = torch.cat([random(0, 200), torch.tensor([0.0, -0.0, 1e-40, 6e-8, 60000.0])]).to(dtype)

    def act(federation: Federation) -> None:
        parameters = {"moved": random(1, 50).to(dtype), "still": still.clone()}
        aggregator = started(federation, parameters, outer_optimizer=outer)
        for number in range(20):
            parameters["moved"] += random(number + 100 * federation.party, 50).to(dtype)
            aggregator.step(1)
            assert bits(parameters["still"]) == bits(still), f"moved in round {number}"

    run_parties(3, act)


def test_rounding_to_bf16_is_no_pseudo_gradient() -> None:
    def act(federation: Federation) -> None:
        w = random(0, 300).to(torch.bfloat16)
        aggregator = started(federation, {"w": w})
        w += random(1 + federation.party, 300).to(torch.bfloat16)
        aggregator.step(1)
        written, kept = bits(w), bits(aggregator.global_vector)
        assert not torch.equal(aggregator.global_vector, w.float()), "the mean of thirds was a bf16 by chance"
        for _ in range(50):  # in which nobody trains
            report = aggregator.step(1)
            assert report.update_norm == report.distance == 0.0
        assert bits(w) == written
        assert bits(aggregator.global_vector) == kept

    run_parties(3, act)


def test_small_outer_steps_accumulate_in_bf16() -> None:
    # Below 1 the bf16 numbers are 1/256 apart. Each round both parties move by -1/8, which with lr=0.01 is a
    # step of -0.00125, less than half of that distance: alone it rounds away. After 40 rounds the global
    # vector is at 1 - 40 * 0.00125 = 0.95, and the nearest bf16 to 0.95 = 243.2/256 is 243/256.
    def act(federation: Federation) -> tuple[Tensor, Tensor]:
        w = torch.ones(5, dtype=torch.bfloat16)
        aggregator = started(federation, {"w": w}, outer_optimizer=sgd(lr=0.01))
        for _ in range(40):
            w -= 0.125
            aggregator.step(1 + 2 * federation.party)
        return aggregator.global_vector.clone(), w

    for kept, written in run_parties(2, act):
        torch.testing.assert_close(kept, torch.full((5,), 0.95), rtol=0, atol=1e-5)
        assert torch.equal(written.float(), torch.full((5,), 243 / 256))


def test_a_write_back_survives_the_next_local_step() -> None:
    def act(federation: Federation) -> None:
        w = nn.Parameter(torch.zeros(3))
        place = w.data_ptr()
        inner = torch.optim.Adam([w], lr=0.5)
        aggregator = started(federation, {"w": w})
        write_({"w": w}, {"w": torch.full((3,), 4.0 * federation.party)})
        aggregator.step(1)
        assert torch.equal(w.detach(), torch.full((3,), 2.0))  # (0 + 4) / 2
        w.grad = torch.ones(3)
        inner.step()  # Adam's first step is lr * sign(gradient)
        # Adam's first step in a thread is off by 4e-5 about once in fourteen runs.
        torch.testing.assert_close(w.detach(), torch.full((3,), 1.5), rtol=0, atol=1e-3)
        assert w.data_ptr() == place

    run_parties(2, act)


# ---- weights


def test_a_party_of_weight_0_may_be_the_last_one_active() -> None:
    # Round 0: (3*2 + 0*9) / 3 = 2. In round 1 only party 1 is active, with weight 0: all stay at 2.
    def act(federation: Federation) -> list[float]:
        w = torch.zeros(1)
        aggregator = started(federation, {"w": w})
        values = []
        for _ in range([1, 2][federation.party]):
            w.add_([2.0, 9.0][federation.party])
            aggregator.step([3, 0][federation.party])
            values.append(w.item())
        for _ in aggregator.drain():
            values.append(w.item())
        return values

    assert run_parties(2, act) == [[2.0, 2.0], [2.0, 2.0]]


def test_total_weight_0_stops_all_and_changes_nothing() -> None:
    def act(federation: Federation) -> None:
        w = torch.zeros(3)
        aggregator = started(federation, {"w": w})
        w.fill_(1.0 + federation.party)
        before = bits(w)
        with pytest.raises(FederationError, match="No party has weight above 0 in round 0"):
            aggregator.step(0)
        assert bits(w) == before

    run_parties(3, act)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    def act(federation: Federation) -> None:
        aggregator = started(federation, {"w": torch.zeros(3)})
        aggregator.step(weight if federation.party == 1 else 1.0)

    began = time.monotonic()
    results = run_parties(3, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    assert isinstance(results[1], ValueError)
    assert f"Party 1 has weight={weight}" in str(results[1])
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert f"Party 1 has weight={weight}" in str(results[party])
