import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pellm_lightning.tasks.samples import (
    Record,
    pack,
    pad_batch,
    read_records,
    response_sample,
    split_records,
    to_prompt,
    to_samples,
)

CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=12), max_size=8), block_size=st.integers(2, 9)
)
def test_packing_loses_only_the_tail(documents: list[list[int]], block_size: int) -> None:
    blocks = pack(documents, end=0, block_size=block_size)
    stream = [token for document in documents for token in [*document, 0]]
    packed = [token for block in blocks for token in block["input_ids"].tolist()]
    assert packed == stream[: len(packed)]
    assert 0 <= len(stream) - len(packed) < block_size
    assert all(torch.equal(block["labels"], block["input_ids"]) for block in blocks)


def test_only_the_response_has_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    # "w1 w2" -> 3 4, the newline that parts them is no token of this tokenizer, "w7" -> 9, the end 0.
    sample = response_sample("w1 w2", "w7", tokenizer, block_size=8)
    assert sample["input_ids"].tolist() == [3, 4, 9, 0]
    assert sample["labels"].tolist() == [-100, -100, 9, 0]


def test_a_chat_template_frames_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT
    sample = response_sample("w1", "w7", tokenizer, block_size=16)
    # user : w1 <eos> assistant : | w7 <eos>
    assert sample["input_ids"].tolist() == [32, 34, 3, 0, 33, 34, 9, 0]
    assert sample["labels"].tolist() == [-100] * 6 + [9, 0]
    assert to_prompt(Record("w7", prompt="w1"), tokenizer)["input_ids"].tolist() == [32, 34, 3, 0, 33, 34]


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ messages | length }} {{ messages[0].content }}"
    with pytest.raises(ValueError, match="chat template renders a prompt differently"):
        response_sample("w1", "w7", tokenizer, block_size=16)


def test_a_long_sample_is_cut_and_one_without_a_label_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [Record("w7 w8", prompt="w1 w2"), Record("w9", prompt="w1 w2 w3")]
    samples = to_samples(records, tokenizer, block_size=3)
    assert [sample["labels"].tolist() for sample in samples] == [[-100, -100, 9]]


def test_texts_are_packed_and_responses_are_not(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [Record("w1"), Record("w2", prompt="w3"), Record("w4")]
    samples = to_samples(records, tokenizer, block_size=4)
    assert [sample["input_ids"].tolist() for sample in samples] == [[3, 0, 6, 0], [5, 4, 0]]


@pytest.mark.parametrize(("side", "expected"), [("right", [[5, 6], [7, 0]]), ("left", [[5, 6], [0, 7]])])
def test_padding_takes_no_part(side: str, expected: list[list[int]]) -> None:
    samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6], [7])]
    batch = pad_batch(samples, pad=0, side=side)
    padding = torch.tensor(expected) == 0
    assert batch["input_ids"].tolist() == expected
    assert torch.equal(batch["attention_mask"] == 0, padding)
    assert torch.equal(batch["labels"] == -100, padding)


@given(count=st.integers(2, 40), fraction=st.floats(0.01, 0.6), seed=st.integers(0, 5))
def test_a_split_holds_out_whole_records(count: int, fraction: float, seed: int) -> None:
    records = [Record(f"text {i}") for i in range(count)]
    kept, held_out = split_records(records, fraction, seed)
    assert len(held_out) == max(1, round(count * fraction))
    assert sorted([*kept, *held_out], key=records.index) == records
    assert split_records(records, fraction, seed) == (kept, held_out)


def test_a_single_text_gives_its_end() -> None:
    assert split_records([Record("abcdefghij")], 0.2, seed=0) == ([Record("abcdefgh")], [Record("ij")])


def test_reading_text_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "blank.txt").write_text(" \n")
    records = [{"text": "line\u2028separator"}, {"instruction": "i", "response": "r", "id": 1}]
    first, second = (json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "b.jsonl").write_text(f"{first}\r\n\r\n{second}\r\n", encoding="utf-8")
    assert read_records(tmp_path / "a.txt") == [Record("one\ntwo\n")]
    assert read_records(tmp_path / "blank.txt") == []
    assert read_records(tmp_path / "b.jsonl") == [Record("line\u2028separator"), Record("r", prompt="i")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "broken', r"b\.jsonl:2: is not JSON"),
        ('{"txt": "typo"}', r"b\.jsonl:2: expected strings under 'text'.*found the keys \['txt'\]"),
        ('{"instruction": "i"}', r"b\.jsonl:2: .*found the keys \['instruction'\]"),
        ('{"text": 7}', r"b\.jsonl:2: expected strings"),
        ("[1]", r"b\.jsonl:2: .*found list"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "b.jsonl")


def test_unknown_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read \.parquet. Use \.txt or \.jsonl"):
        read_records(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"latin\.txt: is not UTF-8"):
        read_records(tmp_path / "latin.txt")
