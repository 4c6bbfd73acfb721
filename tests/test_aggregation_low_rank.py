"""The best low-rank mean, by sums alone and by an owner of each module, against dense truncated SVDs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import run_parties
from products import (
    Parameters,
    Sizes,
    adapter,
    away,
    best,
    bits,
    copied,
    cut,
    drift,
    frozen,
    iterated,
    mean_update,
    modules,
    name_a,
    name_b,
    random,
    run_rounds,
    sgd,
    update,
)
from torch import Tensor

from pellm_lightning import Aggregator, Federation, FederationError
from pellm_lightning.aggregation import LowRankMean
from pellm_lightning.aggregation.factors import Gauge
from pellm_lightning.aggregation.low_rank import Solver

SIZES: Sizes = {"k": (12, 10), "q": (9, 14)}
RANK = 3
WEIGHTS = [1.0, 3.0, 0.5]
SOLVERS: list[Solver] = ["power", "exact"]
GAUGES: list[Gauge] = ["procrustes", "balanced", "svd"]
A, B = name_a("q"), name_b("q")

solvers = pytest.mark.parametrize("solver", SOLVERS)
gauges = pytest.mark.parametrize("gauge", GAUGES)


def one_round(
    rule: LowRankMean, ends: list[Parameters], weights: list[float], **arguments: Any
) -> list[Parameters]:
    """What the parties hold after a round that they came to with ``ends``, having begun with party 0's."""

    def train(party: int, number: int, parameters: Parameters) -> None:
        for name, p in parameters.items():
            p.copy_(ends[party][name])

    begin = arguments.pop("start", ends[0])
    seen = run_rounds(rule, lambda party: copied(begin), train, weights=weights, **arguments)
    return [of_party[0].result for of_party in seen]


def drifted(far: float, num_parties: int = 3, rank: int = RANK) -> list[Parameters]:
    ends = []
    for party in range(num_parties):
        ends.append(adapter(0, SIZES, rank))
        drift(far)(party, 0, ends[-1])
    return ends


# ---- the error is the one that no factors can avoid


@gauges
def test_exact_misses_the_singular_values_that_are_cut_and_no_more(gauge: Gauge) -> None:
    ends = drifted(1.0)
    (result, *_) = one_round(LowRankMean("exact", gauge=gauge), ends, WEIGHTS)
    for module in SIZES:
        wanted = mean_update(ends, module, WEIGHTS)
        missed = np.linalg.norm(update(result, module) - wanted)
        assert missed == pytest.approx(cut(wanted, RANK), rel=1e-6)
        assert cut(wanted, RANK) > 0.1 * np.linalg.norm(wanted), "there was nothing to cut"
        assert away(update(result, module), best(wanted, RANK)) < 1e-6


@gauges
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_power_is_the_dense_subspace_iteration(steps: int, gauge: Gauge) -> None:
    # It starts with the A that everybody began the round with.
    ends = drifted(1.0)
    (result, *_) = one_round(LowRankMean("power", steps, gauge), ends, WEIGHTS, start=adapter(0, SIZES, RANK))
    for module in SIZES:
        wanted = mean_update(ends, module, WEIGHTS)
        dense = iterated(wanted, adapter(0, SIZES, RANK)[name_a(module)], steps)
        assert away(update(result, module), dense) < 1e-5


@solvers
def test_where_a_starts_at_zero_the_columns_of_b_show_the_way(solver: Solver) -> None:
    # As PEFT starts an embedding's. By sums alone it is the subspace iteration of the transposed product.
    start = adapter(0, SIZES, RANK)
    for module in SIZES:
        start[name_a(module)].zero_()
    ends = []
    for party in range(3):
        ends.append(copied(start))
        drift(0.3)(party, 0, ends[-1])
    (result, *_) = one_round(LowRankMean(solver), ends, WEIGHTS, start=start)
    for module in SIZES:
        wanted = mean_update(ends, module, WEIGHTS)
        dense = iterated(wanted.T, start[name_b(module)].T, 1).T if solver == "power" else best(wanted, RANK)
        assert away(update(result, module), dense) < 1e-5


