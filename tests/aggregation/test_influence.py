"""Bounds on influence as pure functions: float64 references, what Flower returns, and properties."""

import math
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pellm_lightning.aggregation import GeometricMedian, Krum, MultiKrum, NormBound, influence

UPDATES = torch.tensor(
    [
        [0.0, 0.3, -0.27, -0.89, -0.45],
        [-0.99, 0.06, 1.34, -0.49, -0.62],
        [-7.0, 7.0, -7.0, 7.0, 7.0],
        [0.7, -1.34, -0.46, -1.9, -1.29],
        [-1.84, -0.24, -1.27, 0.27, 0.16],
        [-0.19, -2.52, -0.54, -0.05, 0.11],
        [9.0, -9.0, 9.0, -9.0, 9.0],
    ]
)
EXAMPLES = torch.tensor([3, 1, 4, 1, 5, 9, 2], dtype=torch.float64)
SHARES = EXAMPLES / EXAMPLES.sum()
EQUAL = torch.full((7,), 1 / 7, dtype=torch.float64)
weights_of_parties = st.lists(
    st.sampled_from([0.0, 1e-20, 0.5, 1.0, 3.0, 300.0, 1e9]) | st.floats(1e-3, 1e12), max_size=9
)


def random(seed: int, n: int, k: int = 6) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(x: Tensor) -> Tensor:
    return x.double() @ x.double().T


def equal(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def shares_of(seed: int, n: int) -> Tensor:
    shares = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return shares / shares.sum()


# ---- what flwr 1.42.0 returns of the same updates: aggregate_median, aggregate_trimmed_avg, aggregate_krum


def test_median_is_flowers() -> None:
    expected = [-0.19, -0.24, -0.46, -0.49, 0.11]
    assert influence.weighted_median(UPDATES, EQUAL).tolist() == pytest.approx(expected)
    of_six = [-0.59, -0.09, -0.5, -0.27, -0.17]
    assert influence.weighted_median(UPDATES[:6], equal(6)).tolist() == pytest.approx(of_six)


def test_trimmed_mean_is_flowers() -> None:
    one = [-0.464, -0.748, -0.24, -0.612, 1.24]
    two = [-0.39333333, -0.50666667, -0.42333333, -0.47666667, -0.06]
    assert influence.trimmed_mean(UPDATES, EQUAL, 1).tolist() == pytest.approx(one)
    assert influence.trimmed_mean(UPDATES, EQUAL, 2).tolist() == pytest.approx(two)


def test_krum_and_multi_krum_are_flowers() -> None:
    gram = gram_of(UPDATES)
    one = Krum(2).influence(gram, SHARES)
    assert one.tolist() == [1, 0, 0, 0, 0, 0, 0]
    # Flower weighs the selected updates by their examples, as here.
    three = MultiKrum(2, 3).influence(gram, SHARES) @ UPDATES.double()
    assert three.tolist() == pytest.approx([-0.058, -0.076, 0.014, -1.012, -0.652])
    five = MultiKrum(2).influence(gram, SHARES) @ UPDATES.double()
    assert five.tolist() == pytest.approx(
        [-0.58947368, -1.27684211, -0.58631579, -0.21894737, -0.07736842], abs=1e-7
    )


# ---- against references


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 20), values=st.sampled_from([2, 5, 10**6]))
def test_a_median_of_whole_weights_is_that_of_repeated_values(seed: int, n: int, values: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.integers(-values, values, (n, 5)).astype(np.float32)  # with ties
    counts = generator.integers(1, 5, n)
    shares = torch.tensor(counts / counts.sum())
    found = influence.weighted_median(torch.tensor(x), shares)
    np.testing.assert_array_equal(found.numpy(), np.median(np.repeat(x, counts, axis=0), axis=0))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 20), trimmed=st.integers(0, 9))
def test_a_trimmed_mean_is_that_of_the_values_between(seed: int, n: int, trimmed: int) -> None:
    x, shares = random(seed, n), shares_of(seed, n)
    cut = min(trimmed, (n - 1) // 2)
    expected = []
    for column in x.T.tolist():
        kept = sorted(zip(column, shares.tolist(), strict=True))[cut : n - cut]
        expected.append(sum(v * w for v, w in kept) / sum(w for _, w in kept))
    assert influence.trimmed_mean(x.float(), shares, trimmed).tolist() == pytest.approx(expected, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 8))
