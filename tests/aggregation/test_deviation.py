"""The deviation that a round reports, against dense matrices in float64; and that no rule ever makes one."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from allocations import Allocations
from lora_oracles import (
    Parameters,
    Round,
    Sizes,
    adapter,
    best,
    bits,
    drift,
    frozen,
    iterated,
    mean_of,
    mean_update,
    measuring,
    modules,
    name_a,
    name_b,
    random,
    run_rounds,
    sgd,
)
from party_threads import run_parties

from pellm_lightning import Aggregator, Federation, RoundReport
from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    Deviation,
    FrozenA,
    HeterogeneousRank,
    LowRankMean,
    Mean,
    ResidualMean,
    ShareA,
    Stacking,
    base_writing,
)

FEW: Sizes = {"q": (8, 9)}
MANY: Sizes = {"a": (8, 7), "b": (6, 9), "c": (9, 9), "d": (5, 8), "e": (7, 6)}
"""More than there are parties, so that some own two."""
RANK = 3
WEIGHTS = [1.0, 3.0, 0.5]
SCALING = 2.0

Result = Callable[[Sequence[Parameters], str, list[float], Parameters], np.ndarray]
"""The product of a rule's result, from what the parties held, the module, the weights and the start."""


def of_mean(held: Sequence[Parameters], module: str, weights: list[float], start: Parameters) -> np.ndarray:
    b, a = (mean_of(weights, [p[name(module)].double().numpy() for p in held]) for name in (name_b, name_a))
    return np.asarray(SCALING * b @ a)


def of_best(held: Sequence[Parameters], module: str, weights: list[float], start: Parameters) -> np.ndarray:
    return best(mean_update(held, module, weights, [SCALING] * len(held)), RANK)


def of_power(held: Sequence[Parameters], module: str, weights: list[float], start: Parameters) -> np.ndarray:
    return iterated(mean_update(held, module, weights, [SCALING] * len(held)), start[name_a(module)], 1)


def of_all(held: Sequence[Parameters], module: str, weights: list[float], start: Parameters) -> np.ndarray:
    return mean_update(held, module, weights, [SCALING] * len(held))


CASES: dict[str, tuple[Aggregation, Result]] = {
    "Mean": (Mean(), of_mean),
    "FrozenA": (FrozenA(), of_all),
    "Alternating": (Alternating(), of_all),
    "LowRankMean, power": (LowRankMean("power"), of_power),
    "LowRankMean, exact": (LowRankMean("exact", factorization="svd"), of_best),
    "HeterogeneousRank": (HeterogeneousRank(solver="exact"), of_best),
    "HeterogeneousRank, zero_pad": (HeterogeneousRank("zero_pad"), of_mean),
    "ResidualMean": (ResidualMean(), of_all),
}


def apart(party: int, number: int, parameters: Parameters) -> None:
    """Each module drifts further than the one before, but for the last; d is the worst of many."""
    for index, module in enumerate(sorted({name.partition(".")[0] for name in parameters})):
        own = {name: p for name, p in parameters.items() if name.startswith(f"{module}.")}
        drift(0.3 + 0.2 * (index % 4))(party, 7 * number, own)


def rounds_of(rule: Aggregation, sizes: Sizes, dtype: torch.dtype, **arguments: object) -> list[list[Round]]:
    bases = [frozen(3, sizes) for _ in WEIGHTS]

    def train(party: int, number: int, parameters: Parameters) -> None:
        if rule.frozen_parts(number):
            parameters = {name: p for name, p in parameters.items() if "lora_B" in name}
        apart(party, number, parameters)

    return run_rounds(
        rule,
        lambda party: adapter(0, sizes, RANK, dtype),
        arguments.pop("train", train),
        weights=WEIGHTS,
        lora=lambda party: modules(bases[party], SCALING),
        **arguments,
    )


def expected(
    result: Result, held: Sequence[Parameters], sizes: Sizes, weights: list[float], start: Parameters
) -> Deviation:
    """|M - R| / |M| over all modules together, and of the one where it is largest, with its name."""
    away, whole = [], []
    for module in sizes:
        mean = mean_update(held, module, weights, [SCALING] * len(held))
        away.append(float(np.sum((result(held, module, weights, start) - mean) ** 2)))
        whole.append(float(np.sum(mean**2)))
    each = [math.sqrt(a / w) for a, w in zip(away, whole, strict=True)]
    worst = int(np.argmax(each))
    return Deviation(math.sqrt(sum(away) / sum(whole)), each[worst], f"{list(sizes)[worst]}.default")


