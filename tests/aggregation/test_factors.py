"""Products as pairs of factors, against dense matrices in numpy's float64."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lora_oracles import best, cut, random
from torch import Tensor

from pellm_lightning.aggregation.factors import (
    Factorization,
    LowRank,
    MeanFactors,
    Stack,
    factorize,
    fill_null_directions,
    from_range,
    orthonormal,
    truncated_svd,
)

GAUGES: list[Factorization] = ["procrustes", "balanced", "svd"]
Term = tuple[float, Tensor, Tensor]


def double(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return random(seed, *shape, scale=scale).double()


def dense(terms: Sequence[Term]) -> np.ndarray:
    return np.asarray(sum(c * b.numpy() @ a.numpy() for c, b, a in terms))


def mean_factors(terms: Sequence[Term], low: LowRank) -> MeanFactors:
    """The factors' means as the product sees them; coefficients are shares here."""
    return MeanFactors(
        a=torch.stack([c * a @ low.v for c, _, a in terms]).sum(0),
        b=torch.stack([c * low.u.T @ b for c, b, _ in terms]).sum(0),
        squares=sum(c * float(a.square().sum() + b.square().sum()) for c, b, a in terms),
    )


@st.composite
def stacks(draw: st.DrawFn) -> list[Term]:
    """Terms of one to four parties, each with a rank of its own, up to more than the matrix has."""
    m, n, seed = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 10_000))
    coefficient = st.sampled_from([1.0, 0.25, -0.5, 3.0, 0.0])
    ranks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    return [
        (draw(coefficient), double(seed + 2 * i, m, r, scale=scale), double(seed + 2 * i + 1, r, n))
        for i, r in enumerate(ranks)
    ]


@st.composite
def alike(draw: st.DrawFn, max_rank: int = 4) -> tuple[list[Term], int]:
    """Terms whose coefficients are shares and whose factors have drifted apart, and their rank.

    m and n are larger than the rank; the drift reaches from next to nothing to unrelated factors.
    """
    r = draw(st.integers(1, max_rank))
    m, n = r + draw(st.integers(1, 5)), r + draw(st.integers(1, 5))
    seed, far = draw(st.integers(0, 10_000)), draw(st.sampled_from([0.02, 0.3, 1.0, 4.0]))
    weights = draw(st.lists(st.sampled_from([1.0, 3.0, 0.5]), min_size=2, max_size=4))
    b, a = double(seed, m, r), double(seed + 1, r, n)
    terms = [
        (
            w / sum(weights),
            b + double(seed + 2 * i + 2, m, r, scale=far),
            a + double(seed + 2 * i + 3, r, n) * far,
        )
        for i, w in enumerate(weights)
    ]
    return terms, r


# ---- stacks


@settings(deadline=None)
@given(stacks())
def test_a_stack_is_the_weighted_sum_of_products(terms: list[Term]) -> None:
    stack = Stack.of(terms)
    assert stack.left.shape[1] == stack.right.shape[0] == sum(a.shape[0] for _, _, a in terms)
    np.testing.assert_allclose(stack.left @ stack.right, dense(terms), rtol=0, atol=1e-13 * largest(terms))


@settings(deadline=None)
@given(stacks(), st.sampled_from([1.0, 2.0, -0.5]), st.integers(1, 4))
def test_squared_norms_are_those_of_the_dense_matrices(terms: list[Term], scaling: float, rank: int) -> None:
    m, n = terms[0][1].shape[0], terms[0][2].shape[1]
    b, a = double(20_001, m, rank, scale=1e-2), double(20_002, rank, n)
    away, whole = Stack.of(terms).squared_norms(scaling, b, a)
    wanted = dense(terms)
    scale = (largest(terms) + 1) ** 2
    assert away == pytest.approx(
        np.sum((wanted - scaling * (b @ a).numpy()) ** 2), rel=1e-9, abs=1e-12 * scale
    )
    assert whole == pytest.approx(np.sum(wanted**2), rel=1e-9, abs=1e-12 * scale)


def largest(terms: Sequence[Term]) -> float:
    """A bound of the products' norms."""
    return sum(abs(c) * float(b.norm() * a.norm()) for c, b, a in terms)


def test_a_difference_of_nothing_is_never_below_zero() -> None:
    # tr((L^T L) (R R^T)) of a difference that is zero is rounding of either sign.
    for seed in range(50):
        b, a = double(seed, 7, 3), double(seed + 100, 3, 5)
        away, whole = Stack.of([(1.0, b, a)]).squared_norms(0.5, 2 * b, a)
        assert 0 <= away <= 1e-14 * whole


