"""Data module of texts for causal language models."""

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pellm_lightning.tasks.columns import ignored_columns
from pellm_lightning.tasks.encoding import Encoder, end_of
from pellm_lightning.tasks.left_out import Notes, check_not_empty, note_on
from pellm_lightning.tasks.pretrained import load_tokenizer
from pellm_lightning.tasks.records import Record, read_records, split_records
from pellm_lightning.tasks.samples import Sample, Side, pad_batch, to_prompt, to_samples
from pellm_lightning.tasks.source import party_files, shuffled
from pellm_lightning.trainer.environment import party_of


class TextDataModule(LightningDataModule):
    """Data module of a party's texts for a causal language model.

    ``.txt`` files are documents. ``.jsonl`` files have a record per line, ``.json`` files a list of them:
    ``{"text": ...}`` is a document, and of ``{"instruction": ..., "response": ...}`` only the
    response has labels. ``context`` (or ``input``) is appended to the instruction after a blank line;
    ``system`` is a chat's system message; a response may be called ``output``. Other non-empty columns are an
    error, unless in ``ignore_columns``. Documents are concatenated with special tokens, including the end of
    sequence, and split into blocks.

    Each party logs the numbers of dropped records (blank, or with a prompt that fills a block), truncated
    responses, and the tail of the packed texts.

    In every pattern ``{party}`` stands for the party's index, from 0: ``data/party-{party}/*.txt``.

    Args:
        files: Pattern of the training files.
        tokenizer: Hub id, local folder or GGUF file; usually that of the model.
        batch_size: Batch size of each process.
        block_size: Tokens of a block, at most the model's positions; longer samples are truncated.
        val_fraction: Share of the documents and records to hold out for validation, whole ones; of a single
            text, its end. Not used when ``val_files`` is given.
        val_files: Pattern of the validation files.
        test_files: Pattern of the test files.
        predict_files: Pattern of the files with prompts; responses are ignored.
        ignore_columns: Columns to ignore, for example ``[id, source]``.
        party: Index of the party; None takes it from the federation.
        seed: Seed of the validation split and of shuffling.
        num_workers: Number of DataLoader workers.

    Example:
        >>> data = TextDataModule("data/party-{party}/*.jsonl", "HuggingFaceTB/SmolLM2-135M", block_size=256)
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
        ignore_columns: Sequence[str] = (),
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
        self.ignore_columns = ignored_columns(ignore_columns)
        self.tokenizer_name = tokenizer
        self.batch_size, self.block_size = batch_size, block_size
        self.val_fraction = val_fraction
        self.party, self.seed, self.num_workers = party, seed, num_workers
        self._notes = Notes()

    def setup(self, stage: str) -> None:
        """Read and tokenize what ``stage`` (fit, validate, test or predict) needs of this party's files."""
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        if stage in ("fit", "validate"):
            self._setup_fit()
        elif stage == "test":
            records, blank = self._records("test_files", self.test_files)
            self.test_samples = self._samples(records, blank, "test_files")
        elif stage == "predict":
            self._setup_predict()
        self._notes.log_at(self.trainer, self._party())

    def _setup_fit(self) -> None:
        records, blank = self._records("files", self.files)
        held_out, held_out_blank, source = list[Record](), list[Record](), "the validation split"
        is_split = self.val_files is None and self.val_fraction > 0
        if self.val_files is not None:
            held_out, held_out_blank = self._records("val_files", self.val_files)
            source = "val_files"
        elif is_split:
            whose = f"files={self.files!r} of party {self._party()}"
            records, held_out = split_records(records, self.val_fraction, self.seed, whose)
        self.train_samples = self._samples(records, blank, "files")
        self.val_samples = []
        if is_split or self.val_files is not None:
            self.val_samples = self._samples(held_out, held_out_blank, source, is_split)

    def _setup_predict(self) -> None:
        records, blank = self._records("predict_files", self.predict_files, responses=False)
        if blank:
            raise ValueError(
                f"{blank[0].where}: the prompt is blank, so there is nothing to continue. Write one, or take"
                " the row out of the file: predictions are in the order of the rows."
            )
        encoder = Encoder(self.tokenizer)
        self.predict_samples = [to_prompt(record, encoder) for record in records]
        self.predict_places = [record.where for record in records]

    def _records(
        self, argument: str, pattern: str | None, responses: bool = True
    ) -> tuple[list[Record], list[Record]]:
        """Read the records of a pattern: those with content, and the blank ones."""
        if pattern is None:
            raise ValueError(f"{argument} is not given: name the files of this stage with --data.{argument}.")
        files = party_files(pattern, self._party())
        records = [r for path in files for r in read_records(path, self.ignore_columns, responses)]
        is_blank = attrgetter("is_blank" if responses else "has_blank_prompt")
        blank = [record for record in records if is_blank(record)]
        if len(blank) == len(records):
            names = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
            raise ValueError(
                f"Party {self._party()} has no text in {argument}: all there is in {names} is blank. Write"
                " the files again, or name others."
            )
        return [record for record in records if not is_blank(record)], blank

    def _party(self) -> int:
        return party_of(self.trainer) if self.party is None else self.party

    def _samples(
        self, records: Sequence[Record], blank: Sequence[Record], source: str, is_split: bool = False
    ) -> list[Sample]:
        made = to_samples(records, self.tokenizer, self.block_size)
        check_not_empty(self._party(), source, made, self.block_size, is_split)
        self._notes.add(note_on(source, made, blank, self.block_size))
        return made.samples

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
        """Return prompts, padded on the left so that generation continues from their last token."""
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