def turned(far: float) -> list[Parameters]:
    """Factors rotated against each other, as training may: O A and B O^T, and a little of their own."""
    ends = []
    for party in range(4):
        begin = adapter(0, {"q": (256, 256)}, 8)
        g = random(100 + party, 8, 8).double()
        turn = torch.linalg.matrix_exp(far * (g - g.T) / 2).float()
        ends.append({A: turn @ begin[A], B: begin[B] @ turn.T})
        drift(0.05)(party, 0, ends[-1])
    return ends


def apart(far: float) -> list[Parameters]:
    ends = [adapter(0, {"q": (256, 256)}, 8) for _ in range(4)]
    for party, end in enumerate(ends):
        drift(far)(party, 0, end)
    return ends


SCENARIOS = {
    "turned by 0.05": (turned, 0.05),
    "turned by 0.2": (turned, 0.2),
    "turned by 0.5": (turned, 0.5),
    "apart by 0.3": (apart, 0.3),
    "apart by 1": (apart, 1.0),
}


@pytest.mark.parametrize("case", SCENARIOS)
def test_power_is_next_to_the_optimum_after_one_step_and_there_after_two(case: str) -> None:
    make, far = SCENARIOS[case]
    ends, weights = make(far), [1.0, 1.5, 1.0, 1.0]
    wanted = mean_update(ends, "q", weights)
    optimum = cut(wanted, 8) / np.linalg.norm(wanted)
    begin = adapter(0, {"q": (256, 256)}, 8)
    for steps, excess in ((1, 1e-2), (2, 1e-4)):
        (result, *_) = one_round(LowRankMean("power", steps), ends, weights, start=begin)
        missed = away(update(result, "q"), wanted)
        assert optimum * (1 - 1e-5) < missed < optimum * (1 + excess)
    mean = {name: sum(w * end[name] for w, end in zip(weights, ends, strict=True)) / 4.5 for name in (A, B)}
    assert away(update(mean, "q"), wanted) > optimum * (1 + 1e-3), "the plain mean would have done"


@st.composite
def federations(draw: st.DrawFn) -> dict[str, Any]:
    """Any sizes, ranks and weights; products that are full, zero, or of too low a rank."""
    weight = st.sampled_from([1.0, 3.0, 0.1, 0.0])
    return {
        "m": draw(st.integers(1, 7)),
        "n": draw(st.integers(1, 7)),
        "rank": draw(st.integers(1, 5)),
        "weights": draw(st.lists(weight, min_size=1, max_size=5).filter(any)),
        "far": draw(st.sampled_from([0.0, 0.1, 1.0, 10.0])),
        "dead at first": draw(st.sampled_from(["", "B", "A", "a column of B", "a row of A"])),
        "dead": draw(st.sampled_from(["", "B", "A", "a column of B", "a row of A", "all but one of B"])),
        "scale": draw(st.sampled_from([1e-4, 1.0, 1e3])),
        "scaling": draw(st.sampled_from([1.0, 0.25, 2.0])),
        "solver": draw(st.sampled_from(SOLVERS)),
        "gauge": draw(st.sampled_from(GAUGES)),
        "seed": draw(st.integers(0, 1000)),
    }


def kill_(parameters: Parameters, what: str) -> None:
    if what == "B":
        parameters[B].zero_()
    elif what == "A":
        parameters[A].zero_()
    elif what == "a column of B":
        parameters[B][:, 0] = 0
    elif what == "a row of A":
        parameters[A][0] = 0
    elif what == "all but one of B":
        parameters[B][:, 1:] = 0


