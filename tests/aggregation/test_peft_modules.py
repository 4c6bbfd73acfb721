"""Real PEFT modules: what they say of their LoRA pairs, and that a round does to them what it promises."""

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import data, fit_parties, linear, quiet_trainer, run_parties
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as peft_config
from peft.tuners.lora import variants
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    FrozenA,
    HeterogeneousRank,
    LoraModule,
    LowRankMean,
    Mean,
    ResidualMean,
    Stacking,
    lora_modules,
)
from pellm_lightning.aggregation.lora import Pair, find_pairs, matrix
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.tensors.selection import select

pytestmark = [
    # What PEFT says about layers that it adapts, not about federating them.
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

SHARES = (0.25, 0.75, 0.0)
"""Of three parties with the weights 1, 3 and 0."""


# ---- one adapted layer


class Holder(nn.Module):
    """A model of one layer, since PEFT adapts submodules only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def adapted(make: Callable[[], nn.Module], *, seed: int = 0, **config: Any) -> PeftModel:
    """Put LoRA on a layer: the same base for each seed, another adapter."""
    torch.manual_seed(7)
    base = Holder(make())
    torch.manual_seed(100 + seed)
    return get_peft_model(base, LoraConfig(**{"target_modules": ["layer"], "r": 2, "lora_alpha": 6} | config))


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model.layer


def the_module(model: nn.Module) -> LoraModule:
    (module,) = lora_modules(model).values()
    return module


def the_pair(model: nn.Module) -> Pair:
    (pair,) = find_pairs(select(model))
    return pair


def product(model: nn.Module) -> Tensor:
    """Return ``scaling * B A`` as the package reads it, float64."""
    pair, parameters = the_pair(model), select(model)
    b, a = (matrix(parameters[name].detach()).double() for name in (pair.b, pair.a))
    return the_module(model).scaling * b @ a


def move_(model: nn.Module, seed: int, frozen_parts: Sequence[str] = ()) -> None:
    """Do what training may do: move all that trains, unless its name holds one of the words."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in select(model).items():
            if not any(word in name for word in frozen_parts):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def tokens(number: int) -> Callable[[], Tensor]:
    return lambda: torch.arange(number).flip(0).repeat(2, 1)


@dataclass(frozen=True)
class Layer:
    """A layer that LoRA adapts; ``size`` is that of its update as a matrix, (m, n)."""

    make: Callable[[], nn.Module]
    size: tuple[int, int]
    inputs: Callable[[], Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    writable: bool = True

    def adapted(self, seed: int, rank: int, **config: Any) -> PeftModel:
        return adapted(self.make, seed=seed, **{"r": rank} | self.config | config)

    def output(self, model: PeftModel) -> Tensor:
        return layer_of(model)(self.inputs(), **self.call).detach()


class Experts(nn.Module):
    """Several linear layers in one parameter of shape (experts, outputs, inputs)."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, 6, 9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->beo", self.weight, x)


ON_EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": ["layer.weight"]}


LINEAR = Layer(lambda: nn.Linear(9, 6), (6, 9), rows(5, 9))
CONV1D = Layer(lambda: Conv1D(6, 9), (6, 9), rows(5, 9), {"fan_in_fan_out": True})
# PEFT starts an embedding with A = 0; a factor A that rests there is a case of its own.
STARTED = {"init_lora_weights": False}
EMBEDDING = Layer(lambda: nn.Embedding(9, 6), (6, 9), tokens(9), STARTED)
CONV2D = Layer(lambda: nn.Conv2d(3, 6, (3, 2), stride=2, padding=1), (6, 3 * 3 * 2), rows(2, 3, 7, 5))


def with_(layer: Layer, call: dict[str, Any] | None = None, writable: bool = True, **config: Any) -> Layer:
    return Layer(layer.make, layer.size, layer.inputs, layer.config | config, call or {}, writable)


DORA = {"use_dora": True}
LAYERS: dict[str, Layer] = {
    "Linear": LINEAR,
    "Linear with more outputs": Layer(lambda: nn.Linear(5, 8), (8, 5), rows(4, 5)),
    "Linear with bias in B": with_(LINEAR, lora_bias=True),
    "Linear in bfloat16": Layer(lambda: nn.Linear(9, 6).bfloat16(), (6, 9), rows(5, 9), writable=False),
    "rsLoRA": with_(LINEAR, use_rslora=True),
    "DoRA": with_(LINEAR, **DORA),
    "VeLoRA": with_(LINEAR, velora_config=peft_config.VeloraConfig(num_groups=3)),
    # From the second token on in the first row, from the last in the second; nowhere in the third.
    "aLoRA": with_(
        Layer(LINEAR.make, LINEAR.size, rows(3, 4, 9)),
        {"alora_offsets": [3, 1, None]},
        writable=False,
        alora_invocation_tokens=[1],
    ),
    "Conv1D": CONV1D,
    "DoRA on Conv1D": with_(CONV1D, **DORA),
    "Embedding": EMBEDDING,
    "DoRA on Embedding": with_(EMBEDDING, **DORA),
    "scaled Embedding": Layer(
        lambda: Gemma3TextScaledWordEmbedding(9, 6, padding_idx=0, embed_scale=3.0),
        (6, 9),
        tokens(9),
        STARTED,
    ),
    "Conv2d": CONV2D,
    "DoRA on Conv2d": with_(CONV2D, **DORA),
    "Conv2d, 1 x 1": Layer(lambda: nn.Conv2d(5, 6, 1), (6, 5), rows(2, 5, 3, 3)),
    "Conv1d": Layer(lambda: nn.Conv1d(3, 5, 3, padding="same"), (5, 9), rows(2, 3, 7)),
    "Conv3d": Layer(lambda: nn.Conv3d(2, 4, 2), (4, 16), rows(1, 2, 3, 4, 3)),
    "parameter": with_(LINEAR, target_modules=[], target_parameters=["layer.weight"]),
    "one expert": Layer(partial(Experts, 1), (6, 9), rows(5, 9), ON_EXPERTS),
}


# ---- what a module says


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_tells_its_scaling_and_its_base(name: str) -> None:
    layer = LAYERS[name]
    model = layer.adapted(0, 4)
    said, pair = the_module(model), the_pair(model)
    assert pair.name == next(iter(lora_modules(model))) == "base_model.model.layer.default"
    # lora_alpha is 6: 6 / 4, or 6 / 4^(1/2) with rsLoRA.
    assert said.scaling == (3.0 if layer.config.get("use_rslora") else 1.5)
    assert said.unsupported_reason is None
    assert product(model).shape == layer.size
    if name == "aLoRA":
        assert said.unwritable_base_reason == "its update is not one of the base weight (ALoraLinearVariant)"
        return
    assert said.unwritable_base_reason is None
    assert said.base is not None
    assert said.base.shape == layer.size
    said.base.zero_()
    assert not layer_of(model).get_base_layer().weight.any(), "the base is no view of the weight"


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.writable])
def test_a_products_place_in_the_base_has_its_effect(name: str) -> None:
    """Moving ``scaling * B A`` into the base changes nothing, whatever the layer makes of its factors."""
    layer = LAYERS[name]
    model = layer.adapted(0, 3)
    move_(model, seed=1)
    model = model.double().eval()
    with_factors = layer.output(model)
    base, update = the_module(model).base, product(model)
    with torch.no_grad():
        select(model)[the_pair(model).b].zero_()
    without = layer.output(model)
    assert base is not None
    base.add_(update)
    assert (without - with_factors).abs().max() > 0.1, "the factors had no effect"
    torch.testing.assert_close(layer.output(model), with_factors, rtol=0, atol=1e-12)


# PEFT 0.20 does not have it yet.
KASA: dict[str, Any] = {"kasa_config": peft_config.KasaConfig()} if hasattr(peft_config, "KasaConfig") else {}


def test_every_variant_of_peft_is_judged() -> None:
    """Plain are those whose update is the product; what they compute is tested below, and on LAYERS."""
    judged = {}
    for name, config in {
        "DoraLinearVariant": DORA,
        "VeloraLinearVariant": {"velora_config": peft_config.VeloraConfig(num_groups=3)},
        "ALoraLinearVariant": {"alora_invocation_tokens": [1]},
        "BdLoraLinearVariant": {"use_bdlora": peft_config.BdLoraConfig(["layer"], nblocks=3), "r": 3},
        "MontecloraLinearVariant": {
            "monteclora_config": peft_config.MontecloraConfig(num_samples=2, buffer_size=2)
        },
        **({"KasaLinearVariant": KASA} if KASA else {}),
        "MiCALinearVariant": {"init_lora_weights": "mica"},
        "ArrowLinearVariant": {"arrow_config": peft_config.ArrowConfig()},
    }.items():
        if "arrow_config" in config:
            config["arrow_config"].task_adapter_names = []  # as PEFT fills it in
        model = adapted(LINEAR.make, **config)
        assert type(layer_of(model).lora_variant["default"]).__name__ == name
        judged[name] = the_module(model).unsupported_reason
    model = adapted(LINEAR.make)
    layer_of(model).lora_variant["default"] = variants.QALoraLinearVariant()  # else it takes a GPTQ base
    judged["QALoraLinearVariant"] = the_module(model).unsupported_reason
    plain = {"DoraLinearVariant", "VeloraLinearVariant", "ALoraLinearVariant", "QALoraLinearVariant"}
    for name, unsupported_reason in judged.items():
        if name != "MiCALinearVariant":  # which has no pairs, so nobody asks
            assert unsupported_reason == (None if name in plain else f"its update is changed by {name}")
    on_other_layers = {"MiCAEmbeddingVariant", "DoraEmbeddingVariant", "_DoraConvNdVariant"}
    on_other_layers |= {f"DoraConv{dims}dVariant" for dims in (1, 2, 3)}
    known = {
        v.__name__ for v in vars(variants).values() if isinstance(v, type) and issubclass(v, LoraVariant)
    }
    assert known - {"LoraVariant"} == judged.keys() | on_other_layers, "PEFT has a variant nobody has judged"


@pytest.mark.parametrize(
    ("config", "train"),
    [
        pytest.param(KASA, False, id="KaSA", marks=pytest.mark.skipif(not KASA, reason="not in this PEFT")),
        pytest.param(
            {"monteclora_config": peft_config.MontecloraConfig(num_samples=2, sample_scaler=0.1)},
            True,
            id="MonteCLoRA",
        ),
    ],
)
def test_an_update_that_is_not_the_product_is_called_so(config: dict[str, Any], train: bool) -> None:
    model = adapted(LINEAR.make, **config)
    move_(model, seed=1)
    model = model.double().train(train)
    with model.disable_adapter():
        alone = LINEAR.output(model)
    update = LINEAR.output(model) - alone
    assert (update - rows(5, 9)() @ product(model).T).abs().max() > 0.01
    assert "its update is changed by" in str(the_module(model).unsupported_reason)


def test_pooled_inputs_of_qalora_leave_the_update_linear_in_the_product() -> None:
    """Its A acts on means of 3 inputs, times their number. It takes GPTQ layers, so the variant is put on."""
    config = LoraConfig(use_qalora=True, qalora_group_size=3)
    models = []
    for seed in range(2):
        model = adapted(LINEAR.make, seed=seed)
        variants.QALoraLinearVariant.init(layer_of(model), "default", config)
        layer_of(model).lora_variant["default"] = variants.QALoraLinearVariant()
        move_(model, seed)
        models.append(model.double())
    model = models[0]
    pooled = rows(5, 9)().view(5, 3, 3).mean(dim=2) * 3
    expected = layer_of(model).base_layer(rows(5, 9)()) + pooled @ product(model).T
    torch.testing.assert_close(LINEAR.output(model), expected.detach(), rtol=0, atol=1e-12)
    assert the_module(model).unsupported_reason is None
    assert (
        the_module(model).unwritable_base_reason
        == "its update is not one of the base weight (QALoraLinearVariant)"
    )


def test_mica_has_no_pair_since_its_b_is_frozen() -> None:
    model = adapted(LINEAR.make, init_lora_weights="mica")
    assert [name for name in select(model) if "lora_" in name] == [
        "base_model.model.layer.lora_A.default.weight"
    ]
    assert find_pairs(select(model)) == []


def test_what_lora_trains_beside_its_factors_is_no_pair() -> None:
    names = {
        "DoRA": "base_model.model.layer.lora_magnitude_vector.default.weight",
        "Linear with bias in B": "base_model.model.layer.lora_B.default.bias",
        "DoRA on Embedding": "base_model.model.layer.lora_magnitude_vector.default.weight",
    }
    for layer, name in names.items():
        model = LAYERS[layer].adapted(0, 2)
        pair = the_pair(model)
        assert select(model).keys() == {pair.a, pair.b, name}


# ---- obstacles


def grouped() -> nn.Module:
    return nn.Conv2d(4, 6, 3, groups=2)


def test_a_convolution_of_groups_is_an_obstacle() -> None:
    assert the_module(adapted(grouped)).unsupported_reason == "its convolution has 2 groups"


def test_one_expert_is_a_matrix_of_its_own() -> None:
    """Its weight has three dimensions, (1, 6, 9): one expert, outputs, inputs."""
    said = the_module(adapted(partial(Experts, 1), **ON_EXPERTS))
    assert said.unsupported_reason is None
    assert said.unwritable_base_reason is None
    assert said.base is not None
    assert said.base.shape == (6, 9)


def test_two_parameters_of_one_module_are_two_pairs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 4))
            self.down = nn.Parameter(torch.randn(4, 8))

    model = adapted(Two, target_modules=[], target_parameters=["layer.up", "layer.down"])
    said = lora_modules(model)
    assert [pair.name for pair in find_pairs(select(model))] == sorted(said)
    bases = [
        (module.base.shape, module.base.data_ptr()) for module in said.values() if module.base is not None
    ]
    two = layer_of(model).get_base_layer()
    assert sorted(bases) == sorted([((8, 4), two.up.data_ptr()), ((4, 8), two.down.data_ptr())])


def test_a_merged_adapter_stands_against_writing_the_base_only() -> None:
    model = adapted(LINEAR.make)
    model.merge_adapter()
    assert the_module(model).unsupported_reason is None
    assert the_module(model).unwritable_base_reason == "its adapter is merged into the base weight"
    model.unmerge_adapter()
    assert the_module(model).unwritable_base_reason is None


def test_a_quantised_base_cannot_be_written() -> None:
    model = adapted(LINEAR.make)
    base = layer_of(model).get_base_layer()
    words = "its base weight is quantised, or in another read-only form"
    base.weight.quant_state = object()  # as bitsandbytes marks 4 bits packed into floats
    assert the_module(model).unwritable_base_reason == words
    base.weight = nn.Parameter(base.weight.detach().to(torch.int8), requires_grad=False)
    assert the_module(model).unwritable_base_reason == words
    assert the_module(model).base is None
    assert the_module(model).unsupported_reason is None


def test_a_base_that_is_not_contiguous_cannot_be_written() -> None:
    model = adapted(LINEAR.make)
    base = layer_of(model).get_base_layer()
    base.weight = nn.Parameter(base.weight.detach().T.contiguous().T, requires_grad=False)
    assert the_module(model).unwritable_base_reason == "its base weight is not contiguous"


def tiny_llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, use_cache=False, **config))


def test_a_weight_that_is_tied_to_another_cannot_be_written() -> None:
    model = get_peft_model(
        tiny_llama(tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens", "q_proj"])
    )
    said = {
        name.split(".")[-2]: module.unwritable_base_reason for name, module in lora_modules(model).items()
    }
    assert said == {"embed_tokens": "its base weight is tied to that of another module", "q_proj": None}


def test_a_module_that_stands_at_two_places_cannot_be_written() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.again = self.layer

    model = get_peft_model(Twice(), LoraConfig(target_modules=["layer"]))
    (module,) = lora_modules(model).values()
    assert module.unwritable_base_reason == "its base weight is tied to that of another module"


def test_factors_that_two_modules_share_are_an_obstacle() -> None:
    """With ensure_weight_tying the head's A is the embedding's B transposed: no factorisation suits both."""
    model = get_peft_model(
        tiny_llama(tie_word_embeddings=True),
        LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM"),
    )
    assert len(find_pairs(select(model))) == 2
    assert all(module.unsupported_reason is not None for module in lora_modules(model).values())


def test_a_convolution_that_pads_unlike_its_factors_cannot_be_written() -> None:
    """PEFT pads A's inputs with zeros whatever the layer does, so the update is not one of its weight."""
    layer = Layer(lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (6, 27), rows(2, 3, 5, 5))
    model = layer.adapted(0, 3)
    move_(model, seed=1)
    model = model.double()
    with_factors, base = layer.output(model), layer_of(model).get_base_layer().weight
    with torch.no_grad():
        base.add_(product(model).view(base.shape))
        select(model)[the_pair(model).b].zero_()
    assert (layer.output(model) - with_factors).abs().max() > 0.1
    assert the_module(model).unwritable_base_reason is not None


# ---- names


def test_adapters_are_pairs_of_their_own_and_only_the_trainable_one_federates() -> None:
    model = adapted(LINEAR.make)
    model.add_adapter("second", LoraConfig(target_modules=["layer"], r=3, lora_alpha=6))
    assert [pair.name for pair in find_pairs(select(model))] == ["base_model.model.layer.default"]
    model.set_adapter("second")
    assert [pair.name for pair in find_pairs(select(model))] == ["base_model.model.layer.second"]
    model.base_model.set_adapter(["default", "second"])
    assert [pair.name for pair in find_pairs(select(model))] == [
        "base_model.model.layer.default",
        "base_model.model.layer.second",
    ]
    said = lora_modules(model)
    # 6 / 2 and 6 / 3.
    assert {name.split(".")[-1]: module.scaling for name, module in said.items()} == {
        "default": 3.0,
        "second": 2.0,
    }
    for module in said.values():
        assert module.unsupported_reason is None
        assert module.unwritable_base_reason == "it has several adapters (default, second) on one base weight"


@pytest.mark.parametrize("part", ["base_model", "base_model.model.layer", "base_model.model.layer.lora_A"])
def test_compiled_modules_keep_their_pairs_names(part: str) -> None:
    model = adapted(LINEAR.make)
    plain, pairs = lora_modules(model).keys(), find_pairs(select(model))
    parent, _, child = part.rpartition(".")
    inner = model.get_submodule(part)
    compiled = torch.compile(inner, backend="eager")
    setattr(model.get_submodule(parent), child, compiled)
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert lora_modules(model).keys() == plain
    assert find_pairs(select(model)) == pairs
    assert the_module(model).base is not None


def test_patterns_of_rank_and_alpha_count_module_by_module() -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "o_proj"],
        rank_pattern={"q_proj": 4},
        alpha_pattern={"v_proj": 8},
    )
    model = get_peft_model(tiny_llama(), config)
    said = {name.split(".")[-2]: module.scaling for name, module in lora_modules(model).items()}
    assert said == {"q_proj": 6 / 4, "v_proj": 8 / 2, "o_proj": 6 / 2}
    ranks = {pair.name.split(".")[-2]: select(model)[pair.a].shape[0] for pair in find_pairs(select(model))}
    assert ranks == {"q_proj": 4, "v_proj": 2, "o_proj": 2}


