"""A party's texts as a Lightning data module."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pellm_lightning.environment import party_of
from pellm_lightning.tasks.pretrained import load_tokenizer
from pellm_lightning.tasks.samples import (
    Record,
    Sample,
    Side,
    end_of,
    pad_batch,
    read_records,
    split_records,
    to_prompt,
    to_samples,
)
from pellm_lightning.tasks.source import party_files, shuffled


class TextDataModule(LightningDataModule):
    """One party's private texts for a causal language model.

    ``.txt`` files are documents. ``.jsonl`` files hold a record a line: ``{"text": ...}`` is a document, and
    of ``{"instruction": ..., "response": ...}`` the model learns the response alone. Documents are joined,
    each closed by the tokenizer's end token, and cut into blocks.

    In every pattern ``{party}`` stands for the party's index, counted from 0: ``data/party-{party}/*.txt``.

    Args:
        files: Pattern of the files to train on.
        tokenizer: Hub id, local folder or GGUF file; as a rule that of the model.
        batch_size: Samples in a batch, of each process.
        block_size: Tokens in a block; longer instruction samples are cut.
        val_fraction: Share of the documents and records to hold out for validation, whole ones; of a single
            text, its end. Not used when ``val_files`` is given.
        val_files: Pattern of the files to validate on.
        test_files: Pattern of the files to test on.
        predict_files: Pattern of the files with prompts: of instructions the response is left out.
        party: Whose files these are; None asks the federation.
        seed: Of the split and of each epoch's order.
        num_workers: Processes that collate batches.
    """

    def __init__(
        self,
        files: str,
        tokenizer: str,
        batch_size: int = 8,
        block_size: int = 512,
        val_fraction: float = 0.1,
        val_files: str | None = None,
        test_files: str | None = None,
        predict_files: str | None = None,
        party: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if block_size < 2:
            raise ValueError(
                f"block_size={block_size} leaves nothing to predict: the first token has no context."
            )
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} should be at least 0 and below 1.")
        self.files, self.val_files, self.test_files, self.predict_files = (
            files,
            val_files,
            test_files,
            predict_files,
        )
        self.tokenizer_name = tokenizer
        self.batch_size, self.block_size = batch_size, block_size
        self.val_fraction = val_fraction
        self.party, self.seed, self.num_workers = party, seed, num_workers

    def setup(self, stage: str) -> None:
        """Read and tokenize what ``stage`` (fit, validate, test or predict) needs of this party's files."""
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        if stage in ("fit", "validate"):
            self._setup_fit()
        elif stage == "test":
            self.test_samples = self._samples(self._records("test_files", self.test_files), "test_files")
        elif stage == "predict":
            records = self._records("predict_files", self.predict_files)
            self.predict_samples = [to_prompt(record, self.tokenizer) for record in records]

    def _setup_fit(self) -> None:
        records, held_out = self._records("files", self.files), None
        if self.val_files is not None:
            held_out = self._records("val_files", self.val_files)
        elif self.val_fraction > 0:
            records, held_out = split_records(records, self.val_fraction, self.seed)
        self.train_samples = self._samples(records, "files")
        self.val_samples = [] if held_out is None else self._samples(held_out, "the validation split")

    def _records(self, argument: str, pattern: str | None) -> list[Record]:
        if pattern is None:
            raise ValueError(f"{argument} is not given: name the files of this stage with --data.{argument}.")
        files = party_files(pattern, self._party())
        return [record for path in files for record in read_records(path)]

    def _party(self) -> int:
        return party_of(self.trainer) if self.party is None else self.party

    def _samples(self, records: Sequence[Record], source: str) -> list[Sample]:
        samples = to_samples(records, self.tokenizer, self.block_size)
        if not samples:
            raise ValueError(
                f"Party {self._party()} has too little text in {source}: {len(records)} records fill no "
                f"block of block_size={self.block_size} tokens. Give more text, or a smaller block_size."
            )
        return samples

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled batches, in a new order each epoch."""
        return self._loader(self.train_samples, sampler=shuffled(self.train_samples, self.trainer, self.seed))

    def val_dataloader(self) -> Sequence[DataLoader[Sample]]:
        """Return the held-out batches in their own order; nothing when nothing is held out."""
        return [self._loader(self.val_samples)] if self.val_samples else []

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the batches of ``test_files`` in their own order."""
        return self._loader(self.test_samples)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return prompts, padded on the left so that generation goes on from their last token."""
        return self._loader(self.predict_samples, side="left")

    def _loader(self, samples: list[Sample], side: Side = "right", **options: Any) -> DataLoader[Sample]:
        collate = partial(pad_batch, pad=end_of(self.tokenizer), side=side)
        return DataLoader(
            samples,  # type: ignore[arg-type]  # a list is all that a map-style dataset has to be
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **options,
        )