@settings(max_examples=60, deadline=None)
@given(federations())
def test_any_factors_have_a_finite_best_mean(drawn: dict[str, Any]) -> None:
    # A party of weight 0 holds NaN.
    sizes, weights, scaling = {"q": (drawn["m"], drawn["n"])}, drawn["weights"], drawn["scaling"]
    start = {name: p * drawn["scale"] for name, p in adapter(drawn["seed"], sizes, drawn["rank"]).items()}
    kill_(start, drawn["dead at first"])
    ends = []
    for party, weight in enumerate(weights):
        end = copied(start)
        drift(drawn["far"] * drawn["scale"])(party, drawn["seed"], end)
        kill_(end, drawn["dead"])
        ends.append({name: p if weight else p * math.nan for name, p in end.items()})
    results = one_round(
        LowRankMean(drawn["solver"], gauge=drawn["gauge"]),
        ends,
        weights,
        start=start,
        lora=lambda party: modules(frozen(0, sizes), scaling),
    )
    assert all(p.isfinite().all() for p in results[0].values())
    assert len({bits(result) for result in results}) == 1
    wanted = mean_update(ends, "q", weights, [scaling] * len(weights))
    missed = float(np.linalg.norm(update(results[0], "q", scaling) - wanted))
    # The result has the rank, up to rounding, so it cannot miss less than the best; nor more than nothing.
    held = [start, results[0], *(end for end, weight in zip(ends, weights, strict=True) if weight)]
    rounding = 3e-6 * scaling * math.prod(max(float(p[name].norm()) for p in held) for name in (A, B))
    optimum = cut(wanted, drawn["rank"])
    assert optimum - rounding <= missed
    assert missed <= (optimum if drawn["solver"] == "exact" else float(np.linalg.norm(wanted))) + rounding


# ---- the coordinates


@solvers
def test_the_product_does_not_depend_on_the_gauge(solver: Solver) -> None:
    ends = drifted(0.5)
    found = [one_round(LowRankMean(solver, gauge=gauge), ends, WEIGHTS)[0] for gauge in GAUGES]
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
    (svd, *_) = one_round(LowRankMean(solver, gauge="svd"), ends, WEIGHTS, lora=lora)
    (balanced, *_) = one_round(LowRankMean(solver, gauge="balanced"), ends, WEIGHTS, lora=lora)
    for module in SIZES:
        a = svd[name_a(module)]
        torch.testing.assert_close(a @ a.T, torch.eye(RANK), rtol=0, atol=1e-6)
        b, a = balanced[name_b(module)], balanced[name_a(module)]
        torch.testing.assert_close(b.T @ b, a @ a.T, rtol=0, atol=1e-4)
        wanted = mean_update(ends, module, WEIGHTS)
        if solver == "exact":
            singular = np.linalg.svd(wanted, compute_uv=False)[:RANK]
            np.testing.assert_allclose(np.diag(a @ a.T), singular, rtol=1e-5)


@solvers
def test_procrustes_is_nearer_to_the_mean_factors_than_the_balanced_ones_rotated(solver: Solver) -> None:
    ends = drifted(0.5)
    (near, *_) = one_round(LowRankMean(solver), ends, WEIGHTS)
    (balanced, *_) = one_round(LowRankMean(solver, gauge="balanced"), ends, WEIGHTS)
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
@pytest.mark.parametrize("gauge", ["balanced", "svd"])
def test_signs_do_not_depend_on_those_of_the_parties(solver: Solver, gauge: Gauge) -> None:
    # Each party may turn the signs of a column of B and the row of A together: its product stays, to the bit.
    ends = drifted(0.5)
    flipped = [copied(end) for end in ends]
    for party, end in enumerate(flipped):
        flips = random(party, RANK).sign()
        for module in SIZES:
            end[name_b(module)] *= flips
            end[name_a(module)] *= flips[:, None]
    rule = LowRankMean(solver, gauge=gauge)
    start = adapter(0, SIZES, RANK)
    plain, turned_ = (one_round(rule, those, WEIGHTS, start=start)[0] for those in (ends, flipped))
    assert bits(flipped[0]) != bits(ends[0])
    assert bits(turned_) == bits(plain)


@solvers
@gauges
def test_parties_that_agree_get_back_what_they_came_with(solver: Solver, gauge: Gauge) -> None:
    end = adapter(5, SIZES, RANK)
    start = adapter(0, SIZES, RANK)
    for result in one_round(LowRankMean(solver, gauge=gauge), [end] * 3, WEIGHTS, start=start):
        for name, p in end.items():
            torch.testing.assert_close(result[name], p, rtol=0, atol=3e-6)


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
@pytest.mark.parametrize("gauge", ["balanced", "svd"])
def test_at_the_start_where_b_is_zero_no_row_of_a_dies(solver: Solver, gauge: Gauge) -> None:
    # A has drifted apart, as by weight decay, and B has not moved: a row of A that is zero could never learn.
    ends = drifted(0.1)
    for end in ends:
        for module in SIZES:
            end[name_b(module)].zero_()
    (result, *_) = one_round(LowRankMean(solver, gauge=gauge), ends, WEIGHTS)
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


