"""Every initialisation and setting of the installed PEFT's LoRA is listed, with what it does to the base."""

import typing
from dataclasses import fields
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pellm_lightning.adapter_config import MAY_DIFFER, adapter_configs, init_that_writes_base
from pellm_lightning.frozen_state import frozen_state

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
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **arguments))


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