def test_a_stack_takes_factors_of_any_dtype() -> None:
    b, a = random(0, 4, 2).to(torch.bfloat16), random(1, 2, 3).half()
    stack = Stack.of([(0.1, b, a)])
    assert stack.left.dtype == stack.right.dtype == torch.float64
    assert torch.equal(stack.left, 0.1 * b.double())
    assert torch.equal(stack.right, a.double())


# ---- decompositions


def check(low: LowRank, m: int, n: int) -> None:
    """U and V have orthonormal columns, s descends, and the largest entry of each column of U is positive."""
    k = low.s.numel()
    assert (low.u.shape, low.v.shape) == ((m, k), (n, k))
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(low.u.T @ low.u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(low.v.T @ low.v, eye, rtol=0, atol=1e-12)
    assert (low.s[:-1] >= low.s[1:]).all()
    assert (low.s >= 0).all()
    assert all(column[column.abs().argmax()] > 0 for column in low.u.T)


def whole(low: LowRank) -> np.ndarray:
    return (low.u * low.s @ low.v.T).numpy()


@settings(deadline=None)
@given(stacks(), st.integers(1, 7))
def test_the_best_rank_is_that_of_eckart_and_young(terms: list[Term], rank: int) -> None:
    m, n = terms[0][1].shape[0], terms[0][2].shape[1]
    low = truncated_svd(Stack.of(terms), rank)
    check(low, m, n)
    assert low.s.numel() <= rank
    wanted = dense(terms)
    missed = np.linalg.norm(whole(low) - wanted)
    assert missed == pytest.approx(cut(wanted, rank), rel=1e-9, abs=1e-12 * largest(terms))


def test_the_best_rank_equals_the_truncated_matrix_where_that_is_unique() -> None:
    terms = [(c, double(3 * i, 20, 3), double(3 * i + 1, 3, 30)) for i, c in enumerate([0.25, 0.75, -0.1])]
    for rank in range(1, 10):
        np.testing.assert_allclose(
            whole(truncated_svd(Stack.of(terms), rank)), best(dense(terms), rank), atol=1e-11
        )


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_a_product_with_an_orthonormal_factor_is_decomposed(m: int, n: int, r: int, seed: int) -> None:
    k = min(m, n, r)
    p, projected = orthonormal(double(seed, m, k)), double(seed + 1, n, k)
    low = from_range(p, projected)
    check(low, m, n)
    np.testing.assert_allclose(whole(low), (p @ projected.T).numpy(), atol=1e-12)


@pytest.mark.parametrize(("n", "r"), [(5, 3), (3, 3), (2, 4), (1, 1)])
def test_orthonormal_columns_span_as_much_as_fits(n: int, r: int) -> None:
    x = double(0, n, r)
    q = orthonormal(x)
    assert q.shape == (n, min(n, r))
    torch.testing.assert_close(q.T @ q, torch.eye(min(n, r), dtype=torch.float64))
    torch.testing.assert_close(q @ (q.T @ x), x)


# ---- handing back


def handed_back(
    terms: list[Term],
    rank: int,
    factorization: Factorization,
    scaling: float = 1.0,
    anchor: Term | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors of the best product, of scaling ``scaling``; terms count by their shares."""
    low = truncated_svd(Stack.of([(c * scaling, b, a) for c, b, a in terms]), rank)
    _, b, a = terms[0] if anchor is None else anchor
    low = fill_null_directions(low, b, a)
    return factorize(low, mean_factors(terms, low), scaling, rank, factorization)


@settings(deadline=None)
@given(alike(), st.sampled_from(GAUGES), st.sampled_from([1.0, 2.0, 0.125]))
def test_every_gauge_gives_the_same_product(
    drawn: tuple[list[Term], int], factorization: Factorization, scaling: float
) -> None:
    terms, r = drawn
    b, a = handed_back(terms, r, factorization, scaling)
    wanted = best(scaling * dense(terms), r)
    assert (b.shape[1], a.shape[0]) == (r, r)
    np.testing.assert_allclose(scaling * (b @ a), wanted, rtol=0, atol=1e-11 * np.linalg.norm(wanted))


@settings(deadline=None)
@given(alike(), st.sampled_from([1.0, 2.0]))
def test_the_gauges_are_what_they_say(drawn: tuple[list[Term], int], scaling: float) -> None:
    terms, r = drawn
    singular = torch.from_numpy(np.linalg.svd(dense(terms), compute_uv=False)[:r].copy())
    _, a = handed_back(terms, r, "svd", scaling)
    torch.testing.assert_close(a @ a.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-11)
    b, a = handed_back(terms, r, "balanced", scaling)
    # B = U S^1/2 and A = S^1/2 V^T: both Gram matrices are S, but for directions 1e-4 below the first.
    for gram in (b.T @ b, a @ a.T):
        torch.testing.assert_close(gram, torch.diag(singular), rtol=0, atol=1e-4 * float(singular[0]))
    strong = singular > 1e-3 * singular[0]
    torch.testing.assert_close(b.norm(dim=0)[strong], a.norm(dim=1)[strong])


def distance(both: tuple[Tensor, Tensor], terms: list[Term]) -> float:
    """Squared distance to the mean factors."""
    b, a = both
    mean_b, mean_a = sum(c * b for c, b, _ in terms), sum(c * a for c, _, a in terms)
    return float((b - mean_b).square().sum() + (a - mean_a).square().sum())


def rotated_towards(both: tuple[Tensor, Tensor], terms: list[Term]) -> tuple[Tensor, Tensor]:
    """B O^T and O A for the orthogonal O that brings them nearest to the mean factors, by numpy's SVD."""
    b, a = both
    mean_b, mean_a = sum(c * b for c, b, _ in terms), sum(c * a for c, _, a in terms)
    u, _, vt = np.linalg.svd((mean_a @ a.T + mean_b.T @ b).numpy())
    turn = torch.from_numpy(u @ vt)
    return b @ turn.T, turn @ a


@settings(deadline=None)
@given(alike())
def test_procrustes_is_at_least_as_near_as_the_balanced_factors_rotated(
    drawn: tuple[list[Term], int],
) -> None:
    terms, r = drawn
    near = handed_back(terms, r, "procrustes")
    rotated = rotated_towards(handed_back(terms, r, "balanced"), terms)
    np.testing.assert_allclose(rotated[0] @ rotated[1], near[0] @ near[1], atol=1e-9)
    assert distance(near, terms) <= distance(rotated, terms) * (1 + 1e-9)


@settings(deadline=None)
@given(alike(max_rank=3), st.integers(0, 100))
def test_no_change_of_coordinates_brings_procrustes_nearer(drawn: tuple[list[Term], int], seed: int) -> None:
    # All factors of one product are B T and T^-1 A, so a small T tells whether the distance is a minimum:
    # along it the slope is zero.
    terms, r = drawn
    b, a = handed_back(terms, r, "procrustes")
    rotated = rotated_towards(handed_back(terms, r, "balanced"), terms)
    if distance((b, a), terms) > distance(rotated, terms) * (1 - 1e-6):
        return  # the mean was no start, and the rotated ones stand in
    turn = double(seed, r, r)
    step = 1e-5 / float(turn.norm())
    before = distance((b, a), terms)
    for sign in (1, -1):
        t = torch.eye(r, dtype=torch.float64) + sign * step * turn
        assert distance((b @ t, torch.linalg.solve(t, a)), terms) >= before * (1 - 1e-9)


@settings(deadline=None)
@given(
    st.floats(0.6, 1.6),
    st.floats(0.6, 1.6),
    st.sampled_from([1, -1]),
    st.floats(0.1, 9),
    st.sampled_from([1.0, 2.0]),
)
@example(1.0, 1.0, -1, 1.0, 1.0)
def test_procrustes_of_rank_one_is_the_root_of_a_quartic(
    along_b: float, along_a: float, sign: int, s: float, scaling: float
) -> None:
    # B = t u and A = p / t v^T with p = s / scaling. The distance (t - b)^2 + (p / t - a)^2 from the mean
    # factors b and a has its minimum where t^4 - b t^3 + p a t - p^2 = 0.
    p = s / scaling
    mean_b, mean_a = sign * along_b * math.sqrt(p), sign * along_a * math.sqrt(p)
    one = torch.ones(1, 1, dtype=torch.float64)
    mean = MeanFactors(a=mean_a * one, b=mean_b * one, squares=1e6)
    b, a = map(float, factorize(LowRank(one, s * one[0], one), mean, scaling, 1, "procrustes"))
    roots = np.roots([1, -mean_b, 0, p * mean_a, -(p**2)])
    real = [root.real for root in roots if abs(root.imag) < 1e-9 * abs(root)]
    nearest = min((t - mean_b) ** 2 + (p / t - mean_a) ** 2 for t in real)
    assert b * a == pytest.approx(p, rel=1e-12)
    assert (b - mean_b) ** 2 + (a - mean_a) ** 2 == pytest.approx(nearest, rel=1e-6, abs=1e-12)


def test_procrustes_where_one_mean_factor_vanishes() -> None:
    # Parties hold (B, A) and (-B, -A / 2): the mean of B is 0, that of A is A / 4, the product 3/4 B A.
    b, a = double(0, 6, 2), double(1, 2, 8)
    terms = [(0.5, b, a), (0.5, -b, -0.5 * a)]
    near = handed_back(terms, 2, "procrustes")
    torch.testing.assert_close(near[0] @ near[1], 0.75 * b @ a)
    rotated = rotated_towards(handed_back(terms, 2, "balanced"), terms)
    assert distance(near, terms) <= distance(rotated, terms) * (1 + 1e-9)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 8, 16, 26])