def test_the_geometric_median_has_the_least_sum_of_distances(seed: int, n: int) -> None:
    x, shares = random(seed, n), shares_of(seed + 1, n)
    u = influence.geometric_median(gram_of(x), shares, 1e-6)
    assert float(u.sum()) == pytest.approx(1)

    def total(point: Tensor) -> float:
        return float(shares @ (x - point).norm(dim=1))

    best = total(u @ x)
    for step in random(seed + 2, 40):
        assert total(u @ x + 0.03 * step) >= best - 1e-7
    assert all(total(point) >= best - 1e-5 for point in x)


def test_a_majority_of_the_weight_is_the_geometric_median() -> None:
    x = random(3, 5)
    shares = torch.tensor([0.52, 0.12, 0.12, 0.12, 0.12], dtype=torch.float64)
    u = influence.geometric_median(gram_of(x), shares, 1e-6)
    torch.testing.assert_close(u @ x, x[0], rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), factor=st.floats(0.1, 5))
def test_norms_are_bounded_by_a_multiple_of_their_median(seed: int, n: int, factor: float) -> None:
    x = random(seed, n) * torch.logspace(-2, 2, n, dtype=torch.float64)[:, None]
    norms = x.norm(dim=1)
    bound = factor * float(np.median(norms.numpy()))
    found = NormBound(factor).influence(gram_of(x), equal(n)) * n
    expected = [min(1.0, bound / norm) for norm in norms.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 9), f=st.integers(0, 4))
def test_mixing_takes_the_mean_of_the_nearest(seed: int, n: int, f: int) -> None:
    x, shares = random(seed, n), shares_of(seed, n)
    found = influence.nearest_mixing(gram_of(x), shares, f) @ x
    for i in range(n):
        nearest = (x - x[i]).norm(dim=1).argsort()[: max(1, n - f)]
        expected = (shares[nearest, None] * x[nearest]).sum(dim=0) / shares[nearest].sum()
        torch.testing.assert_close(found[i], expected)


def test_long_vectors_are_combined_block_by_block() -> None:
    x = random(1, 5, 40_000).float()
    for shares in (equal(5), shares_of(2, 5)):
        whole = influence.weighted_median(x, shares), influence.trimmed_mean(x, shares, 1)
        for start in (0, 16_000, 39_000):
            part = x[:, start : start + 1000]
            torch.testing.assert_close(
                whole[0][start : start + 1000], influence.weighted_median(part, shares)
            )
            torch.testing.assert_close(
                whole[1][start : start + 1000], influence.trimmed_mean(part, shares, 1)
            )
    np.testing.assert_array_equal(influence.weighted_median(x, equal(5)), np.median(x.numpy(), axis=0))


# ---- properties

WEIGHING = [
    NormBound(),
    GeometricMedian(),
    MultiKrum(2),
    Krum(2),
    MultiKrum(2, mixing=2),
    GeometricMedian(mixing=2),
]


@pytest.mark.parametrize("rule", WEIGHING, ids=repr)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-8, 1.0, 1e8]))
def test_the_order_and_the_unit_do_not_matter(rule: NormBound, seed: int, scale: float) -> None:
    x, shares = random(seed, 8), equal(8) if rule.mixing else shares_of(seed, 8)  # mixed updates may be equal
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    u = rule.influence(gram_of(x), shares)
    again = rule.influence(gram_of(scale * x[order]), shares[order])
    torch.testing.assert_close(again @ x[order], u @ x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [30.0, 1e6, 1e18, math.inf, math.nan])
@pytest.mark.parametrize("rule", WEIGHING, ids=repr)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_two_of_eight_move_the_result_no_further_than_the_honest_reach(
    rule: NormBound, size: float, seed: int
) -> None:
    x = random(seed, 8)
    x[6:] = size * torch.tensor([[1.0, -1, 1, -1, 1, 1], [1.0, -1, 1, -1, 1, 1.01]])
    u = rule.influence(gram_of(x), equal(8))
    counted = u > 0
    result = (u[counted, None] * x[counted]).sum(dim=0)
    # A norm bound lets each pull as far as the median; the others are among the honest, RFA up to a factor.
    assert float(result.norm()) <= 2 * float(x[:6].norm(dim=1).max())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), bad=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -3e38]))