# ---- what a round does to a module's output


Move = Callable[..., None]
Done = tuple[list[Any], list[Any], RoundReport]


def federate(
    models: Sequence[nn.Module],
    rule: Aggregation | None,
    frozen_parts: Sequence[str] = ("",),
    move: Move = move_,
) -> list[Done]:
    """Run rounds of three parties of the weights 1, 3 and 0, each party training before each round.

    ``frozen_parts`` names, round by round, the factor that is not trained, "" none. Returns of each round
    copies of the parties' models before and after it, and party 0's report.
    """

    def act(federation: Any) -> list[tuple[nn.Module, nn.Module, RoundReport]]:
        model, party = models[federation.party], federation.party
        aggregator = Aggregator(federation, select(model), aggregation=rule, lora=lora_modules(model))
        aggregator.start()
        done = []
        for round_, factor in enumerate(frozen_parts):
            words = [f"lora_{factor}.", f"lora_embedding_{factor}."] if factor else []
            move(model, seed=10 * round_ + party, frozen_parts=words)
            before = copy.deepcopy(model)
            report = aggregator.step((1.0, 3.0, 0.0)[party])
            done.append((before, copy.deepcopy(model), report))
        return done

    rounds = zip(*run_parties(3, act), strict=True)
    return [([own[0] for own in parties], [own[1] for own in parties], parties[0][2]) for parties in rounds]


