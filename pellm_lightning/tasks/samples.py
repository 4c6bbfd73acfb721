"""From text to samples: records out of files, packed blocks, prompts and responses, padded batches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pellm_lightning.tasks.source import hold_out

Sample = dict[str, Tensor]
"""``input_ids`` and ``labels``, each (T,) int64; a label of -100 takes no part in the loss."""

IGNORED = -100


@dataclass(frozen=True)
class Record:
    """A text to learn; after a prompt, only the text is learned."""

    text: str
    prompt: str | None = None


def read_records(path: Path) -> list[Record]:
    """Read a ``.txt`` file as one record, a ``.jsonl`` file as one record a line.

    A line of JSONL is ``{"text": ...}`` or ``{"instruction": ..., "response": ...}``; further keys are
    ignored.

    Raises:
        ValueError: Names the file, and the line of what cannot be read.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}. Use .txt or .jsonl."
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}). Convert it first.") from error
    if path.suffix == ".txt":
        return [Record(content)] if content.strip() else []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for the end of a line.
    lines = enumerate(content.split("\n"), start=1)
    return [_record(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _record(line: str, where: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is not JSON: {error}.") from error
    match fields:
        case {"instruction": str(instruction), "response": str(response)}:
            return Record(response, prompt=instruction)
        case {"text": str(text)}:
            return Record(text)
    found = f"the keys {sorted(fields)}" if isinstance(fields, dict) else type(fields).__name__
    raise ValueError(
        f"{where}: expected strings under 'text', or under 'instruction' and 'response'; found {found}."
    )


def to_samples(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> list[Sample]:
    """Make samples of at most ``block_size`` tokens: plain texts packed, responses one by one."""
    texts = [record.text for record in records if record.prompt is None]
    samples = pack(tokenize(texts, tokenizer), end_of(tokenizer), block_size)
    for record in records:
        if record.prompt is not None:
            samples.append(response_sample(record.prompt, record.text, tokenizer, block_size))
    return [sample for sample in samples if is_learnable(sample)]


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize without special tokens, and without a warning that a document exceeds the model's context."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    token_ids: list[list[int]] = encoded["input_ids"]
    return token_ids


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a document."""
    end = tokenizer.eos_token_id
    assert isinstance(end, int)  # load_tokenizer saw to it
    return end


def pack(documents: Sequence[Sequence[int]], end: int, block_size: int) -> list[Sample]:
    """Join documents, each closed by ``end``, and cut them into blocks; the tail is left out."""
    stream = torch.tensor([token for document in documents for token in (*document, end)], dtype=torch.int64)
    blocks = stream[: len(stream) // block_size * block_size].view(-1, block_size)
    return [{"input_ids": block, "labels": block} for block in blocks]


def response_sample(
    instruction: str, response: str, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Sample:
    """Put a response after its instruction, cut at ``block_size`` tokens; only the response has labels.

    With a chat template the two are a user's and an assistant's message. Without one, a newline parts them
    and the token that ends a document closes the response.
    """
    prompt = prompt_tokens(instruction, tokenizer)
    answer = _response_tokens(instruction, response, tokenizer)
    tokens = torch.tensor((prompt + answer)[:block_size], dtype=torch.int64)
    labels = tokens.clone()
    labels[: len(prompt)] = IGNORED
    return {"input_ids": tokens, "labels": labels}


def prompt_tokens(instruction: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize an instruction up to where the response begins."""
    return tokenize([_prompt_text(instruction, tokenizer)], tokenizer)[0]


def _prompt_text(instruction: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return f"{instruction}\n"
    return _chat([{"role": "user", "content": instruction}], tokenizer, add_generation_prompt=True)


def _response_tokens(instruction: str, response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a response apart from its prompt, so that no token straddles the border between the two."""
    if not tokenizer.chat_template:
        return [*tokenize([response], tokenizer)[0], end_of(tokenizer)]
    messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
    prompt, whole = _prompt_text(instruction, tokenizer), _chat(messages, tokenizer)
    if not whole.startswith(prompt):
        raise ValueError(
            "The tokenizer's chat template renders a prompt differently once its response follows, so "
            "the two cannot be told apart. Change the template, or set it to None in the saved tokenizer."
        )
    return tokenize([whole.removeprefix(prompt)], tokenizer)[0]


def _chat(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text


def is_learnable(sample: Sample) -> bool:
    """Tell whether any label counts: a prompt that fills the block leaves none, and their mean is NaN."""
    return bool((sample["labels"][1:] != IGNORED).any())


def split_records(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Hold out a fraction of the records, whole ones, chosen by ``seed``; of a single text, its end.

    Cutting between records keeps a document's own words out of its evaluation.
    """
    if len(records) == 1 and records[0].prompt is None:
        text = records[0].text
        cut = round(len(text) * (1 - fraction))
        return [Record(text[:cut])], [Record(text[cut:])]
    held_out = hold_out(len(records), fraction, seed)
    kept = [record for index, record in enumerate(records) if index not in held_out]
    return kept, [records[index] for index in sorted(held_out)]


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


def to_prompt(record: Record, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """Tokenize what the model is to continue: an instruction without its response, or a text as it stands."""
    if record.prompt is None:
        tokens = tokenize([record.text.rstrip()], tokenizer)[0]
    else:
        tokens = prompt_tokens(record.prompt, tokenizer)
    return {"input_ids": torch.tensor(tokens, dtype=torch.int64)}