def test_procrustes_of_parties_that_cancel_out_is_a_balanced_one(r: int) -> None:
    # Parties hold (B, A) and (-B, -A): one product, and no mean factors at all.
    b, a = double(0, 30, r), double(1, r, 40)
    left, right = handed_back([(0.5, b, a), (0.5, -b, -a)], r, "procrustes")
    torch.testing.assert_close(left @ right, b @ a)
    torch.testing.assert_close(left.T @ left, right @ right.T)


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_procrustes_of_parties_that_nearly_cancel_out_is_a_balanced_one_rotated(seed: int) -> None:
    # Of a mean this short the product is out of reach. What stands in for it is turned towards the mean.
    b, a = double(seed, 6, 3), double(seed + 1, 3, 8)
    left = -b + double(seed + 2, 6, 3, scale=0.2), -a + double(seed + 3, 3, 8, scale=0.2)
    terms = [(0.5, b, a), (0.5, *left)]
    balanced = handed_back(terms, 3, "balanced")
    wanted = distance(rotated_towards(balanced, terms), terms)
    assert distance(handed_back(terms, 3, "procrustes"), terms) == pytest.approx(wanted, rel=1e-9)
    assert wanted < 0.98 * distance(balanced, terms)


@settings(deadline=None)
@given(alike(max_rank=6), st.integers(0, 1000))
def test_procrustes_of_parties_rotated_at_will_is_finite_and_exact(
    drawn: tuple[list[Term], int], seed: int
) -> None:
    terms, r = drawn
    turned = []
    for i, (c, b, a) in enumerate(terms):
        turn = orthonormal(double(seed + i, r, r))
        turned.append((c, b @ turn.T, turn @ a))
    b, a = handed_back(turned, r, "procrustes")
    wanted = best(dense(terms), r)
    np.testing.assert_allclose(b @ a, wanted, rtol=0, atol=1e-10 * np.linalg.norm(wanted))
    rotated = rotated_towards(handed_back(turned, r, "balanced"), turned)
    assert distance((b, a), turned) <= distance(rotated, turned) * (1 + 1e-9)


