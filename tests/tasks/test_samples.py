import pickle
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.tasks.samples import Padding, RowSamples, TextSamples, stream_samples, text_sample
from pellm_lightning.tasks.text import token_features

Encoded = tuple[list[int], list[bool], bool]


def document(*tokens: int) -> Encoded:
    return list(tokens), [True] * len(tokens), True


def answer(prompt: list[int], response: list[int]) -> Encoded:
    return [*prompt, *response], [False] * len(prompt) + [True] * len(response), False


def samples_of(encoded: list[Encoded], block_size: int) -> TextSamples:
    """Store them as the data module does, in several chunks."""
    rows = [
        {
            "input_ids": tokens,
            "learned": [] if is_document else learned,
            "first": next((i for i, mark in enumerate(learned) if mark and i), len(learned)),
            "is_document": is_document,
        }
        for tokens, learned, is_document in encoded
    ]
    parts = [Dataset.from_list(rows[i : i + 3], features=token_features()) for i in range(0, len(rows), 3)]
    return TextSamples(concatenate_datasets(parts), block_size)


def tokens_of(samples: Any) -> list[list[int]]:
    return [sample["input_ids"].tolist() for sample in samples]


Documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=8)


@given(documents=Documents, block_size=st.integers(2, 9))
def test_packing_loses_only_the_tail(documents: list[list[int]], block_size: int) -> None:
    blocks = samples_of([document(*tokens) for tokens in documents], block_size)
    stream = [token for tokens in documents for token in tokens]
    packed = [token for tokens in tokens_of(blocks) for token in tokens]
    assert packed == stream[: len(packed)]
    assert 0 <= len(stream) - len(packed) < block_size
    assert all(torch.equal(block["labels"], block["input_ids"]) for block in blocks)


@given(documents=Documents, block_size=st.integers(2, 9), every=st.integers(1, 3))
def test_a_stream_has_the_samples_of_what_is_stored(
    documents: list[list[int]], block_size: int, every: int
) -> None:
    """In another order: a stored source has its blocks first."""
    encoded = [
        document(*tokens) if i % (every + 1) else answer(tokens[:2], [*tokens, 0])
        for i, tokens in enumerate(documents)
    ]
    stored, streamed = samples_of(encoded, block_size), list(stream_samples(encoded, block_size))
    assert sorted(map(str, streamed)) == sorted(map(str, stored))


def test_only_the_response_has_labels() -> None:
    sample = text_sample([3, 4, 9, 0], [False, False, True, True], block_size=8)
    assert sample["input_ids"].tolist() == [3, 4, 9, 0]
    assert sample["labels"].tolist() == [-100, -100, 9, 0]


def test_what_a_block_cuts_is_known() -> None:
    samples = samples_of([answer([3, 4], [9, 10, 0]), answer([3, 4, 5], [11, 0])], block_size=3)
    assert [sample["labels"].tolist() for sample in samples] == [[-100, -100, 9]]
    assert samples.learnable.tolist() == [True, False]
    assert samples.lengths.tolist() == [5, 5]
    assert samples.first.tolist() == [2, 3]


def test_a_response_that_fits_exactly_keeps_its_end() -> None:
    assert tokens_of(samples_of([answer([3, 4], [9, 0])], block_size=4)) == [[3, 4, 9, 0]]


def test_texts_are_packed_and_responses_are_not() -> None:
    samples = samples_of([document(3, 0), answer([5], [4, 0]), document(6, 7, 0)], block_size=4)
    assert tokens_of(samples) == [[3, 0, 6, 7], [5, 4, 0]]
    assert (samples.blocks, samples.stream, samples.num_tokens, samples.longest) == (1, 5, 7, 4)


def test_samples_are_a_sequence_that_can_be_joined_and_sent() -> None:
    samples = samples_of([document(*range(20)), answer([5], [4, 0])], block_size=4)
    expected = [list(range(start, start + 4)) for start in range(0, 20, 4)] + [[5, 4, 0]]
    assert tokens_of(samples) == tokens_of(samples[:]) == expected
    assert samples[-1]["input_ids"].tolist() == [5, 4, 0]
    assert tokens_of(samples[1:3]) == expected[1:3]
    assert tokens_of(samples + samples) == expected * 2
    assert tokens_of(pickle.loads(pickle.dumps(samples))) == expected
    with pytest.raises(IndexError, match="sample 6 of 6"):
        samples[6]
    rows = RowSamples(Dataset.from_list([{"input_ids": [1, 2], "labels": 0}]))
    assert (list(rows), rows.longest) == ([{"input_ids": [1, 2], "labels": 0}], 2)


def test_blocks_can_be_changed_and_the_stored_tokens_stay() -> None:
    samples = samples_of([document(1, 2, 3, 4)], block_size=4)
    samples[0]["input_ids"][0] = 9
    assert np.array_equal(samples[0]["input_ids"], [1, 2, 3, 4])


@pytest.mark.parametrize(("side", "expected"), [("right", [[5, 6], [7, 0]]), ("left", [[5, 6], [0, 7]])])
def test_padding_takes_no_part(side: Any, expected: list[list[int]]) -> None:
    samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6], [7])]
    batch = Padding(pad=0, side=side)(samples)
    padding = torch.tensor(expected) == 0
    assert batch["input_ids"].tolist() == expected
    assert torch.equal(batch["attention_mask"] == 0, padding)
    assert torch.equal(batch["labels"] == -100, padding)
