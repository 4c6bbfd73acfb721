"""Data module of labelled texts, of one party or partitioned over simulated parties."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from pellm_lightning.comm.topology import Topology
from pellm_lightning.tasks.columns import ignored_columns, is_ignored
from pellm_lightning.tasks.left_out import Note, Notes, counted
from pellm_lightning.tasks.limits import check_labels
from pellm_lightning.tasks.partition import by_key, check_num_parties, dirichlet, iid
from pellm_lightning.tasks.pretrained import load_tokenizer
from pellm_lightning.tasks.rows import Label, Row, index_labels, label_names, read_rows
from pellm_lightning.tasks.source import hold_out, party_files, shuffled
from pellm_lightning.trainer.environment import topology_of

Partition = Literal["iid", "dirichlet", "key"]
Encoded = dict[str, Any]
"""``input_ids`` and ``attention_mask``, lists of integers, and ``labels``, an integer."""


class ClassificationDataModule(LightningDataModule):
    """Data module of a party's labelled texts, from ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` files.

    A row has a text and a label; other non-empty columns are an error, unless in ``ignore_columns``. Rows
    with blank texts are dropped, and texts longer than ``max_length`` truncated: each party logs their
    numbers.

    In every pattern ``{party}`` stands for the party's index, from 0. To simulate a federation from one data
    set, set ``num_parties``: every party reads all ``files`` and takes its part. It must equal the number of
    parties of the federation.

    Args:
        files: Pattern of the training files.
        tokenizer: Hub id, local folder or GGUF file; usually that of the model.
        labels: The labels in the order of their indices. They must be equal at every party; only a
            simulation may omit them, and uses the sorted labels of ``files``. 1, 1.0 and "1" are one label.
        text_column: Column of the text.
        label_column: Column of the label.
        batch_size: Batch size of each process.
        max_length: Maximum number of tokens of a text, at most the model's positions.
        val_fraction: Fraction of the party's samples to hold out for validation, without ``val_files``.
        val_files: Pattern of the validation files; not partitioned.
        test_files: Pattern of the test files; not partitioned.
        num_parties: Number of simulated parties to partition ``files`` over.
        partition: "iid", "dirichlet" (label skew) or "key" (natural partition).
        alpha: Concentration of the Dirichlet distribution: smaller is more heterogeneous.
        key_column: Column of the natural key.
        ignore_columns: Columns to ignore, for example ``[id, source]``.
        party: Index of the party; None takes it from the federation.
        seed: Seed of partition, validation split and shuffling.
        num_workers: Number of DataLoader workers.

    Example:
        >>> data = ClassificationDataModule(
        ...     "data/party-{party}/*.jsonl", "google-bert/bert-base-uncased", labels=["no", "yes"]
        ... )
    """

    def __init__(
        self,
        files: str,
        tokenizer: str,
        labels: Sequence[Label] | None = None,
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
        ignore_columns: Sequence[str] = (),
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
        self.labels = None if labels is None else label_names(labels)
        self.columns = (text_column, label_column, key_column)
        self.ignore_columns = ignored_columns(ignore_columns)
        ignored = [name for name in self.columns if name and is_ignored(name, self.ignore_columns)]
        if ignored:
            raise ValueError(f"ignore_columns={list(ignore_columns)} names {ignored}, which are used.")
        self.val_fraction = val_fraction
        self.num_parties, self.partition, self.alpha = num_parties, partition, alpha
        self.party, self.seed, self.num_workers = party, seed, num_workers
        self._notes = Notes()

    def setup(self, stage: str) -> None:
        """Read and tokenize what ``stage`` needs."""
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        rows = self._rows(self.files) if self.labels is None or stage in ("fit", "validate") else []
        self.label_names = sorted({row.label for row in rows}) if self.labels is None else self.labels
        check_labels(self.label_names, getattr(self.trainer, "lightning_module", None))
        if stage in ("fit", "validate"):
            self._setup_fit(rows)
        elif self.test_files is None:
            raise ValueError("test_files is not given: name the files of this stage with --data.test_files.")
        else:
            rows = self._rows(self.test_files)
            if stage == "predict":
                _check_no_blank(rows)
            self.test_samples = self._encode(rows, "test_files")
        self._notes.log_at(self.trainer, self._party())

    def _setup_fit(self, rows: list[Row]) -> None:
        own, held_out, source = self._own(rows), list[Row](), "the validation split"
        if self.val_files is not None:
            held_out, source = self._rows(self.val_files), "val_files"
        elif self.val_fraction > 0:
            own, held_out = self._split(own)
        self.train_samples = self._encode(own, "files")
        self.val_samples = self._encode(held_out, source) if held_out else []

    def _own(self, rows: list[Row]) -> list[Row]:
        """Pick this party's part in a simulation."""
        if self.num_parties is None:
            return rows
        check_num_parties(self.num_parties, self.party, self._topology())
        parts = _divide(rows, self.num_parties, self.partition, self.alpha, self.seed)
        return [rows[index] for index in parts[self._party()]]

    def _split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        filled = [row for row in rows if row.text.strip()]
        blank = [row for row in rows if not row.text.strip()]
        whose = f"files={self.files!r} of party {self._party()}"
        held_out = hold_out(len(filled), self.val_fraction, self.seed, whose)
        kept = [row for index, row in enumerate(filled) if index not in held_out]
        return kept + blank, [filled[index] for index in sorted(held_out)]

    def _topology(self) -> Topology:
        return Topology.from_env() if self.trainer is None else topology_of(self.trainer)

    def _party(self) -> int:
        return self._topology().party if self.party is None else self.party

    def _rows(self, pattern: str) -> list[Row]:
        files = party_files(pattern, self._party())
        return [row for path in files for row in read_rows(path, *self.columns, self.ignore_columns)]

    def _encode(self, rows: Sequence[Row], source: str) -> list[Encoded]:
        """Tokenize the rows that have a text, and note what is left out or cut."""
        filled = [row for row in rows if row.text.strip()]
        if not filled:
            raise ValueError(
                f"Party {self._party()} has no text in {source}: {len(rows)} rows, all blank (the first:"
                f" {rows[0].where if rows else 'none'}). Write the files again, or name others."
            )
        labels = index_labels(filled, self.label_names, self._party())
        least = self.tokenizer.num_special_tokens_to_add() + 1
        if self.max_length < least:
            raise ValueError(
                f"max_length={self.max_length} leaves no token of a text: the tokenizer adds {least - 1} of"
                f" its own. Set it to {least} or more."
            )
        texts = [row.text for row in filled]
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        lost = [len(ids) - len(kept) for ids, kept in zip(whole, tokens["input_ids"], strict=True)]
        self._note(source, rows, filled, lost)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, mask, label in zip(tokens["input_ids"], tokens["attention_mask"], labels, strict=True)
        ]

    def _note(self, source: str, rows: Sequence[Row], filled: Sequence[Row], lost: Sequence[int]) -> None:
        parts = []
        blank = [row for row in rows if not row.text.strip()]
        if blank:
            parts.append(f"{counted(len(blank), 'row')} left out as blank (the first: {blank[0].where})")
        cut = [(row, tokens) for row, tokens in zip(filled, lost, strict=True) if tokens]
        if cut:
            most = self.max_length + max(lost)
            parts.append(
                f"{counted(len(cut), 'text')} cut, by {sum(lost)} tokens (the first: {cut[0][0].where});"
                f" max_length={most} would keep each whole"
            )
        if parts:
            self._notes.add(Note(f"{source}, at max_length={self.max_length}: {'; '.join(parts)}.", True))

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


def _check_no_blank(rows: Sequence[Row]) -> None:
    blank = next((row for row in rows if not row.text.strip()), None)
    if blank is not None:
        raise ValueError(
            f"{blank.where}: the text is blank. Write it, or take the row out of the file: predictions are in"
            " the order of the rows."
        )
