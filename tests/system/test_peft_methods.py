"""Every fine-tuning method of the installed PEFT on a tiny Llama: it federates and equals the mean."""

from pathlib import Path
from typing import Any

import peft
import peft_methods
import pytest
import torch
from party_threads import fit_parties, quiet_trainer
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.optimizers import create_lorafa_optimizer
from peft_methods import (
    METHODS,
    NOT_HERE,
    PROMPT,
    Tuned,
    of,
    sentences,
    tiny_llama,
    with_adapters,
)
from torch import nn
from transformers import PretrainedConfig

from pellm_lightning import FederationError, Parameters
from pellm_lightning.aggregation import Mean, lora_modules
from pellm_lightning.aggregation.lora import find_pairs
from pellm_lightning.tensors.selection import plain_name, select

no_compiler_chosen = peft_methods.no_compiler_chosen
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),  # X-LoRA's base
    # What PEFT and transformers say about methods and versions, not about federating them.
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.filterwarnings("ignore:::huggingface_hub"),
]


def test_every_method_of_peft_is_listed() -> None:
    listed = {make.func for make in METHODS.values()}  # type: ignore[attr-defined]
    assert listed == set(PEFT_TYPE_TO_CONFIG_MAPPING.values())


def frozen(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {plain_name(name): p.detach() for name, p in module.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_a_round_is_the_mean_and_leaves_the_base_alone(tmp_path: Path, name: str) -> None:
    if name in NOT_HERE:
        pytest.skip(NOT_HERE[name])
    make = with_adapters(METHODS[name], tmp_path)

    def fit(party: int, federated: Any) -> tuple[Tuned, dict[str, torch.Tensor]]:
        module = Tuned(make, party)
        still = frozen(module)
        still = {n: t.clone() for n, t in (still | dict(module.named_buffers())).items()}
        quiet_trainer(tmp_path, [federated(aggregation=Mean())], max_epochs=1).fit(module, sentences(party))
        return module, still

    results = fit_parties(2, fit)
    first, second = (module for module, _ in results)
    names = list(select(first))
    assert names == sorted(name for name, _ in first.trained())
    trained, other = dict(first.trained()), dict(second.trained())
    for name in names:
        assert torch.equal(trained[name], other[name]), name
        mean = (3 * first.local[name] + 1 * second.local[name]) / 4
        # A few float32 roundings of numbers that are below 4 for all these methods.
        torch.testing.assert_close(trained[name].double(), mean, rtol=3e-7, atol=1e-6, msg=name)
    assert any(not torch.equal(first.local[name], second.local[name]) for name in names), (
        "nothing was trained"
    )
    for module, still in results:
        now = frozen(module) | dict(module.named_buffers())
        assert all(torch.equal(value, now[name]) for name, value in still.items())


def test_only_lora_and_its_variants_have_pairs(tmp_path: Path) -> None:
    for name, make in METHODS.items():
        if name not in NOT_HERE:
            torch.manual_seed(0)
            model = get_peft_model(tiny_llama(), with_adapters(make, tmp_path)())
            pairs = {pair.name for pair in find_pairs(select(model))}
            if make.func is peft.LoraConfig:  # type: ignore[attr-defined]
                assert pairs == lora_modules(model).keys() != set(), name
            else:
                assert pairs == set(), name


class LoraFa(Tuned):
    """LoRA with a frozen A: a matter of the optimizer, which freezes it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return create_lorafa_optimizer(self.model, r=4, lora_alpha=8, lr=0.1)


@pytest.mark.parametrize("same_seed", [True, False])
def test_lora_fa_sends_b_only_and_wants_the_same_a(tmp_path: Path, same_seed: bool) -> None:
    def fit(party: int, federated: Any) -> LoraFa:
        module = LoraFa(METHODS["LoRA"], party)
        if same_seed:
            other = LoraFa(METHODS["LoRA"], 0)
            module.load_state_dict(other.state_dict())
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(module, sentences(party))
        return module

    first, second = fit_parties(2, fit, may_fail=True)
    if not same_seed:
        for error in (first, second):
            assert "The frozen base model of party 1 is not that of party 0" in str(error)
            assert "lora_A" in str(error)
        return
    assert all("lora_B" in name for name in select(first))
    for name, parameter in first.trained():
        mean = (3 * first.local[name] + second.local[name]) / 4
        torch.testing.assert_close(parameter.double(), mean, rtol=3e-7, atol=1e-6)
        assert torch.equal(parameter, dict(second.trained())[name])


def test_a_random_frozen_part_must_be_the_same_everywhere(tmp_path: Path) -> None:
    """A cartridge's first token is frozen at a random value: to average the rest would mix unlike things."""

    def fit(party: int, federated: Any) -> None:
        module = Tuned(of("CartridgeConfig", **PROMPT), party)
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(module, sentences(party))

    for error in fit_parties(2, fit, may_fail=True):
        assert isinstance(error, FederationError)
        assert "the first tensor that differs is 'model.prompt_encoder.default.frozen_embedding'" in str(
            error
        )


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3", "prefix tuning"])
def test_the_adapter_is_exported_by_peft(tmp_path: Path, name: str) -> None:
    """What every party saves with save_pretrained is the same adapter, and loads onto a fresh base."""

    def fit(party: int, federated: Any) -> Tuned:
        module = Tuned(METHODS[name], party)
        quiet_trainer(tmp_path, [federated(parameters=Parameters(save_frozen=False))], max_epochs=1).fit(
            module, sentences(party)
        )
        module.model.save_pretrained(tmp_path / f"adapter-{party}")
        return module

    first, _ = fit_parties(2, fit)
    ids = next(iter(sentences(0)))
    with torch.no_grad():
        expected = first.model.eval()(input_ids=ids).logits
        for party in range(2):
            loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / f"adapter-{party}").eval()
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-6)


