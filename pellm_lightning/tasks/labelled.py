"""A party's labelled texts as a Lightning data module, or one data set divided over simulated parties."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from pellm_lightning.environment import party_of
from pellm_lightning.tasks.partition import by_key, dirichlet, iid
from pellm_lightning.tasks.pretrained import load_tokenizer
from pellm_lightning.tasks.source import hold_out, party_files, shuffled

Partition = Literal["iid", "dirichlet", "key"]
Encoded = dict[str, Any]
"""``input_ids`` and ``attention_mask``, lists of integers, and ``labels``, an integer."""


@dataclass(frozen=True)
class Row:
    """A text with its label and, where one is asked for, its natural key."""

    text: str
    label: str
    key: str = ""


class ClassificationDataModule(LightningDataModule):
    """One party's labelled texts, from ``.jsonl``, ``.csv`` or ``.tsv`` files with a header.

    In every pattern ``{party}`` stands for the party's index, counted from 0. To simulate a federation from
    one data set instead, give ``num_parties``: ``files`` is read whole, and divided the same way by every
    party.

    Args:
        files: Pattern of the files to train on.
        tokenizer: Hub id, local folder or GGUF file; as a rule that of the model.
        labels: The labels in the order of their indices. It must be the same at every party, so only a
            simulation can leave it out, and takes those in ``files``, sorted.
        text_column: Where a row has its text.
        label_column: Where a row has its label.
        batch_size: Samples in a batch, of each process.
        max_length: Tokens of a text; longer ones are cut.
        val_fraction: Share of the party's samples to hold out for validation, unless ``val_files`` is given.
        val_files: Pattern of the files to validate on; never divided.
        test_files: Pattern of the files to test on; never divided.
        num_parties: Divide ``files`` over so many simulated parties.
        partition: How to divide: at random (iid), by a Dirichlet draw of each party's labels, or by a natural
            key.
        alpha: Of the Dirichlet draw: the smaller, the less alike are the parties.
        key_column: Where a row has its natural key.
        party: Which party this is; None asks the federation.
        seed: Of the division, the split and each epoch's order.
        num_workers: Processes that collate batches.
    """

    def __init__(
        self,
        files: str,
        tokenizer: str,
        labels: Sequence[str] | None = None,
        text_column: str = "text",
        label_column: str = "label",
        batch_size: int = 16,
        max_length: int = 128,
        val_fraction: float = 0.1,
        val_files: str | None = None,
        test_files: str | None = None,
        num_parties: int | None = None,
        partition: Partition = "iid",
        alpha: float = 0.5,
        key_column: str | None = None,
        party: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if labels is None and num_parties is None:
            raise ValueError(
                "labels is not given: parties that know only their own would number them differently. "
                "List every label, in the same order at every party."
            )
        if (partition == "key") != (key_column is not None):
            raise ValueError(f"partition={partition!r} and key_column={key_column!r}: each needs the other.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} should be at least 0 and below 1.")
        self.files, self.val_files, self.test_files = files, val_files, test_files
        self.tokenizer_name, self.max_length, self.batch_size = tokenizer, max_length, batch_size
        self.labels = labels
        self.columns = (text_column, label_column, key_column)
        self.val_fraction = val_fraction
        self.num_parties, self.partition, self.alpha = num_parties, partition, alpha
        self.party, self.seed, self.num_workers = party, seed, num_workers

    def setup(self, stage: str) -> None:
        """Read and tokenize what ``stage`` needs."""
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        self.label_names = list(self.labels or sorted({row.label for row in self._rows(self.files)}))
        if stage in ("fit", "validate"):
            self._setup_fit(self._rows(self.files))
        elif self.test_files is not None:
            self.test_samples = self._encode(self._rows(self.test_files))
        else:
            raise ValueError("test_files is not given: name the files of this stage with --data.test_files.")

    def _setup_fit(self, rows: list[Row]) -> None:
        own, held_out = self._own(rows), list[Row]()
        if self.val_files is not None:
            held_out = self._rows(self.val_files)
        elif self.val_fraction > 0:
            own, held_out = self._split(own)
        self.train_samples, self.val_samples = self._encode(own), self._encode(held_out)

    def _own(self, rows: list[Row]) -> list[Row]:
        """Pick this party's part in a simulation."""
        party = self._party()
        if self.num_parties is None:
            return rows
        if not 0 <= party < self.num_parties:
            raise ValueError(
                f"Party {party} has no part of num_parties={self.num_parties}: the count has to be "
                "the federation's, and parties count from 0."
            )
        parts = _divide(rows, self.num_parties, self.partition, self.alpha, self.seed)
        return [rows[index] for index in parts[party]]

    def _split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        if len(rows) < 2:
            raise ValueError(
                f"Party {self._party()} has {len(rows)} sample: val_fraction={self.val_fraction} would "
                "leave nothing to train on. Give more samples, or val_files."
            )
        held_out = hold_out(len(rows), self.val_fraction, self.seed)
        kept = [row for index, row in enumerate(rows) if index not in held_out]
        return kept, [rows[index] for index in sorted(held_out)]

    def _party(self) -> int:
        return party_of(self.trainer) if self.party is None else self.party

    def _rows(self, pattern: str) -> list[Row]:
        return [row for path in party_files(pattern, self._party()) for row in read_rows(path, *self.columns)]

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        if not rows:
            return []
        index = {name: number for number, name in enumerate(self.label_names)}
        unknown = sorted({row.label for row in rows} - index.keys())
        if unknown:
            raise ValueError(
                f"Party {self._party()} has the labels {unknown}, which are not among {self.label_names}. "
                "Add them to labels, at every party."
            )
        tokens = self.tokenizer([row.text for row in rows], truncation=True, max_length=self.max_length)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": index[row.label]}
            for ids, mask, row in zip(tokens["input_ids"], tokens["attention_mask"], rows, strict=True)
        ]

    def train_dataloader(self) -> DataLoader[Encoded]:
        """Return shuffled batches, in a new order each epoch."""
        return self._loader(self.train_samples, sampler=shuffled(self.train_samples, self.trainer, self.seed))

    def val_dataloader(self) -> Sequence[DataLoader[Encoded]]:
        """Return the held-out batches in their own order; nothing when nothing is held out."""
        return [self._loader(self.val_samples)] if self.val_samples else []

    def test_dataloader(self) -> DataLoader[Encoded]:
        """Return the batches of ``test_files`` in their own order."""
        return self._loader(self.test_samples)

    def predict_dataloader(self) -> DataLoader[Encoded]:
        """Return the batches of ``test_files`` in their own order."""
        return self._loader(self.test_samples)

    def _loader(self, samples: list[Encoded], **options: Any) -> DataLoader[Encoded]:
        return DataLoader(
            samples,  # type: ignore[arg-type]  # a list is all that a map-style dataset has to be
            batch_size=self.batch_size,
            collate_fn=DataCollatorWithPadding(self.tokenizer),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **options,
        )