def mean_output(layer: Layer, before: Sequence[PeftModel]) -> Tensor:
    """Return the output that the mean of the parties' dense weights gives, in float64."""
    if "use_dora" not in layer.config:  # linear in the weight, so it is the mean of the outputs
        return sum(share * layer.output(model) for share, model in zip(SHARES, before, strict=True))
    # Of DoRA's weight, magnitude * (W + update) / norm, magnitude and W + update are averaged.
    model = copy.deepcopy(before[0])
    update = sum(s * layer_of(m).get_delta_weight("default") for s, m in zip(SHARES, before, strict=True))
    with torch.no_grad():
        layer_of(model).get_base_layer().weight.add_(update)
        mine = select(model)
        mine[the_pair(model).b].zero_()
        for name in mine.keys() - {the_pair(model).a, the_pair(model).b}:
            mine[name].copy_(sum(s * select(m)[name] for s, m in zip(SHARES, before, strict=True)))
    return layer.output(model)


@dataclass(frozen=True)
class Exact:
    """A rule that is exact: at which ranks of the parties, None for that of the update as a matrix."""

    rule: Aggregation
    ranks: tuple[int | None, ...] = (None, None, None)
    more: int = 0
    alphas: tuple[int, int, int] = (6, 6, 6)
    frozen_parts: tuple[str, str] = ("", "")

    def takes(self, layer: Layer) -> bool:
        alike = len({*self.ranks}) == len({*self.alphas}) == 1  # else biases of B have a test of their own
        return (layer.writable or not self.rule.writes_base) and (alike or "lora_bias" not in layer.config)


