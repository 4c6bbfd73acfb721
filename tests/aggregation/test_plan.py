"""Which parameters a rule treats how, and what is refused, in words, before any tensor moves."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lora_oracles import (
    Optimizer,
    Parameters,
    adapter,
    away,
    best,
    drift,
    frozen,
    mean_of,
    mean_update,
    modules,
    name_a,
    name_b,
    random,
    run_rounds,
    sgd,
    update,
)
from party_threads import run_parties

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    FrozenA,
    HeterogeneousRank,
    LoraModule,
    LowRankMean,
    Mean,
    ResidualMean,
    ShareA,
    Stacking,
)
from pellm_lightning.aggregation.base import Part
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import MismatchError

SIZES = {"q": (4, 5), "v": (3, 6)}
NAMES = [*adapter(0, SIZES, 2), "head.weight"]
OBSTACLE = "its factors hold 4 experts at once"
BASE_OBSTACLE = "its base weight is quantised, or kept in a form that cannot be written"


@pytest.fixture
def alone() -> Iterator[Federation]:
    federation = Federation(dist.HashStore(), 0, 1)
    yield federation
    federation.close()


def parameters() -> Parameters:
    return adapter(0, SIZES, 2) | {"head.weight": random(0, 3, 4)}


# ---- what crosses with what


def test_the_parts_of_a_model() -> None:
    plan = Plan(FrozenA(), NAMES)
    assert plan.named((Part.A,)) == {name_a("q"), name_a("v")}
    assert plan.named((Part.B,)) == {name_b("q"), name_b("v")}
    assert plan.named((Part.OTHER,)) == {"head.weight"}
    assert [pair.name for pair in plan.pairs] == ["q.default", "v.default"]
    assert plan.shared == set(NAMES)


def test_sharing_a_leaves_the_rest_local() -> None:
    plan = Plan(ShareA(), NAMES)
    assert plan.shared == {name_a("q"), name_a("v")}
    assert plan.products == []


@pytest.mark.parametrize(
    ("rule", "apart"),
    [
        (Mean(), False),
        (ResidualMean(), False),
        (HeterogeneousRank("zero_pad"), False),
        (FrozenA(), True),
        (Alternating(), True),
        (ShareA(), True),
        (LowRankMean(), True),
        (HeterogeneousRank(), True),
        (Stacking(), True),
    ],
)
def test_parts_that_may_cross_alone_stand_apart(rule: Aggregation, apart: bool) -> None:
    lora = modules(frozen(0, SIZES))
    assert (len(Plan(rule, NAMES, lora).groups) == 3) is apart


# ---- no pair


@pytest.mark.parametrize(
    "rule",
    [
        FrozenA(),
        Alternating(),
        ShareA(),
        ResidualMean(),
        Stacking(),
        LowRankMean("exact"),
        HeterogeneousRank(),
    ],
    ids=repr,
)
def test_a_rule_for_factors_needs_factors(rule: Aggregation) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Plan(rule, ["head.weight", "body.weight"])
    assert str(caught.value).startswith(f"{rule!r} found no LoRA pair")
    for words in ("2 trainable parameters", "such as 'body.weight'", "Use Mean()", "include and exclude"):
        assert words in str(caught.value)


def test_a_rule_for_factors_without_any_parameter_says_so_too() -> None:
    with pytest.raises(ValueError, match=r"0 trainable parameters\. Use Mean"):
        Plan(FrozenA(), [])


@pytest.mark.parametrize("rule", [None, Mean()])
def test_the_mean_needs_none(rule: Aggregation | None) -> None:
    plan = Plan(rule, ["head.weight"])
    assert plan.pairs == []
    assert plan.products == []
    assert plan.shared == {"head.weight"}


# ---- modules that a rule cannot handle

HARD: list[tuple[Aggregation, LoraModule, str]] = [
    (LowRankMean(), LoraModule(unsupported_reason=OBSTACLE), OBSTACLE),
    (HeterogeneousRank(), LoraModule(unsupported_reason=OBSTACLE), OBSTACLE),
    (FrozenA(), LoraModule(zero_a=True), "its A is zero, so neither factor would change"),
    (ResidualMean(), LoraModule(base=torch.zeros(3, 6), unsupported_reason=OBSTACLE), OBSTACLE),
    (ResidualMean(), LoraModule(unwritable_base_reason=BASE_OBSTACLE), BASE_OBSTACLE),
    (
        ResidualMean(),
        LoraModule(),
        "its frozen weight is unknown (pass lora={...: LoraModule(base=...)})",
    ),
    (Stacking(), LoraModule(base=torch.zeros(3, 6), unsupported_reason=OBSTACLE), OBSTACLE),
    (Stacking(), LoraModule(unwritable_base_reason=BASE_OBSTACLE), BASE_OBSTACLE),
    (Stacking(), LoraModule(), "its frozen weight is unknown"),
]


@pytest.mark.parametrize(("rule", "module", "words"), HARD)
def test_a_module_that_a_rule_cannot_handle_is_named(
    rule: Aggregation, module: LoraModule, words: str, alone: Federation
) -> None:
    lora = modules(frozen(0, SIZES)) | {"v.default": module}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Aggregator(alone, parameters(), aggregation=rule, lora=lora)
    said = str(caught.value)
    assert said.startswith(f"{rule!r} cannot aggregate the LoRA module 'v.default' (1 of 2 modules): {words}")
    for cure in ("Use Mean()", "target_modules"):
        assert cure in said


@pytest.mark.parametrize("rule", [ResidualMean(), Stacking()])
def test_without_lora_there_is_no_weight_to_write(rule: Aggregation, alone: Federation) -> None:
    with pytest.raises(ValueError, match=r"'q\.default' \(2 of 2 modules\): its frozen weight is unknown"):
        Aggregator(alone, parameters(), aggregation=rule)


@pytest.mark.parametrize("rule", [Mean(), FrozenA(), Alternating(), ShareA()], ids=repr)
def test_rules_of_single_factors_take_any_module(rule: Aggregation) -> None:
    lora = {"v.default": LoraModule(unsupported_reason=OBSTACLE, unwritable_base_reason=BASE_OBSTACLE)}
    assert len(Plan(rule, NAMES, lora).pairs) == 2


@pytest.mark.parametrize("rule", [Mean(), Alternating()], ids=repr)
def test_a_module_that_is_no_product_is_not_measured(rule: Aggregation) -> None:
    lora = {"v.default": LoraModule(unsupported_reason=OBSTACLE)}
    assert [pair.name for pair in Plan(rule, NAMES, lora).products] == ["q.default"]


def test_by_default_a_hard_module_is_averaged_factor_by_factor(caplog: pytest.LogCaptureFixture) -> None:
    # The other has the best product. The deviation is that of the modules that have one.
    lora = {"v.default": LoraModule(unsupported_reason=OBSTACLE)}
    with caplog.at_level(logging.WARNING):
        seen = run_rounds(
            None, lambda party: parameters(), drift(0.5), weights=[1, 3, 0.5], lora=lambda party: lora
        )
    assert f"'v.default' are averaged one by one, since {OBSTACLE}" in caplog.text
    held = [done.held for (done,) in seen]
    for (done,) in seen:
        for name in (name_a("v"), name_b("v")):
            mean = mean_of([1, 3, 0.5], [p[name].double().numpy() for p in held])
            torch.testing.assert_close(done.result[name].double().numpy(), mean, rtol=0, atol=1e-6)
        mean = mean_update(held, "q", [1, 3, 0.5])
        assert away(update(done.result, "q"), best(mean, 2)) < 1e-6
        assert done.report.deviation is not None
        assert done.report.deviation.worst_module == "q.default"


def test_by_default_pairs_get_the_low_rank_mean(alone: Federation) -> None:
    assert repr(Plan(None, NAMES).rule) == repr(LowRankMean("exact", 1, "procrustes"))


def test_lora_modules_of_no_pair_are_no_matter() -> None:
    # As those of an adapter that is not trained.
    lora = modules(frozen(0, SIZES)) | {"v.other": LoraModule(unsupported_reason=OBSTACLE)}
    plan = Plan(ResidualMean(), NAMES, lora)
    assert [pair.name for pair in plan.pairs] == ["q.default", "v.default"]


@pytest.mark.parametrize("rule", [None, LowRankMean("exact"), HeterogeneousRank()])
def test_a_scaling_of_zero_is_refused(rule: Aggregation | None, alone: Federation) -> None:
    # No factor changes what such a module computes, and every product has infinitely many best factors.
    lora = {"v.default": LoraModule(scaling=0.0)}
    with pytest.raises(ValueError, match=r"(?=.*'v\.default')(?=.*scaling)"):
        Aggregator(alone, parameters(), aggregation=rule, lora=lora)


# ---- outer optimizers

ONLY_MEAN = [
    LowRankMean(factorization="balanced"),
    LowRankMean("exact", factorization="svd"),
    HeterogeneousRank(),
    HeterogeneousRank("zero_pad"),
    ResidualMean(),
    Stacking(),
]
MEMORYLESS = [FrozenA(), Alternating()]
ANY = [None, Mean(), ShareA(), LowRankMean("power"), LowRankMean("exact")]
WITH_MEMORY: list[Optimizer] = [
    sgd(lr=1.0, momentum=0.9),
    sgd(lr=1.0, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, lr=0.1),
]


def build(alone: Federation, rule: Aggregation | None, outer: Optimizer) -> Aggregator:
    lora = modules(frozen(0, SIZES))
    return Aggregator(alone, parameters(), aggregation=rule, lora=lora, outer_optimizer=outer)


@pytest.mark.parametrize("outer", [*WITH_MEMORY, sgd(lr=0.5), sgd(lr=1.0, maximize=True)])
@pytest.mark.parametrize("rule", ONLY_MEAN, ids=repr)
def test_new_coordinates_leave_only_the_mean(rule: Aggregation, outer: Optimizer, alone: Federation) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build(alone, rule, outer)
    said = str(caught.value)
    assert said.startswith(repr(rule))
    for words in ("outer_optimizer=", "SGD with lr=1", "LowRankMean(factorization='procrustes')"):
        assert words in said


@pytest.mark.parametrize("outer", WITH_MEMORY)
@pytest.mark.parametrize("rule", MEMORYLESS, ids=repr)
def test_a_resting_factor_leaves_no_memory(rule: Aggregation, outer: Optimizer, alone: Federation) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build(alone, rule, outer)
    said = str(caught.value)
    assert said.startswith(repr(rule))
    for words in (
        "freezes a factor",
        "outer_optimizer=",
        "without momentum and weight decay",
        "another aggregation",
    ):
        assert words in said


@pytest.mark.parametrize("rule", [*ONLY_MEAN, *MEMORYLESS, *ANY], ids=repr)
def test_every_rule_takes_the_mean(rule: Aggregation | None, alone: Federation) -> None:
    assert build(alone, rule, sgd(lr=1.0)).round == 0


@pytest.mark.parametrize("rule", MEMORYLESS, ids=repr)
def test_a_step_of_another_size_has_no_memory(rule: Aggregation, alone: Federation) -> None:
    assert build(alone, rule, sgd(lr=0.5)).round == 0


@pytest.mark.parametrize("outer", WITH_MEMORY)
@pytest.mark.parametrize("rule", ANY, ids=repr)
def test_rules_that_keep_coordinates_take_any(
    rule: Aggregation | None, outer: Optimizer, alone: Federation
) -> None:
    assert build(alone, rule, outer).round == 0


# ---- arguments

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: LowRankMean("svd"), r"solver='svd' must be one of 'power', 'exact'"),  # type: ignore[arg-type]
    (
        lambda: LowRankMean(factorization="anchored"),  # type: ignore[arg-type]
        r"factorization='anchored' must be one of 'procrustes', 'balanced', 'svd'",
    ),
    (lambda: LowRankMean(steps=0), r"steps=0 must be an integer >= 1"),
    (lambda: LowRankMean(steps=-1), r"steps=-1 must"),
    (lambda: LowRankMean(steps=1.5), r"steps=1.5 must"),  # type: ignore[arg-type]
    (lambda: LowRankMean(steps=True), r"steps=True must"),
    (lambda: HeterogeneousRank("pad"), r"method='pad' must be 'low_rank' or 'zero_pad'"),  # type: ignore[arg-type]
    (
        lambda: HeterogeneousRank(factorization="procrustes"),  # type: ignore[arg-type]
        r"factorization='procrustes' must be 'balanced' or 'svd': .* first r directions",
    ),
    (lambda: HeterogeneousRank(solver="qr"), r"solver='qr' must be one of"),  # type: ignore[arg-type]
    (lambda: HeterogeneousRank(steps=0), r"steps=0 must"),
]


@pytest.mark.parametrize(("make", "words"), WRONG)
def test_arguments_that_are_none_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_rule_tells_all_its_settings() -> None:
    # Parties compare them.
    assert repr(LowRankMean("exact", 2, "svd")) == "LowRankMean(solver='exact', steps=2, factorization='svd')"
    assert repr(Stacking(7)) == "Stacking(seed=7)"
    told = {
        repr(HeterogeneousRank(method, solver, steps, factorization))
        for method in ("low_rank", "zero_pad")
        for solver in ("power", "exact")
        for steps in (1, 2)
        for factorization in ("balanced", "svd")
    }
    assert len(told) == 16


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Mean(), FrozenA()),
        (LowRankMean("power"), LowRankMean("exact")),
        (Stacking(0), Stacking(1)),
        (None, Mean()),
    ],
)
def test_parties_with_other_rules_are_refused(ours: Aggregation | None, theirs: Aggregation) -> None:
    def act(federation: Federation) -> None:
        rule = theirs if federation.party == 1 else ours
        lora = modules(frozen(0, SIZES))
        aggregator = Aggregator(federation, parameters(), aggregation=rule, lora=lora)
        with pytest.raises(MismatchError) as caught:
            aggregator.start()
        assert f"aggregation={repr(ours or LowRankMean())!r}" in str(caught.value)
        assert f"party 1 has aggregation={repr(theirs)!r}" in str(caught.value)

    run_parties(2, act)


def test_parties_that_measure_and_that_do_not_are_refused() -> None:
    # Measuring is a collective: one party alone would wait for the others.
    def act(federation: Federation) -> None:
        aggregator = Aggregator(federation, parameters(), aggregation=Mean(federation.party == 0))
        with pytest.raises(
            MismatchError, match="measure_deviation=True, party 1 has measure_deviation=False"
        ):
            aggregator.start()

    run_parties(2, act)


# ---- states of other rules


@pytest.mark.parametrize(
    ("saved", "loaded"), [(Mean(), FrozenA()), (FrozenA(), Mean()), (None, ResidualMean()), (Mean(), None)]
)
def test_a_state_in_another_order_is_refused(
    saved: Aggregation | None, loaded: Aggregation | None, alone: Federation
) -> None:
    # Rules that let parts cross alone put A, B and the rest one after the other; the mean goes by name.
    state = build(alone, saved, sgd(lr=1.0)).state_dict()
    with pytest.raises(ValueError, match=r"their order differs, as with another aggregation.* Resume with"):
        build(alone, loaded, sgd(lr=1.0)).load_state_dict(state)


def test_a_state_of_fewer_parts_is_refused(alone: Federation) -> None:
    state = build(alone, ShareA(), sgd(lr=1.0)).state_dict()
    with pytest.raises(ValueError, match=r"of 2 parameters, this module trains 5; .* 'head\.weight'"):
        build(alone, Mean(), sgd(lr=1.0)).load_state_dict(state)
