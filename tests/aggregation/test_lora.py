"""Which names are LoRA pairs."""

import pytest
from lora_oracles import random

from pellm_lightning.aggregation.lora import Pair, find_pairs, matrix

PAIRS: dict[str, tuple[list[str], list[Pair]]] = {
    "a module": (
        ["model.q.lora_A.default.weight", "model.q.lora_B.default.weight"],
        [Pair("model.q.default", "model.q.lora_A.default.weight", "model.q.lora_B.default.weight")],
    ),
    "a module at the top": (
        ["lora_B.x.weight", "lora_A.x.weight"],
        [Pair("x", "lora_A.x.weight", "lora_B.x.weight")],
    ),
    "an embedding": (
        ["e.lora_embedding_A.default", "e.lora_embedding_B.default"],
        [Pair("e.default", "e.lora_embedding_A.default", "e.lora_embedding_B.default")],
    ),
    "two adapters": (
        [f"q.lora_{factor}.{adapter}.weight" for factor in "BA" for adapter in ("two", "one")],
        [
            Pair(f"q.{adapter}", f"q.lora_A.{adapter}.weight", f"q.lora_B.{adapter}.weight")
            for adapter in ("one", "two")
        ],
    ),
    "half a pair": (["q.lora_A.default.weight", "v.lora_B.default.weight"], []),
    "halves of two adapters": (["q.lora_A.one.weight", "q.lora_B.two.weight"], []),
    "biases and magnitudes": (
        ["q.lora_B.default.bias", "q.lora_A.default.bias", "q.lora_magnitude_vector.default.weight"],
        [],
    ),
    "no weight, or an embedding with one": (
        ["q.lora_A.default", "q.lora_B.default"]
        + [f"e.lora_embedding_{factor}.default.weight" for factor in "AB"],
        [],
    ),
    "other adapters": (
        ["q.hada_w1_a.default", "q.lokr_w1.default", "q.vera_lambda_b.default", "head.weight"],
        [],
    ),
    "alike, but not": (["q.my_lora_A.default.weight", "q.my_lora_B.default.weight"], []),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_are_found_by_name(case: str) -> None:
    names, pairs = PAIRS[case]
    assert find_pairs(names) == pairs
    assert find_pairs(reversed(names)) == pairs


def test_pairs_are_sorted_whatever_the_order_of_the_names() -> None:
    names = [f"{module}.lora_{factor}.default.weight" for module in ("v", "k", "q") for factor in "BA"]
    assert [pair.name for pair in find_pairs(names)] == ["k.default", "q.default", "v.default"]


def test_a_convolution_s_kernel_belongs_to_its_inputs() -> None:
    kernel = random(0, 2, 3, 5, 5)
    assert matrix(kernel).shape == (2, 75)
    assert matrix(kernel)[1, 26] == kernel[1, 1, 0, 1]
    assert matrix(kernel).data_ptr() == kernel.data_ptr(), "what is written into a matrix reaches the factor"