EXACT = {
    "FrozenA": Exact(FrozenA(), (2, 2, 2), frozen_parts=("A", "A")),
    "Alternating": Exact(Alternating(), (2, 2, 2), frozen_parts=("A", "B")),
    # Of full rank, so that the factors can hold any mean.
    "LowRankMean, power": Exact(LowRankMean("power")),
    "LowRankMean, exact": Exact(LowRankMean("exact")),
    "LowRankMean, balanced": Exact(LowRankMean("power", factorization="balanced")),
    "ResidualMean": Exact(ResidualMean(), (2, 2, 2)),
    "Stacking": Exact(Stacking(), (2, 2, 2)),
    "Stacking of three ranks": Exact(Stacking(), (3, 1, 2), alphas=(6, 2, 5)),
    # Party 0 alone can hold what party 1 and it make together.
    "HeterogeneousRank": Exact(HeterogeneousRank(), (None, 1, 2), alphas=(6, 2, 5)),
    # More rank than an update can have.
    "LowRankMean, power, of excess": Exact(LowRankMean("power"), more=2),
    "LowRankMean, exact, of excess": Exact(LowRankMean("exact", factorization="svd"), more=2),
    "ResidualMean, of excess": Exact(ResidualMean(), more=2),
    "HeterogeneousRank, of excess": Exact(HeterogeneousRank(), (None, 1, 2), more=5),
}