def check(found: Deviation | None, wanted: Deviation) -> None:
    assert found is not None
    assert found.total == pytest.approx(wanted.total, rel=1e-5, abs=3e-7)
    assert found.worst == pytest.approx(wanted.worst, rel=1e-5, abs=3e-7)
    if wanted.worst > 1e-3:
        assert found.worst_module == wanted.worst_module


# ---- what is reported


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["one module", "five modules"])
@pytest.mark.parametrize("case", CASES)
def test_the_deviation_is_that_of_the_dense_matrices(case: str, sizes: Sizes, dtype: torch.dtype) -> None:
    # Parameters may hold bf16: the deviation is that of the result from what the parties held. That of a mean
    # of factors is the same in the next round, whose anchor the parameters hold rounded.
    rule, result = CASES[case]
    seen = rounds_of(rule, sizes, dtype, rounds=2)
    for number in range(2 if result in (of_mean, of_all) else 1):
        held = [of_party[number].held for of_party in seen]
        wanted = expected(result, held, sizes, WEIGHTS, adapter(0, sizes, RANK, dtype))
        for of_party in seen:
            check(of_party[number].report.deviation, wanted)
        assert len({repr(of_party[number].report.deviation) for of_party in seen}) == 1
    if result is not of_all:
        assert wanted.total > 0.01
        assert sizes is FEW or wanted.worst_module == "d.default"


@pytest.mark.parametrize("case", ["Mean", "LowRankMean, power", "LowRankMean, exact"])
def test_a_party_that_is_left_out_deviates_from_nothing(case: str) -> None:
    # Party 1 holds NaN, so the weights are 1, 0, 0.5.
    rule, result = CASES[case]

    def train(party: int, number: int, parameters: Parameters) -> None:
        apart(party, number, parameters)
        if party == 1:
            parameters[name_b("b")][2, 1] = math.nan

    seen = rounds_of(rule, MANY, torch.float32, train=train)
    assert all(done.report.excluded == (1,) for (done,) in seen)
    held = [done.held for (done,) in seen]
    wanted = expected(result, held, MANY, [1.0, 0.0, 0.5], adapter(0, MANY, RANK))
    for (done,) in seen:
        check(done.report.deviation, wanted)


def test_the_deviation_is_that_of_the_result_and_not_of_an_outer_step() -> None:
    whole = rounds_of(Mean(), MANY, torch.float32)
    half = rounds_of(Mean(), MANY, torch.float32, outer_optimizer=sgd(lr=0.5, momentum=0.9))
    assert half[0][0].report.deviation == whole[0][0].report.deviation


def reports(starts: Sequence[Parameters], weights: Sequence[float]) -> list[RoundReport]:
    def train(party: int, number: int, parameters: Parameters) -> None:
        for name, p in parameters.items():
            p.copy_(starts[party][name])

    seen = run_rounds(
        Mean(), lambda party: {n: p.clone() for n, p in starts[0].items()}, train, weights=weights
    )
    return [done.report for (done,) in seen]


def test_nothing_deviates_from_nothing() -> None:
    # B is zero at both parties, as at the start of a training.
    starts = [adapter(party, FEW, RANK) for party in range(2)]
    for made in starts:
        made[name_b("q")].zero_()
    for report in reports(starts, [1, 3]):
        assert report.deviation == Deviation(0.0, 0.0, "q.default")


def test_something_deviates_infinitely_from_nothing() -> None:
    # Parties hold B, A and -B / 2, 2 A: the mean of the products is 0, that of the factors B / 4 and 3/2 A.
    # Whole numbers: the sums are exact.
    b, a = (random(seed, *shape, scale=3.0).round() * 2 for seed, shape in ((0, (4, 2)), (1, (2, 5))))
    starts = [{name_b("q"): b, name_a("q"): a}, {name_b("q"): -b / 2, name_a("q"): 2 * a}]
    for report in reports(starts, [1, 1]):
        assert report.deviation == Deviation(math.inf, math.inf, "q.default")


