"""Data module of texts and conversations for causal language models."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from pellm_lightning.tasks.encoding import Encoder, end_of
from pellm_lightning.tasks.formats import Format, Record, RowMapper
from pellm_lightning.tasks.party_data import Files, PartyDataModule
from pellm_lightning.tasks.reading import Row
from pellm_lightning.tasks.samples import Padding, Sample, TextSamples, stream_samples
from pellm_lightning.tasks.store import Stored
from pellm_lightning.tasks.summary import check_not_empty, text_line


class TextDataModule(PartyDataModule):
    """Data module of a party's texts or conversations for a causal language model.

    Files are ``.txt`` (a document each), ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` (perhaps with ``.gz``),
    ``.parquet`` and ``.arrow``. A row is a document (``text``); a prompt with its completion (``prompt`` and
    ``completion``, ``instruction`` and ``response`` or ``output``, with ``context`` or ``input``, and
    ``system``); or a conversation (``messages`` or ``conversations``, with ``tools``). Other non-empty
    columns are an error, unless in ``ignore_columns``. Documents are concatenated with special tokens,
    including the end of sequence, and split into blocks. Of the others only completions and what the
    assistant says have labels.

    Each party logs one table, except of a stream: records, samples, tokens, what was cut and what was left
    out.

    Args:
        files: Training data: glob patterns, folders of ``save_to_disk`` or hub ids (``owner/name``, or
            ``owner/name:configuration``). ``{party}`` stands for the party's index, from 0.
        tokenizer: Hub id, local folder or GGUF file; usually that of the model.
        batch_size: Batch size of each process.
        block_size: Tokens of a block, at most the model's positions; longer samples are truncated.
        predict_files: Files with prompts; their completions are ignored.
        format: Format of the rows; "auto" detects it from the columns.
        columns: Names of columns, for example ``{prompt: question, completion: answer}``.
        chat_template: Template of conversations, or path of a ``.jinja`` file, instead of the tokenizer's;
            ``""`` writes prompt and completion as they are.
        options: Those of `PartyDataModule`.

    Example:
        >>> data = TextDataModule("data/party-{party}/*.jsonl", "HuggingFaceTB/SmolLM2-135M", block_size=256)
    """

    _limit = "block_size"
    _keyed = ("key", "dirichlet")  # texts have no labels

    def __init__(
        self,
        files: Files,
        tokenizer: str,
        batch_size: int = 8,
        block_size: int = 512,
        predict_files: Files | None = None,
        format: Format = "auto",
        columns: dict[str, str] | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(files, tokenizer, batch_size, **options)
        if block_size < 2:
            raise ValueError(
                f"block_size={block_size} leaves nothing to predict: the first token has no context."
            )
        self.block_size, self.format, self.columns = block_size, format, columns
        self.sources["predict_files"] = predict_files
        self.chat_template = chat_template
        self._mapper("files")  # raises for settings that contradict each other

    def _mapper(self, argument: str) -> "TextMapper":
        key, ignored = self._key_of(argument)
        return TextMapper(self.format, self.columns, ignored, key, argument != "predict_files")

    def _columns(self) -> tuple[str, ...]:
        return self._mapper("files").names

    def _setup(self, stage: str) -> None:
        if self.chat_template is not None:
            self.tokenizer.chat_template = _template(self.chat_template)
        super()._setup(stage)

    def _setup_predict(self) -> None:
        records = self._records("predict_files")
        records.check_filled("prompt")
        prompts = [load_record(row) for row in records.data]
        tokens = Encoder(self.tokenizer).prompts(prompts)
        self.predict_samples = [{"input_ids": torch.tensor(ids, dtype=torch.int64)} for ids in tokens]
        self.predict_places = [record.where for record in prompts]

    def _split(self, records: Stored) -> tuple[Stored, Stored]:
        """Hold out whole records; of a single document its end."""
        if len(records) == 1 and records.column("messages") == [None]:
            return self._split_text(records)
        return super()._split(records)

    def _split_text(self, records: Stored) -> tuple[Stored, Stored]:
        from datasets import Dataset

        (row,) = records.data.select(records.rows)
        cut = round(len(row["text"]) * (1 - self.val_fraction))
        halves = [row | {"text": text} for text in (row["text"][:cut], row["text"][cut:])]
        data, key = Dataset.from_list(halves, features=records.data.features), f"{records.key}@{cut}"
        return Stored(data, key, np.array([0])), Stored(data, key, np.array([1]))

    def _samples(self, records: Stored, source: str, is_split: bool = False) -> TextSamples:
        filled, blank = records.parted()
        tokens = filled.mapped(
            encode_texts, token_features(), self._folder(), self.num_proc, tokenizer=self.tokenizer
        )
        samples = TextSamples(tokens, self.block_size)
        check_not_empty(self._party(), source, samples, filled, is_split)
        self._summary.add(text_line(source, samples, filled, blank))
        return samples

    def _streamed(self, rows: Iterator[dict[str, Any]]) -> Iterator[Sample]:
        return stream_samples(self._encoded(rows), self.block_size)

    def _encoded(
        self, rows: Iterator[dict[str, Any]]
    ) -> Iterator[tuple[Sequence[int], Sequence[bool], bool]]:
        encoder = Encoder(self.tokenizer)
        while batch := [load_record(row) for row in islice(rows, 64)]:
            for record, (tokens, learned) in zip(batch, encoder.encode(batch), strict=True):
                yield tokens, learned, not record.messages

    def _collate(self) -> Padding:
        return Padding(end_of(self.tokenizer))

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return prompts, padded on the left so that generation continues from their last token."""
        return self._loader(self.predict_samples, collate_fn=Padding(end_of(self.tokenizer), "left"))


class TextMapper(RowMapper):
    """Mapper of rows to stored records of texts and conversations."""

    def stored(self, where: str, row: Row) -> dict[str, Any]:
        """Return a record's columns; messages as JSON, whose keys differ from row to row."""
        record = self(where, row)
        return {
            "text": record.text,
            "messages": json.dumps(record.messages) if record.messages else None,
            "tools": json.dumps(record.tools) if record.tools else None,
            "learned": record.learned,
            "is_chat": record.is_chat,
            "key": record.key,
            "where": where,
            "blank": record.is_blank if self.answers else record.has_blank_prompt,
        }

    def features(self) -> Any:
        """Return the type of each column."""
        from datasets import Features, Value

        text, number, flag = Value("large_string"), Value("int64"), Value("bool")
        return Features({"text": text, "messages": text, "tools": text, "learned": number, "is_chat": flag,
                         "key": Value("string"), "where": Value("string"), "blank": flag})  # fmt: skip


def load_record(row: Mapping[str, Any]) -> Record:
    """Return a stored record."""
    messages, tools = (tuple(json.loads(row[name] or "[]")) for name in ("messages", "tools"))
    return Record(row["text"], messages, tools, row["learned"], row["is_chat"], row["key"], row["where"])


def encode_texts(batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Tokenize a batch of stored records, for ``datasets``."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    records = [load_record(row) for row in rows]
    encoded = Encoder(tokenizer).encode(records)
    is_document = [not record.messages for record in records]
    return {
        "input_ids": [tokens for tokens, _ in encoded],
        "learned": [[] if d else learned for (_, learned), d in zip(encoded, is_document, strict=True)],
        # The first token of a sample is never predicted.
        "first": [next((i for i, is_learned in enumerate(learned) if is_learned and i), len(learned))
                  for _, learned in encoded],
        "is_document": is_document,
    }  # fmt: skip


def token_features() -> Any:
    """Return the type of each column of tokenized records."""
    from datasets import Features, Sequence, Value

    tokens, learned = Sequence(Value("int32")), Sequence(Value("bool"))
    return Features({"input_ids": tokens, "learned": learned, "first": Value("int64"),
                     "is_document": Value("bool")})  # fmt: skip


def _template(template: str) -> str | None:
    """Return a chat template, from its file if that is what is given; None for none."""
    path = Path(template)
    if path.suffix in (".jinja", ".j2") or ("{" not in template and template):
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"chat_template={template!r} is neither a template nor the path of one (seen from"
                f" {Path.cwd()}): {error.strerror}."
            ) from error
    return template or None