@cache
def two_rounds(name: str) -> list[Done]:
    """Federate all kinds of layers at once under a rule."""
    exact = EXACT[name]
    taken = {kind: layer for kind, layer in LAYERS.items() if exact.takes(layer)}
    models = []
    for party, (rank, alpha) in enumerate(zip(exact.ranks, exact.alphas, strict=True)):
        ranks = {kind: exact.more + (rank or min(layer.size)) for kind, layer in taken.items()}
        adapters = {k: layer.adapted(party, ranks[k], lora_alpha=alpha) for k, layer in taken.items()}
        models.append(nn.ModuleDict(adapters))
    return federate(models, exact.rule, exact.frozen_parts)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, exact in EXACT.items() for kind, layer in LAYERS.items() if exact.takes(layer)],
)
def test_an_exact_rule_gives_the_output_of_the_mean_weight(name: str, kind: str) -> None:
    layer = LAYERS[kind]
    for before, after, report in two_rounds(name):
        own = [model[kind].double().eval() for model in before]
        now = after[0][kind].double().eval()
        expected = mean_output(layer, own)
        # Float32 factors, products and base weights: a few dozen roundings of 2^-24 of numbers below 20.
        torch.testing.assert_close(layer.output(now), expected, rtol=0, atol=5e-5)
        moved = max(float((layer.output(model) - expected).abs().max()) for model in own[:2])
        assert moved > 0.1, "the parties' outputs must differ, or any rule would do"
        assert report.deviation is not None
        assert report.deviation.total < 1e-5


