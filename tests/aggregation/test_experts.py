"""LoRA on the experts of a mixture (PEFT's ``target_parameters``): products are combined expert by expert.

The references are dense float64 matrices of every expert, by PEFT's layout of the factors: B is (outputs, r,
experts), A is (experts, r, inputs).
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lora_oracles import away, best, cut, mean_of
from party_threads import run_parties
from peft import LoraConfig, PeftModel, get_peft_model
from secure_exchange import masked
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    FrozenA,
    GeometricMedian,
    HeterogeneousRank,
    Krum,
    LowRankMean,
    Mean,
    NormBound,
    ResidualMean,
    ShareA,
    Stacking,
    lora_modules,
)
from pellm_lightning.aggregation.lora import find_pairs, join_experts, of_experts
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import MismatchError
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.tensors.selection import select

pytestmark = pytest.mark.filterwarnings("ignore:::peft")

EXPERTS = 3
WEIGHTS = (1.0, 3.0, 0.0)
ALPHA = 6


class Mixture(nn.Module):
    """Experts of two layers, (inputs, hidden) and (hidden, outputs), each layer one parameter."""

    def __init__(self, *, is_transposed: bool = False, sizes: tuple[int, int, int] = (5, 8, 6)) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        inputs, hidden, outputs = sizes

        def weight(to: int, of: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(EXPERTS, *((of, to) if is_transposed else (to, of))))

        self.up, self.down = weight(hidden, inputs), weight(outputs, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each expert says, (batch, experts, outputs); linear in each weight."""
        up, down = (w.mT if self.is_transposed else w for w in (self.up, self.down))
        return torch.einsum("eoh,ehi,bi->beo", down, up, x)


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.experts = Mixture(**options)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


LAYOUTS: dict[str, dict[str, Any]] = {
    "outputs by inputs": {},
    "inputs by outputs": {"is_transposed": True},
    "square": {"sizes": (6, 6, 6)},
    "square, inputs by outputs": {"sizes": (6, 6, 6), "is_transposed": True},
}
BOTH = ["experts.up", "experts.down"]


