"""Drift corrections: on quadratics they rest where they should, and go the way that their papers tell."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from party_threads import Classifier, data, fit_parties, quiet_trainer
from quadratic_parties import (
    CURVATURES,
    LR,
    MINIMISERS,
    SHARES,
    STEPS,
    WEIGHTS,
    Quadratic,
    minimiser,
    resting_place,
    sgd,
    train,
)
from torch import Tensor

from pellm_lightning.callbacks.drift import SCAFFOLD, FedDyn, FedNova, FedProx

Correction = Callable[[], Callback]
MOMENTUM = sgd(0.03, momentum=0.8)


# ---- where they rest


def test_averaging_rests_elsewhere(tmp_path: Path) -> None:
    end = train(tmp_path, None, 40)[-1]
    np.testing.assert_allclose(end, resting_place(SHARES, LR), atol=2e-6)
    assert np.linalg.norm(end - minimiser(SHARES)) > 0.2


@pytest.mark.parametrize(
    ("correction", "options"),
    [
        (SCAFFOLD, {}),
        (SCAFFOLD, {"optimizer": MOMENTUM, "inner_optimizer_state": "reset"}),
        (SCAFFOLD, {"trainer": lambda: {"gradient_clip_val": 1.0}}),
        # Windows that are full: Lightning divides the loss of a short last one by the full number.
        (SCAFFOLD, {"trainer": lambda: {"accumulate_grad_batches": 2}, "steps": (4, 8, 2)}),
        (partial(FedDyn, alpha=1.0), {}),
        (partial(FedDyn, alpha=1.0), {"optimizer": MOMENTUM}),
    ],
)
def test_reaches_the_minimiser(tmp_path: Path, correction: Correction, options: dict[str, Any]) -> None:
    end = train(tmp_path, correction, 50, **options)[-1]
    np.testing.assert_allclose(end, minimiser(SHARES), atol=1e-4)


def test_weight_decay_is_part_of_the_loss(tmp_path: Path) -> None:
    end = train(tmp_path, SCAFFOLD, 45, optimizer=sgd(weight_decay=0.3))[-1]
    curvature = np.einsum("i,ijk->jk", SHARES, CURVATURES)
    expected = np.linalg.solve(curvature + 0.3 * np.eye(2), curvature @ minimiser(SHARES))
    np.testing.assert_allclose(end, expected, atol=1e-4)


def test_fednova_fixed_point(tmp_path: Path) -> None:
    """u_i / tau_i is the mean of gradients along the way, so the bias left is of the order of lr."""
    end = train(tmp_path, FedNova, 36)[-1]
    np.testing.assert_allclose(end, resting_place(SHARES / STEPS, LR), atol=2e-6)
    true, uneven = minimiser(SHARES), minimiser(SHARES * STEPS / (SHARES @ STEPS))
    gaps = [np.linalg.norm(resting_place(SHARES / STEPS, lr) - true) for lr in (LR, LR / 10, LR / 100)]
    assert gaps[1] < 0.15 * gaps[0]
    assert gaps[2] < 0.15 * gaps[1]
    # Averaging goes to another loss's minimiser, however small the steps.
    np.testing.assert_allclose(resting_place(SHARES, LR / 1000), uneven, atol=2e-3)
    assert np.linalg.norm(uneven - true) > 10 * gaps[1]


def test_adam_comes_closer_with_scaffold(tmp_path: Path) -> None:
    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.1)

    gaps = [
        np.linalg.norm(train(tmp_path, correction, 40, optimizer=adam, decay=0.97)[-1] - minimiser(SHARES))
        for correction in (None, SCAFFOLD)
    ]
    assert gaps[1] < 0.2 * gaps[0]


# ---- the way, re-derived from the papers in float64


def local(
    party: int,
    start: np.ndarray,
    rates: list[float],
    correct: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return x_i after steps of gradient descent."""
    x = start.copy()
    for rate in rates:
        gradient = CURVATURES[party] @ (x - MINIMISERS[party])
        x = x - rate * (gradient + (0.0 if correct is None else correct(x)))
    return x


def rates_of(party: int, round: int, decay: float) -> list[float]:
    return [LR * decay ** (round * STEPS[party] + step) for step in range(STEPS[party])]


def test_scaffold_equals_the_paper(tmp_path: Path) -> None:
    """Algorithm 1 with option II, all parties in each round; shares instead of 1 / N; schedules by sums."""
    path = train(tmp_path, SCAFFOLD, 6, decay=0.98)
    x, c, own = np.zeros(2), np.zeros(2), np.zeros((3, 2))
    for round in range(6):
        rates = [rates_of(party, round, 0.98) for party in range(3)]
        shifts = c - own
        ends = [local(p, x, rates[p], lambda _, shift=shifts[p]: shift) for p in range(3)]
        new = np.stack([own[p] - c + (x - ends[p]) / sum(rates[p]) for p in range(3)])
        c = c + SHARES @ (new - own)
        x, own = x + SHARES @ (np.stack(ends) - x), new
        np.testing.assert_allclose(path[round], x, atol=5e-6)


