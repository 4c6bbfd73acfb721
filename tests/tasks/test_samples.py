import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pellm_lightning.tasks.encoding import Encoder
from pellm_lightning.tasks.records import Record
from pellm_lightning.tasks.samples import Cut, pack, pad_batch, to_prompt, to_samples

CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=12), max_size=8), block_size=st.integers(2, 9)
)
def test_packing_loses_only_the_tail(documents: list[list[int]], block_size: int) -> None:
    blocks = pack(documents, block_size)
    stream = [token for document in documents for token in document]
    packed = [token for block in blocks for token in block["input_ids"].tolist()]
    assert packed == stream[: len(packed)]
    assert 0 <= len(stream) - len(packed) < block_size
    assert all(torch.equal(block["labels"], block["input_ids"]) for block in blocks)


def test_only_the_response_has_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    # "w1 w2" -> 3 4, the newline that parts them is no token of this tokenizer, "w7" -> 9, the end 0.
    (sample,) = to_samples([Record("w7", prompt="w1 w2")], tokenizer, block_size=8).samples
    assert sample["input_ids"].tolist() == [3, 4, 9, 0]
    assert sample["labels"].tolist() == [-100, -100, 9, 0]


def test_a_chat_template_frames_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT
    (sample,) = to_samples([Record("w7", prompt="w1")], tokenizer, block_size=16).samples
    # user : w1 <eos> assistant : | w7 <eos>
    assert sample["input_ids"].tolist() == [32, 34, 3, 0, 33, 34, 9, 0]
    assert sample["labels"].tolist() == [-100] * 6 + [9, 0]
    assert to_prompt(Record("w7", prompt="w1"), Encoder(tokenizer))["input_ids"].tolist() == [
        32,
        34,
        3,
        0,
        33,
        34,
    ]


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ messages | length }} {{ messages[0].content }}"
    with pytest.raises(ValueError, match="chat template renders a prompt differently"):
        to_samples([Record("w7", prompt="w1")], tokenizer, block_size=16)


def test_what_a_block_cuts_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [Record("w7 w8", prompt="w1 w2", where="a:1"), Record("w9", prompt="w1 w2 w3", where="a:2")]
    made = to_samples(records, tokenizer, block_size=3)
    assert [sample["labels"].tolist() for sample in made.samples] == [[-100, -100, 9]]
    # A response has its end token too: 2 + 3 tokens, and 3 + 2.
    assert made.cuts == [Cut("a:1", 2, 3, False), Cut("a:2", 3, 2, True)]


def test_a_response_that_fits_exactly_keeps_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    made = to_samples([Record("w7", prompt="w1 w2")], tokenizer, block_size=4)
    assert made.samples[0]["input_ids"].tolist() == [3, 4, 9, 0]
    assert made.cuts == []


def test_texts_are_packed_and_responses_are_not(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [Record("w1"), Record("w2", prompt="w3"), Record("w4 w5")]
    made = to_samples(records, tokenizer, block_size=4)
    assert [sample["input_ids"].tolist() for sample in made.samples] == [[3, 0, 6, 7], [5, 4, 0]]
    assert (made.blocks, made.num_texts, made.tail) == (1, 2, 1)


@pytest.mark.parametrize(("side", "expected"), [("right", [[5, 6], [7, 0]]), ("left", [[5, 6], [0, 7]])])
def test_padding_takes_no_part(side: str, expected: list[list[int]]) -> None:
    samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6], [7])]
    batch = pad_batch(samples, pad=0, side=side)
    padding = torch.tensor(expected) == 0
    assert batch["input_ids"].tolist() == expected
    assert torch.equal(batch["attention_mask"] == 0, padding)
    assert torch.equal(batch["labels"] == -100, padding)
