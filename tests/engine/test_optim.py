"""Optimizers that torch has not, against their papers in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pellm_lightning.engine.optim import Yogi


def run(gradients: list[Tensor], x: Tensor, **arguments: Any) -> Tensor:
    parameter = nn.Parameter(x.clone())
    optimizer = Yogi([parameter], **arguments)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@given(
    seed=st.integers(0, 1000),
    steps=st.integers(1, 12),
    lr=st.sampled_from([1e-3, 0.1, 1.0]),
    betas=st.sampled_from([(0.9, 0.99), (0.0, 0.5), (0.5, 0.0)]),
    eps=st.sampled_from([1e-8, 1e-3, 0.1]),
    v0=st.sampled_from([0.0, 1e-6, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_yogi_equals_its_formula(
    seed: int, steps: int, lr: float, betas: tuple[float, float], eps: float, v0: float
) -> None:
    """Reddi et al. 2021, algorithm 2, lines 9 and 12 to 14, with Delta = -g and tau = eps."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, generator=generator, dtype=torch.float64)
    gradients = [
        torch.randn(7, generator=generator, dtype=torch.float64) * 10.0 ** (k % 5 - 2) for k in range(steps)
    ]
    expected, m, v = x.numpy().copy(), np.zeros(7), np.full(7, v0)
    for gradient in gradients:
        delta = -gradient.numpy()
        m = betas[0] * m + (1 - betas[0]) * delta
        v = v - (1 - betas[1]) * delta**2 * np.sign(v - delta**2)
        expected = expected + lr * m / (np.sqrt(v) + eps)
    got = run(gradients, x, lr=lr, betas=betas, eps=eps, initial_accumulator_value=v0)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_second_moment_falls_slowly_after_a_burst() -> None:
    """What Yogi is for (Zaheer et al. 2018): Adam forgets a large gradient by beta2 a step, Yogi hardly."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = Yogi([p], initial_accumulator_value=0.0)
    for gradient in [100.0] + [0.01] * 50:
        p.grad = torch.tensor([gradient])
        optimizer.step()
    # v = 0.01 * 100^2 = 100 after the burst, less 50 * 0.01 * 0.01^2; Adam's would be 100 * 0.99^50 = 60.5.
    assert float(optimizer.state[p]["exp_avg_sq"]) == pytest.approx(100 - 5e-5, rel=1e-6)


def test_it_converges() -> None:
    p = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = Yogi([p], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss = optimizer.step(lambda: backward(p))
    assert loss is not None
    assert loss < 1e-4


def backward(p: Tensor) -> float:
    loss = (p * p).sum()
    loss.backward()
    return float(loss.detach())


def test_without_a_gradient_nothing_moves() -> None:
    p, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([1.0, -0.0]))
    optimizer = Yogi([p, still])
    p.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(p, torch.ones(2))
    assert still not in optimizer.state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"eps": -1.0}, "eps=-1.0 must be above 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must both be in \[0, 1\)"),
        ({"initial_accumulator_value": -1.0}, "initial_accumulator_value=-1.0 must be 0 or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Yogi([nn.Parameter(torch.zeros(1))], **arguments)
