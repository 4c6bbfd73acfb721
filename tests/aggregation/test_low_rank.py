"""The best low-rank mean, by sums alone and by an owner of each module, against dense truncated SVDs."""

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_oracles import (
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
    one_round,
    random,
    run_rounds,
    sgd,
    update,
)
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Aggregator, Federation, FederationError
from pellm_lightning.aggregation import LowRankMean, factors
from pellm_lightning.aggregation.factorization import Factorization
from pellm_lightning.aggregation.low_rank import Solver

SIZES: Sizes = {"k": (12, 10), "q": (9, 14)}
RANK = 3
WEIGHTS = [1.0, 3.0, 0.5]
SOLVERS: list[Solver] = ["power", "exact"]
GAUGES: list[Factorization] = ["procrustes", "balanced", "svd"]
A, B = name_a("q"), name_b("q")

solvers = pytest.mark.parametrize("solver", SOLVERS)
gauges = pytest.mark.parametrize("factorization", GAUGES)


def drifted(far: float) -> list[Parameters]:
    """What three parties came with, having begun with one adapter."""
    ends = [adapter(0, SIZES, RANK) for _ in WEIGHTS]
    for party, end in enumerate(ends):
        drift(far)(party, 0, end)
    return ends


# ---- the error is the one that no factors can avoid


@gauges
def test_exact_misses_the_singular_values_that_are_cut_and_no_more(factorization: Factorization) -> None:
    ends = drifted(1.0)
    (result, *_) = one_round(LowRankMean("exact", factorization=factorization), ends, WEIGHTS)
    for module in SIZES:
        wanted = mean_update(ends, module, WEIGHTS)
        missed = np.linalg.norm(update(result, module) - wanted)
        assert missed == pytest.approx(cut(wanted, RANK), rel=1e-6)
        assert cut(wanted, RANK) > 0.1 * np.linalg.norm(wanted), "there was nothing to cut"
        assert away(update(result, module), best(wanted, RANK)) < 1e-6


@gauges
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_power_is_the_dense_subspace_iteration(steps: int, factorization: Factorization) -> None:
    # It starts with the A that everybody began the round with.
    ends = drifted(1.0)
    (result, *_) = one_round(
        LowRankMean("power", steps, factorization), ends, WEIGHTS, start=adapter(0, SIZES, RANK)
    )
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
        "factorization": draw(st.sampled_from(GAUGES)),
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
        LowRankMean(drawn["solver"], factorization=drawn["factorization"]),
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


# ---- what no float32 holds


@solvers
@gauges
def test_products_beyond_float32_write_nothing_that_is_not_finite(
    solver: Solver, factorization: Factorization
) -> None:
    # Factors of 1e25 have products of 1e50: what is to cross or be written of them may exceed float32, and
    # then the round stops at every party. Else the result is right.
    ends = drifted(0.5)
    for end in ends:
        for p in end.values():
            p *= 1e25

    def act(federation: Federation) -> Parameters | None:
        parameters = adapter(0, SIZES, RANK)
        aggregator = Aggregator(
            federation, parameters, aggregation=LowRankMean(solver, factorization=factorization)
        )
        aggregator.start()
        for name, p in parameters.items():
            p.copy_(ends[federation.party][name])
        if solver == "exact" and factorization != "svd":
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


# ---- parties whose processors round otherwise


def on_unlike_processors(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Let each thread's linear algebra round in a way of its own: by 2^-52 of the largest number."""
    here = threading.local()

    def rounded(x: Tensor) -> Tensor:
        here.calls = getattr(here, "calls", 0) + 1
        return x + 2.0**-52 * x.abs().max() * random(1000 * here.party + here.calls, *x.shape).double()

    orthonormal, from_range = factors.orthonormal, factors.from_range
    monkeypatch.setattr(factors, "orthonormal", lambda x: orthonormal(rounded(x)))
    monkeypatch.setattr(factors, "from_range", lambda p, projected: from_range(p, rounded(projected)))
    return here


@gauges
@pytest.mark.parametrize("steps", [1, 2])
def test_directions_of_rounding_errors_are_the_same_at_all_parties(
    steps: int, factorization: Factorization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the parties add up, column by column, is of the same columns."""
    # Column 2 of B cancels in the sum, and column 3 is zero: of four columns the product has two, and where
    # the others lie rounding decides. Yet each party's product has much in the direction of column 2.
    ends = [adapter(0, {"q": (9, 14)}, 4) for _ in range(2)]
    for party, end in enumerate(ends):
        end[B][:, :2] = random(party, 9, 2)
        end[B][:, 2] *= 10 * (1 - 2 * party)
        end[B][:, 3] = 0
    here = on_unlike_processors(monkeypatch)

    def act(federation: Federation) -> Parameters:
        here.party = federation.party
        held = copied(adapter(0, {"q": (9, 14)}, 4))
        aggregator = Aggregator(federation, held, aggregation=LowRankMean("power", steps, factorization))
        aggregator.start()
        for name, p in held.items():
            p.copy_(ends[federation.party][name])
        aggregator.step(1.0)
        return held

    first, second = run_parties(2, act)
    assert bits(first) == bits(second)
    # Both parties' A are the same, so M is of rank 2 and one step finds it. Sums in float32 of numbers up to
    # 100 have errors of 2^-24 of these, a hundred thousandth of M; columns that differ add a tenth of it.
    wanted = mean_update(ends, "q", [1.0, 1.0])
    assert away(update(first, "q"), wanted) < 1e-5