def test_numbers_of_a_minority_stay_among_those_of_the_honest(seed: int, bad: float) -> None:
    x = random(seed, 7).float()
    honest, (low, high) = x[:5], (x[:5].min(dim=0).values, x[:5].max(dim=0).values)
    x = torch.cat([honest, torch.full_like(x[5:], bad)])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    shares = shares_of(seed, 7) if seed % 2 else EQUAL
    attackers = float(shares[5:].sum())
    found = [influence.trimmed_mean(x[order], shares[order], 2)]
    if attackers < 0.5:
        found.append(influence.weighted_median(x[order], shares[order]))
    for result in found:
        assert bool(((result >= low - 1e-6) & (result <= high + 1e-6)).all())


# ---- the cap on weights


@given(weights=weights_of_parties, max_share=st.floats(0.01, 1))
def test_no_share_exceeds_the_cap_and_as_little_as_possible_is_cut(
    weights: list[float], max_share: float
) -> None:
    found = influence.capped(weights, max_share)
    counting = [w for w in weights if w > 0]
    assert [w > 0 for w in found] == [w > 0 for w in weights]
    assert all(0 <= new <= old for new, old in zip(found, weights, strict=True))
    if not counting:
        return
    total = math.fsum(found)
    cut = [new for new, old in zip(found, weights, strict=True) if new < old]
    assert max(cut, default=0) - min(cut, default=0) <= 1e-9 * total, "one cap for all"
    if len(counting) * max_share > 1.000001:
        assert max(found) <= max_share * total * (1 + 1e-9)
        if cut:
            assert cut[0] == pytest.approx(max_share * total, rel=1e-6), "not more than needed"
    elif len(counting) * max_share < 0.999999:
        assert {w for w in found if w > 0} == {min(counting)}


def test_caps_step_by_step() -> None:
    # 1e9 of 1e9 + 4 * 300 becomes C = 0.25 (C + 1200) = 400.
    assert influence.capped([1e9, 300, 300, 300, 300], 0.25) == pytest.approx([400, 300, 300, 300, 300])
    # Two above: C = 0.4 (2 C + 1) = 2.
    assert influence.capped([10, 10, 1], 0.4) == pytest.approx([2, 2, 1])
    # What has been capped stays so without the third: C = 0.5 (C + 2), 2.
    assert influence.capped([2.0, 2.0, 0.0], 0.6) == [2.0, 2.0, 0.0]


def test_a_party_that_hardly_moved_has_a_place_among_the_others() -> None:
    """What rounding makes of its inner product with itself may be below 0."""
    gram = gram_of(random(3, 5))
    gram[4], gram[:, 4] = 0.0, 0.0
    gram[4, 4] = -1e-18
    for rule in (GeometricMedian(), GeometricMedian(mixing=1), NormBound(), Krum(), MultiKrum()):
        assert rule.influence(gram, equal(5)).isfinite().all()
    assert gram[4, 4] == -1e-18, "the argument is left alone"


# ---- absurd norms


def test_who_is_a_thousand_times_the_median_of_the_others_is_absurd() -> None:
    assert influence.absurd([1.0, 2.0, 3.0, 2500.0]) == [3]
    assert influence.absurd([1.0, 2.0, 3.0, 1999.0]) == []
    assert influence.absurd([1.0, 1e6, 1.0, 1e9, 1.0]) == [1, 3]


def test_who_has_fewer_than_two_others_or_unmoved_ones_is_not_judged() -> None:
    assert influence.absurd([1.0, 1e30]) == influence.absurd([1e30]) == influence.absurd([]) == []
    assert influence.absurd([0.0, 0.0, 1e30]) == []


def test_parties_that_have_converged_differ_by_rounding_and_none_is_absurd() -> None:
    assert influence.absurd([1e-10, 1e-10, 1.8e-7]) == []
    assert influence.absurd([1e-10, 1e-10, 1e-3]) == [2]


@given(norms=st.lists(st.floats(0, 1e30), min_size=3, max_size=9))
def test_more_than_half_are_never_absurd(norms: list[float]) -> None:
    found = influence.absurd(norms)
    assert len(found) <= len(norms) / 2
    assert all(norms[k] > median(norms) for k in found)