def test_the_worst_module_is_the_worst_by_its_own_size() -> None:
    # Module b is small and deviates by all it has, a is large and deviates by a little: in all by next to
    # nothing.
    def train(party: int, number: int, parameters: Parameters) -> None:
        drift(0.02, "a.")(party, number, parameters)
        drift(0.05, "b.")(party, number, parameters)

    sizes: Sizes = {"a": (8, 8), "b": (8, 8)}
    small = {name: p * (0.01 if name.startswith("b") else 1) for name, p in adapter(0, sizes, 2).items()}
    seen = run_rounds(Mean(), lambda party: {n: p.clone() for n, p in small.items()}, train, weights=WEIGHTS)
    deviation = seen[0][0].report.deviation
    assert deviation is not None
    assert deviation.worst_module == "b.default"
    assert deviation.worst > 0.3
    assert deviation.total < 0.01


# ---- what is not


def plainly(rule: Aggregation | None, parameters: Parameters, **arguments: object) -> list[RoundReport]:
    seen = run_rounds(
        rule,
        lambda party: {n: p.clone() for n, p in parameters.items()},
        drift(0.3),
        weights=[1, 3],
        **arguments,
    )
    return [done.report for (done,) in seen]


@pytest.mark.parametrize("rule", [None, Mean()])
def test_without_lora_nothing_is_measured(rule: Aggregation | None) -> None:
    head = {"head.weight": random(0, 3, 4), "half.lora_A.default.weight": random(1, 2, 4)}
    assert [report.deviation for report in plainly(rule, head)] == [None, None]


def test_factors_that_stay_local_have_no_common_product() -> None:
    assert [report.deviation for report in plainly(ShareA(), adapter(0, FEW, 2))] == [None, None]


@pytest.mark.parametrize(
    "rule", [None, Mean(), FrozenA(), Alternating(), LowRankMean("exact"), HeterogeneousRank()]
)
def test_measuring_can_be_left_out(rule: Aggregation | None) -> None:
    found = plainly(measuring(rule, False), adapter(0, FEW, 2))
    assert [report.deviation for report in found] == [None, None]


@pytest.mark.parametrize("rule", [ResidualMean(), Stacking()])
def test_what_rounding_of_the_base_loses_is_known_without_measuring(rule: Aggregation) -> None:
    bases = [frozen(3, FEW) for _ in range(2)]
    found = plainly(
        measuring(rule, False), adapter(0, FEW, 2), lora=lambda party: modules(bases[party], SCALING)
    )
    assert all(report.deviation is not None and report.deviation.total < 1e-6 for report in found)


@pytest.mark.parametrize("rule", [Mean(), LowRankMean("power"), LowRankMean("exact")])
def test_measuring_changes_no_bit_of_the_result(rule: Aggregation) -> None:
    def run(measure: bool) -> list[bytes]:
        seen = rounds_of(measuring(rule, measure), MANY, torch.float32, rounds=2)
        return [bits(of_party[-1].result) for of_party in seen]

    assert run(True) == run(False)


# ---- no matrix of the size of a weight


@pytest.mark.parametrize(
    "rule", [Mean(), LowRankMean("power"), LowRankMean("exact"), LowRankMean("exact", factorization="svd")]
)
def test_no_round_makes_a_matrix_of_the_size_of_a_weight(rule: Aggregation) -> None:
    # The largest is the stack of the four parties' factors and the result's, in float64: 4096 x 80 scalars,
    # a fiftieth of the weight's.
    size, rank = 4096, 16

    def act(federation: Federation) -> int:
        parameters = adapter(0, {"q": (size, size)}, rank)
        aggregator = Aggregator(federation, parameters, aggregation=rule)
        aggregator.start()
        drift(0.1)(federation.party, 0, parameters)
        with Allocations() as made:
            report = aggregator.step([1, 3, 2, 0.5][federation.party])
        assert report.deviation is not None
        return max(made.sizes)

    for largest in run_parties(4, act):
        assert largest <= 8 * size * 5 * rank


@pytest.mark.parametrize("across", [False, True], ids=["(m, n)", "(n, m)"])
@pytest.mark.parametrize("rule", [ResidualMean(), Stacking()])
def test_writing_a_weight_makes_no_second_one(
    rule: Aggregation, across: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_writing, "_BLOCK", 1 << 14)
    size = 512

    def act(federation: Federation) -> int:
        base = random(0, size, size)
        parameters = adapter(0, {"q": (size, size)}, 4)
        lora = modules({"q": base.T if across else base})
        aggregator = Aggregator(federation, parameters, aggregation=rule, lora=lora)
        aggregator.start()
        drift(0.1)(federation.party, 0, parameters)
        with Allocations() as made:
            aggregator.step(1 + federation.party)
        return max(made.sizes)

    for largest in run_parties(2, act):
        assert largest < 4 * size * size / 4, "a quarter of the weight in float32"