@pytest.mark.parametrize("factorization", GAUGES)
def test_factors_that_agree_come_back(factorization: Factorization) -> None:
    b, a = double(0, 6, 3), double(1, 3, 8)
    found_b, found_a = handed_back([(0.25, b, a), (0.75, b, a)], 3, factorization, scaling=2.0)
    torch.testing.assert_close(found_b, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_a, a, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factorization", ["balanced", "svd"])
def test_signs_do_not_depend_on_the_signs_of_the_parties(factorization: Factorization) -> None:
    terms = [(0.25, double(0, 6, 3), double(1, 3, 8)), (0.75, double(2, 6, 3), double(3, 3, 8))]
    flips = torch.tensor([[1.0, -1, -1], [-1, -1, 1]]).double()
    flipped = [(c, b * flip, flip[:, None] * a) for (c, b, a), flip in zip(terms, flips, strict=True)]
    for found, wanted in zip(
        handed_back(flipped, 3, factorization), handed_back(terms, 3, factorization), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


# ---- directions without a product


@pytest.mark.parametrize("factorization", GAUGES)
def test_without_a_product_no_row_of_a_dies(factorization: Factorization) -> None:
    # B = 0 at all parties, A drifted: as after a round in which nothing was learned.
    b, a = torch.zeros(6, 3).double(), double(1, 3, 8)
    terms = [(0.25, b, a), (0.75, b, a + double(2, 3, 8, scale=0.3))]
    found_b, found_a = handed_back(terms, 3, factorization, anchor=(0, b, a))
    assert not found_b.any()
    assert (found_a.norm(dim=1) > 0.1).all()
    # It spans the anchor's rows, the only ones that all parties know.
    inside = found_a @ torch.linalg.pinv(a) @ a
    torch.testing.assert_close(found_a, inside, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factorization", ["balanced", "svd"])
def test_a_direction_without_a_product_can_still_be_trained(factorization: Factorization) -> None:
    # The gradient of B is that of the product times A^T, so no row of A may be zero, nor next to it.
    b = double(0, 6, 3)
    b[:, 1] = 0
    terms = [(0.25, b, double(1, 3, 8)), (0.75, 2 * b, double(1, 3, 8))]
    found_b, found_a = handed_back(terms, 3, factorization)
    np.testing.assert_allclose(found_b @ found_a, dense(terms), atol=1e-12)
    assert (found_a.norm(dim=1) > 0.009 * found_a.norm(dim=1).max()).all()


def test_completing_leaves_the_product_alone() -> None:
    b, a = double(0, 6, 2), double(1, 2, 8)
    low = truncated_svd(Stack.of([(1.0, b, a)]), 4)
    assert low.s.numel() == 2
    wide = truncated_svd(Stack.of([(0.25, b, a), (0.75, b, a)]), 4)
    # Two directions of four are rounding errors, of which no direction is to be made: a few times 2^-52 of
    # the largest singular value, or zero, as the processor has it. What is written there in their place
    # stands for such an error, a hundred times below the 1e-12 at which a direction counts.
    assert float(wide.s[2:].max()) < 1e-14 * float(wide.s[0])
    wide.s[2:] = 1e-14 * wide.s[0]
    full = fill_null_directions(wide, double(3, 6, 4), double(4, 4, 8))
    assert full.s[:2].tolist() == pytest.approx(low.s.tolist())
    assert full.s[2:].tolist() == [0, 0]
    assert torch.equal(full.u[:, :2], wide.u[:, :2])
    assert torch.equal(full.v[:, :2], wide.v[:, :2])
    np.testing.assert_allclose(whole(full), (b @ a).numpy(), atol=1e-12)
    for side in (full.u, full.v):
        torch.testing.assert_close(side.T @ side, torch.eye(4).double(), rtol=0, atol=1e-12)
    assert fill_null_directions(low, double(3, 6, 2), double(4, 2, 8)) is low


def test_a_dead_direction_keeps_the_row_of_a_that_it_had() -> None:
    # Column 1 of B is zero at all parties, so row 1 of A adds nothing to the product. Nobody has moved it:
    # it must come back.
    b, a = double(0, 6, 3), double(1, 3, 8)
    b[:, 1] = 0
    terms = [(0.25, b, a), (0.75, b, a)]
    for factorization in GAUGES:
        found_b, found_a = handed_back(terms, 3, factorization)
        torch.testing.assert_close(found_b, b, rtol=0, atol=1e-10)
        torch.testing.assert_close(found_a, a, rtol=0, atol=1e-10)


@pytest.mark.parametrize("factorization", GAUGES)
@pytest.mark.parametrize(("m", "n", "r"), [(2, 9, 4), (9, 2, 4), (1, 1, 3), (3, 3, 5)])
def test_more_columns_than_the_matrix_has_directions(
    m: int, n: int, r: int, factorization: Factorization
) -> None:
    terms = [(0.25, double(0, m, r), double(1, r, n)), (0.75, double(2, m, r), double(3, r, n))]
    b, a = handed_back(terms, r, factorization)
    assert (b.shape, a.shape) == ((m, r), (r, n))
    np.testing.assert_allclose(b @ a, dense(terms), atol=1e-12)


@pytest.mark.parametrize("factorization", GAUGES)
def test_a_negative_scaling_is_a_sign_of_the_product(factorization: Factorization) -> None:
    terms = [(0.25, double(0, 6, 3), double(1, 3, 8)), (0.75, double(2, 6, 3), double(3, 3, 8))]
    b, a = handed_back(terms, 3, factorization, scaling=-2.0)
    np.testing.assert_allclose(b @ a, best(dense(terms), 3), atol=1e-10)