class ChatGlm(nn.Module):
    """ChatGLM-6B as far as LoRA sees it: 28 layers whose attention has one query_key_value."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig(model_type="chatglm", tie_word_embeddings=False)
        hidden, inner, vocabulary = 4096, 16384, 130528
        self.transformer = nn.Module()
        self.transformer.word_embeddings = nn.Embedding(vocabulary, hidden)
        self.transformer.layers = nn.ModuleList()
        for _ in range(28):
            layer = nn.Module()
            layer.input_layernorm = nn.LayerNorm(hidden)
            layer.attention = nn.Module()
            layer.attention.query_key_value = nn.Linear(hidden, 3 * hidden)
            layer.attention.dense = nn.Linear(hidden, hidden)
            layer.post_attention_layernorm = nn.LayerNorm(hidden)
            layer.mlp = nn.Module()
            layer.mlp.dense_h_to_4h = nn.Linear(hidden, inner)
            layer.mlp.dense_4h_to_h = nn.Linear(inner, hidden)
            self.transformer.layers.append(layer)
        self.transformer.final_layernorm = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        self.lm_head.weight = self.transformer.word_embeddings.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_chatglm_6b_sends_the_adapter_only() -> None:
    """The numbers of FATE-LLM's tutorial: 3,670,016 parameters, 0.059 % of the model."""
    with torch.device("meta"):
        base = ChatGlm()
        assert sum(p.numel() for p in base.parameters()) == 6_173_286_400
        model = get_peft_model(base, peft.LoraConfig(r=8, target_modules=["query_key_value"]))
    chosen = select(model)
    # 28 layers of A, 8 x 4096, and B, 12288 x 8.
    assert sum(p.numel() for p in chosen.values()) == 28 * 8 * (4096 + 12288) == 3_670_016
    assert all("query_key_value.lora_" in name for name in chosen)
    share = 3_670_016 / sum(p.numel() for p in model.parameters())
    assert f"{share:.3%}" == "0.059%"
    assert f"{share:.6%}" == f"{3_670_016 / (6_173_286_400 + 3_670_016):.6%}"
