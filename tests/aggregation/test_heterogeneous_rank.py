"""Parties of different ranks and scalings: each gets the best of its own rank, or a part of a padded mean."""

import io
import math
from collections.abc import Mapping, Sequence
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
    update,
)
from party_threads import run_parties

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import Aggregation, HeterogeneousRank, LoraModule, LowRankMean, Mean
from pellm_lightning.comm import MismatchError

SIZES: Sizes = {"k": (8, 7), "q": (6, 9)}
WEIGHTS = [1.0, 3.0, 0.5]
RANKS = [{"k": 2, "q": 3}, {"k": 4, "q": 1}, {"k": 3, "q": 5}]
"""Of each party; the first of the largest is party 1 for k, party 2 for q."""
SOURCE = {"k": 1, "q": 2}
ALPHA = 8.0
PLAIN = [{name: ALPHA / rank for name, rank in ranks.items()} for ranks in RANKS]
RS_LORA = [{name: ALPHA / math.sqrt(rank) for name, rank in ranks.items()} for ranks in RANKS]
OTHER_ALPHAS = [
    {name: (1 + party) / rank for name, rank in ranks.items()} for party, ranks in enumerate(RANKS)
]
scalings_vary = pytest.mark.parametrize(
    "scalings", [PLAIN, RS_LORA, OTHER_ALPHAS], ids=["alpha / r", "rsLoRA", "other alphas"]
)


def start(party: int, ranks: Sequence[Mapping[str, int]] = RANKS) -> Parameters:
    """Another one at each party."""
    made = {}
    for module, rank in ranks[party].items():
        made |= adapter(10 * party, {module: SIZES[module]}, rank)
    return made


def said(scalings: Mapping[str, float]) -> dict[str, LoraModule]:
    return {f"{name}.default": LoraModule(scaling=scaling) for name, scaling in scalings.items()}


def of(module: str, scalings: Sequence[Mapping[str, float]]) -> list[float]:
    return [of_party[module] for of_party in scalings]


# ---- the start


@scalings_vary
@pytest.mark.parametrize("method", ["low_rank", "zero_pad"])
def test_all_start_with_the_adapter_of_the_largest_rank(
    method: Any, scalings: list[Mapping[str, float]]
) -> None:
    # Of it each takes as many rows of A and columns of B as it has; B s stays. All else is party 0's.
    def act(federation: Federation) -> Parameters:
        party = federation.party
        parameters = start(party) | {"head": random(party, 4)}
        rule = HeterogeneousRank(method)
        Aggregator(federation, parameters, aggregation=rule, lora=said(scalings[party])).start()
        return parameters

    for party, parameters in enumerate(run_parties(3, act)):
        assert torch.equal(parameters["head"], random(0, 4))
        for module, source in SOURCE.items():
            rank, largest = RANKS[party][module], start(source)
            assert torch.equal(parameters[name_a(module)], largest[name_a(module)][:rank])
            ratio = scalings[source][module] / scalings[party][module]
            wanted = largest[name_b(module)][:, :rank] * ratio
            torch.testing.assert_close(parameters[name_b(module)], wanted, rtol=1e-6, atol=0)


def test_of_equal_ranks_party_0_is_the_source() -> None:
    ranks = [{"k": 3}, {"k": 2}, {"k": 3}]

    def act(federation: Federation) -> Parameters:
        parameters = start(federation.party, ranks)
        Aggregator(federation, parameters, aggregation=HeterogeneousRank()).start()
        return parameters

    for parameters in run_parties(3, act):
        rank = parameters[name_a("k")].shape[0]
        assert torch.equal(parameters[name_a("k")], start(0, ranks)[name_a("k")][:rank])


# ---- low_rank