def test_feddyn_equals_the_paper(tmp_path: Path) -> None:
    """Algorithm 1, all parties in each round; shares instead of 1 / m."""
    alpha = 0.7
    path = train(tmp_path, partial(FedDyn, alpha), 6, decay=0.98)
    x, h, own = np.zeros(2), np.zeros(2), np.zeros((3, 2))
    for round in range(6):
        ends = np.stack(
            [
                local(p, x, rates_of(p, round, 0.98), lambda at, x=x, h_i=own[p]: alpha * (at - x) - h_i)
                for p in range(3)
            ]
        )
        own = own - alpha * (ends - x)
        h = h - alpha * SHARES @ (ends - x)
        x = SHARES @ ends - h / alpha
        np.testing.assert_allclose(path[round], x, atol=2e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_fednova_equals_the_paper(tmp_path: Path, momentum: float) -> None:
    """Its update rule, with the closed form of ``|a_i|_1`` for momentum."""
    path = train(tmp_path, FedNova, 5, optimizer=sgd(momentum=momentum), inner_optimizer_state="reset")
    reach = np.array([(t - momentum * (1 - momentum**t) / (1 - momentum)) / (1 - momentum) for t in STEPS])
    x = np.zeros(2)
    for round in range(5):
        updates = []
        for party in range(3):
            at, velocity = x.copy(), np.zeros(2)
            for _ in range(STEPS[party]):
                velocity = momentum * velocity + CURVATURES[party] @ (at - MINIMISERS[party])
                at = at - LR * velocity
            updates.append((x - at) / reach[party])
        x = x - SHARES @ reach * (SHARES @ np.stack(updates))
        np.testing.assert_allclose(path[round], x, rtol=2e-5, atol=5e-6)


def test_fedprox_reaches_the_proximal_solution(tmp_path: Path) -> None:
    """``argmin f_i + mu/2 |x - anchor|^2 = (H_i + mu)^-1 (H_i b_i + mu anchor)``, averaged, twice."""
    mu, x = 0.8, np.zeros(2)
    path = train(tmp_path, partial(FedProx, mu), 2, steps=(150, 150, 150), optimizer=sgd(0.3))
    for round in range(2):
        solutions = [
            np.linalg.solve(h + mu * np.eye(2), h @ b + mu * x)
            for h, b in zip(CURVATURES, MINIMISERS, strict=True)
        ]
        x = SHARES @ np.stack(solutions)
        np.testing.assert_allclose(path[round], x, atol=1e-5)


def test_a_strong_fedprox_holds_the_anchor(tmp_path: Path) -> None:
    # lr (H + mu) must stay below 2.
    end = train(tmp_path, partial(FedProx, 1e4), 1, optimizer=sgd(1e-4))[-1]
    assert np.linalg.norm(end) < 2e-3


@settings(max_examples=40, deadline=None)
@given(
    tau=st.integers(1, 40),
    rho=st.floats(0.0, 0.99),
    lr=st.floats(1e-4, 1.0),
)
def test_momentum_has_the_closed_form(tau: int, rho: float, lr: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=rho)
    expected = lr * (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    assert reach(optimizer, parameter, tau) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.7, "dampening": 0.4},
        {"momentum": 0.5, "dampening": 1.0},
    ],
)
def test_the_reach_is_what_torch_moves(setting: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.3, **setting)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def step() -> None:
        parameter.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        schedule.step()

    assert reach(optimizer, parameter, 9, step) == pytest.approx(-parameter.item(), rel=1e-12)


def reach(
    optimizer: torch.optim.Optimizer,
    parameter: torch.nn.Parameter,
    steps: int,
    step: Callable[[], None] = lambda: None,
) -> float:
    correction = FedNova()
    correction.begin({"x": parameter}, {}, resumed=False)
    for _ in range(steps):
        correction._stepped(optimizer)
        step()
    return correction.contribution().effective_steps


# ---- where there is nothing to correct


def classified(root: Path, corrections: list[Correction], parties: int = 2, **arguments: Any) -> list[Tensor]:
    """Return the parameters after some rounds, equal at all parties, for each of the corrections."""

    def fit(correction: Correction, party: int, federated: Any) -> Tensor:
        module = Classifier(seed=party)
        callbacks = [federated(every_n_steps=3, **arguments), *([correction()] if correction else [])]
        quiet_trainer(root, callbacks).fit(module, data(20 + 4 * party, seed=party))
        return module.vector()

    ends = []
    for correction in corrections:
        vectors = fit_parties(parties, partial(fit, correction))
        assert all(torch.equal(vectors[0], other) for other in vectors)
        ends.append(vectors[0])
    return ends


