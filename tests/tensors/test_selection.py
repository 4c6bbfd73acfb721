"""Which parameters leave a party."""

import pytest
import torch
from torch import nn

from pellm_lightning.tensors.selection import select, share_outside_adapter


class Adapted(nn.Module):
    """A frozen layer with two small factors, and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_B = nn.Linear(2, 4, bias=False)
        self.lora_A = nn.Linear(4, 2, bias=False)
        self.lm_head = nn.Linear(4, 3)


class Compiled(nn.Module):
    """The names that torch.compile gives: the module is kept under ``_orig_mod``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


ALL = ["lm_head.bias", "lm_head.weight", "lora_A.weight", "lora_B.weight"]


def test_what_requires_a_gradient_federates_sorted_by_name() -> None:
    module = Adapted()
    chosen = select(module)
    assert list(chosen) == ALL
    assert all(chosen[name] is parameter for name, parameter in module.named_parameters() if name in chosen)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), ALL),
        (["*"], (), ALL),
        (["*lora*"], (), ["lora_A.weight", "lora_B.weight"]),
        (["*lora_A*", "lm_head.bias"], (), ["lm_head.bias", "lora_A.weight"]),
        ((), ["lm_head.*"], ["lora_A.weight", "lora_B.weight"]),
        (["*weight"], ["*_B*", "lm_head*"], ["lora_A.weight"]),
    ],
)
def test_patterns_narrow_the_choice(include: list[str], exclude: list[str], expected: list[str]) -> None:
    assert list(select(Adapted(), include, exclude)) == expected


@pytest.mark.parametrize("pattern", ["lora_A", "*LORA_A*", "base.*", "loraA*"])
def test_a_pattern_that_matches_nothing_trainable_is_refused(pattern: str) -> None:
    # A part of a name, another case, a frozen layer, a typo: each would otherwise be a silent no-op.
    with pytest.raises(ValueError, match=r"include pattern .* matches none of the 4 trainable"):
        select(Adapted(), include=[pattern])
    if pattern == "base.*":  # which may be unfrozen later, and then stays at home
        assert "lora_A.weight" in select(Adapted(), exclude=["lm_head.*", pattern])
        return
    with pytest.raises(ValueError, match=r"exclude pattern .* matches none of the 6 parameters"):
        select(Adapted(), exclude=["lm_head.*", pattern])


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No parameter of the module requires a gradient.*PEFT"):
        select(Adapted().requires_grad_(False))


def test_patterns_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="together leave none of the 4"):
        select(Adapted(), include=["*lora*"], exclude=["*.weight"])


def test_tied_parameters_federate_once() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(3, 4), "output": nn.Linear(4, 3, bias=False)})
    module["output"].weight = module["embedding"].weight
    assert list(select(module)) == ["embedding.weight"]


def test_a_compiled_party_agrees_with_a_plain_one() -> None:
    plain, whole = Adapted(), Compiled(Adapted())
    inner = Adapted()
    inner.lm_head = Compiled(inner.lm_head)  # type: ignore[assignment]
    assert list(select(plain)) == list(select(whole)) == list(select(inner))
    assert list(select(whole, include=["lora_A.weight"])) == ["lora_A.weight"]


def test_share_outside_the_adapter() -> None:
    # lora_A 2x4 + lora_B 4x2 = 16 scalars of the adapter; lm_head 3x4 + 3 = 15 outside of it.
    assert share_outside_adapter(select(Adapted())) == 15 / 31
    assert share_outside_adapter(select(Adapted(), include=["*lora*"])) == 0.0
    assert share_outside_adapter(select(Adapted(), exclude=["*lora*"])) == 1.0


class GLMBlock(nn.Module):
    """The parameters of one block of ChatGLM-6B."""

    def __init__(self, width: int = 4096) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"dense_h_to_4h": nn.Linear(width, 4 * width), "dense_4h_to_h": nn.Linear(4 * width, width)}
        )


def test_chatglm_lora_selects_a_two_thousandth_of_the_model() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(130528, 4096),
                "layers": nn.ModuleList(GLMBlock() for _ in range(28)),
                "final_layernorm": nn.LayerNorm(4096),
            }
        )
        whole = sum(p.numel() for p in model.parameters())
        inject_adapter_in_model(LoraConfig(r=8, target_modules=["query_key_value"]), model)
    chosen = select(model)
    # A is 8 x 4096 and B is 12288 x 8 in each of 28 layers: 28 * (32768 + 98304) = 3,670,016 scalars.
    assert len(chosen) == 56
    assert sum(p.numel() for p in chosen.values()) == 3_670_016
    # The base: 130528 * 4096 embeddings, 28 * 201,379,840 in the layers, 8192 in the last norm.
    assert whole == 6_173_286_400
    assert round(100 * 3_670_016 / whole, 3) == 0.059
    assert share_outside_adapter(chosen) == 0.0
