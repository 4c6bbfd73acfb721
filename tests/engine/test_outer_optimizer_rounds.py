"""Rounds with outer optimizers: against their formulas in float64."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from manual_rounds import Factory, OtherBits, all_bits, bits, random, sgd, started
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Federation
from pellm_lightning.comm.torchrun.federation import SLOT_BYTES

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


# ---- parties whose processors round otherwise


def test_a_step_that_gives_other_bits_at_a_party_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    def act(federation: Federation) -> tuple[bytes, bytes, Tensor]:
        w = random(999, 40)
        outer = partial(OtherBits, here=federation.party == 1)
        aggregator = started(federation, {"w": w}, outer_optimizer=outer)
        for number in range(3):
            w.add_(random(number, 40), alpha=0.1 + federation.party)
            aggregator.step(1.0)
        (state,) = aggregator.state_dict()["fragments"][0]["outer_optimizer"]["state"].values()
        return bits(w), bits(aggregator.global_vector), state["momentum_buffer"]

    first, *others = run_parties(3, act)
    for other in others:
        assert other[:2] == first[:2]
        assert torch.equal(other[2], first[2])
    assert first[0] == bits(federated_alike())
    said = [record.getMessage() for record in caplog.records if "other bits" in record.getMessage()]
    assert len(said) == 3, "each party says it once"
    assert all(
        "Round 0: the outer optimizer OtherBits gave other bits at party 1 than at party 0" in x for x in said
    )


def federated_alike() -> Tensor:
    """What party 0 computes where no processor is off."""

    def act(federation: Federation) -> Tensor:
        w = random(999, 40)
        aggregator = started(federation, {"w": w}, outer_optimizer=sgd(lr=0.7, momentum=0.9))
        for number in range(3):
            w.add_(random(number, 40), alpha=0.1 + federation.party)
            aggregator.step(1.0)
        return w

    return run_parties(3, act)[0]


@pytest.mark.parametrize(("outer", "words"), [(sgd(lr=1.0), 0), (sgd(lr=0.7), 1)])
def test_only_what_parties_compute_themselves_is_compared(outer: Factory, words: int, lane: str) -> None:
    def act(federation: Federation) -> int:
        w = random(0, 40)
        aggregator = started(federation, {"w": w}, outer_optimizer=outer)
        return aggregator.step(1.0).bytes_sent

    # A header's slot; 40 float32, then two flags, the clipping bit, the loss with
    # its weight, and the weight; and a checksum of each party. What is shown in memory has a loss and a
    # norm of 8 bytes each instead of the flags.
    behind = 4 * 6 if lane == "gloo" or words else 2 * 8
    assert run_parties(2, act) == [SLOT_BYTES + 4 * 40 + behind + 2 * 8 * words] * 2