@pytest.mark.parametrize("rule", [ResidualMean(), Stacking()], ids=repr)
def test_what_a_bfloat16_base_cannot_hold_is_the_deviation(rule: Aggregation) -> None:
    layer = LAYERS["Linear in bfloat16"]
    models = [layer.adapted(party, 2) for party in range(3)]
    base = layer_of(models[0]).get_base_layer().weight.detach().double().clone()
    ((before, after, report),) = federate(models, rule)
    mean = sum(share * product(model) for share, model in zip(SHARES, before, strict=True))
    moved = layer_of(after[0]).get_base_layer().weight.detach().double() - base
    missed = float((moved + product(after[0]) - mean).norm() / mean.norm())
    # Half an ulp of bfloat16 is 2^-9 of a weight of 0.2, at most 2^-8 of one that has grown to about 2.
    assert 1e-5 < missed < 2**-8
    assert report.deviation is not None
    assert report.deviation.total == pytest.approx(missed, rel=1e-4)


@pytest.mark.parametrize(
    "rule", [Stacking(), HeterogeneousRank(), HeterogeneousRank("zero_pad")], ids=lambda rule: repr(rule)[:25]
)
def test_the_bias_of_b_counts_by_each_partys_scaling(rule: Aggregation) -> None:
    """It shifts the output by ``scaling * bias``; by the plain mean of biases party 1's counts too much."""
    models = [
        LINEAR.adapted(party, 2, lora_bias=True, lora_alpha=(12, 2, 6)[party], init_lora_weights=True)
        for party in range(3)
    ]

    def shift(model: PeftModel) -> Tensor:
        """Return what the bias of B adds to the output."""
        layer = layer_of(model)
        return layer.scaling["default"] * layer.lora_B["default"].bias.detach().double()

    ((before, after, _),) = federate(models, rule)
    expected = sum(share * shift(model) for share, model in zip(SHARES, before, strict=True))
    for model in after:
        torch.testing.assert_close(shift(model), expected, rtol=0, atol=1e-6)


def test_the_first_round_of_an_embedding_loses_nothing() -> None:
    """It starts with A = 0, so B is the same everywhere still: the mean of the products has rank r.

    The first tokens of a vocabulary are special ones, which no text of the parties may hold.
    """

    def move(model: nn.Module, seed: int, frozen_parts: Any) -> None:
        a = select(model)[the_pair(model).a]
        assert not a.any()
        with torch.no_grad():
            a[:, 5:].normal_(generator=torch.Generator().manual_seed(seed))

    models = [adapted(lambda: nn.Embedding(40, 16), seed=party) for party in range(3)]
    ((_, _, report),) = federate(models, LowRankMean("power"), move=move)
    assert report.deviation is not None
    assert report.deviation.total < 1e-5


def test_frozen_a_does_not_rest_on_a_zero_a() -> None:
    """With an embedding's A, which starts at zero, no B learns anything: the rule must not take that."""
    models = [adapted(lambda: nn.Embedding(40, 16), seed=party) for party in range(3)]
    with contextlib.suppress(ValueError):  # which would name the module
        federate(models, FrozenA(), ("A",))
        layer = layer_of(models[0])
        layer(torch.arange(40)).square().sum().backward()
        assert layer.lora_embedding_B["default"].grad.any(), "it will never learn"


def test_two_trained_adapters_are_combined_each_on_its_own() -> None:
    models = []
    for party in range(3):
        model = adapted(LINEAR.make, seed=party, r=6)
        model.add_adapter("second", LoraConfig(target_modules=["layer"], r=6, lora_alpha=3))
        model.base_model.set_adapter(["default", "second"])
        models.append(model)
    ((before, after, report),) = federate(models, LowRankMean("power"))
    own = [LINEAR.output(model.double()) for model in before]
    expected = sum(share * output for share, output in zip(SHARES, own, strict=True))
    assert all((output - expected).abs().max() > 0.1 for output in own)
    torch.testing.assert_close(LINEAR.output(after[2].double()), expected, rtol=0, atol=2e-5)
    assert report.deviation is not None
    assert report.deviation.total < 1e-5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


def attentive(seed: int, rank: int) -> PeftModel:
    torch.manual_seed(7)
    base = Attention()
    torch.manual_seed(100 + seed)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=6, target_modules=["layer"]))


@pytest.mark.parametrize(
    ("rule", "rank", "frozen_parts"),
    [(LowRankMean(), 6, ""), (FrozenA(), 2, "A")],
    ids=["LowRankMean", "FrozenA"],
)
def test_attention_computes_with_the_mean_products(rule: Aggregation, rank: int, frozen_parts: str) -> None:
    models = [attentive(party, rank) for party in range(3)]
    x = rows(2, 5, 6)()
    ((before, after, _),) = federate(models, rule, frozen_parts=(frozen_parts,))
    # A model whose adapters hold the mean exactly: A = 1 of rank 6, B = the mean product, 18 or 6 by 6.
    expected = attentive(0, 6).double()
    parameters = select(expected)
    for pair in find_pairs(parameters):
        update = torch.zeros_like(parameters[pair.b])
        for share, model in zip(SHARES, before, strict=True):
            own = {name: p.detach().double() for name, p in select(model).items()}
            update += share * lora_modules(model)[pair.name].scaling * own[pair.b] @ own[pair.a]
        with torch.no_grad():
            parameters[pair.a].copy_(torch.eye(6))
            parameters[pair.b].copy_(update / lora_modules(expected)[pair.name].scaling)
    assert len(find_pairs(parameters)) == 2, "the projection in, of queries, keys and values, and that out"
    assert (models[0].double()(x) - before[0].double()(x)).abs().max() > 0.1
    torch.testing.assert_close(after[1].double()(x), expected(x), rtol=0, atol=2e-5)


