"""Samples of language modelling: packed blocks, prompts with responses, padded batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pellm_lightning.tasks.encoding import Encoder
from pellm_lightning.tasks.records import Record

Sample = dict[str, Tensor]
"""``input_ids`` and ``labels``, each (T,) int64; a label of -100 is ignored by the loss."""

IGNORED = -100


@dataclass(frozen=True)
class Cut:
    """A truncated or dropped record, with a prompt and longer than a block.

    Args:
        where: File and line.
        prompt: Tokens of its prompt.
        response: Tokens of its response, and of the end of that.
        is_left_out: Whether the prompt alone fills the block, so that no token would be learned.
    """

    where: str
    prompt: int
    response: int
    is_left_out: bool


@dataclass(frozen=True)
class Samples:
    """Samples of one source, and what was dropped.

    Args:
        samples: The samples.
        blocks: Number of packed blocks among them.
        num_texts: Number of records without a prompt.
        tail: Number of tokens at their end that fill no block.
        cuts: The records with a prompt that are longer than a block.
    """

    samples: list[Sample]
    blocks: int
    num_texts: int
    tail: int
    cuts: list[Cut]


def to_samples(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Samples:
    """Convert records to samples of at most ``block_size`` tokens: plain texts packed, responses singly."""
    encoder = Encoder(tokenizer)
    documents = encoder.documents([record.text for record in records if record.prompt is None])
    blocks = pack(documents, block_size)
    samples, cuts = list(blocks), list[Cut]()
    for record in records:
        if record.prompt is not None:
            prompt, response = encoder.exchange(record)
            sample = response_sample(prompt, response, block_size)
            left_out = not is_learnable(sample)
            if not left_out:
                samples.append(sample)
            if left_out or len(prompt) + len(response) > block_size:
                cuts.append(Cut(record.where, len(prompt), len(response), left_out))
    tail = sum(map(len, documents)) - len(blocks) * block_size
    return Samples(samples, len(blocks), len(documents), tail, cuts)


def pack(documents: Sequence[Sequence[int]], block_size: int) -> list[Sample]:
    """Concatenate documents with their special tokens and split them into blocks; the tail is dropped."""
    stream = torch.tensor([token for document in documents for token in document], dtype=torch.int64)
    blocks = stream[: len(stream) // block_size * block_size].view(-1, block_size)
    return [{"input_ids": block, "labels": block} for block in blocks]


def response_sample(prompt: Sequence[int], response: Sequence[int], block_size: int) -> Sample:
    """Concatenate prompt and response, truncated to ``block_size`` tokens; only the response has labels.

    A truncated response has no end-of-sequence token.
    """
    tokens = torch.tensor([*prompt, *response][:block_size], dtype=torch.int64)
    labels = tokens.clone()
    labels[: len(prompt)] = IGNORED
    return {"input_ids": tokens, "labels": labels}


def is_learnable(sample: Sample) -> bool:
    """Return whether any token has a label: without one the mean loss is NaN."""
    return bool((sample["labels"][1:] != IGNORED).any())


Side = Literal["left", "right"]


def pad_batch(samples: Sequence[Mapping[str, Tensor]], pad: int, side: Side = "right") -> Sample:
    """Pad samples to the longest: ``input_ids``, ``attention_mask``, ``labels`` if there; (B, T) int64."""
    filling = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
    whole = [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in samples]
    return {
        key: pad_sequence([sample[key] for sample in whole], True, padding_value, padding_side=side)
        for key, padding_value in filling.items()
        if key in whole[0]
    }


def to_prompt(record: Record, encoder: Encoder) -> Sample:
    """Tokenize a prompt: an instruction without its response, or a text as it is."""
    return {"input_ids": torch.tensor(encoder.prompt(record), dtype=torch.int64)}