@scalings_vary
@pytest.mark.parametrize("factorization", ["balanced", "svd"])
def test_each_party_gets_the_best_of_its_own_rank(
    scalings: list[Mapping[str, float]], factorization: Any
) -> None:
    seen = run_rounds(
        HeterogeneousRank(solver="exact", factorization=factorization),
        start,
        drift(0.5),
        weights=WEIGHTS,
        rounds=2,
        lora=lambda party: said(scalings[party]),
    )
    for number in range(2):
        held = [of_party[number].held for of_party in seen]
        for module in SIZES:
            mean = mean_update(held, module, WEIGHTS, of(module, scalings))
            for party, of_party in enumerate(seen):
                found = update(of_party[number].result, module, scalings[party][module])
                assert away(found, best(mean, RANKS[party][module])) < 2e-6
        # What is reported is by how much the largest rank misses.
        missed, whole = 0.0, 0.0
        for module in SIZES:
            mean = mean_update(held, module, WEIGHTS, of(module, scalings))
            missed += cut(mean, max(ranks[module] for ranks in RANKS)) ** 2
            whole += float(np.sum(mean**2))
        for of_party in seen:
            assert of_party[number].report.deviation is not None
            assert of_party[number].report.deviation.total == pytest.approx(
                math.sqrt(missed / whole), rel=1e-4
            )


@scalings_vary
@pytest.mark.parametrize("steps", [1, 3])
def test_by_sums_alone_it_is_the_dense_subspace_iteration_cut(
    scalings: list[Mapping[str, float]], steps: int
) -> None:
    # Started with the A of the largest rank, whose first rows the others have.
    seen = run_rounds(
        HeterogeneousRank(solver="power", steps=steps),
        start,
        drift(0.5),
        weights=WEIGHTS,
        lora=lambda party: said(scalings[party]),
    )
    for module, source in SOURCE.items():
        mean = mean_update([done.held for (done,) in seen], module, WEIGHTS, of(module, scalings))
        dense = iterated(mean, start(source)[name_a(module)], steps)
        for party, (done,) in enumerate(seen):
            found = update(done.result, module, scalings[party][module])
            assert away(found, best(dense, RANKS[party][module])) < 1e-5


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([0.25, 1.0, 3.0]), st.sampled_from([1.0, 3.0, 0.0])),
        min_size=2,
        max_size=4,
    ).filter(lambda drawn: any(weight > 0 for _, _, weight in drawn)),
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from(["balanced", "svd"]),
)
def test_any_ranks_give_the_best_of_each(
    drawn: list[tuple[int, float, float]], m: int, n: int, factorization: Any
) -> None:
    ranks, scalings, weights = zip(*drawn, strict=True)
    sizes = {"q": (m, n)}
    seen = run_rounds(
        HeterogeneousRank(solver="exact", factorization=factorization),
        lambda party: adapter(party, sizes, ranks[party]),
        drift(0.5),
        weights=weights,
        lora=lambda party: said({"q": scalings[party]}),
    )
    held = [done.held for (done,) in seen]
    mean = mean_update(held, "q", weights, scalings)
    largest = max(np.linalg.norm(update(p, "q", s)) for p, s in zip(held, scalings, strict=True))
    for (done,), rank, scaling in zip(seen, ranks, scalings, strict=True):
        assert all(p.isfinite().all() for p in done.result.values())
        missed = np.linalg.norm(update(done.result, "q", scaling) - mean)
        assert missed == pytest.approx(cut(mean, rank), rel=1e-5, abs=1e-5 * largest)


@pytest.mark.parametrize(
    ("ranks", "scalings", "weights"),
    [((2, 4), (2.0, 2.0), (1.0, 0.0)), ((2, 4), (2.0, 2.0), (0.0, 1.0)), ((3, 3), (2.0, 4.0), (0.0, 1.0))],
)
def test_if_one_party_counts_the_others_have_the_best_of_its_product(
    ranks: tuple[int, int], scalings: tuple[float, float], weights: tuple[float, float]
) -> None:
    seen = run_rounds(
        HeterogeneousRank(solver="exact"),
        lambda party: adapter(party, {"q": (7, 6)}, ranks[party]),
        drift(0.5),
        weights=list(weights),
        lora=lambda party: said({"q": scalings[party]}),
    )
    (counts,) = (party for party in range(2) if weights[party])
    ((trained,),) = [seen[counts]]
    product = update(trained.held, "q", scalings[counts])
    for (done,), rank, scaling in zip(seen, ranks, scalings, strict=True):
        assert away(update(done.result, "q", scaling), best(product, rank)) < 1e-5