def test_without_effect_to_the_bit(tmp_path: Path) -> None:
    plain, prox = classified(tmp_path, [None, partial(FedProx, 0.0)])  # type: ignore[list-item]
    assert torch.equal(plain, prox)
    plain, scaffold = classified(tmp_path, [None, SCAFFOLD], parties=1)  # type: ignore[list-item]
    assert torch.equal(plain, scaffold)


def test_equal_reach_is_averaging(tmp_path: Path) -> None:
    plain, nova = classified(tmp_path, [None, FedNova], parties=1)  # type: ignore[list-item]
    torch.testing.assert_close(plain, nova, rtol=1e-5, atol=1e-6)
    paths = [train(tmp_path, correction, 4, steps=(3, 3, 3)) for correction in (None, FedNova)]
    np.testing.assert_allclose(*paths, rtol=1e-6, atol=1e-6)


def test_equal_parties_need_no_correction(tmp_path: Path) -> None:
    """c is c_i up to the rounding of shares."""
    alike = {"curvatures": CURVATURES[[0, 0, 0]], "steps": (4, 4, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quadratic_parties.MINIMISERS", MINIMISERS[[0, 0, 0]])
        plain, scaffold, one = (
            train(tmp_path, correction, 5, **alike)[-1]  # type: ignore[arg-type]
            for correction in (None, SCAFFOLD, partial(FedProx, 0.0))
        )
    np.testing.assert_allclose(plain, scaffold, atol=1e-6)
    np.testing.assert_array_equal(plain, one)


def test_feddyn_of_one_party_goes_to_its_minimum(tmp_path: Path) -> None:
    end = train(tmp_path, partial(FedDyn, 1.0), 40, steps=(5,), weights=(1.0,))[-1]
    np.testing.assert_allclose(end, MINIMISERS[0], atol=1e-4)


# ---- precision


@pytest.mark.parametrize("correction", [partial(FedProx, 0.5), SCAFFOLD, FedNova, partial(FedDyn, 1.0)])
def test_scaled_gradients_are_unscaled_first(tmp_path: Path, correction: Correction) -> None:
    """A correction of gradients that are still 1024 times as large would be as good as none."""
    plain = train(tmp_path, correction, 3)

    def trainer() -> dict[str, Any]:
        return {"plugins": [scaled(init_scale=1024.0, growth_interval=10**6)]}

    np.testing.assert_allclose(train(tmp_path, correction, 3, trainer=trainer), plain, rtol=2e-2, atol=2e-2)


def test_skipped_steps_do_not_count(tmp_path: Path) -> None:
    """The first scale overflows in one step of each party; what remains are STEPS - 1 steps."""

    class Overflowing(Quadratic):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.total_batch_idx == 0 and self.x.grad is not None:
                self.x.grad.fill_(math.inf)

    seen = {}

    def fit(correction: FedNova | SCAFFOLD, party: int, federated: Any) -> None:
        module = Overflowing(CURVATURES[party], MINIMISERS[party], sgd())
        plugin = scaled(init_scale=4.0, growth_interval=10**6)
        callbacks = [federated(weighting=WEIGHTS[party], every_n_epochs=5), correction]
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=1, plugins=[plugin])
        give = correction.contribution

        def noted() -> Any:
            given = seen[party] = give()
            return given

        correction.contribution = noted  # type: ignore[method-assign]
        trainer.fit(module, data(STEPS[party], seed=party, batch_size=1))

    fit_parties(3, lambda party, federated: fit(FedNova(), party, federated))
    assert [seen[p].effective_steps for p in range(3)] == pytest.approx([LR * (t - 1) for t in STEPS])
    fit_parties(3, lambda party, federated: fit(SCAFFOLD(), party, federated))
    for party in range(3):
        # Half precision products leave three digits.
        mean = np.mean(
            [
                CURVATURES[party] @ (local(party, np.zeros(2), [LR] * k) - MINIMISERS[party])
                for k in range(STEPS[party] - 1)
            ],
            axis=0,
        )
        np.testing.assert_allclose(seen[party].vector["x"].numpy(), mean, rtol=1e-2, atol=1e-2)


def scaled(**settings: Any) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **settings))


@pytest.mark.parametrize("correction", [partial(FedProx, 0.5), SCAFFOLD, FedNova, partial(FedDyn, 1.0)])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(tmp_path: Path, correction: Correction, precision: str) -> None:
    plain = train(tmp_path, correction, 4)[-1]
    end = train(tmp_path, correction, 4, trainer=lambda: {"precision": precision})[-1]
    np.testing.assert_allclose(end, plain, rtol=0.1, atol=0.1)
