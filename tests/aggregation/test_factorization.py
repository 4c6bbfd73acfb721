"""Which of a product's factors the low-rank mean hands back."""

from typing import Any

import numpy as np
import pytest
import torch
from lora_oracles import (
    Parameters,
    Sizes,
    adapter,
    away,
    bits,
    copied,
    drift,
    frozen,
    mean_update,
    modules,
    name_a,
    name_b,
    one_round,
    random,
    run_rounds,
    update,
)
from torch import Tensor

from pellm_lightning.aggregation import LowRankMean
from pellm_lightning.aggregation.factorization import Factorization
from pellm_lightning.aggregation.low_rank import Solver

SIZES: Sizes = {"k": (12, 10), "q": (9, 14)}
RANK = 3
WEIGHTS = [1.0, 3.0, 0.5]
SOLVERS: list[Solver] = ["power", "exact"]
GAUGES: list[Factorization] = ["procrustes", "balanced", "svd"]

solvers = pytest.mark.parametrize("solver", SOLVERS)
gauges = pytest.mark.parametrize("factorization", GAUGES)


def drifted(far: float) -> list[Parameters]:
    """What three parties came with, having begun with one adapter."""
    ends = [adapter(0, SIZES, RANK) for _ in WEIGHTS]
    for party, end in enumerate(ends):
        drift(far)(party, 0, end)
    return ends


# ---- the coordinates


@solvers
def test_the_product_does_not_depend_on_the_gauge(solver: Solver) -> None:
    ends = drifted(0.5)
    found = [
        one_round(LowRankMean(solver, factorization=factorization), ends, WEIGHTS)[0]
        for factorization in GAUGES
    ]
    for module in SIZES:
        first, *others = (update(result, module) for result in found)
        assert all(away(other, first) < 1e-6 for other in others)
    assert len({bits(result) for result in found}) == len(GAUGES)


@solvers
@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_the_gauges_are_what_they_say(solver: Solver, scaling: float) -> None:
    # Neither depends on the scaling, since B A is the product over it.
    def lora(party: int) -> Any:
        return modules(frozen(0, SIZES), scaling)

    ends = drifted(0.5)
    (svd, *_) = one_round(LowRankMean(solver, factorization="svd"), ends, WEIGHTS, lora=lora)
    (balanced, *_) = one_round(LowRankMean(solver, factorization="balanced"), ends, WEIGHTS, lora=lora)
    for module in SIZES:
        a = svd[name_a(module)]
        torch.testing.assert_close(a @ a.T, torch.eye(RANK), rtol=0, atol=1e-6)
        b, a = balanced[name_b(module)], balanced[name_a(module)]
        torch.testing.assert_close(b.T @ b, a @ a.T, rtol=0, atol=1e-4)
        wanted = mean_update(ends, module, WEIGHTS)
        if solver == "exact":
            singular = np.linalg.svd(wanted, compute_uv=False)[:RANK]
            np.testing.assert_allclose(np.diag(a @ a.T), singular, rtol=1e-5)


def test_bf16_factors_are_the_result_rounded_once() -> None:
    # B = U S and A = V^T, the largest entry of each column of U positive. Each written number is off by half
    # of the distance to the next bf16, 2^-8 of it, at most, whatever rounding the round before has left.
    seen = run_rounds(
        LowRankMean("exact", factorization="svd"),
        lambda party: adapter(0, SIZES, RANK, torch.bfloat16),
        drift(0.5),
        weights=WEIGHTS,
        rounds=2,
    )
    for number in range(2):
        for module in SIZES:
            wanted = mean_update([of_party[number].held for of_party in seen], module, WEIGHTS)
            u, singular, vt = np.linalg.svd(wanted)
            signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])[:RANK]
            result = seen[0][number].result
            for name, exact in (
                (name_b(module), u[:, :RANK] * signs * singular[:RANK]),
                (name_a(module), vt[:RANK] * signs[:, None]),
            ):
                off = np.abs(result[name].double().numpy() - exact)
                assert (off <= 2**-8 * np.abs(exact) + 1e-5).all()


@solvers
def test_procrustes_is_nearer_to_the_mean_factors_than_the_balanced_ones_rotated(solver: Solver) -> None:
    ends = drifted(0.5)
    (near, *_) = one_round(LowRankMean(solver), ends, WEIGHTS)
    (balanced, *_) = one_round(LowRankMean(solver, factorization="balanced"), ends, WEIGHTS)
    for module in SIZES:
        a, b = name_a(module), name_b(module)
        mean_a, mean_b = (
            sum(w * end[name].double() for w, end in zip(WEIGHTS, ends, strict=True)) / 4.5 for name in (a, b)
        )
        u, _, vt = np.linalg.svd((mean_a @ balanced[a].double().T + mean_b.T @ balanced[b].double()).numpy())
        turn = torch.from_numpy(u @ vt)

        def distance(b: Tensor, a: Tensor, to: tuple[Tensor, Tensor] = (mean_b, mean_a)) -> float:
            return float((b - to[0]).square().sum() + (a - to[1]).square().sum())

        rotated = distance(balanced[b].double() @ turn.T, turn @ balanced[a].double())
        assert distance(near[b].double(), near[a].double()) < rotated