# ---- what no float32 holds


@solvers
@gauges
def test_products_beyond_float32_write_nothing_that_is_not_finite(solver: Solver, gauge: Gauge) -> None:
    # Factors of 1e25 have products of 1e50: what is to cross or be written of them may exceed float32, and
    # then the round stops at every party. Else the result is right.
    ends = drifted(0.5)
    for end in ends:
        for p in end.values():
            p *= 1e25

    def act(federation: Federation) -> Parameters | None:
        parameters = adapter(0, SIZES, RANK)
        aggregator = Aggregator(federation, parameters, aggregation=LowRankMean(solver, gauge=gauge))
        aggregator.start()
        for name, p in parameters.items():
            p.copy_(ends[federation.party][name])
        if solver == "exact" and gauge != "svd":
            aggregator.step(WEIGHTS[federation.party])
            return parameters
        with pytest.raises(FederationError, match=r"'k\.default' exceed float32.*No parameter was changed"):
            aggregator.step(WEIGHTS[federation.party])
        assert bits(parameters) == bits(ends[federation.party])
        return None

    for result in run_parties(3, act):
        if result is not None:
            for module in SIZES:
                wanted = best(mean_update(ends, module, WEIGHTS), RANK)
                assert away(update(result, module), wanted) < 1e-6


# ---- outer optimizers with a memory


@solvers
def test_momentum_under_procrustes_equals_its_formula(solver: Solver) -> None:
    # m <- 0.9 m + (x - result); x <- x - 0.5 m for x = (A, B) of rank 1 and scaling 2, over five rounds in
    # which party i holds x + its drift. The result in float64: M = 2 sum(w B A) = p u v^T + ...; of all
    # B = t u, A = p / (2 t) v^T it is the one nearest to the mean factors, where with b = u B, a = A v the
    # distance (t - b)^2 + (q / t - a)^2, q = p / 2, has its minimum: t^4 - b t^3 + q a t - q^2 = 0.
    sizes: Sizes = {"q": (8, 9)}
    rounds = 5
    seen = run_rounds(
        LowRankMean(solver, steps=4),
        lambda party: adapter(3, sizes, 1),
        drift(0.15),
        weights=WEIGHTS,
        rounds=rounds,
        lora=lambda party: modules(frozen(0, sizes), 2.0),
        outer_optimizer=sgd(lr=0.5, momentum=0.9),
    )
    b, a = (adapter(3, sizes, 1)[name].double().numpy() for name in (B, A))
    momentum_b, momentum_a = 0 * b, 0 * a
    for number in range(rounds):
        ends = [{B: torch.from_numpy(b.copy()), A: torch.from_numpy(a.copy())} for _ in WEIGHTS]
        for party, end in enumerate(ends):
            drift(0.15)(party, number, end)
        u, s, vt = np.linalg.svd(mean_update(ends, "q", WEIGHTS, [2.0] * 3))
        mean_b, mean_a = (
            sum(w * end[name].numpy() for w, end in zip(WEIGHTS, ends, strict=True)) / 4.5 for name in (B, A)
        )
        along_b, along_a, q = float(u[:, 0] @ mean_b[:, 0]), float(mean_a[0] @ vt[0]), s[0] / 2
        roots = np.roots([1, -along_b, 0, q * along_a, -(q**2)])
        real = [root.real for root in roots if abs(root.imag) < 1e-9]
        t = min(real, key=lambda t: (t - along_b) ** 2 + (q / t - along_a) ** 2)
        momentum_b = 0.9 * momentum_b + b - t * u[:, :1]
        momentum_a = 0.9 * momentum_a + a - q / t * vt[:1]
        b, a = b - 0.5 * momentum_b, a - 0.5 * momentum_a
        np.testing.assert_allclose(seen[1][number].result[B], b, rtol=0, atol=2e-5)
        np.testing.assert_allclose(seen[1][number].result[A], a, rtol=0, atol=2e-5)
