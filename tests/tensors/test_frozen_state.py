"""What must be equal at all parties beside what they train: what is used, and what gives it its meaning."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from pellm_lightning.engine.compatibility import base_digests
from pellm_lightning.tensors.adapter_config import adapter_configs
from pellm_lightning.tensors.frozen_state import frozen_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:::transformers"),
]


def bert(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **size))
    torch.manual_seed(seed)
    model.classifier.reset_parameters()
    return model


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **size))


def digests(module: nn.Module) -> dict[str, str]:
    return base_digests(frozen_state(module))


QV = {"target_modules": ["q_proj", "v_proj"]}


# ---- what no forward pass uses


def test_the_head_that_a_trained_copy_replaces_is_not_compared() -> None:
    models = [get_peft_model(bert(seed), LoraConfig(task_type="SEQ_CLS", r=2)) for seed in (1, 2)]
    assert digests(models[0]) == digests(models[1])
    assert not any("original_module" in name for name in frozen_state(models[0]))


def test_it_is_compared_where_it_is_what_runs() -> None:
    models = [get_peft_model(bert(seed), LoraConfig(task_type="SEQ_CLS", r=2)) for seed in (1, 2)]
    for model in models:
        model.base_model.disable_adapter_layers()
    assert digests(models[0]) != digests(models[1])
    assert any("original_module" in name for name in frozen_state(models[0]))


def test_a_frozen_random_head_is_compared() -> None:
    models = [bert(seed).requires_grad_(False) for seed in (1, 2)]
    differing = {name for name, digest in digests(models[0]).items() if digest != digests(models[1])[name]}
    assert differing == {"classifier.weight", "classifier.bias"}


def test_the_original_of_trainable_tokens_is_used() -> None:
    config = LoraConfig(r=2, **QV, trainable_token_indices={"embed_tokens": [3]})
    models = [get_peft_model(llama(), config) for _ in range(2)]
    with torch.no_grad():
        models[1].get_submodule("base_model.model.model.embed_tokens").original_module.weight[7] += 1
    assert digests(models[0]) != digests(models[1])


@pytest.mark.parametrize("active", [True, False])
def test_adapters_count_if_they_are_active(active: bool) -> None:
    def build(seed: int) -> nn.Module:
        model = get_peft_model(llama(), LoraConfig(r=2, **QV))
        torch.manual_seed(seed)
        model.add_adapter("other", LoraConfig(r=2, **QV, init_lora_weights=False))
        if active:
            model.base_model.set_adapter(["default", "other"])
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".default" in name and "lora_" in name)
        return model

    models = [build(seed) for seed in (1, 2)]
    assert (digests(models[0]) == digests(models[1])) == (not active)
    assert set(adapter_configs(models[0])) == ({"default", "other"} if active else {"default"})


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stand_there_once(tied: bool) -> None:
    model = llama(tied).requires_grad_(False)
    names = [name for name in frozen_state(model) if name in ("lm_head.weight", "model.embed_tokens.weight")]
    assert len(names) == (1 if tied else 2)


# ---- equal names of another meaning


OTHER_MEANING: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "VeRA": (peft.VeraConfig, {"r": 4, "projection_prng_key": 0}, {"projection_prng_key": 1}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 20, "random_loc_seed": 1}, {"random_loc_seed": 2}),
    "trainable tokens": (
        LoraConfig,
        {"r": 4, "trainable_token_indices": {"embed_tokens": [2, 5]}},
        {"trainable_token_indices": {"embed_tokens": [2, 6]}},
    ),
    "RandLoRA": (peft.RandLoraConfig, {"r": 4, "projection_prng_key": 0}, {"projection_prng_key": 3}),
    "SHiRA": (peft.ShiraConfig, {"r": 2, "random_seed": 1}, {"random_seed": 2}),
    "dropout is none": (LoraConfig, {"r": 4}, {"lora_dropout": 0.5}),
    "paths are none": (LoraConfig, {"r": 4}, {"base_model_name_or_path": "elsewhere", "revision": "v2"}),
}


@pytest.mark.parametrize("name", OTHER_MEANING)
def test_what_a_seed_or_an_index_makes_differ_is_compared(name: str) -> None:
    kind, arguments, changes = OTHER_MEANING[name]
    models = [get_peft_model(llama(), kind(**QV, **arguments | more)) for more in ({}, changes)]
    configs = [adapter_configs(model) for model in models]
    assert (configs[0] == configs[1]) == name.endswith("none")
    if name in ("VeRA", "FourierFT", "RandLoRA", "SHiRA"):
        assert digests(models[0]) != digests(models[1]), "the buffers and indices are compared, too"


# ---- buffers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def test_saved_buffers_of_a_peft_model_count_and_running_statistics_do_not() -> None:
    names = set(frozen_state(get_peft_model(Net(), LoraConfig(r=2, target_modules=["layer"]))))
    assert any(name.endswith("model.table") for name in names)
    assert not any("running_" in name or "num_batches" in name or "cache" in name for name in names)


def test_buffers_of_a_module_of_the_users_own_are_its_own() -> None:
    module = nn.ModuleList([Net(), nn.CrossEntropyLoss(weight=torch.ones(3))]).requires_grad_(False)
    assert set(frozen_state(module)) == {"0.layer.weight", "0.layer.bias", "0.norm.weight", "0.norm.bias"}


# ---- quantised weights


def quantised(absmax: float = 1.0, offset: float = 0.5, kind: str = "nf4") -> nn.Module:
    """A layer of the shape of bitsandbytes' Linear4bit with statistics that are quantised, too."""
    layer = nn.Linear(4, 4, bias=False)
    weight = nn.Parameter(torch.arange(8, dtype=torch.uint8)[:, None], requires_grad=False)
    weight.quant_state = SimpleNamespace(  # type: ignore[attr-defined]
        absmax=torch.full((2,), absmax),
        code=torch.linspace(-1, 1, 16),
        offset=torch.tensor(offset),
        quant_type=kind,
        blocksize=64,
        state2=SimpleNamespace(absmax=torch.ones(1), code=torch.linspace(-1, 1, 256), blocksize=256),
    )
    layer.weight = weight
    return layer