@solvers
@pytest.mark.parametrize("factorization", ["balanced", "svd"])
def test_signs_do_not_depend_on_those_of_the_parties(solver: Solver, factorization: Factorization) -> None:
    # Each party may turn the signs of a column of B and the row of A together: its product stays, to the bit.
    ends = drifted(0.5)
    flipped = [copied(end) for end in ends]
    for party, end in enumerate(flipped):
        flips = random(party, RANK).sign()
        for module in SIZES:
            end[name_b(module)] *= flips
            end[name_a(module)] *= flips[:, None]
    rule = LowRankMean(solver, factorization=factorization)
    start = adapter(0, SIZES, RANK)
    plain, turned_ = (one_round(rule, those, WEIGHTS, start=start)[0] for those in (ends, flipped))
    assert bits(flipped[0]) != bits(ends[0])
    assert bits(turned_) == bits(plain)


@solvers
@gauges
def test_parties_that_agree_get_back_what_they_came_with(
    solver: Solver, factorization: Factorization
) -> None:
    end = adapter(5, SIZES, RANK)
    start = adapter(0, SIZES, RANK)
    # "exact" rounds factors of up to 3 to float32 once, 2e-7. "power" has sums that cross in float32: each of
    # a few roundings turns a column by 2^-24 times the condition of the products, 4, and so moves factors of
    # norm 5 by 1e-6; this is ten times what was seen. Factors of another gauge differ by about 1.
    tolerance = {"exact": 1e-6, "power": 3e-5}[solver]
    for result in one_round(
        LowRankMean(solver, factorization=factorization), [end] * 3, WEIGHTS, start=start
    ):
        for name, p in end.items():
            torch.testing.assert_close(result[name], p, rtol=0, atol=tolerance)


@solvers
@pytest.mark.parametrize("rank", [2, 4])
def test_parties_whose_mean_factors_cancel_out(solver: Solver, rank: int) -> None:
    # They hold (B, A) and (-B, -A): the same product, and no mean factors to be near to.
    end = adapter(0, SIZES, rank)
    results = one_round(LowRankMean(solver), [end, {name: -p for name, p in end.items()}], [1, 1])
    for module in SIZES:
        assert away(update(results[0], module), update(end, module)) < 1e-6
    assert len({bits(result) for result in results}) == 1


# ---- directions without a product


@solvers
@pytest.mark.parametrize("factorization", ["balanced", "svd"])
def test_at_the_start_where_b_is_zero_no_row_of_a_dies(solver: Solver, factorization: Factorization) -> None:
    # A has drifted apart, as by weight decay, and B has not moved: a row of A that is zero could never learn.
    ends = drifted(0.1)
    for end in ends:
        for module in SIZES:
            end[name_b(module)].zero_()
    (result, *_) = one_round(LowRankMean(solver, factorization=factorization), ends, WEIGHTS)
    for module in SIZES:
        assert not result[name_b(module)].any()
        assert (result[name_a(module)].norm(dim=1) > 0.1).all()


@solvers
def test_a_direction_that_nobody_trained_keeps_its_row_of_a(solver: Solver) -> None:
    # The last column of B is zero at all parties, which moved the others. The last row of A is one at all.
    start = adapter(0, SIZES, RANK)
    ends = []
    for party in range(3):
        end = copied(start)
        drift(0.05, "lora_B")(party, 0, end)
        for module in SIZES:
            end[name_b(module)][:, -1] = 0
        ends.append(end)
    (result, *_) = one_round(LowRankMean(solver), ends, WEIGHTS, start=start)
    for module in SIZES:
        wanted = mean_update(ends, module, WEIGHTS)
        assert away(update(result, module), wanted) < 1e-6, "all parties have one A, so the mean has its rank"
        torch.testing.assert_close(result[name_a(module)][-1], start[name_a(module)][-1], rtol=0, atol=1e-3)


@solvers
def test_factors_of_too_low_a_rank_that_nobody_moves_stay(solver: Solver) -> None:
    end = adapter(0, SIZES, RANK)
    for module in SIZES:
        end[name_b(module)][:, 1] = 0
    (result, *_) = one_round(LowRankMean(solver), [end] * 3, WEIGHTS)
    for name, p in end.items():
        torch.testing.assert_close(result[name], p, rtol=0, atol=3e-6)


@solvers
@pytest.mark.parametrize("size", [(2, 9), (9, 2)])
def test_factors_of_a_higher_rank_than_the_matrix_that_nobody_moves_stay(
    solver: Solver, size: tuple[int, int]
) -> None:
    # As rank 4 on a head of two labels: of A's four rows the product needs two, the others may yet learn.
    end = adapter(0, {"q": size}, 4)
    (result, *_) = one_round(LowRankMean(solver), [end] * 3, WEIGHTS)
    for name, p in end.items():
        torch.testing.assert_close(result[name], p, rtol=0, atol=3e-6)
