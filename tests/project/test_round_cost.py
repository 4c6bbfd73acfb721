"""The table of "What a round costs" is what its formula, PEFT's adapters and real rounds give."""

import re
from typing import Any

import pytest
import torch
from document_blocks import ROOT, blocks
from party_threads import run_parties
from peft import LoraConfig
from transformers import LlamaConfig

from pellm_lightning import Aggregator, Federation
from pellm_lightning.exchange import Cast, Plain, Quantized

PAGE = "docs/howto/round_cost.md"
PARTIES, LINES = 3, (10, 100, 1000)
RATIOS = {"`Plain()`": 1.0, "4 bits": 0.133}
TARGETS = {"`q_proj`, `v_proj`": ["q_proj", "v_proj"], "all": "all-linear"}
SIZES = {
    "1B": (16, 32, {"hidden_size": 2048, "intermediate_size": 8192, "num_key_value_heads": 8}),
    "7B": (32, 32, {"hidden_size": 4096, "intermediate_size": 11008}),
    "70B": (80, 64, {"hidden_size": 8192, "intermediate_size": 28672, "num_key_value_heads": 8}),
}
"""Layers, heads and widths of Llama 3.2 1B, Llama 2 7B and Llama 3.1 70B."""


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's block defines."""
    defined: dict[str, Any] = {}
    (code,) = (block.text for block in blocks(PAGE) if block.language == "python")
    exec(code, defined)
    return defined


def table() -> list[list[str]]:
    rows = re.findall(r"^\| (\d+B \|.*) \|$", (ROOT / PAGE).read_text(), re.MULTILINE)
    return [row.split(" | ") for row in rows]


def test_the_table_is_whole() -> None:
    expected = {(size, target, exchange) for size in SIZES for target in TARGETS for exchange in RATIOS}
    assert {(size, target, exchange) for size, target, _, exchange, *_ in table()} == expected


@pytest.mark.parametrize("row", table(), ids=lambda row: "-".join(row[:4]))
def test_a_row(row: list[str], page: dict[str, Any]) -> None:
    size, target, numbers, exchange, megabytes, *seconds = row
    layers, heads, widths = SIZES[size]
    # Layers are alike, so one is enough to count.
    config = LlamaConfig(**widths, num_hidden_layers=1, num_attention_heads=heads)
    count = layers * page["adapter_size"](config, LoraConfig(r=16, target_modules=TARGETS[target]))
    assert numbers == f"{count / 1e6:.1f} million"
    sent = 2 * (PARTIES - 1) / PARTIES * 4 * count * RATIOS[exchange]
    costs = [page["round_cost"](count, PARTIES, line, RATIOS[exchange]) for line in LINES]
    assert [cost[0] for cost in costs] == pytest.approx([sent / 1e6] * len(LINES))
    assert float(megabytes.replace(",", "")) == pytest.approx(sent / 1e6, rel=0.04)
    for said, (_, computed), line in zip(seconds, costs, LINES, strict=True):
        assert computed == pytest.approx(8 * sent / (line * 1e6))
        assert float(said.removesuffix(" s")) == pytest.approx(computed, rel=0.04, abs=0.005)


def test_an_adapter_has_rank_times_inputs_and_outputs(page: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    # q, k, v, o: 64 to 64; gate and up: 64 to 96; down: 96 to 64. Twice, rank 4.
    expected = 2 * 4 * (4 * 128 + 3 * 160)
    assert page["adapter_size"](config, LoraConfig(r=4, target_modules="all-linear")) == expected


@pytest.mark.parametrize(
    ("exchange", "ratio"),
    [(Plain(), 1.0), (Cast("bfloat16"), 0.5), (Quantized(8), 0.258), (Quantized(4), 0.133)],
)
def test_rounds_send_what_the_page_says(exchange: Any, ratio: float) -> None:
    count = 384 * 1024

    def act(federation: Federation) -> int:
        aggregator = Aggregator(federation, {"w": torch.zeros(count)}, exchange=exchange)
        aggregator.start()
        return aggregator.step(1.0).bytes_sent

    for sent in run_parties(PARTIES, act):
        assert sent == pytest.approx(4 * count * ratio, rel=0.01)
    assert f"{ratio:g}" in (ROOT / PAGE).read_text()