@pytest.mark.parametrize("change", [{"absmax": 2.0}, {"offset": 0.25}, {"kind": "fp4"}])
def test_the_statistics_of_quantised_weights_are_compared(change: dict[str, Any]) -> None:
    assert digests(quantised()) == digests(quantised())
    assert digests(quantised()) != digests(quantised(**change))


def test_the_statistics_of_every_layer_are_found() -> None:
    """Their settings become tensors on the way, which come and go, and must not be taken for one another."""
    found = frozen_state(nn.Sequential(*(quantised() for _ in range(50))))
    assert len([name for name in found if name.endswith("quant_state.settings")]) == 50
    assert len([name for name in found if name.endswith("quant_state.state2.settings")]) == 50


@pytest.mark.parametrize("moved", [True, False])
def test_the_scale_of_8_bit_weights_is_found_wherever_it_is(moved: bool) -> None:
    def layer(scale: float, moved: bool) -> nn.Module:
        module = nn.Linear(2, 2, bias=False)
        module.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        scb: Tensor | None = torch.full((2,), scale)
        module.state = SimpleNamespace(SCB=scb if moved else None)  # type: ignore[assignment]
        module.weight.SCB = None if moved else scb  # type: ignore[attr-defined]
        return module

    assert digests(layer(1.0, moved)) == digests(layer(1.0, not moved))
    assert digests(layer(1.0, moved)) != digests(layer(2.0, moved))


def test_4_and_8_bit_bases_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def build(kind: str, change: float) -> nn.Module:
        torch.manual_seed(0)
        source = nn.Linear(64, 64, bias=False)
        if kind == "8 bit":
            layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(64, 64, bias=False, compress_statistics=kind == "double")
        layer.load_state_dict(source.state_dict())
        layer = layer.to("cpu").requires_grad_(False)
        if kind == "8 bit":
            layer.weight.SCB[0] += change
        else:
            state = layer.weight.quant_state
            state.absmax[0] += change
        return layer

    for kind in ("8 bit", "4 bit", "double"):
        assert digests(build(kind, 0)) == digests(build(kind, 0)), kind
        assert digests(build(kind, 0)) != digests(build(kind, 1)), kind