def test_one_rank_and_one_scaling_are_the_low_rank_mean() -> None:
    def run(rule: Aggregation) -> list[bytes]:
        seen = run_rounds(rule, lambda party: adapter(party, SIZES, 3), drift(0.5), weights=WEIGHTS, rounds=2)
        return [bits(of_party[-1].result) for of_party in seen]

    assert run(HeterogeneousRank(factorization="svd")) == run(LowRankMean(factorization="svd"))


# ---- zero_pad


@scalings_vary
def test_zero_pad_is_the_mean_of_padded_factors_cut(scalings: list[Mapping[str, float]]) -> None:
    # B_i s_i / s and A_i, padded with zeros to the largest rank, of scaling s; a party takes the first r_i of
    # the mean, and B back in its own scaling.
    seen = run_rounds(
        HeterogeneousRank("zero_pad"),
        start,
        drift(0.5),
        weights=WEIGHTS,
        rounds=2,
        lora=lambda party: said(scalings[party]),
    )
    for number in range(2):
        missed, whole = 0.0, 0.0
        for module, (m, n) in SIZES.items():
            largest = max(ranks[module] for ranks in RANKS)
            mean_b, mean_a = np.zeros((m, largest)), np.zeros((largest, n))
            for party, of_party in enumerate(seen):
                rank, held = RANKS[party][module], of_party[number].held
                share = WEIGHTS[party] / 4.5
                mean_b[:, :rank] += share * scalings[party][module] * held[name_b(module)].double().numpy()
                mean_a[:rank] += share * held[name_a(module)].double().numpy()
            for party, of_party in enumerate(seen):
                rank, result = RANKS[party][module], of_party[number].result
                wanted = mean_b[:, :rank] / scalings[party][module]
                np.testing.assert_allclose(result[name_b(module)], wanted, rtol=0, atol=3e-6)
                np.testing.assert_allclose(result[name_a(module)], mean_a[:rank], rtol=0, atol=1e-6)
            mean = mean_update([o[number].held for o in seen], module, WEIGHTS, of(module, scalings))
            missed += float(np.sum((mean - mean_b @ mean_a) ** 2))
            whole += float(np.sum(mean**2))
        for of_party in seen:
            assert of_party[number].report.deviation is not None
            assert of_party[number].report.deviation.total == pytest.approx(
                math.sqrt(missed / whole), rel=1e-4
            )