def adapted(
    seed: int, r: int = 2, alpha: int = ALPHA, targets: Sequence[str] = BOTH, **layout: Any
) -> PeftModel:
    """Put LoRA on a mixture: the same base for each seed, other factors, all of them far from zero."""
    torch.manual_seed(7)
    base = Model(**layout)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=[], target_parameters=list(targets))
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in select(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def move_(model: nn.Module, seed: int, only: str = "lora_", scale: float = 0.7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in select(model).items():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            if only in name:
                parameter.add_(noise)


def dense(model: nn.Module) -> dict[str, np.ndarray]:
    """Return ``s B A`` of every expert in float64, (experts, m, n), by the names of the pairs."""
    parameters, found = select(model), {}
    for path, module in model.named_modules():
        if not hasattr(module, "num_experts") or not hasattr(module, "scaling"):
            continue
        (scaling,) = module.scaling.values()
        b, a = (parameters[f"{path}.lora_{f}.default.weight"].detach().double().numpy() for f in "BA")
        e = module.num_experts
        b, a = b.reshape(b.shape[0], -1, e), a.reshape(e, -1, a.shape[1])
        found[f"{path}.default"] = scaling * np.einsum("ore,eri->eoi", b, a)
    return found


def mean_products(models: Sequence[nn.Module], weights: Sequence[float] = WEIGHTS) -> dict[str, np.ndarray]:
    each = [dense(model) for model in models]
    return {name: mean_of(weights, [of[name] for of in each]) for name in each[0]}


# ---- what a module says


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_expert_has_a_product_of_its_own(layout: str) -> None:
    """PEFT's own update of a weight is, expert by expert, the product of what is taken apart here."""
    model = adapted(0, **LAYOUTS[layout])
    said, parameters = lora_modules(model), select(model)
    assert sorted(said) == [pair.name for pair in find_pairs(parameters)] == sorted(dense(model))
    assert len(said) == 2, "a wrapper around a wrapper: each has its own parameter"
    for pair in find_pairs(parameters):
        module, own = said[pair.name], (parameters[pair.b].detach(), parameters[pair.a].detach())
        assert (module.experts, module.scaling, module.rank(own[1])) == (EXPERTS, ALPHA / 2, 2)
        assert module.unsupported_reason is module.unwritable_base_reason is None
        delta = model.get_submodule(pair.name.removesuffix(".default")).get_delta_weight("default")
        each = of_experts(*own, EXPERTS)
        for expert, ((b, a), base) in enumerate(zip(each, module.bases(), strict=True)):
            assert base is not None
            mine = module.scaling * b @ a
            assert base.shape == mine.shape
            place = delta[expert].T if LAYOUTS[layout].get("is_transposed") else delta[expert]
            torch.testing.assert_close(mine, place, rtol=0, atol=1e-5)
            np.testing.assert_allclose(mine, dense(model)[pair.name][expert], atol=1e-5)
        assert all(map(torch.equal, join_experts(each), own))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_products_place_in_the_base_has_its_effect(layout: str) -> None:
    model = adapted(0, **LAYOUTS[layout]).double()
    x = torch.randn(4, 6 if "square" in layout else 5, dtype=torch.float64)
    with_factors = model(x).detach()
    said, parameters = lora_modules(model), select(model)
    for pair in find_pairs(parameters):
        each = of_experts(parameters[pair.b].detach(), parameters[pair.a].detach(), EXPERTS)
        for (b, a), base in zip(each, said[pair.name].bases(), strict=True):
            assert base is not None
            base.add_(said[pair.name].scaling * b @ a)
        with torch.no_grad():
            parameters[pair.b].zero_()
    torch.testing.assert_close(model(x).detach(), with_factors, rtol=1e-10, atol=1e-10)
    alone = adapted(0, **LAYOUTS[layout]).double().base_model.model.experts.get_base_layer()
    assert (alone(x) - with_factors).abs().max() > 0.1


def test_factors_in_an_order_that_is_not_known_are_refused() -> None:
    model = adapted(0)
    outer = model.base_model.model.experts
    outer.num_experts = 4  # which does not divide 6 rows, nor is it that of the weight
    why = "its factors hold 4 experts at once, in an order that is not known"
    reasons = {name: module.unsupported_reason for name, module in lora_modules(model).items()}
    assert sorted(map(str, reasons.values())) == ["None", why]
    with pytest.raises(ValueError, match=r"LowRankMean.*cannot aggregate.*1 of 2 modules\): " + why):
        Plan(LowRankMean(), select(model), lora_modules(model))
    by_default = Plan(None, select(model), lora_modules(model))
    assert [*by_default.unsupported.values()] == [why]
    assert len(by_default.products) == 1


@pytest.mark.parametrize("targets", [BOTH, ["experts.up"]], ids=["two", "one"])
def test_names_alone_do_not_tell_how_many_experts_there_are(targets: list[str]) -> None:
    """An aggregator without a model would take all experts for one product, of a mixture of their factors."""
    names = select(adapted(0, targets=targets))
    why = "its factors may hold several experts"
    with pytest.raises(ValueError, match=why):
        Plan(LowRankMean(), names)
    assert Plan(None, names).products == []
    assert all(reason.startswith(why) for reason in Plan(None, names).unsupported.values())
    assert Plan(Mean(), names).products == [], "so that no deviation of a product that is none is reported"
    for plain in ("model.layers.0.experts.1.w1", "experts.0", "layer"):
        own = [f"{plain}.lora_{factor}.default.weight" for factor in "AB"]
        assert len(Plan(LowRankMean(), own).products) == 1


# ---- what a round does


Done = tuple[list[Any], list[Any], list[RoundReport]]


def federate(
    models: Sequence[nn.Module],
    rule: Aggregation | None,
    *,
    weights: Sequence[float] = WEIGHTS,
    train: Callable[[nn.Module, int], None] = move_,
    **options: Any,
) -> Done:
    """Run a round; return copies of the models before and after it, and the reports."""

    def act(federation: Federation) -> tuple[nn.Module, nn.Module, RoundReport]:
        model, party = models[federation.party], federation.party
        lora = lora_modules(model)
        aggregator = Aggregator(federation, select(model), aggregation=rule, lora=lora, **options)
        aggregator.start()
        train(model, party)
        before = copy.deepcopy(model)
        report = aggregator.step(weights[party])
        return before, copy.deepcopy(model), report

    before, after, reports = zip(*run_parties(len(models), act), strict=True)
    return list(before), list(after), list(reports)


FULL = 8
"""A rank that holds any mean of experts of (8, 5) and (6, 8)."""
ranks_one, ranks_other = (FULL,) * 3, (FULL, 1, 2)
EXACT: dict[str, tuple[Aggregation | None, Sequence[int], dict[str, Any]]] = {
    "by default": (None, ranks_one, {}),
    "exact": (LowRankMean("exact"), ranks_one, {}),
    "power": (LowRankMean("power"), ranks_one, {}),
    "balanced": (LowRankMean("power", factorization="balanced"), ranks_one, {}),
    "svd": (LowRankMean(factorization="svd"), ranks_one, {}),
    "secure": (None, ranks_one, {"exchange": masked()}),
    "other ranks": (HeterogeneousRank(), ranks_other, {}),
    "other ranks, power": (HeterogeneousRank(solver="power"), ranks_other, {}),
    "base": (ResidualMean(), (2, 2, 2), {}),
    "stacking": (Stacking(), (2, 1, 3), {}),
    "B alone": (FrozenA(), (2, 2, 2), {"train": partial(move_, only="lora_B")}),
    "in turn": (Alternating(), (2, 2, 2), {"train": partial(move_, only="lora_B")}),
}


@pytest.mark.parametrize("layout", ["outputs by inputs", "inputs by outputs"])
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_rule_gives_every_expert_its_mean(name: str, layout: str) -> None:
    rule, ranks, options = EXACT[name]
    if name == "secure":
        options = options | {"weights": (1.0, 3.0, 2.0)}
    models = [adapted(party, r, **LAYOUTS[layout]) for party, r in enumerate(ranks)]
    x = torch.randn(4, 5, dtype=torch.float64)
    before, after, reports = federate(models, rule, **options)
    weights = options.get("weights", WEIGHTS)
    wanted = mean_products(before, weights)
    base = adapted(0, **LAYOUTS[layout]).double().base_model.model.experts.get_base_layer()
    with torch.no_grad():
        for pair_name, products in wanted.items():
            weight = base.up if "base_layer" in pair_name else base.down
            mean = torch.from_numpy(products)
            weight.add_(mean.mT if base.is_transposed else mean)
    expected = base(x).detach()
    for model in after[:1] if "other" in name else after:  # of all experts one rank alone holds the mean
        found = model.double()(x).detach()
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-3)
    assert (before[0].double()(x) - expected).abs().max() > 1
    if name != "secure":
        assert reports[0].deviation is not None
        assert reports[0].deviation.total < 1e-4


@pytest.mark.parametrize(
    "rule", [None, LowRankMean(), LowRankMean("exact", factorization="balanced")], ids=repr
)
def test_of_a_low_rank_every_expert_gets_its_best(rule: Aggregation | None) -> None:
    before, after, reports = federate([adapted(party) for party in range(3)], rule)
    wanted = mean_products(before)
    lost = whole = worst = 0.0
    for name, products in wanted.items():
        for expert, mean in enumerate(products):
            for model in after:
                assert away(dense(model)[name][expert], best(mean, 2)) < 1e-5
            lost, whole = lost + cut(mean, 2) ** 2, whole + float(np.linalg.norm(mean)) ** 2
            if cut(mean, 2) / np.linalg.norm(mean) > worst:
                worst, where = cut(mean, 2) / float(np.linalg.norm(mean)), f"{name}, expert {expert}"
    deviation = reports[0].deviation
    assert deviation is not None
    assert deviation.total == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert (deviation.worst, deviation.worst_module) == (pytest.approx(worst, rel=1e-5), where)
    assert 0.05 < deviation.total < 1, "or any rule would do"


def test_the_mean_of_factors_reports_by_how_much_it_misses_the_products() -> None:
    before, after, reports = federate([adapted(party) for party in range(3)], Mean())
    wanted, found = mean_products(before), dense(after[0])
    missed = sum(float(np.linalg.norm(found[name] - wanted[name])) ** 2 for name in wanted)
    whole = sum(float(np.linalg.norm(mean)) ** 2 for mean in wanted.values())
    assert reports[0].deviation is not None
    assert reports[0].deviation.total == pytest.approx((missed / whole) ** 0.5, rel=1e-5)
    for name, parameter in select(after[0]).items():
        mean = mean_of(WEIGHTS, [select(model)[name].detach().double().numpy() for model in before])
        np.testing.assert_allclose(parameter.detach(), mean, atol=1e-6)


def test_a_shared_a_leaves_b_to_its_party() -> None:
    before, after, _ = federate([adapted(party) for party in range(3)], ShareA())
    for name, parameter in select(after[1]).items():
        mean = mean_of(WEIGHTS, [select(model)[name].detach().double().numpy() for model in before])
        own = select(before[1])[name].detach()
        np.testing.assert_allclose(parameter.detach(), mean if "lora_A" in name else own, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [GeometricMedian(), Krum(num_malicious=0), NormBound(0.8), GeometricMedian(mixing=1)],
    ids=["median", "Krum", "bound", "mixed"],
)
def test_a_robust_rule_weighs_the_changes_of_all_experts_products(rule: Any) -> None:
    """The inner products of updates are those of the dense products, summed over layers and experts."""
    models = [adapted(party, FULL) for party in range(3)]
    start = dense(models[0])  # all begin with what party 0 has

    def train(model: nn.Module, party: int) -> None:
        move_(model, party, scale=(0.2, 0.3, 2.0)[party])

    weights = (1.0, 2.0, 1.0)
    before, after, reports = federate(models, rule, weights=weights, train=train)
    changes = [{name: of[name] - start[name] for name in start} for of in map(dense, before)]
    flat = np.stack([np.concatenate([part.ravel() for part in of.values()]) for of in changes])
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    expected = rule.influence(torch.from_numpy(flat @ flat.T), shares)
    np.testing.assert_allclose(reports[0].influence, expected, atol=1e-5)
    assert float(expected[2]) < 0.2, "the party that has moved far must count less than its weight"
    for name, anchor in start.items():
        wanted = anchor + sum(float(u) * change[name] for u, change in zip(expected, changes, strict=True))
        assert away(dense(after[2])[name], wanted) < 1e-4


def test_padded_experts_are_those_of_each_party_padded_one_by_one() -> None:
    """``zero_pad``: factors of expert e have zeros behind the party's own rows, and B its scaling."""
    ranks, alphas = (3, 1, 2), (6, 2, 5)
    models = [adapted(party, r, alpha) for party, (r, alpha) in enumerate(zip(ranks, alphas, strict=True))]
    before, after, _ = federate(models, HeterogeneousRank("zero_pad"))
    scale = [alpha / r for alpha, r in zip(alphas, ranks, strict=True)]
    for pair in find_pairs(select(models[0])):
        own = [select(model) for model in before]
        for expert in range(EXPERTS):
            padded = []
            for party, rank in enumerate(ranks):
                b, a = (own[party][name].detach().double().numpy() for name in (pair.b, pair.a))
                wide_b, wide_a = np.zeros((len(b), 3)), np.zeros((3, a.shape[1]))
                wide_b[:, :rank] = b.reshape(len(b), rank, EXPERTS)[:, :, expert] * scale[party] / scale[0]
                wide_a[:rank] = a.reshape(EXPERTS, rank, -1)[expert]
                padded.append((wide_b, wide_a))
            b, a = (mean_of(WEIGHTS, [factors[at] for factors in padded]) for at in (0, 1))
            for party, rank in enumerate(ranks):
                mine = scale[0] * b[:, :rank] @ a[:rank]
                assert away(dense(after[party])[pair.name][expert], mine) < 1e-5


def test_of_other_ranks_every_party_gets_the_best_of_its_own() -> None:
    ranks, alphas = (3, 1, 2), (6, 2, 5)
    models = [adapted(party, r, alpha) for party, (r, alpha) in enumerate(zip(ranks, alphas, strict=True))]
    starts = [copy.deepcopy(model) for model in models]
    before, after, _ = federate(models, HeterogeneousRank())
    first = dense(starts[0])
    for party, rank in enumerate(ranks):
        for name, products in mean_products(before).items():
            for expert, mean in enumerate(products):
                assert away(dense(after[party])[name][expert], best(mean, rank)) < 1e-5
    assert first.keys() == mean_products(before).keys()


@pytest.mark.parametrize("rule", [LowRankMean(), HeterogeneousRank()], ids=["one rank", "several"])
def test_as_many_rows_of_more_experts_are_another_model(rule: Aggregation) -> None:
    """6 experts of rank 1 and 3 of rank 2 have factors of the same shapes, and products that differ."""

    def act(federation: Federation) -> None:
        model = adapted(0)
        lora = lora_modules(model)
        if federation.party == 1:
            lora = {name: copy.copy(module) for name, module in lora.items()}
            for module in lora.values():
                object.__setattr__(module, "experts", 6)
                object.__setattr__(module, "base", None)
        Aggregator(federation, select(model), aggregation=rule, lora=lora).start()

    refused = [result for result in run_parties(2, act, may_fail=True) if isinstance(result, MismatchError)]
    assert refused
    assert all("holds 3 experts at party 0 but 6 at party 1" in str(error) for error in refused)


# ---- whole models

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "Mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)),
    "Qwen3-MoE": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SIZES, head_dim=4, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=10),
    ),
    "GPT-OSS": (
        GptOssForCausalLM,
        GptOssConfig(**SIZES, head_dim=4, num_local_experts=3, num_experts_per_tok=2),
    ),
}


