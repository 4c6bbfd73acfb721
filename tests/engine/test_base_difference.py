"""What is said of frozen tensors that differ: which, in which rows, why that may be, and the cure."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pellm_lightning.engine.base_difference import base_difference
from pellm_lightning.engine.compatibility import base_digests


def base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (1000, 8),
        "model.layers.0.q_proj.base_layer.weight": (8, 8),
        "model.layers.0.norm.weight": (8,),
        "model.layers.1.q_proj.base_layer.weight": (8, 8),
        "model.layers.1.norm.weight": (8,),
        "model.vera_A.default": (2, 8),
        "score.weight": (3, 8),
        "score.weight.quant_state.absmax": (3,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def said(changed: list[str], rows: slice = slice(None), **config: Any) -> str:
    ours, theirs = base(), base()
    for name in changed:
        theirs[name][rows] += 1
    adapters = {"default": {"peft_type": "LORA"} | config}
    message = base_difference("0", "1", base_digests(ours), base_digests(theirs), adapters)
    assert message is not None
    assert f"of party 1 is not that of party 0: the first tensor that differs is {min(changed)!r}" in message
    assert "check_frozen=False" in message
    return message


ADAPTED = [f"model.layers.{layer}.q_proj.base_layer.weight" for layer in range(2)]


def test_equal_bases_have_no_difference() -> None:
    assert base_difference("0", "1", base_digests(base()), base_digests(base()), {}) is None


@pytest.mark.parametrize(
    ("init", "seed_helps"),
    [("pissa_niter_4", True), ("pissa", False), ("olora", False), ("loftq", False), ("corda", False),
     ("lora_ga", False)],
)  # fmt: skip
def test_an_initialisation_that_writes_into_the_base_is_named_with_its_cures(
    init: str, seed_helps: bool
) -> None:
    message = said(ADAPTED, init_lora_weights=init)
    assert f"init_lora_weights={init!r}" in message
    assert ("seed_everything" in message) == seed_helps
    assert "init_lora_weights=True" in message
    assert "load the saved one at every party" in message
    assert "Load the same checkpoint" not in message


def test_an_initialisation_is_not_blamed_for_another_checkpoint() -> None:
    names = [*ADAPTED, "model.layers.0.norm.weight", "model.embed_tokens.weight"]
    assert "Load the same checkpoint" in said(names, init_lora_weights="pissa_niter_4")
    assert "Load the same checkpoint" in said(ADAPTED, init_lora_weights=True)


@pytest.mark.parametrize("rows", [1, 2, 8, 10])
def test_new_rows_are_named(rows: int) -> None:
    message = said(["model.embed_tokens.weight"], slice(1000 - rows, None))
    named = "row 999" if rows == 1 else f"rows {1000 - rows} to 999"
    for words in (f"Only {named} of 'model.embed_tokens.weight'", "tokens were added", "seed_everything",
                  "modules_to_save", "load the saved one"):  # fmt: skip
        assert words in message
    assert "Load the same checkpoint" not in message


def test_other_rows_are_named_without_a_guess() -> None:
    message = said(["model.embed_tokens.weight"], slice(10, 12))
    assert "in rows 0 to " in message
    assert "tokens were added" not in message


def test_new_layers_are_told_from_another_checkpoint() -> None:
    message = said(["score.weight"])
    for words in ("new ones", "from_pretrained draws at random", "seed_everything", "modules_to_save"):
        assert words in message
    assert "Load the same checkpoint" not in message
    assert "Load the same checkpoint" in said(list(base()))


def test_frozen_parts_of_the_adapter_are_told_from_the_base() -> None:
    message = said(["model.vera_A.default"])
    assert "belong to the adapter and are not trained" in message
    assert "seed_everything" in message


def test_quantisation_is_told_from_the_weights() -> None:
    assert "quantised weights are read by" in said(["score.weight.quant_state.absmax"])


def test_kinds_and_missing_tensors_are_told() -> None:
    ours, theirs = base(), base()
    theirs["score.weight"] = theirs["score.weight"].to(torch.bfloat16)
    message = base_difference("a", "b", base_digests(ours), base_digests(theirs), {})
    assert message is not None
    assert "float32[3,8] at party a but bfloat16[3,8] at party b" in message
    del theirs["score.weight"]
    message = base_difference("a", "b", base_digests(ours), base_digests(theirs), {})
    assert message is not None
    assert "which party a has and party b has not" in message