def test_zero_pad_of_one_rank_and_one_scaling_is_the_mean() -> None:
    def run(rule: Aggregation) -> list[bytes]:
        seen = run_rounds(rule, lambda party: adapter(party, SIZES, 3), drift(0.5), weights=WEIGHTS, rounds=2)
        return [bits(of_party[-1].result) for of_party in seen]

    assert run(HeterogeneousRank("zero_pad")) == run(Mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_by_another_scaling_does_not_drift(dtype: torch.dtype) -> None:
    # Party 1 holds B times sqrt(2), rounded. Where nobody trains that comes back as an update, but it settles
    # within one step of the dtype at each entry.
    scalings = [1.0, 1 / math.sqrt(2)]

    def train(party: int, number: int, parameters: Parameters) -> None:
        if number == 0:
            drift(0.5)(party, number, parameters)

    seen = run_rounds(
        HeterogeneousRank("zero_pad"),
        lambda party: adapter(0, SIZES, 3, dtype),
        train,
        weights=[1, 3],
        rounds=7,
        lora=lambda party: said(dict.fromkeys(SIZES, scalings[party])),
    )
    for of_party in seen:
        for name, settled in of_party[-1].result.items():
            moved = (settled - of_party[0].result[name]).double().abs()
            assert (moved <= torch.finfo(dtype).eps * of_party[0].result[name].double().abs()).all()
        for done in of_party[5:]:
            assert bits(done.result) == bits(of_party[4].result)
            assert done.report.update_norm == 0


@scalings_vary
@pytest.mark.parametrize("method", ["low_rank", "zero_pad"])
def test_the_bias_of_b_is_scaled_as_b_is(method: Any, scalings: list[Mapping[str, float]]) -> None:
    # PEFT's lora_bias adds s (B A x + b): the mean of s_i b_i is that of what the parties' models add.
    name = name_b("k").replace("weight", "bias")
    seen = run_rounds(
        HeterogeneousRank(method),
        lambda party: start(party) | {name: random(party, 8)},
        drift(0.5),
        weights=WEIGHTS,
        lora=lambda party: said(scalings[party]),
    )
    own = of("k", scalings)
    mean = sum(w * s * done.held[name] for w, s, (done,) in zip(WEIGHTS, own, seen, strict=True)) / 4.5
    for scaling, (done,) in zip(own, seen, strict=True):
        torch.testing.assert_close(scaling * done.result[name], mean, rtol=0, atol=1e-5)


# ---- what may differ, and what not


@pytest.mark.parametrize("rule", [HeterogeneousRank(), HeterogeneousRank("zero_pad")])
@pytest.mark.parametrize(
    ("sizes", "dtype", "words"),
    [
        (
            {"k": (8, 7), "q": (6, 8)},
            torch.float32,
            "'q.lora_A.default.weight' is float32 of shape ['rank', 9]",
        ),
        (
            {"k": (9, 7), "q": (6, 9)},
            torch.float32,
            "'k.lora_B.default.weight' is float32 of shape [8, 'rank']",
        ),
        (SIZES, torch.bfloat16, "'k.lora_A.default.weight' is float32 of shape ['rank', 7]"),
        (
            {"k": (8, 7)},
            torch.float32,
            "Party 0 trains parameter 'q.lora_A.default.weight', party 1 does not",
        ),
    ],
    ids=["inputs", "outputs", "dtype", "a module less"],
)
def test_no_difference_but_the_rank_is_taken(
    rule: Aggregation, sizes: Sizes, dtype: torch.dtype, words: str
) -> None:
    def act(federation: Federation) -> None:
        made = adapter(0, sizes, 2, dtype) if federation.party == 1 else adapter(0, SIZES, 3)
        before = bits(made)
        with pytest.raises(MismatchError) as caught:
            Aggregator(federation, made, aggregation=rule).start()
        assert words in str(caught.value)
        assert bits(made) == before

    run_parties(2, act)


@pytest.mark.parametrize("rule", [None, Mean(), LowRankMean("exact")])
def test_other_rules_refuse_another_rank(rule: Aggregation | None) -> None:
    def act(federation: Federation) -> None:
        made = adapter(0, SIZES, 2 + federation.party)
        with pytest.raises(MismatchError, match=r"shape \[2, 7\] at party 0 .* \[3, 7\] at party 1.*rank!"):
            Aggregator(federation, made, aggregation=rule).start()

    run_parties(2, act)


@pytest.mark.parametrize("rule", [None, Mean(), LowRankMean("exact")])
def test_other_rules_refuse_another_scaling_and_name_the_module(rule: Aggregation | None) -> None:
    def act(federation: Federation) -> None:
        lora = said({"k": 2.0, "q": 2.0 - federation.party})
        aggregator = Aggregator(federation, adapter(0, SIZES, 2), aggregation=rule, lora=lora)
        with pytest.raises(MismatchError) as caught:
            aggregator.start()
        for word in ("'q.default'", "scaling 2 ", "1 at party 1", "HeterogeneousRank"):
            assert word in str(caught.value)

    run_parties(2, act)


def convolution(party: int) -> Parameters:
    """The rank, 2 at party 0 and 3 at party 1, is the first dimension of A and the second of B."""
    return {name_a("c"): random(1, 2 + party, 3, 2, 2), name_b("c"): random(2, 5, 2 + party, 1, 1)}


def test_convolutions_have_a_best_product_of_each_rank() -> None:
    seen = run_rounds(HeterogeneousRank(solver="exact"), convolution, drift(0.5), weights=[1, 3])
    mean = mean_update([done.held for (done,) in seen], "c", [1, 3])
    for party, (done,) in enumerate(seen):
        assert {name: p.shape for name, p in done.result.items()} == {
            name: p.shape for name, p in convolution(party).items()
        }
        assert away(update(done.result, "c"), best(mean, 2 + party)) < 2e-6


def test_convolutions_are_padded_along_their_rank() -> None:
    # (1 * [A_0, 0] + 3 * A_1) / 4, and the like for B.
    seen = run_rounds(HeterogeneousRank("zero_pad"), convolution, drift(0.5), weights=[1, 3])
    (first,), (second,) = seen
    for name, dim in ((name_a("c"), 0), (name_b("c"), 1)):
        wanted = 0.75 * second.held[name]
        wanted.narrow(dim, 0, 2).add_(first.held[name], alpha=0.25)
        torch.testing.assert_close(second.result[name], wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(first.result[name], wanted.narrow(dim, 0, 2), rtol=0, atol=1e-6)


# ---- resuming


@pytest.mark.parametrize(
    "rule",
    [HeterogeneousRank(solver="power"), HeterogeneousRank(solver="exact"), HeterogeneousRank("zero_pad")],
)
def test_resuming_is_exact_at_every_rank(rule: Aggregation) -> None:
    files: dict[int, bytes] = {}

    def run(resume: bool) -> list[bytes]:
        def act(federation: Federation) -> bytes:
            party, first = federation.party, 0
            parameters = start(party) | {"head": random(party, 4)}
            aggregator = Aggregator(federation, parameters, aggregation=rule, lora=said(RS_LORA[party]))
            if resume:
                state = torch.load(io.BytesIO(files[party]), weights_only=True)
                for name, value in state["parameters"].items():
                    parameters[name].copy_(value)
                aggregator.load_state_dict(state["aggregator"])
                first = 2
            aggregator.start()
            for number in range(first, 4):
                drift(0.3)(party, number, parameters)
                aggregator.step(WEIGHTS[party])
                if number == 1:
                    file = io.BytesIO()
                    torch.save({"parameters": parameters, "aggregator": aggregator.state_dict()}, file)
                    files[party] = file.getvalue()
            return bits(parameters) + repr(aggregator.state_dict()).encode()

        return run_parties(3, act)

    whole = run(resume=False)
    assert run(resume=True) == whole


def test_a_state_of_another_largest_rank_is_refused() -> None:
    # Which shapes the global factors have is known only when the parties have met.
    states: dict[int, Any] = {}

    def save(federation: Federation) -> None:
        aggregator = Aggregator(federation, start(federation.party), aggregation=HeterogeneousRank())
        aggregator.start()
        states[federation.party] = aggregator.state_dict()

    def resume(federation: Federation) -> None:
        ranks = [{"k": 2, "q": 3}, {"k": 4, "q": 1}, {"k": 3, "q": 4}]
        parameters = start(federation.party, ranks)
        aggregator = Aggregator(federation, parameters, aggregation=HeterogeneousRank())
        aggregator.load_state_dict(states[federation.party])
        with pytest.raises(ValueError, match=r"the first that differs is 'q\.lora_A\.default\.weight'"):
            aggregator.start()

    run_parties(3, save)
    run_parties(3, resume)


def test_the_same_product_in_another_scaling_is_the_same() -> None:
    # Party 1 has twice the scaling and half of B: what its model computes with is party 0's.
    seen = run_rounds(
        HeterogeneousRank(solver="exact"),
        lambda party: adapter(0, SIZES, 3),
        lambda party, number, parameters: None,
        weights=[1, 3],
        lora=lambda party: modules(frozen(0, SIZES), 1.0 + party),
    )
    for module in SIZES:
        first, second = (update(done.result, module, 1.0 + party) for party, (done,) in enumerate(seen))
        assert away(second, first) < 1e-6
        assert away(first, update(adapter(0, SIZES, 3), module)) < 1e-6
