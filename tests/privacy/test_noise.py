"""Noise has the standard deviation it should, and no seed gives it away."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import seed_everything
from party_threads import in_threads
from scipy import stats

from pellm_lightning.privacy import Noise

DRAWS = 1 << 19  # two blocks


def drawn(std: float, size: int = DRAWS) -> torch.Tensor:
    return Noise().add_(torch.zeros(size), std).double()


@pytest.mark.parametrize("std", [1e-12, 3e-4, 1.0, 7e9])
def test_standard_deviation_mean_and_tails(std: float) -> None:
    draws = drawn(std) / std
    # Of n draws, n * variance is chi-square with n degrees of freedom, the mean normal; each at 1 in 10^9.
    low, high = (stats.chi2.ppf(p, DRAWS) / DRAWS for p in (5e-10, 1 - 5e-10))
    assert low < float(draws.square().mean()) < high
    assert abs(float(draws.mean())) < 6.2 / math.sqrt(DRAWS)
    assert 4 < float(draws.abs().max()) < 8


def test_is_normal() -> None:
    assert stats.kstest(drawn(2.0).numpy(), stats.norm(scale=2.0).cdf).pvalue > 1e-9


def test_draws_of_a_chunk_are_independent() -> None:
    draws = drawn(1.0)
    # The two halves of a block are the sine and cosine of the same angles.
    for lag in (1, 2, 1 << 17, 1 << 18):
        for power in (1, 2):
            a, b = draws[:-lag] ** power, draws[lag:] ** power
            correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
            assert abs(correlation) < 6.2 / math.sqrt(len(a))


def test_parties_under_one_seed_draw_different_noise() -> None:
    draws = []
    for _ in range(2):
        seed_everything(1, verbose=False)
        draws.append(drawn(1.0))
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        del os.environ[name]
    in_threads([lambda: draws.append(drawn(1.0)) for _ in range(2)])
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(4, dtype=torch.float64)
    assert float(correlations.abs().max()) < 6.2 / math.sqrt(DRAWS)


def test_one_object_never_repeats_itself() -> None:
    noise = Noise()
    assert not torch.equal(noise.add_(torch.zeros(8), 1.0), noise.add_(torch.zeros(8), 1.0))


def test_a_forked_process_draws_its_own() -> None:
    noise = Noise()
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, noise._source(32))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 32)
    os.close(read)
    os.close(write)
    assert len(theirs) == 32
    assert theirs != noise._source(32)


def test_leaves_torch_generators_alone() -> None:
    before = torch.get_rng_state()
    drawn(1.0, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_has_no_state_to_save() -> None:
    assert vars(Noise()) == {"_source": os.urandom}


def test_adds_to_what_is_there() -> None:
    values = torch.randn(DRAWS)
    noisy = values.clone()
    assert Noise().add_(noisy, 0.5) is noisy
    assert float((noisy - values).std()) == pytest.approx(0.5, rel=0.01)


def test_no_noise_leaves_the_bits() -> None:
    values = torch.randn(10)
    assert torch.equal(Noise().add_(values.clone(), 0.0), values)


def test_the_transform_is_box_and_mullers() -> None:
    # Two pairs of words, first the radii's: u = (x / 2^11 + 2^52 + 1) / 2^53 of a signed x, by hand.
    words = [0, 2**62, 0, -(2**62)]
    uniform = [(word // 2**11 + 2**52 + 1) / 2**53 for word in words]
    radius = [math.sqrt(-2 * math.log(u)) for u in uniform[:2]]
    angle = [2 * math.pi * u for u in uniform[2:]]
    expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    source = torch.tensor(words).numpy().tobytes()
    added = Noise(lambda size: source[:size]).add_(torch.zeros(4), 1.0)
    torch.testing.assert_close(added, torch.tensor(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("byte", [b"\x00", b"\xff", b"\x7f", b"\x80"])
def test_extreme_words_give_finite_noise(byte: bytes) -> None:
    # -1 >> 11 is -1, the largest negative; 0x80.. gives the least uniform, 2^-53, 0x7f.. the greatest.
    assert Noise(lambda size: byte * size).add_(torch.zeros(3), 1.0).isfinite().all()


def test_the_least_word_has_a_finite_logarithm() -> None:
    least = (-(2**63)).to_bytes(8, "little", signed=True)
    added = Noise(lambda size: least * (size // 8)).add_(torch.zeros(2), 1.0)
    assert float(added.norm()) == pytest.approx(math.sqrt(2 * 53 * math.log(2)), rel=1e-6)


@settings(deadline=None)
@given(
    value=st.floats(-100, 100, width=32),
    std=st.floats(2.0**-40, 2.0**40),
)
def test_lands_on_a_grid_that_the_value_does_not_choose(value: float, std: float) -> None:
    grid = 2.0 ** math.floor(math.log2(std)) * 2.0**-30
    noisy = Noise().add_(torch.full((64,), value), std).double()
    # Where float32 is finer than the grid; where it is coarser, rounding to it comes after the grid.
    fine = noisy[noisy.abs() < grid * 2**24]
    assert torch.equal(fine.div(grid).round(), fine.div(grid))


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_refuses_no_standard_deviation(std: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number >= 0"):
        Noise().add_(torch.zeros(3), std)


@pytest.mark.parametrize("chunk", [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 2)])
def test_refuses_what_is_not_flat_float32(chunk: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="flat float32"):
        Noise().add_(chunk, 1.0)


def test_an_empty_chunk_stays_empty() -> None:
    assert Noise().add_(torch.zeros(0), 1.0).numel() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    noisy = Noise().add_(torch.zeros(DRAWS, device="cuda"), 2.0)
    assert float(noisy.std()) == pytest.approx(2.0, rel=0.01)
