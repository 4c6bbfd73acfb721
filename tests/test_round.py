"""A round over N parties as threads: right to float64, to the bit the same everywhere, and no silent harm."""

import copy
import io
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parties import run_parties
from torch import Tensor, nn
from transcript import NotedStore, tapped

from pellm_lightning import Aggregator, Federation, FederationError, RoundReport, layout, passport
from pellm_lightning.federation import MismatchError, PartyLostError

SOON_S = 8.0
"""Far below the parties' timeout of 20 s, far above what a loaded machine needs."""
Factory = Callable[[Iterable[Any]], torch.optim.Optimizer]


def sgd(**arguments: Any) -> Factory:
    return lambda parameters: torch.optim.SGD(parameters, **arguments)


def started(federation: Federation, parameters: Mapping[str, Tensor], **arguments: Any) -> Aggregator:
    aggregator = Aggregator(federation, parameters, **arguments)
    aggregator.start()
    return aggregator


def write_(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """What local training does: it changes the parameters in place."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(parameters: Mapping[str, Tensor]) -> bytes:
    return b"".join(bits(parameters[name]) for name in sorted(parameters))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut vectors of a few dozen scalars as those of millions are."""
    monkeypatch.setattr(layout, "_CHUNK", 8)
    monkeypatch.setattr(layout, "_BUCKET", 24)


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
        mock.patch.object(layout, "_CHUNK", drawn["chunk"]),
        mock.patch.object(layout, "_BUCKET", 3 * drawn["chunk"]),
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


# ---- outer optimizers, against their formulas in float64

WEIGHTS = [[1, 3, 2], [0, 3, 1], [5, 1, 0], [1, 1, 1], [2, 0, 3]]
"""Of three parties, round by round."""


def pull(number: int, party: int) -> np.ndarray:
    return random(1000 + 10 * number + party, 40).numpy().astype(np.float64)


def reference(outer: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """The global vector after five rounds in which party i makes ``x_i = 0.9 x + 0.1 pull_i`` of it."""
    x = random(999, 40).numpy().astype(np.float64)
    for number, weights in enumerate(WEIGHTS):
        locals_ = [0.9 * x + 0.1 * pull(number, party) for party in range(3)]
        mean = sum(weight * local for weight, local in zip(weights, locals_, strict=True)) / sum(weights)
        x = x - outer(x - mean, number + 1)
    return x


def federated(outer: Factory) -> Tensor:
    """The same by three parties in float32."""

    def act(federation: Federation) -> Tensor:
        w = random(999, 40)
        aggregator = started(federation, {"w": w}, outer_optimizer=outer)
        for number, weights in enumerate(WEIGHTS):
            w.mul_(0.9).add_(torch.from_numpy(pull(number, federation.party)).float(), alpha=0.1)
            aggregator.step(weights[federation.party])
        return w

    first, *others = run_parties(3, act)
    assert all(bits(other) == bits(first) for other in others)
    return first


class FedAvg:
    """x <- mean (McMahan et al. 2017)."""

    def __call__(self, gradient: np.ndarray, t: int) -> np.ndarray:
        return gradient


class FedAvgM:
    """m <- 0.9 m + g; x <- x - 0.5 m (Hsu et al. 2019)."""

    m: Any = 0.0

    def __call__(self, gradient: np.ndarray, t: int) -> np.ndarray:
        self.m = 0.9 * self.m + gradient
        return 0.5 * self.m


class DiLoCo:
    """m <- 0.9 m + g; x <- x - 0.7 (g + 0.9 m) (Douillard et al. 2023)."""

    m: Any = 0.0

    def __call__(self, gradient: np.ndarray, t: int) -> np.ndarray:
        self.m = 0.9 * self.m + gradient
        return 0.7 * (gradient + 0.9 * self.m)


class FedAdam:
    """m, v: means of g, g^2 with 0.9, 0.99, freed of their start; x <- x - 0.1 m / (sqrt(v) + 1e-3)."""

    m: Any = 0.0
    v: Any = 0.0

    def __call__(self, gradient: np.ndarray, t: int) -> np.ndarray:
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.99 * self.v + 0.01 * gradient**2
        return 0.1 * (self.m / (1 - 0.9**t)) / (np.sqrt(self.v / (1 - 0.99**t)) + 1e-3)


class FedAdagrad:
    """s <- s + g^2; x <- x - 0.1 g / (sqrt(s) + 1e-3) (Reddi et al. 2021, without momentum)."""

    s: Any = 0.0

    def __call__(self, gradient: np.ndarray, t: int) -> np.ndarray:
        self.s = self.s + gradient**2
        return 0.1 * gradient / (np.sqrt(self.s) + 1e-3)


@pytest.mark.parametrize(
    ("outer", "formula"),
    [
        (sgd(lr=1.0), FedAvg()),
        (sgd(lr=0.5, momentum=0.9), FedAvgM()),
        (sgd(lr=0.7, momentum=0.9, nesterov=True), DiLoCo()),
        (lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3), FedAdam()),
        (lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3), FedAdagrad()),
    ],
    ids=["FedAvg", "FedAvgM", "DiLoCo", "FedAdam", "FedAdagrad"],
)
def test_outer_optimizer_equals_its_formula(
    outer: Factory, formula: Callable[[np.ndarray, int], np.ndarray], small_pieces: None
) -> None:
    expected = torch.from_numpy(reference(copy.copy(formula)))
    torch.testing.assert_close(federated(outer).double(), expected, rtol=1e-5, atol=2e-6)


