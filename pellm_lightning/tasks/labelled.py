"""Data module of labelled texts, of one party or partitioned over simulated parties."""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from pellm_lightning.comm.errors import did_you_mean
from pellm_lightning.tasks.columns import check_used, find_column, has_content, is_ignored, shown, string_of
from pellm_lightning.tasks.labels import Label, index_labels, label_name, label_names
from pellm_lightning.tasks.limits import check_labels
from pellm_lightning.tasks.party_data import Files, PartyDataModule
from pellm_lightning.tasks.reading import Row
from pellm_lightning.tasks.samples import RowSamples
from pellm_lightning.tasks.store import Stored, store
from pellm_lightning.tasks.summary import labelled_line


class ClassificationDataModule(PartyDataModule):
    """Data module of a party's labelled texts, from the files and data sets of `TextDataModule`.

    A row has a text and a label; other non-empty columns are an error, unless in ``ignore_columns``. Rows
    with blank texts are dropped, and texts longer than ``max_length`` truncated: each party logs their
    numbers in one table.

    Args:
        files: Training data: glob patterns, folders of ``save_to_disk`` or hub ids (``owner/name``, or
            ``owner/name:configuration``). ``{party}`` stands for the party's index, from 0.
        tokenizer: Hub id, local folder or GGUF file; usually that of the model.
        labels: The labels in the order of their indices. They must be equal at every party; only a
            simulation may omit them, and uses the sorted labels of ``files``. 1, 1.0 and "1" are one label;
            yes and no, which YAML reads as true and false, are also found as "yes" and "no".
        text_column: Column of the text.
        label_column: Column of the label.
        batch_size: Batch size of each process.
        max_length: Maximum number of tokens of a text, at most the model's positions.
        options: Those of `PartyDataModule`.

    Example:
        >>> data = ClassificationDataModule(
        ...     "data/party-{party}/*.jsonl", "google-bert/bert-base-uncased", labels=["no", "yes"]
        ... )
    """

    _limit = "max_length"

    def __init__(
        self,
        files: Files,
        tokenizer: str,
        labels: Sequence[Label] | None = None,
        text_column: str = "text",
        label_column: str = "label",
        batch_size: int = 16,
        max_length: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(files, tokenizer, batch_size, **options)
        if labels is None and self.num_parties is None:
            raise ValueError(
                "labels is not given: parties that know only their own would number them differently. "
                "List every label, in the same order at every party."
            )
        self.labels = None if labels is None else label_names(labels)
        self.are_bools = any(isinstance(label, bool) for label in labels or ())
        self.max_length = max_length
        self.text_column, self.label_column = text_column, label_column
        ignored = [name for name in self._columns() if is_ignored(name, self.ignore_columns)]
        if ignored:
            raise ValueError(f"ignore_columns={list(self.ignore_columns)} names {ignored}, which are used.")

    def _columns(self) -> tuple[str, ...]:
        return (self.text_column, self.label_column, *([self.key_column] if self.key_column else []))

    def _mapper(self, argument: str) -> "LabelledMapper":
        return LabelledMapper(self.text_column, self.label_column, *self._key_of(argument))

    def _setup(self, stage: str) -> None:
        if self.labels is None:
            every = store(self._source("files"), self._mapper("files"), self._folder())
            self.label_names = sorted(set(every.column("label")))
        else:
            self.label_names = self.labels
        least = self.tokenizer.num_special_tokens_to_add() + 1
        if self.max_length < least:
            raise ValueError(
                f"max_length={self.max_length} leaves no token of a text: the tokenizer adds {least - 1} of"
                f" its own. Set it to {least} or more."
            )
        check_labels(self.label_names, getattr(self.trainer, "lightning_module", None))
        super()._setup(stage)

    def _setup_predict(self) -> None:
        records = self._records("test_files")
        records.check_filled("text")
        self.test_samples = self._samples(records, "test_files")

    def _samples(self, records: Stored, source: str, is_split: bool = False) -> RowSamples:
        """Tokenize the rows that have a text, and note what is left out or cut."""
        filled, blank = records.parted()
        names, where = filled.column("label"), filled.column("where")
        index = index_labels(names, self.label_names, self._party(), where, self.are_bools)
        settings = {"tokenizer": self.tokenizer, "max_length": self.max_length}
        rows = filled.mapped(
            encode_labelled, _features(), self._folder(), self.num_proc, index=index, **settings
        )
        samples = RowSamples(rows.remove_columns("lost"))
        lost, tokens = rows.data.column("lost").to_pylist(), int(samples.lengths.sum())
        self._summary.add(labelled_line(source, lost, filled, blank, self.max_length, tokens))
        return samples

    def _streamed(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while batch := list(islice(rows, 64)):
            names, where = ([row[name] for row in batch] for name in ("label", "where"))
            index = index_labels(names, self.label_names, self._party(), where, self.are_bools)
            texts = {"text": [row["text"] for row in batch], "label": names}
            columns = encode_labelled(texts, self.tokenizer, self.max_length, index)
            del columns["lost"]
            yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    def _collate(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.tokenizer)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the batches of ``test_files`` in their own order."""
        return self._loader(self.test_samples)


class LabelledMapper:
    """Mapper of rows to stored texts, labels and keys.

    Args:
        text: Column of the text.
        label: Column of the label.
        key: Column of the natural key.
        ignored: Columns that may be left out.
    """

    def __init__(self, text: str, label: str, key: str | None = None, ignored: Sequence[str] = ()) -> None:
        self.text, self.label, self.key, self.ignored = text, label, key, tuple(ignored)

    def stored(self, where: str, row: Row) -> dict[str, Any]:
        """Return a row's columns.

        Raises:
            ValueError: Names the row and what to do.
        """
        wanted = [name for name in (self.text, self.label, self.key) if name]
        columns = {name: _column(where, row, name) for name in wanted}
        check_used(row, list(columns.values()), self.ignored, where, f"Used are {wanted}.")
        text = string_of(row, columns[self.text], where)
        label = label_name(_scalar(where, row, columns[self.label]))
        key = str(_scalar(where, row, columns[self.key])) if self.key else ""
        return {"text": text, "label": label, "key": key, "where": where, "blank": not text.strip()}

    def features(self) -> Any:
        """Return the type of each column."""
        from datasets import Features, Value

        names = ("label", "key", "where")
        return Features({"text": Value("large_string"), **{name: Value("string") for name in names},
                         "blank": Value("bool")})  # fmt: skip


def _column(where: str, row: Row, name: str) -> str:
    column = find_column(row, name, where)
    if column is None:
        parted = " If that is several names, they are parted by something else than expected."
        raise ValueError(
            f"{where}: has no column {name!r}; it has {list(row)}.{did_you_mean(name, row)}"
            f"{parted if len(row) == 1 else ''} Name the columns by text_column, label_column and"
            " key_column; the first line of a table must be its header."
        )
    return column


def _scalar(where: str, row: Row, column: str) -> Label:
    value: Any = row[column]
    if isinstance(value, Decimal):  # of a database's table
        value = float(value)
    if not has_content(value) or not isinstance(value, str | bool | int | float):
        what = f"holds {shown(value)}, no single value" if has_content(value) else "is empty"
        raise ValueError(f"{where}: {column!r} {what}. Fill it in, or take the row out of the file.")
    return value


def encode_labelled(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    index: Mapping[str, int],
) -> dict[str, Any]:
    """Tokenize a batch of stored texts, for ``datasets``."""
    texts = list(batch["text"])
    whole = tokenizer(texts, verbose=False)["input_ids"]
    tokens = tokenizer(texts, truncation=True, max_length=max_length)
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "labels": [index[label] for label in batch["label"]],
        "lost": [len(ids) - len(kept) for ids, kept in zip(whole, tokens["input_ids"], strict=True)],
    }


def _features() -> Any:
    from datasets import Features, Sequence, Value

    tokens, number = Sequence(Value("int64")), Value("int64")
    return Features({"input_ids": tokens, "attention_mask": tokens, "labels": number, "lost": number})
