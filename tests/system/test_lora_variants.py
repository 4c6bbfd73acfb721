"""Every initialisation and setting of the installed PEFT's LoRA is listed, with what it does to the base."""

import typing
from dataclasses import fields
from typing import Any

import peft.tuners.lora.config as peft_config
import pytest
import torch
from party_threads import run_parties
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import Mean, lora_modules
from pellm_lightning.tensors.adapter_config import MAY_DIFFER, adapter_configs, init_that_writes_base
from pellm_lightning.tensors.frozen_state import frozen_state
from pellm_lightning.tensors.selection import select

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:::transformers"),
]

INITS: dict[Any, Any] = {
    True: True,
    False: False,
    "gaussian": "gaussian",
    "eva": "eva",
    "olora": "olora",
    "pissa": "pissa",
    "pissa_niter_[number of iters]": "pissa_niter_4",
    "orthogonal": "orthogonal",
    "mica": "mica",
}
"""Initialisations that need no data: how PEFT's annotation has them, and one to be tried."""

NEEDS_DATA = {"corda", "lora_ga", "loftq"}
"""Those that need data or a quantised base first; each writes into the base."""


def inits_of_peft() -> set[Any]:
    hint = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    literals = {value for part in typing.get_args(hint) for value in typing.get_args(part)}
    return {True, False} | literals


def tuned(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, **size))
    return get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | arguments))


def test_every_initialisation_is_listed() -> None:
    assert inits_of_peft() <= INITS.keys() | NEEDS_DATA


@pytest.mark.parametrize("init", sorted(NEEDS_DATA))
def test_those_that_need_data_are_known_to_write_into_the_base(init: str) -> None:
    assert init_that_writes_base({"init_lora_weights": init}) is not None


@pytest.mark.parametrize("listed", INITS)
def test_what_an_initialisation_does_to_the_base_is_known(listed: Any) -> None:
    if listed not in inits_of_peft():
        pytest.skip(f"the installed PEFT has no {listed}")
    plain, model = frozen_state(tuned()), tuned(init_lora_weights=INITS[listed])
    now = frozen_state(model)
    changed = {name for name in plain.keys() & now if not torch.equal(now[name], plain[name])}
    (config,) = adapter_configs(model).values()
    assert bool(changed) == (init_that_writes_base(config) is not None)
    assert all("base_layer" in name for name in changed)


COMPARED = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "fan_in_fan_out", "init_lora_weights", "kasa_config", "layer_replication", "loftq_config",
    "lora_alpha", "lora_bias", "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config",
    "peft_type", "qalora_group_size", "r", "rank_pattern", "task_type", "trainable_token_indices",
    "use_bdlora",
    "use_dora", "use_qalora", "use_rslora", "velora_config",
}  # fmt: skip
"""Fields of LoRA that give its numbers a meaning."""


def test_every_field_is_compared_or_may_differ_for_a_reason() -> None:
    names = {field.name for field in fields(LoraConfig)}
    assert names - COMPARED - MAY_DIFFER.keys() == {"lora_dropout"}


# ---- each of them federates

VARIANTS: dict[str, dict[str, Any]] = {
    f"init_lora_weights={init}": {"init_lora_weights": value}
    for init, value in INITS.items()
    if init != "eva"
} | {
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 5}},
    "bias": {"bias": "lora_only"},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "lora_bias": {"lora_bias": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 3}},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 7]},
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": True},
}
for _field, _config, _arguments in (
    ("kasa_config", "KasaConfig", {}),
    ("monteclora_config", "MontecloraConfig", {"num_samples": 2, "buffer_size": 2}),
    ("use_bdlora", "BdLoraConfig", {"target_modules_bd_a": ["q_proj", "v_proj"], "nblocks": 2}),
    ("velora_config", "VeloraConfig", {"num_groups": 4}),
):
    if hasattr(peft_config, _config):
        VARIANTS[_field] = {_field: getattr(peft_config, _config)(**_arguments)}
NOT_HERE = {
    "arrow_config": "mixes adapters that are trained already",
    "corda_config": "an initialisation that needs data",
    "ensure_weight_tying": "of modules_to_save",
    "eva_config": "an initialisation that needs data",
    "fan_in_fan_out": "of GPT-2's layers",
    "init_lora_weights": "by each of its values",
    "loftq_config": "an initialisation that needs a quantised base",
    "lora_alpha": "in each of these",
    "lora_ga_config": "an initialisation that needs data",
    "megatron_config": "needs Megatron",
    "megatron_core": "needs Megatron",
    "peft_type": "LoRA",
    "qalora_group_size": "needs a GPTQ base",
    "r": "in each of these",
    "task_type": "of the model around it",
    "use_qalora": "needs a GPTQ base",
}


def test_every_field_federates_or_says_why_it_is_not_tried() -> None:
    tried = {name for arguments in VARIANTS.values() for name in arguments} - {"target_modules"}
    assert COMPARED & {field.name for field in fields(LoraConfig)} <= tried | NOT_HERE.keys()


@pytest.mark.parametrize("rule", [None, Mean()], ids=["default", "Mean"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_round_leaves_all_with_the_same_and_the_base_as_it_was(name: str, rule: Any) -> None:
    """Weights 1 and 3; what the default rule factorises anew is tested where the rule is."""
    init = VARIANTS[name].get("init_lora_weights")
    if isinstance(init, str) and init not in str(inits_of_peft()) and "pissa" not in init:
        pytest.skip(f"the installed PEFT has no {init}")
    models = [tuned(**VARIANTS[name]) for _ in range(2)]
    moved: list[dict[str, torch.Tensor]] = []
    for party, model in enumerate(models):
        generator = torch.Generator().manual_seed(party)
        with torch.no_grad():
            for parameter in select(model).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        moved.append({key: p.detach().clone() for key, p in select(model).items()})

    def act(federation: Federation) -> None:
        model = models[federation.party]
        parameters = select(model)
        start = {key: p.detach().clone() for key, p in parameters.items()}
        aggregator = Aggregator(
            federation,
            parameters,
            aggregation=rule,
            lora=lora_modules(model),
            frozen=frozen_state(model),
            adapters=adapter_configs(model),
        )
        aggregator.start()
        with torch.no_grad():
            for key, p in parameters.items():
                p.copy_(start[key])
        before = {key: tensor.clone() for key, tensor in frozen_state(model).items()}
        aggregator.step([1.0, 3.0][federation.party])
        now = frozen_state(model)
        assert all(torch.equal(tensor, now[key]) for key, tensor in before.items())

    run_parties(2, act)
    first, second = (select(model) for model in models)
    for key, p in first.items():
        assert torch.equal(p, second[key]), key
        if rule is not None:
            mean = (moved[0][key].double() + 3 * moved[1][key].double()) / 4
            # Two float32 roundings of numbers below 2.
            torch.testing.assert_close(p.detach().double(), mean, rtol=0, atol=1e-6, msg=key)