class RenamedSGD(torch.optim.SGD):
    """An optimizer that a round cannot know to be SGD."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sgd_one_is_the_generic_step_to_the_bit(dtype: torch.dtype, small_pieces: None) -> None:
    def run(outer: Factory) -> list[bytes]:
        def act(federation: Federation) -> bytes:
            w, still = random(0, 97).to(dtype), torch.tensor([0.0, -0.0, 1e-40]).to(dtype)
            aggregator = started(federation, {"w": w, "still": still}, outer_optimizer=outer)
            reports = []
            for number in range(6):
                w += random(1 + number + 100 * federation.party, 97).to(dtype)
                reports.append(aggregator.step([1, 3, 0.7][federation.party]))
            assert len({report.distance for report in reports}) == 6
            return all_bits({"w": w, "still": still}) + bits(aggregator.global_vector)

        return run_parties(3, act)

    generic = run(lambda parameters: RenamedSGD(parameters, lr=1.0))
    assert run(sgd(lr=1.0)) == generic


@pytest.mark.parametrize(
    "extra", [{"weight_decay": 0.1}, {"maximize": True}, {"momentum": 0.5, "dampening": 0.2}]
)
def test_an_sgd_that_does_more_than_subtract_is_not_taken_for_one(extra: dict[str, Any]) -> None:
    def run(outer: Factory) -> Tensor:
        def act(federation: Federation) -> Tensor:
            w = random(0, 9)
            aggregator = started(federation, {"w": w}, outer_optimizer=outer)
            for number in range(3):
                w += random(1 + number + 100 * federation.party, 9)
                aggregator.step(1 + federation.party)
            return w

        return run_parties(2, act)[0]

    assert bits(run(sgd(lr=1.0, **extra))) == bits(run(lambda p: RenamedSGD(p, lr=1.0, **extra)))
    assert bits(run(sgd(lr=1.0, **extra))) != bits(run(sgd(lr=1.0)))


# ---- the report


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


def test_waiting_is_not_counted_as_exchanging() -> None:
    def act(federation: Federation) -> RoundReport:
        aggregator = started(federation, {"w": torch.zeros(2)})
        if federation.party == 1:
            time.sleep(0.4)
        return aggregator.step(1)

    early, late = run_parties(2, act)
    assert early.waited_seconds > 0.3
    assert early.seconds < 0.3
    assert late.waited_seconds < 0.3


# ---- values that are not finite


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


# ---- uneven parties


def test_parties_with_different_numbers_of_rounds() -> None:
    # Parties 0, 1, 2 make 3, 5 and 1 rounds, have weights 1, 3, 2 and move by 1, 2, 3 in each.
    # Round 0, all: (1*1 + 3*2 + 2*3) / 6 = 13/6. Rounds 1 and 2, parties 0 and 1: (1*1 + 3*2) / 4 = 7/4 each.
    # Rounds 3 and 4, party 1 alone: 2 each. Together 13/6 + 7/2 + 4 = 29/3.
    def act(federation: Federation) -> tuple[Tensor, list[RoundReport]]:
        party = federation.party
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
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
        aggregator = started(federation, {"w": w})
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


# ---- state


def trained(
    federation: Federation,
    dtype: torch.dtype,
    outer: Factory,
    store: dict[int, bytes],
    save_in: int | None,
    resume_in: int = 0,
) -> bytes:
    """Train for five rounds of two half steps each; save or begin in the middle of a round."""
    party = federation.party
    parameters = {"a": random(0, 9, 4).to(dtype), "b": random(1, 6)}
    aggregator = Aggregator(federation, parameters, outer_optimizer=outer)
    if resume_in:
        state = torch.load(io.BytesIO(store[party]), weights_only=True)
        write_(parameters, state["parameters"])
        aggregator.load_state_dict(state["aggregator"])
    aggregator.start()
    for number in range(resume_in, 5):
        for half in range(2):
            if half == 1 and number == save_in:
                file = io.BytesIO()
                torch.save({"parameters": parameters, "aggregator": aggregator.state_dict()}, file)
                store[party] = file.getvalue()
            if half == 1 or number != resume_in or not resume_in:
                for index, p in enumerate(parameters.values()):
                    p.mul_(0.9).add_(
                        random(97 * party + 10 * number + 2 * half + index, *p.shape).to(p.dtype)
                    )
        assert aggregator.step([1, 3, 0.7][party]).round == number
    return all_bits(parameters) + bits(aggregator.global_vector) + repr(aggregator.state_dict()).encode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "outer",
    [sgd(lr=1.0), sgd(lr=0.7, momentum=0.9, nesterov=True), lambda p: torch.optim.Adam(p, lr=0.1)],
    ids=["FedAvg", "DiLoCo", "FedAdam"],
)
def test_resuming_in_the_middle_of_a_round_is_exact(dtype: torch.dtype, outer: Factory) -> None:
    store: dict[int, bytes] = {}
    whole = run_parties(3, lambda federation: trained(federation, dtype, outer, store, save_in=2))
    again = run_parties(
        3, lambda federation: trained(federation, dtype, outer, store, save_in=None, resume_in=2)
    )
    assert again == whole


def test_a_state_is_a_copy() -> None:
    def act(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, outer_optimizer=sgd(lr=0.7, momentum=0.9))
        w += 1 + federation.party
        aggregator.step(1)
        state = aggregator.state_dict()
        before = repr(state)
        w += 1
        aggregator.step(1)
        assert repr(state) == before, "a later round has changed a state that was saved"

    run_parties(2, act)


def test_a_state_can_be_loaded_twice() -> None:
    saved: dict[int, Any] = {}

    def save(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, outer_optimizer=sgd(lr=0.7, momentum=0.9))
        w += 1 + federation.party
        aggregator.step(1)
        saved[federation.party] = aggregator.state_dict()

    def resume(federation: Federation) -> bytes:
        state = saved[federation.party]
        before = repr(state)
        w = state["global"].clone()
        aggregator = Aggregator(federation, {"w": w}, outer_optimizer=sgd(lr=0.7, momentum=0.9))
        aggregator.load_state_dict(state)
        aggregator.start()
        w += 1
        aggregator.step(1)
        assert repr(state) == before, "going on has changed the state that was loaded"
        return bits(w)

    run_parties(2, save)
    assert len({*run_parties(2, resume), *run_parties(2, resume)}) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(4)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(5)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)},
        {"a": torch.zeros(3, 2), "b": torch.zeros(4)},
        {"a": torch.zeros(4), "b": torch.zeros(2, 3)},
    ],
    ids=["fewer", "renamed", "longer", "more", "transposed", "swapped"],
)
def test_a_state_of_other_parameters_is_refused(other: dict[str, Tensor]) -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    state = Aggregator(federation, {"a": torch.zeros(2, 3), "b": torch.zeros(4)}).state_dict()
    aggregator = Aggregator(federation, other)
    with pytest.raises(ValueError, match="checkpoint"):
        aggregator.load_state_dict(state)
    federation.close()


def resumed(federation: Federation, rounds: int, value: float) -> Aggregator:
    state = Aggregator(Federation(dist.HashStore(), 0, 1), {"w": torch.full((4,), value)}).state_dict()
    aggregator = Aggregator(federation, {"w": torch.full((4,), value)})
    aggregator.load_state_dict(state | {"round": rounds})
    return aggregator


@pytest.mark.parametrize(
    ("rounds", "values", "words"),
    [
        ([3, 3, 4], [1.0, 1.0, 1.0], ["Party 0 starts at round 3, party 2 at round 4"]),
        ([3, 3, 3], [1.0, 1.0, 2.0], ["Parties 0 and 2", "round 3", "different global vectors"]),
    ],
)
def test_parties_that_do_not_resume_together_are_refused(
    rounds: list[int], values: list[float], words: list[str]
) -> None:
    def act(federation: Federation) -> None:
        aggregator = resumed(federation, rounds[federation.party], values[federation.party])
        with pytest.raises(MismatchError) as caught:
            aggregator.start()
        for word in words:
            assert word in str(caught.value)

    run_parties(3, act)


def test_a_party_that_forgot_its_checkpoint_is_refused() -> None:
    def act(federation: Federation) -> None:
        fresh = Aggregator(federation, {"w": torch.full((4,), 1.0)})
        with pytest.raises(MismatchError, match="checkpoints"):
            (fresh if federation.party == 1 else resumed(federation, 0, 1.0)).start()

    run_parties(2, act)


def test_resumed_parties_keep_their_own_parameters() -> None:
    def act(federation: Federation) -> None:
        w = torch.full((4,), 5.0 + federation.party)
        aggregator = Aggregator(federation, {"w": w})
        aggregator.load_state_dict(
            Aggregator(Federation(dist.HashStore(), 0, 1), {"w": torch.ones(4)}).state_dict()
        )
        aggregator.start()
        assert torch.equal(w, torch.full((4,), 5.0 + federation.party))

    run_parties(2, act)


# ---- what must agree before any tensor moves


def plain() -> dict[str, Any]:
    return {
        "parameters": {"a": torch.zeros(2, 3), "b": torch.zeros(4)},
        "frozen": {"embed": random(0, 5), "layer.0": random(1, 5), "layer.1": random(2, 5)},
        "config": {"every_n_epochs": 1, "weighting": "samples"},
    }


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "fewer": (lambda it: it["parameters"].pop("b"), ["Party 0 trains parameter 'b', party 1 does not"]),
    "more": (
        lambda it: it["parameters"].update(c=torch.zeros(1)),
        ["Party 1 trains parameter 'c', party 0 does not"],
    ),
    "renamed": (
        lambda it: it["parameters"].update(z=it["parameters"].pop("b")),
        ["Party 0 trains parameter 'b', party 1 does not"],
    ),
    "shape": (
        lambda it: it["parameters"].update(b=torch.zeros(5)),
        ["'b' is float32 of shape [4] at party 0", "shape [5] at party 1"],
    ),
    "transposed": (
        lambda it: it["parameters"].update(a=torch.zeros(3, 2)),
        ["'a' is float32 of shape [2, 3] at party 0", "shape [3, 2] at party 1"],
    ),
    "dtype": (
        lambda it: it["parameters"].update(b=torch.zeros(4, dtype=torch.bfloat16)),
        ["'b' is float32 of shape [4] at party 0", "bfloat16 of shape [4] at party 1"],
    ),
    "schedule": (
        lambda it: it["config"].update(every_n_epochs=2),
        ["Party 0 has every_n_epochs=1, party 1 has every_n_epochs=2"],
    ),
    "setting": (
        lambda it: it["config"].pop("weighting"),
        ["weighting='samples', party 1 has weighting=None"],
    ),
    "outer optimizer": (
        lambda it: it.update(outer_optimizer=sgd(lr=0.5)),
        ["outer_optimizer", "lr=1.0", "lr=0.5"],
    ),
    "nonfinite": (
        lambda it: it.update(on_nonfinite="raise"),
        ["on_nonfinite='exclude'", "party 1 has on_nonfinite='raise'"],
    ),
    "base": (
        lambda it: (it["frozen"]["layer.0"].add_(1), it["frozen"]["layer.1"].add_(1)),
        ["base model of party 1", "'layer.0'", "check_base=False"],
    ),
    "base dtype": (
        lambda it: it["frozen"].update(embed=it["frozen"]["embed"].double()),
        ["base model of party 1", "'embed'"],
    ),
    "base tensor": (lambda it: it["frozen"].pop("layer.1"), ["base model of party 1", "'layer.1'"]),
    "files": (
        lambda it: it.update(files=["host:/party-0", "host:/logs"]),
        ["Parties 0 and 1", "'host:/party-0'"],
    ),
    "protocol": (
        lambda it: it.update(protocol=99),
        ["Party 1 speaks protocol version 99", "party 0 version"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_party_that_differs_stops_all_before_a_tensor_moves(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = tapped(monkeypatch)
    alter, words = CHANGES[change]
    issue = Aggregator._passport

    def act(federation: Federation) -> str:
        party = federation.party
        made = plain() | {"files": [f"host:/party-{party}"]}
        if party == 1:
            alter(made)
        protocol = made.pop("protocol", passport.PROTOCOL)
        aggregator = Aggregator(federation, **made)
        aggregator._passport = lambda: issue(aggregator) | {"protocol": protocol}  # type: ignore[method-assign]
        for p in made["parameters"].values():
            p.fill_(7.0 + party)
        before = all_bits(made["parameters"])
        with pytest.raises(MismatchError) as caught:
            aggregator.start()
        assert all_bits(made["parameters"]) == before, "a parameter was touched"
        return str(caught.value)

    began = time.monotonic()
    said = run_parties(3, act)
    assert time.monotonic() - began < SOON_S
    assert len(set(said)) == 1, "every party must tell the same"
    for word in words:
        assert word in said[0]
    assert not messages, "a tensor has moved before the parties agreed"


def test_the_order_of_the_mapping_is_no_difference() -> None:
    # a: (1*1 + 3*2) / 4 = 7/4; b: ten times that.
    def act(federation: Federation) -> dict[str, Tensor]:
        names = ["a", "b"] if federation.party == 0 else ["b", "a"]
        parameters = {name: torch.zeros(3) for name in names}
        aggregator = started(federation, parameters)
        write_(parameters, {"a": torch.full((3,), 1.0 + federation.party)})
        write_(parameters, {"b": torch.full((3,), 10.0 + 10 * federation.party)})
        aggregator.step([1, 3][federation.party])
        return parameters

    for parameters in run_parties(2, act):
        assert torch.equal(parameters["a"], torch.full((3,), 1.75))
        assert torch.equal(parameters["b"], torch.full((3,), 17.5))


def test_the_base_is_not_compared_if_a_party_does_not_show_it() -> None:
    def act(federation: Federation) -> None:
        frozen = None if federation.party == 1 else {"embed": torch.ones(3) * federation.party}
        if federation.party != 2:
            started(federation, {"w": torch.zeros(1)}, frozen=frozen)
        else:
            started(federation, {"w": torch.zeros(1)})

    run_parties(3, act)


def test_a_second_aggregator_is_checked_as_the_first() -> None:
    def act(federation: Federation) -> None:
        started(federation, {"a": torch.zeros(2)})
        if federation.party == 1:
            time.sleep(0.3)  # so that its first passport must not be taken for its second
        second = {"b": torch.zeros(2 + federation.party)}
        with pytest.raises(MismatchError, match="'b' is float32 of shape"):
            started(federation, second)

    run_parties(2, act)


def test_two_aggregators_take_turns() -> None:
    # Two adapters in one federation: (1*1 + 3*2) / 4 = 7/4 in the first, ten times that in the second.
    def act(federation: Federation) -> list[Tensor]:
        vectors = [torch.zeros(5), torch.zeros(7)]
        aggregators = [started(federation, {"w": vector}) for vector in vectors]
        for _ in range(2):
            for scale, vector, aggregator in zip([1, 10], vectors, aggregators, strict=True):
                vector += scale * (1 + federation.party)
                aggregator.step([1, 3][federation.party])
        return vectors

    for first, second in run_parties(2, act):
        assert torch.equal(first, torch.full((5,), 3.5))
        assert torch.equal(second, torch.full((7,), 35.0))


def test_a_step_before_the_start_is_refused() -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    aggregator = Aggregator(federation, {"w": torch.zeros(3)})
    with pytest.raises(FederationError, match="start"):
        aggregator.step(1)
    federation.close()


def test_nothing_to_federate_is_refused() -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    with pytest.raises(ValueError, match="no parameter"):
        Aggregator(federation, {})
    federation.close()


# ---- what leaves a party


def test_a_transcript_of_all_that_leaves(monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> None:
    messages = tapped(monkeypatch)
    store = NotedStore()
    secret = torch.tensor([1234.5, 2345.5, 3456.5, 4567.5])
    size, num_parties = 50, 3
    starts = [random(party, size) for party in range(num_parties)]
    ends = [random(10 + party, size) for party in range(num_parties)]
    weights = [1.0, 3.0, 0.0]

    def act(federation: Federation) -> tuple[int, RoundReport, int]:
        party = federation.party
        trained, untrained = starts[party].clone(), secret.clone()
        aggregator = started(federation, {"w": trained}, frozen={"base": untrained})
        before = federation.bytes_sent
        trained.copy_(ends[party])
        report = aggregator.step(weights[party], loss=0.5)
        assert torch.equal(untrained, secret)
        return before, report, federation.bytes_sent

    results = run_parties(num_parties, act, store=store)
    check_words(store, [secret, *starts, *ends])
    for party, (first_sync, report, in_all) in enumerate(results):
        sent = [m for m in messages if m.party == party and m.sent]
        synchronised = [m.values for m in sent if m.collective == "broadcast"]
        summed = [m.values for m in sent if m.collective != "broadcast"]
        # The first synchronisation: party 0's trainable parameters; nothing of the others.
        assert len(synchronised) == (1 if party == 0 else 0)
        assert all(torch.equal(values, starts[0]) for values in synchronised)
        # The round: a header, then this party's share of its update, and the ballot right behind it.
        header, *rest = summed
        mine = torch.zeros(num_parties, 4, dtype=torch.float64)
        mine[party] = torch.tensor([1, 0, weights[party], 1])
        assert torch.equal(header, mine.flatten())
        payload = torch.cat(rest)
        share = weights[party] / sum(weights)
        # anchor - x times the share, which is party 0's start minus the own end; exact zeros at weight 0.
        torch.testing.assert_close(payload[:size], share * (starts[0] - ends[party]), rtol=1e-6, atol=1e-6)
        assert share or bits(payload[:size]) == bytes(4 * size)
        ballot = payload[size:]
        votes = [1.0 if other == party else 0.0 for other in range(num_parties)]
        assert ballot.tolist() == pytest.approx([*votes, 0.0, 0.5 * share, share, share])
        # Bytes are those handed over, no more and no fewer.
        assert in_all == sum(values.nbytes for values in [*synchronised, *summed])
        assert report.bytes_sent == in_all - first_sync, "the report must count all that its round has sent"
        assert first_sync == (4 * size if party == 0 else 0)


def check_words(store: NotedStore, tensors: Iterable[Tensor]) -> None:
    """No word in the store tells a value: there are only names, shapes, dtypes, settings, short digests."""
    # Under "lane" torch's Gloo groups tell each other their addresses.
    words = [value for key, value in store.written if "/lane" not in key]
    assert len(words) > 3
    assert all(len(word) < 1000 for word in words)
    for value in torch.cat(list(tensors)).tolist():
        assert not any(repr(value).encode() in word for word in words)
        assert not any(np.float32(value).tobytes() in word for word in words)


def test_a_second_exchange_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> tuple[RoundReport, RoundReport]:
        w = torch.zeros(100)
        aggregator = started(federation, {"w": w})
        usual = aggregator.step(1)
        w.fill_(math.nan if federation.party == 1 else 1.0)
        return usual, aggregator.step(1)

    for usual, healed in run_parties(2, act):
        assert healed.excluded == (1,)
        assert usual.bytes_sent + 400 <= healed.bytes_sent <= 2 * usual.bytes_sent
    # A party that has NaN does not send them again: the last message of each party is the second exchange.
    assert not any(message.values.isnan().any() for message in messages[-2:])
    assert any(message.values.isnan().any() for message in messages[:-2])


# ---- a party that is lost


def test_a_party_that_dies_between_two_rounds() -> None:
    took: list[float] = []

    def act(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        aggregator.step(1)
        w += 1 + federation.party
        before = bits(w)
        if federation.party == 1:
            raise OSError("power cut")
        began = time.monotonic()
        try:
            aggregator.step(1)
        finally:
            took.append(time.monotonic() - began)
            assert bits(w) == before, "a failed round must leave the parameters as they were"
            assert aggregator.round == 1

    results = run_parties(3, act, may_fail=True)
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "Party 1 left" in str(results[party])
        assert "OSError: power cut" in str(results[party])
    assert max(took) < SOON_S


@pytest.mark.parametrize("handed_over", [0, 2])
def test_a_party_that_dies_in_the_middle_of_a_round(
    handed_over: int, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    # It has met the others, and dies when so many buckets of its parameters are on their way.
    armed = threading.local()
    add_up = Federation.all_reduce_each_

    def failing(self: Federation, tensors: Iterable[Tensor]) -> None:
        def cut_short() -> Iterator[Tensor]:
            for index, tensor in enumerate(tensors):
                if index == handed_over and armed.yes and tensor.dtype is torch.float32:
                    raise OSError("power cut")
                yield tensor

        add_up(self, cut_short())

    monkeypatch.setattr(Federation, "all_reduce_each_", failing)

    def act(federation: Federation) -> None:
        armed.yes = False
        w = torch.zeros(100)
        aggregator = started(federation, {"w": w})
        for _ in range(2):
            aggregator.step(1)
        w += 1 + federation.party
        before = bits(w)
        armed.yes = federation.party == 1
        try:
            aggregator.step(1)
        finally:
            assert bits(w) == before

    began = time.monotonic()
    results = run_parties(3, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    assert isinstance(results[1], OSError)
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "Party 1 left the federation while in round 2: OSError: power cut" in str(results[party])


class Breaking(torch.optim.SGD):
    """Fails in its second step."""

    def step(self, closure: Any = None) -> Any:
        if self.state:
            raise OSError("power cut")
        return super().step(closure)


def test_a_party_that_dies_while_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    # The others have the sum already and finish the round; they learn of it in the next one.
    def act(federation: Federation) -> list[RoundReport]:
        outer = Breaking if federation.party == 1 else torch.optim.SGD
        aggregator = Aggregator(
            federation,
            {"w": torch.zeros(4)},
            outer_optimizer=lambda p: outer(p, lr=0.5, momentum=0.9),
            config={"outer_optimizer": "SGD"},
        )
        aggregator.start()
        return [aggregator.step(1) for _ in range(3)]

    results = run_parties(3, act, may_fail=True)
    assert isinstance(results[1], OSError)
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "Party 1 left the federation while in round 1: OSError: power cut" in str(results[party])


@pytest.mark.parametrize("elsewhere", ["drained", "metrics"])
def test_a_party_that_dies_while_others_are_elsewhere(elsewhere: str) -> None:
    def act(federation: Federation) -> None:
        aggregator = started(federation, {"w": torch.zeros(4)})
        if federation.party == 1:
            time.sleep(0.2)
            raise OSError("power cut")
        if elsewhere == "drained":
            list(aggregator.drain())
        else:
            aggregator.mean({"loss": (1.0, 1)})

    began = time.monotonic()
    results = run_parties(3, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "OSError: power cut" in str(results[party])


def test_a_party_that_does_not_come_to_a_round() -> None:
    done = threading.Event()

    def act(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        aggregator.step(1)
        w += 1
        if federation.party == 1:
            done.wait(SOON_S)
        try:
            aggregator.step(1)
        finally:
            done.set()
            assert torch.equal(w, torch.ones(4))

    began = time.monotonic()
    results = run_parties(2, act, timeout_s=1, may_fail=True)
    assert time.monotonic() - began < SOON_S
    assert isinstance(results[0], PartyLostError)
    for words in ("round 1", "party 1", "1 s", "raise timeout_s"):
        assert words in str(results[0])
    assert isinstance(results[1], PartyLostError), "a party that comes too late must not go on alone"


def test_parties_in_different_rounds_stop_all() -> None:
    def act(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        aggregator.round += federation.party  # as a party whose schedule counts other steps
        w += 1
        with pytest.raises(MismatchError, match=r"party 0: 0, party 1: 1, party 2: 2"):
            aggregator.step(1)
        assert torch.equal(w, torch.ones(4))

    run_parties(3, act)


# ---- parameters of every kind


def test_parameters_of_every_kind(small_pieces: None) -> None:
    # Party 0 (weight 1) and party 1 (weight 3) move everything by 1 and 2: by 7/4 together.
    kinds = {
        "across": random(0, 6, 7).t(),
        "empty": torch.zeros(0, 3),
        "expanded view": random(1, 4, 6)[:, ::2],
        "half": random(2, 9).half(),
        "large": random(3, 100),
        "number": torch.tensor(2.0),
        "slice": random(4, 40)[3:21],
    }
    base = {name: tensor.clone() for name, tensor in kinds.items()}

    def act(federation: Federation) -> dict[str, Tensor]:
        parameters = {}
        for name, tensor in kinds.items():
            parameters[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            parameters[name].copy_(tensor)
        assert not parameters["across"].is_contiguous()
        aggregator = started(federation, parameters)
        for _ in range(2):
            for tensor in parameters.values():
                tensor += 1 + federation.party
            aggregator.step([1, 3][federation.party])
        return parameters

    first, second = run_parties(2, act)
    assert all_bits(first) == all_bits(second)
    for name, tensor in first.items():
        tolerance = 1e-6 if tensor.dtype is torch.float32 else 8e-3
        torch.testing.assert_close(tensor.float(), base[name].float() + 3.5, rtol=0, atol=tolerance)


def test_parties_may_lay_out_memory_differently(small_pieces: None) -> None:
    # The same names, shapes and dtypes, but party 1 keeps "b" by columns: (1*x + 3*y) / 4 in any order.
    def act(federation: Federation) -> Tensor:
        by_rows = random(5 + federation.party, 9, 10)
        b = by_rows.t().contiguous().t() if federation.party == 1 else by_rows.clone()
        parameters = {"a": torch.zeros(3), "b": b, "c": torch.zeros(5)}
        aggregator = started(federation, parameters)
        write_(parameters, {"b": random(7 + federation.party, 9, 10)})
        aggregator.step([1, 3][federation.party])
        return b

    expected = (random(7, 9, 10).double() + 3 * random(8, 9, 10).double()) / 4
    for result in run_parties(2, act):
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


def test_tied_parameters_are_averaged_once() -> None:
    # Two names, one storage: it moves by 7/4, not by twice that.
    def act(federation: Federation) -> Tensor:
        w = torch.zeros(6)
        aggregator = started(federation, {"embedding": w, "head": w.view(2, 3)})
        for _ in range(2):
            w += 1 + federation.party
            aggregator.step([1, 3][federation.party])
        return w

    for result in run_parties(2, act):
        assert torch.equal(result, torch.full((6,), 3.5))


@pytest.mark.parametrize("moved", ["the same", "across"])
def test_storage_that_moves_between_rounds(moved: str, small_pieces: None) -> None:
    # ``module.to(...)`` and others rebind ``p.data``: reading and writing must be where the values now are.
    def act(federation: Federation) -> Tensor:
        w = nn.Parameter(torch.zeros(5, 6))
        aggregator = started(federation, {"w": w})
        for _ in range(3):
            w.data = w.data.clone() if moved == "the same" else w.data.t().contiguous().t()
            write_({"w": w}, {"w": w + 1 + federation.party})
            aggregator.step([1, 3][federation.party])
        return w.detach()

    for result in run_parties(2, act):
        torch.testing.assert_close(result, torch.full((5, 6), 5.25))  # 3 * 7/4


def test_a_parameter_whose_size_changed_is_told() -> None:
    def act(federation: Federation) -> None:
        w = nn.Parameter(torch.zeros(5, 6))
        aggregator = started(federation, {"weight": w})
        w.data = torch.zeros(8, 6)
        with pytest.raises(ValueError, match="'weight'"):
            aggregator.step(1)

    run_parties(1, act)


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outer", [sgd(lr=1.0), sgd(lr=0.5, momentum=0.9)])
def test_no_memory_in_proportion_after_the_first_round(
    dtype: torch.dtype, outer: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_CHUNK", 1024)
    monkeypatch.setattr(layout, "_BUCKET", 4096)
    size = 64 * 1024

    def act(federation: Federation) -> tuple[int, int]:
        with Allocations() as first:
            parameters = {f"{i:02}": torch.zeros(size // 64, dtype=dtype) for i in range(64)}
            first.sizes.clear()
            aggregator = started(federation, parameters, outer_optimizer=outer)
            aggregator.step(1)
        with Allocations() as later:
            for _ in range(2):
                aggregator.step(1)
        return sum(made for made in first.sizes if made > 16 * 1024), max(later.sizes)

    for first, later in run_parties(2, act):
        assert later <= 2 * 4 * 1024, "a later round has allocated more than a chunk or two"
        # The global vector, what crosses, and the outer optimizer's momentum: 3 of 4 bytes for each scalar.
        assert first <= 3.1 * 4 * size


def test_the_size_that_is_told_is_that_of_the_vector() -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    aggregator = Aggregator(federation, {"a": torch.zeros(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)})
    assert aggregator.size_bytes == 4 * 14
    assert aggregator.global_vector.shape == (14,)
    assert aggregator.global_vector.dtype == torch.float32
    federation.close()