def tiny(family: str) -> PreTrainedModel:
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped kernels take no float64
    if not any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters()):
        pytest.skip(f"this transformers keeps the experts of {family} as modules of their own")
    return model


def tuned(family: str, party: int, rank: int) -> PeftModel:
    config = LoraConfig(
        r=rank,
        lora_alpha=12,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(tiny(family), config)
    move_(model, 50 + party, scale=0.2)
    return model


@pytest.mark.parametrize(
    ("rule", "rank"),
    [(None, 12), (LowRankMean("power"), 12), (ResidualMean(), 2), (Stacking(), 2)],
    ids=["default", "power", "base", "stacking"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_mean_weights(family: str, rule: Aggregation | None, rank: int) -> None:
    models = [tuned(family, party, rank) for party in range(3)]
    before, after, reports = federate(models, rule, train=partial(move_, scale=0.2))
    dense_model = tiny(family).double().eval()
    count = 0
    for name, module in before[0].named_modules():
        if hasattr(module, "get_delta_weight"):
            deltas = [model.get_submodule(name).get_delta_weight("default") for model in before]
            place = name.removeprefix("base_model.model.").replace(".base_layer", "")
            weight = getattr(module, "parameter_name", "weight")
            with torch.no_grad():
                getattr(dense_model.get_submodule(place), weight).add_(
                    sum(w / sum(WEIGHTS) * delta.double() for w, delta in zip(WEIGHTS, deltas, strict=True))
                )
            count += 1
    assert count == 6, "of each of two layers: queries, and two parameters of the experts"
    ids = torch.arange(10).repeat(2, 1) + torch.tensor([[0], [9]])
    with torch.no_grad():
        expected = dense_model(input_ids=ids).logits
        for model in after:
            found = model.double().eval()(input_ids=ids).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (before[0].double().eval()(input_ids=ids).logits - expected).abs().max() > 0.1
    assert reports[0].deviation is not None
    assert reports[0].deviation.total < 1e-4