def test_the_weights_of_an_attention_cannot_be_written() -> None:
    """PEFT puts new weights into the module at each forward pass, so a view of the old ones is dead by then.

    And its update of ``out_proj`` counts twice there: PEFT merges it itself and has the inner layer merge it.
    """
    model = attentive(0, 2)
    bases = [module.base for module in lora_modules(model).values()]
    model(rows(2, 5, 6)().float())
    now = {parameter.data_ptr() for _, parameter in model.named_parameters()}
    assert all(base is None or base.data_ptr() in now for base in bases)
    assert all(module.unwritable_base_reason is not None for module in lora_modules(model).values())


# ---- whole models


def tiny_gpt2(**config: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0, **config))


WHOLE: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "GPT-2": (
        partial(tiny_gpt2, tie_word_embeddings=False),
        # Conv1D everywhere, and the embeddings of words and positions.
        {"target_modules": ["c_attn", "c_proj", "c_fc", "wte", "wpe"], "fan_in_fan_out": True},
    ),
    "Llama": (
        tiny_llama,
        {
            "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
            "rank_pattern": {"v_proj": 8},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
}


@pytest.mark.parametrize(
    ("rule", "rank"),
    [(LowRankMean("power"), 8), (LowRankMean("exact"), 8), (ResidualMean(), 3), (Stacking(), 3)],
    ids=lambda value: repr(value)[:25],
)
@pytest.mark.parametrize("family", WHOLE)
def test_a_models_logits_are_those_of_the_mean_weights(family: str, rule: Aggregation, rank: int) -> None:
    make, config = WHOLE[family]  # all widths are 8 or more, so rank 8 holds any mean of one that is 8
    models = []
    for party in range(3):
        base = make()
        torch.manual_seed(100 + party)
        models.append(get_peft_model(base, LoraConfig(r=rank, **config)))
    ((before, after, _),) = federate(models, rule)
    dense = make().double().eval()
    for name, module in before[0].named_modules():
        if hasattr(module, "get_delta_weight"):
            deltas = [model.get_submodule(name).get_delta_weight("default") for model in before]
            with torch.no_grad():
                dense.get_submodule(name.removeprefix("base_model.model.")).weight.add_(
                    sum(share * delta.double() for share, delta in zip(SHARES, deltas, strict=True))
                )
    ids = torch.arange(10).repeat(2, 1) + torch.tensor([[0], [9]])
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        for model in after:
            torch.testing.assert_close(
                model.double().eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4
            )
        assert (before[0].double().eval()(input_ids=ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("rule", [LowRankMean(), FrozenA(), ResidualMean(), Stacking()], ids=repr)
def test_what_is_no_factor_is_averaged_beside_the_pairs(rule: Aggregation) -> None:
    config = {
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": {"embed_tokens": [2, 5]},
        "use_dora": True,
    }
    models = []
    for party in range(3):
        base = tiny_llama()
        torch.manual_seed(100 + party)
        models.append(get_peft_model(base, LoraConfig(r=2, **config)))
    frozen_parts = "A" if isinstance(rule, FrozenA) else ""
    ((before, after, _),) = federate(models, rule, frozen_parts=(frozen_parts,))
    factors = {name for pair in find_pairs(select(models[0])) for name in (pair.a, pair.b)}
    others = select(models[0]).keys() - factors
    kinds = ("lora_magnitude_vector", "modules_to_save", "trainable_tokens_delta")
    # Two layers of q and v, the head, and the tokens.
    assert [sum(kind in name for name in others) for kind in kinds] == [4, 1, 1]
    assert len(others) == 6
    for name in others:
        mean = sum(
            share * select(model)[name].detach().double() for share, model in zip(SHARES, before, strict=True)
        )
        for model in after:
            # A float32 rounding or two of numbers below 4.
            torch.testing.assert_close(select(model)[name].detach().double(), mean, rtol=0, atol=1e-6)


# ---- modules that a rule cannot handle


BLOCKS = {"use_bdlora": peft_config.BdLoraConfig(target_modules_bd_b=["layer"], nblocks=2)}
HARD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "groups": (grouped, {}, "its convolution has 2 groups"),
    "BdLoRA": (LINEAR.make, BLOCKS, "its update is changed by BdLoraLinearVariant"),
}
if KASA:
    HARD["KaSA"] = (LINEAR.make, KASA, "its update is changed by KasaLinearVariant")
OF_PRODUCTS = (LowRankMean(), ResidualMean(), Stacking(), HeterogeneousRank())


@pytest.mark.parametrize("rule", OF_PRODUCTS, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", HARD)
def test_a_rule_names_the_module_that_it_cannot_handle(kind: str, rule: Aggregation) -> None:
    make, config, why = HARD[kind]
    with pytest.raises(ValueError, match="cannot aggregate the LoRA module") as refused:
        federate([adapted(make, seed=party, **config) for party in range(3)], rule)
    assert str(refused.value) == (
        f"{rule!r} cannot aggregate the LoRA module 'base_model.model.layer.default' (1 of 1 modules): {why}."
        " Use Mean(), which averages its factors, or exclude the module from target_modules."
    )


@pytest.mark.parametrize("rule", [None, Mean(), FrozenA()], ids=repr)
@pytest.mark.parametrize("kind", HARD)
def test_factors_that_are_no_product_can_still_be_averaged(kind: str, rule: Aggregation | None) -> None:
    make, config, _ = HARD[kind]
    frozen_parts = "A" if isinstance(rule, FrozenA) else ""
    models = [adapted(make, seed=party, **config) for party in range(3)]
    ((before, after, _),) = federate(models, rule, frozen_parts=(frozen_parts,))
    for name in select(models[0]):
        mean = sum(
            share * select(model)[name].detach().double() for share, model in zip(SHARES, before, strict=True)
        )
        for model in after:
            torch.testing.assert_close(select(model)[name].detach().double(), mean, rtol=0, atol=1e-6)


class Tuned(LightningModule):
    """Two adapted layers, of which the second is one that few rules can handle."""

    def __init__(self, party: int) -> None:
        super().__init__()
        base = nn.Sequential()
        base.add_module("plain", linear(8, 12, seed=1))
        base.add_module("wide", nn.Unflatten(1, (4, 3)))
        torch.manual_seed(7)
        base.add_module("grouped", nn.Conv1d(4, 4, 1, groups=2))
        base.add_module("flat", nn.Flatten())
        torch.manual_seed(100 + party)
        self.model = get_peft_model(base, LoraConfig(r=2, target_modules=["plain", "grouped"]))
        self.started = False
        self.local: dict[str, Tensor] = {}

    def on_train_start(self) -> None:
        self.started = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.local = {name: p.detach().clone() for name, p in self.trained().items()}

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


building = threading.Lock()
GROUPED = "model.base_model.model.grouped.default"


def fit_tuned(tmp_path: Path, **options: Any) -> list[Any]:
    """Fit two parties for two steps of 8 and of 4 samples; return their modules and what they raised."""
    modules: dict[int, Tuned] = {}

    def fit(party: int, federated: Any) -> Tuned:
        with building:  # PEFT draws from the global generator, and parties are threads
            modules[party] = Tuned(party)
        trainer = quiet_trainer(tmp_path, [federated(**options)], max_epochs=1)
        trainer.fit(modules[party], data(16 - 8 * party, seed=party, batch_size=8 - 4 * party))
        return modules[party]

    raised = fit_parties(2, fit, may_fail=True)
    return [(modules[party], raised[party]) for party in range(2)]


@pytest.mark.parametrize("rule", [LowRankMean(), ResidualMean()], ids=repr)
def test_a_fit_is_refused_before_it_starts_naming_the_module(tmp_path: Path, rule: Aggregation) -> None:
    for party, (module, error) in enumerate(fit_tuned(tmp_path, aggregation=rule)):
        assert isinstance(error, MisconfigurationException)
        assert str(error).startswith(
            f"Party {party}: {rule!r} cannot aggregate the LoRA module {GROUPED!r} (1 of 2 modules):"
            " its convolution has 2 groups."
        )
        assert not module.started


def test_by_default_such_factors_are_averaged_and_the_rest_combined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first, _), (second, _) = fit_tuned(tmp_path)
    said = [record.getMessage() for record in caplog.records if "one by one" in record.getMessage()]
    assert {*said} == {
        f"[party {party}] The factors of the LoRA module {GROUPED!r} are averaged one by one, since its"
        " convolution has 2 groups."
        for party in range(2)
    }
    names = [name for name in first.trained() if ".grouped." in name]
    assert len(names) == 2
    for name in names:
        mean = (16 * first.local[name].double() + 8 * second.local[name].double()) / 24
        for module in (first, second):
            torch.testing.assert_close(module.trained()[name].detach().double(), mean, rtol=0, atol=1e-6)
    # The plain layer's product is nearly the best of rank 2, which the product of the mean factors is not.
    b, a = (f"model.base_model.model.plain.lora_{factor}.default.weight" for factor in "BA")
    # lora_alpha 8 over rank 2 is 4.
    dense = sum(
        4 * share * module.local[b].double() @ module.local[a].double()
        for share, module in ((2 / 3, first), (1 / 3, second))
    )
    best = float(torch.linalg.svdvals(dense)[2:].norm())
    result = 4 * first.trained()[b].detach().double() @ first.trained()[a].detach().double()
    mean_b, mean_a = ((2 * first.local[name] + second.local[name]).double() / 3 for name in (b, a))
    assert float((result - dense).norm()) < 1.02 * best
    assert float((4 * mean_b @ mean_a - dense).norm()) > 1.1 * best > 1e-3
    assert all(torch.equal(p, second.trained()[name]) for name, p in first.trained().items())


def test_each_such_module_is_warned_about_once_per_party(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit_tuned(tmp_path)
    lines = [r for r in caplog.records if r.levelno == logging.WARNING and "one by one" in r.getMessage()]
    assert len(lines) == 2