def _divide(
    rows: Sequence[Row], num_parties: int, how: Partition, alpha: float, seed: int
) -> list[list[int]]:
    if how == "key":
        return by_key([row.key for row in rows], num_parties)
    if how == "dirichlet":
        return dirichlet([row.label for row in rows], num_parties, alpha, seed)
    return iid(len(rows), num_parties, seed)


def read_rows(path: Path, text_column: str, label_column: str, key_column: str | None = None) -> list[Row]:
    """Read labelled texts from a ``.jsonl``, ``.csv`` or ``.tsv`` file.

    Raises:
        ValueError: Names the file, and the line that cannot be read or the column that is missing.
    """
    rows = []
    for number, fields in _read(path):
        missing = [
            name for name in (text_column, label_column, key_column) if name and fields.get(name) is None
        ]
        if missing:
            raise ValueError(f"{path}:{number}: has nothing under {missing}; it has {list(fields)}.")
        key = str(fields[key_column]) if key_column else ""
        rows.append(Row(str(fields[text_column]), str(fields[label_column]), key))
    return rows


def _read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """List the rows of a file, each with the number of the line it ends on."""
    if path.suffix not in (".jsonl", ".csv", ".tsv"):
        raise ValueError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'}. Use .jsonl, .csv or .tsv."
        )
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            return [(n, _json_row(line, f"{path}:{n}")) for n, line in enumerate(file, 1) if line.strip()]
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        return [(reader.line_num, row) for row in reader]


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object, found {type(fields).__name__}.")
    return fields
