"""What PEFT knows of a module: adapters, and what of the base trains beside them."""

import logging
from pathlib import Path

import pytest
import torch
from party_threads import fit_parties, quiet_trainer
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft_methods import (  # noqa: F401 - no_compiler_chosen is a fixture
    METHODS,
    NOT_HERE,
    Tuned,
    no_compiler_chosen,
    sentences,
    tiny_llama,
    with_adapters,
)
from torch import nn

from pellm_lightning.tensors.adapters import adapter_parameters, adapters_with, parameters_of
from pellm_lightning.tensors.selection import select, share_outside_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.filterwarnings("ignore:::huggingface_hub"),
]

# 32 tokens of 16 scalars in a copied head, of all that trains with LoRA of rank 4 at two layers' q and v:
# 8 factors of 4 x 16.
WITH_HEAD = {"LoRA with modules_to_save": 512 / (512 + 512)}


@pytest.mark.parametrize("name", METHODS)
def test_what_every_method_trains_is_adapter(
    name: str,
    tmp_path: Path,
    no_compiler_chosen: None,  # noqa: F811
) -> None:
    if name in NOT_HERE:
        pytest.skip(NOT_HERE[name])
    model = get_peft_model(tiny_llama(), with_adapters(METHODS[name], tmp_path)())
    chosen = select(model)
    assert share_outside_adapter(chosen, adapter_parameters(model)) == WITH_HEAD.get(name, 0.0)
    assert adapters_with(model, chosen.values()) == ["default"]


def test_layers_of_the_base_are_none_wherever_the_adapter_is() -> None:
    """An unfrozen norm, a head of the module's own, LoRA on the embedding: only the last is adapter."""
    base = tiny_llama()
    module = nn.ModuleDict(
        {
            "model": get_peft_model(
                base, LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
            ),
            "prompt": nn.Linear(16, 2),
        }
    )
    base.model.norm.requires_grad_(True)
    found = adapter_parameters(module)
    assert found is not None
    assert {name for name in select(module) if name not in found} == {
        "model.base_model.model.model.norm.weight",
        "prompt.bias",
        "prompt.weight",
    }


def test_adapters_without_a_peft_model_and_compiled_ones_are_known() -> None:
    model = tiny_llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    expected = {f"model.layers.{i}.self_attn.q_proj.lora_{x}.default.weight" for i in range(2) for x in "AB"}
    assert adapter_parameters(model) == expected
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert adapter_parameters(model) == expected


def test_a_module_without_peft_goes_by_names() -> None:
    assert adapter_parameters(nn.Linear(2, 2)) is None
    parts = {
        "prompt_embeddings": 1,
        "embeddings": 2,
        "prefix.embed": 3,
        "adapter.score": 4,
        "lm_head": 5,
        "own": 6,
    }
    parameters = {name: nn.Parameter(torch.zeros(size)) for name, size in parts.items()}
    assert share_outside_adapter(parameters) == (2 + 5) / 21


def test_each_adapter_has_its_own_parameters() -> None:
    # "0" is also the name of a layer of the base.
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="0")
    model.add_adapter("b", LoraConfig(r=3, target_modules=["v_proj"], modules_to_save=["lm_head"]))
    assert [sum(p.numel() for p in parameters_of(model, name)) for name in ("0", "b")] == [
        2 * 2 * 2 * 16,  # layers, factors, rank, width
        2 * 2 * 3 * 16 + 32 * 16,
    ]
    names = dict(model.named_parameters())
    one = [p for name, p in names.items() if "lora_A.0" in name]
    assert adapters_with(model, one) == ["0"]
    assert adapters_with(model, [p for name, p in names.items() if "modules_to_save.b" in name]) == ["b"]
    assert adapters_with(model, names.values()) == ["0", "b"]


def test_the_start_does_not_call_a_prompt_a_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make = lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")  # noqa: E731
    fit_parties(
        1,
        lambda party, federated: quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(
            Tuned(make, party), sentences(party)
        ),
    )
    assert "parameters leave a party" in caplog.text
    assert "not adapter" not in caplog.text
