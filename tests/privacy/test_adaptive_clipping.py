"""Adaptive clipping against the paper's formulas and Flower's numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellm_lightning.privacy import AdaptiveClipping, GaussianMechanism, Noise
from pellm_lightning.privacy.clipping import MAX_NORM, MIN_NORM


@pytest.mark.parametrize(
    ("multiplier", "counting", "bit_std", "std", "raised"),
    [
        # What compute_adaptive_noise_params of flwr 1.41.0 returns.
        (0.5, 100, None, 5.0, 0.5006261743217588),
        (1.0, 40, None, 2.0, 1.0327955589886446),
        (0.4, 8, 1.5, 1.5, 0.4036036763977875),
        (4.0, 8, 4.0, 4.0, 4.618802153517006),
    ],
)
def test_splits_the_budget_as_flower_does(
    multiplier: float, counting: int, bit_std: float | None, std: float, raised: float
) -> None:
    adaptive = AdaptiveClipping(bit_std=bit_std)
    assert adaptive.sum_std(multiplier, counting) == std
    assert adaptive.update_multiplier(multiplier, counting) == pytest.approx(raised, rel=1e-14)


def test_few_parties_get_a_split_where_flower_refuses() -> None:
    # 4 / 20 is not above z / 2 = 2; with s = z the bits take a quarter, and the update the rest.
    adaptive = AdaptiveClipping()
    assert adaptive.sum_std(4.0, 4) == 4.0
    assert adaptive.update_multiplier(4.0, 4) == pytest.approx(4.0 / math.sqrt(3 / 4))


@settings(deadline=None)
@given(
    multiplier=st.floats(1e-3, 1e3),
    counting=st.integers(1, 10**6),
    above=st.none() | st.floats(1.001, 1e3),
)
def test_update_and_bit_cost_what_the_multiplier_says(
    multiplier: float, counting: int, above: float | None
) -> None:
    adaptive = AdaptiveClipping(bit_std=None if above is None else above * multiplier / 2)
    mechanism = GaussianMechanism(0.1, multiplier, adaptive=adaptive, colluders=0)
    # One Gaussian mechanism on (update / std, bit / std): squared sensitivities over variances add up. The
    # update moves the sum by at most C, the bit by 1/2, and the variances of the parties' noises add up.
    update = 0.1**2 / (counting * mechanism.noise_std(counting, 0.1) ** 2)
    bit = 0.5**2 / (counting * mechanism.bit_noise_std(counting) ** 2)
    assert update + bit == pytest.approx(1 / multiplier**2, rel=1e-9)


def test_a_bit_says_whether_the_update_is_within() -> None:
    assert AdaptiveClipping.bit(1.0, 1.0) == 0.5
    assert AdaptiveClipping.bit(1.01, 1.0) == AdaptiveClipping.bit(math.inf, 1.0) == -0.5
    assert AdaptiveClipping.bit(math.nan, 1.0) == -0.5


def test_moves_as_in_the_paper() -> None:
    # 3 of 8 within, so b = 3/8: C exp(-0.2 (3/8 - 1/2)); then 7 of 8.
    adaptive = AdaptiveClipping(0.5, 0.2)
    assert adaptive.updated(0.3, (3 * 0.5 - 5 * 0.5) / 8) == pytest.approx(0.3075945361573286, rel=1e-12)
    assert adaptive.updated(0.3, (7 * 0.5 - 1 * 0.5) / 8) == pytest.approx(0.2783230458985658, rel=1e-12)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_finds_the_quantile(quantile: float, start: float) -> None:
    norms = torch.linspace(1, 3, 101).tolist()  # its quantiles: 1 + 2 q
    adaptive, noise, bound = AdaptiveClipping(quantile, 0.2), Noise(), start
    mechanism = GaussianMechanism(start, 1.0, adaptive=adaptive)
    tail = []
    for step in range(400):
        bits = torch.tensor([adaptive.bit(norm, bound) for norm in norms])
        noisy = noise.add_(bits, mechanism.bit_noise_std(len(norms)))
        bound = adaptive.updated(bound, float(noisy.mean()))
        tail += [bound] if step >= 300 else []
    # Each step's noise moves the bound by about 1 %; the mean of 100 of them is well within 10 %.
    assert sum(tail) / len(tail) == pytest.approx(1 + 2 * quantile, rel=0.1)


@settings(deadline=None)
@given(bound=st.floats(MIN_NORM, MAX_NORM), mean=st.floats(-1e30, 1e30), rate=st.floats(1e-3, 1e3))
def test_stays_where_clipping_is_exact(bound: float, mean: float, rate: float) -> None:
    moved = AdaptiveClipping(0.5, rate).updated(bound, mean)
    assert MIN_NORM <= moved <= MAX_NORM


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_quantile": 1.5}, r"target_quantile=1\.5 must be from 0 to 1"),
        ({"target_quantile": math.nan}, "target_quantile=nan"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"bit_std": 0.0}, r"bit_std=0\.0 must be"),
        ({"bit_std": math.nan}, "bit_std=nan"),
    ],
)
def test_refuses(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdaptiveClipping(**settings)


def test_refuses_a_mean_that_is_none() -> None:
    with pytest.raises(ValueError, match="mean of the clipping bits is nan"):
        AdaptiveClipping().updated(1.0, math.nan)
