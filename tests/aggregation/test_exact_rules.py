"""Rules that give the mean of the products exactly: one factor rests, or the frozen weights take the rest."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lora_oracles import (
    Parameters,
    Round,
    Sizes,
    adapter,
    away,
    bits,
    drift,
    frozen,
    mean_update,
    modules,
    name_a,
    name_b,
    run_rounds,
    sgd,
    update,
)
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    FrozenA,
    ResidualMean,
    Stacking,
    base_writing,
)

SIZES: Sizes = {"k": (6, 5), "q": (4, 7), "v": (5, 5)}
WEIGHTS = [1.0, 3.0, 0.5]
SCALING = 2.0
ROUNDING = 3e-7
"""Of a sum of three products in float32, relative to its norm."""


# ---- one factor rests


def check_products(seen: list[list[Round]], number: int) -> None:
    """Every party's product is the weighted mean of all parties' products."""
    for module in SIZES:
        wanted = mean_update([of_party[number].held for of_party in seen], module, WEIGHTS)
        for of_party in seen:
            assert away(update(of_party[number].result, module), wanted) < ROUNDING


def test_frozen_a_is_exact_and_a_stays_party_0s() -> None:
    seen = run_rounds(
        FrozenA(), lambda party: adapter(party, SIZES, 2), drift(0.5, "lora_B"), weights=WEIGHTS, rounds=3
    )
    for number in range(3):
        check_products(seen, number)
        for of_party in seen:
            for name in map(name_a, SIZES):
                assert bits(of_party[number].result[name]) == bits(adapter(0, SIZES, 2)[name])
    assert bits(seen[0][1].result) != bits(seen[0][0].result)


def test_alternating_is_exact_in_each_of_its_phases() -> None:
    def train(party: int, number: int, parameters: Parameters) -> None:
        drift(0.5, "lora_A" if number % 2 else "lora_B")(party, number, parameters)

    seen = run_rounds(Alternating(), lambda party: adapter(party, SIZES, 2), train, weights=WEIGHTS, rounds=4)
    before = adapter(0, SIZES, 2)
    for number in range(4):
        check_products(seen, number)
        after = seen[0][number].result
        for module in SIZES:
            rests, moves = (name_b, name_a) if number % 2 else (name_a, name_b)
            assert bits(after[rests(module)]) == bits(before[rests(module)])
            assert bits(after[moves(module)]) != bits(before[moves(module)])
        before = after


@pytest.mark.parametrize(("rule", "number"), [(FrozenA(), 0), (Alternating(), 0), (Alternating(), 1)])
def test_a_resting_factor_that_was_moved_all_the_same_comes_back(rule: Aggregation, number: int) -> None:
    # Its gradients are dropped by the callback; without one a party may train what it likes.
    seen = run_rounds(
        rule, lambda party: adapter(party, SIZES, 2), drift(0.5), weights=WEIGHTS, rounds=number + 1
    )
    before = seen[0][0].result if number else adapter(0, SIZES, 2)
    for of_party in seen:
        for module in SIZES:
            rests = name_b(module) if number else name_a(module)
            assert bits(of_party[number].held[rests]) != bits(before[rests])
            assert bits(of_party[number].result[rests]) == bits(before[rests])
        assert of_party[number].report.deviation.total < ROUNDING


@pytest.mark.parametrize("rule", [FrozenA(), Alternating()])
def test_a_memoryless_outer_optimizer_goes_part_of_the_way(rule: Aggregation) -> None:
    # x <- x - 0.5 (x - mean) for the factor B that moves; A has no gradient and so stays, to the bit.
    seen = run_rounds(
        rule,
        lambda party: adapter(party, SIZES, 2),
        drift(0.5, "lora_B"),
        weights=WEIGHTS,
        outer_optimizer=sgd(lr=0.5),
    )
    start = adapter(0, SIZES, 2)
    for module in SIZES:
        b = name_b(module)
        mean = sum(w * done.held[b].double() for w, (done,) in zip(WEIGHTS, seen, strict=True)) / 4.5
        for (done,) in seen:
            torch.testing.assert_close(done.result[b].double(), (start[b] + mean) / 2, rtol=0, atol=1e-6)
            assert bits(done.result[name_a(module)]) == bits(start[name_a(module)])


# ---- the frozen weights take up the rest

Lay = Callable[[Tensor], Tensor]
LAID: dict[str, Lay] = {
    "(m, n)": lambda w: w.clone(),
    # As an embedding or a Conv1D stores it.
    "(n, m)": lambda w: w.T.contiguous().T,
}


@pytest.mark.parametrize("lay", LAID.values(), ids=LAID)
@pytest.mark.parametrize("block", [1, 13, 1 << 20])
def test_residual_mean_puts_into_the_weight_what_the_factors_miss(
    lay: Lay, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # W_t = W_0 + sum of M - s B A over the rounds, with B and A as written; so W + s B A is exact: in round 0
    # W_0 + M.
    monkeypatch.setattr(base_writing, "_BLOCK", block)
    bases = [{name: lay(base) for name, base in frozen(3, SIZES).items()} for _ in WEIGHTS]
    stored = [{name: base.data_ptr() for name, base in of_party.items()} for of_party in bases]
    seen = run_rounds(
        ResidualMean(),
        lambda party: adapter(party, SIZES, 2),
        drift(0.5),
        weights=WEIGHTS,
        rounds=3,
        lora=lambda party: modules(bases[party], SCALING),
    )
    for module, base in frozen(3, SIZES).items():
        wanted = base.double().numpy()
        for number in range(3):
            mean = mean_update([of_party[number].held for of_party in seen], module, WEIGHTS, [SCALING] * 3)
            wanted = wanted + mean - update(seen[0][number].result, module, SCALING)
        for party, of_party in enumerate(bases):
            assert away(of_party[module].double().numpy(), wanted) < ROUNDING
            assert of_party[module].data_ptr() == stored[party][module], "written in place"
            assert of_party[module].shape == SIZES[module]
    # The factors are the plain mean of the parties'.
    for name in seen[0][0].held:
        mean = (
            sum(w * of_party[2].held[name].double() for w, of_party in zip(WEIGHTS, seen, strict=True)) / 4.5
        )
        torch.testing.assert_close(seen[0][2].result[name].double(), mean, rtol=0, atol=1e-6)


def test_a_weight_is_the_exact_mean_of_the_parties_whole_weights() -> None:
    # What the model computes with, W + s B A, is W_0 + M after each round, whatever the factors hold.
    bases = [frozen(3, SIZES) for _ in WEIGHTS]
    seen = run_rounds(
        ResidualMean(),
        lambda party: adapter(party, SIZES, 2),
        drift(1.0),
        weights=WEIGHTS,
        lora=lambda party: modules(bases[party], SCALING),
    )
    for module, base in frozen(3, SIZES).items():
        mean = mean_update([done.held for (done,) in seen], module, WEIGHTS, [SCALING] * 3)
        found = bases[0][module].double().numpy() + update(seen[0][0].result, module, SCALING)
        assert away(found, base.double().numpy() + mean) < ROUNDING


@pytest.mark.parametrize("rule", [ResidualMean(), Stacking()])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_a_bf16_weight_loses_its_rounding_and_no_more(
    rule: Aggregation, factors: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of each entry at most half of the distance to the next bf16, 2^-8 of it. What all entries lose together
    # is the deviation that is reported, relative to the mean product.
    monkeypatch.setattr(base_writing, "_BLOCK", 13)
    bases = [frozen(3, SIZES, torch.bfloat16) for _ in WEIGHTS]
    seen = run_rounds(
        rule,
        lambda party: adapter(party, SIZES, 2, factors),
        drift(0.5),
        weights=WEIGHTS,
        lora=lambda party: modules(bases[party], SCALING),
    )
    lost: dict[str, tuple[float, float]] = {}
    for module, base in frozen(3, SIZES, torch.bfloat16).items():
        mean = mean_update([done.held for (done,) in seen], module, WEIGHTS, [SCALING] * 3)
        wanted = base.double().numpy() + mean - update(seen[0][0].result, module, SCALING)
        missed = bases[0][module].double().numpy() - wanted
        assert (np.abs(missed) <= 2**-8 * np.abs(wanted) * (1 + 1e-4)).all()
        assert np.linalg.norm(missed) > 1e-4 * np.linalg.norm(wanted), "the weight is no bf16 by chance"
        lost[module] = float(np.sum(missed**2)), float(np.sum(mean**2))
    for (done,) in seen:
        deviation = done.report.deviation
        assert deviation is not None
        assert deviation.total == pytest.approx(
            math.sqrt(sum(a for a, _ in lost.values()) / sum(b for _, b in lost.values())), rel=1e-4
        )
        worst = max(lost, key=lambda module: lost[module][0] / lost[module][1])
        assert deviation.worst_module == f"{worst}.default"
        assert deviation.worst == pytest.approx(math.sqrt(lost[worst][0] / lost[worst][1]), rel=1e-4)
    assert len({bits(of_party) for of_party in bases}) == 1


def test_the_others_whole_weights_do_not_drift_apart_in_bf16() -> None:
    # A weight in bf16 rounds in each round; at all parties alike.
    bases = [frozen(3, SIZES, torch.bfloat16) for _ in WEIGHTS]
    run_rounds(
        ResidualMean(),
        lambda party: adapter(party, SIZES, 2, torch.bfloat16),
        drift(0.5),
        weights=WEIGHTS,
        rounds=5,
        lora=lambda party: modules(bases[party], SCALING),
    )
    assert len({bits(of_party) for of_party in bases}) == 1
    assert bits(bases[0]) != bits(frozen(3, SIZES, torch.bfloat16))


# ---- stacking


@pytest.mark.parametrize("lay", LAID.values(), ids=LAID)
def test_stacking_merges_the_mean_product_and_starts_anew(lay: Lay) -> None:
    # W_t = W_0 + M_0 + ... + M_t, as B is zero after each round. Ranks and scalings are the parties' own.
    ranks, scalings = [2, 4, 3], [2.0, 0.5, 1.0]
    bases = [{name: lay(base) for name, base in frozen(3, SIZES).items()} for _ in WEIGHTS]
    seen = run_rounds(
        Stacking(seed=7),
        lambda party: adapter(party, SIZES, ranks[party]),
        drift(0.5),
        weights=WEIGHTS,
        rounds=3,
        lora=lambda party: modules(bases[party], scalings[party]),
    )
    for module, base in frozen(3, SIZES).items():
        held = [[of_party[number].held for of_party in seen] for number in range(3)]
        wanted = base.double().numpy() + sum(mean_update(h, module, WEIGHTS, scalings) for h in held)
        for of_party in bases:
            assert away(of_party[module].double().numpy(), wanted) < ROUNDING
        for party, of_party in enumerate(seen):
            for number, done in enumerate(of_party):
                b, a = done.result[name_b(module)], done.result[name_a(module)]
                assert not b.any()
                # The first rows of the largest party's, and new ones in each round.
                assert torch.equal(a, seen[1][number].result[name_a(module)][: ranks[party]])
                assert number == 0 or not torch.equal(a, of_party[number - 1].result[name_a(module)])
                assert done.report.deviation is not None
                assert done.report.deviation.total < ROUNDING


def drawn(seed: int, rounds: int = 1) -> Tensor:
    """The A that a round draws, (50, 400), from one party."""
    sizes = {"q": (3, 400)}
    lora = modules(frozen(0, sizes))
    seen = run_rounds(
        Stacking(seed),
        lambda party: adapter(party, sizes, 50),
        drift(0.1),
        weights=[1],
        rounds=rounds,
        lora=lambda party: lora,
    )
    return seen[0][-1].result[name_a("q")]


def test_the_new_a_is_drawn_as_peft_draws_it() -> None:
    # nn.init.kaiming_uniform_(a=sqrt(5)) over 400 inputs: uniform in +-sqrt(6 / (1 + 5) / 400) = +-1/20. Of
    # 20,000 numbers the largest is within 1e-3 of that, the mean within 5 standard errors of 0, which are
    # 5 * (1/20 / sqrt(3)) / sqrt(20,000) = 1e-3, and the mean square within some per cent of 1/1200.
    a = drawn(0)
    assert 0.049 < float(a.abs().max()) <= 0.05
    assert abs(float(a.mean())) < 1.1e-3
    assert float(a.square().mean()) == pytest.approx(1 / 1200, rel=0.05)


def test_the_seed_and_the_round_tell_one_a_from_another() -> None:
    first = drawn(0)
    assert torch.equal(drawn(0), first)
    assert not torch.equal(drawn(1), first)
    assert not torch.equal(drawn(0, rounds=2), first)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    drawn(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32])
def test_a_large_seed_draws_too(seed: int) -> None:
    # Lightning's seeds reach to 2^32 - 1, torch's further.
    assert not torch.equal(drawn(seed), drawn(0))


# ---- what modules say of themselves


@pytest.mark.parametrize(("said", "scaling"), [(False, 1.0), (True, 2.0)])
def test_the_scaling_is_that_of_the_module_and_1_without_one(said: bool, scaling: float) -> None:
    # The rest that goes into the weight is that of s B A: here of (1 * B_0 A_0 + 3 * B_1 A_1) / 4 and of the
    # mean factors.
    sizes = {"q": (6, 5)}
    bases = [frozen(3, sizes) for _ in range(2)]

    def act(federation: Federation) -> tuple[Parameters, Parameters]:
        parameters = adapter(0, sizes, 2)
        lora = modules(bases[federation.party], 2.0) if said else modules(bases[federation.party])
        aggregator = Aggregator(federation, parameters, aggregation=ResidualMean(), lora=lora)
        aggregator.start()
        drift(0.5)(federation.party, 0, parameters)
        held = {name: p.clone() for name, p in parameters.items()}
        aggregator.step([1, 3][federation.party])
        return held, parameters

    (first, result), (second, _) = run_parties(2, act)
    wanted = mean_update([first, second], "q", [1, 3], [scaling] * 2) - update(result, "q", scaling)
    found = (bases[0]["q"].double() - frozen(3, sizes)["q"].double()).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert np.linalg.norm(wanted) > 0.1
