"""A clipped update is within its norm, whatever it held."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellm_lightning.privacy.clipping import MAX_NORM, MIN_NORM, clip_, clip_factor, squared_norm

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


def exact_norm(values: torch.Tensor) -> float:
    return math.hypot(*values.double().tolist())


def clipped(values: torch.Tensor, max_norm: float) -> torch.Tensor:
    return clip_(values.clone(), clip_factor(math.sqrt(squared_norm(values)), max_norm))


@settings(max_examples=500, deadline=None)
@given(values=st.lists(FLOATS, min_size=1, max_size=40), max_norm=st.floats(MIN_NORM, MAX_NORM))
def test_never_exceeds_the_norm(values: list[float], max_norm: float) -> None:
    result = clipped(torch.tensor(values), max_norm)
    assert result.isfinite().all()
    assert exact_norm(result) <= max_norm
    # Nor after a share has rounded it once more.
    assert exact_norm(result.mul_(1 / 3)) <= max_norm / 3


@settings(max_examples=200, deadline=None)
@given(
    exponent=st.integers(-149, 127),
    size=st.integers(1, 2000),
    at=st.floats(0.9999999, 1.0000001),
)
def test_never_exceeds_a_norm_nearby(exponent: int, size: int, at: float) -> None:
    # Equal values all round the same way, so that their errors add up.
    values = torch.full((size,), 2.0**exponent * 1.3)
    bound = min(max(exact_norm(values) * at, MIN_NORM), MAX_NORM)
    assert exact_norm(clipped(values, bound)) <= bound


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_clears_all(bad: float) -> None:
    assert torch.equal(clipped(torch.tensor([1.0, bad, 2.0]), 1.0), torch.zeros(3))


def test_within_the_norm_nothing_changes() -> None:
    values = torch.randn(100)
    assert torch.equal(clipped(values, exact_norm(values) * 1.001), values)


def test_clips_to_the_norm_and_keeps_the_direction() -> None:
    values = torch.tensor([3.0, -4.0])  # norm 5
    torch.testing.assert_close(clipped(values, 2.0), torch.tensor([1.2, -1.6]), rtol=2e-6, atol=0)
    assert exact_norm(clipped(values, 2.0)) > 2 * (1 - 2e-6)


def test_an_update_beyond_all_measure_is_none() -> None:
    assert clip_factor(1e31, 1.0) == 0
    assert clip_factor(1e30, 1.0) == pytest.approx(1e-30, rel=1e-5)


def test_norm_is_accurate_where_float32_is_not() -> None:
    values = torch.full((1 << 20,), 0.1)
    assert squared_norm(values) == pytest.approx((1 << 20) * float(values[0].double()) ** 2, rel=1e-9)
    assert squared_norm(torch.full((2,), 3e38)) == pytest.approx(2 * 9e76, rel=1e-6)
