"""Base of the data modules: a party's sources, its part in a simulation, validation split and loaders."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pellm_lightning.comm.topology import Topology
from pellm_lightning.loop.arguments import at_least
from pellm_lightning.tasks.columns import ignored_columns
from pellm_lightning.tasks.loading import EpochSampler, ResumableLoader, Stream, hold_out
from pellm_lightning.tasks.partition import Partition, check_num_parties, divide, label_table, plot_labels
from pellm_lightning.tasks.pretrained import Pretrained, load_tokenizer
from pellm_lightning.tasks.samples import Samples
from pellm_lightning.tasks.source import Source, check_splits, locate
from pellm_lightning.tasks.store import Mapper, Stored, quiet_datasets, store, streamed_rows, temporary_folder
from pellm_lightning.tasks.summary import Summary
from pellm_lightning.trainer.environment import topology_of
from pellm_lightning.trainer.isolation import below

Files = str | list[str]
_SPLITS = {"files": "train", "val_files": "validation", "test_files": "test", "predict_files": "test"}


class PartyDataModule(LightningDataModule):
    """Base class of a party's data modules, on data sets of Hugging Face's ``datasets``.

    Args:
        files: Training data: glob patterns, folders of ``save_to_disk`` or hub ids (``owner/name``, or
            ``owner/name:configuration``). ``{party}`` stands for the party's index, from 0.
        tokenizer: Hub id, local folder or GGUF file; usually that of the model.
        batch_size: Batch size of each process.
        val_fraction: Share of the records to hold out for validation. Not used when ``val_files`` is given.
        val_files: Validation data.
        test_files: Test data.
        split: Split of ``files`` in data sets that have several, or the split of each argument. Without,
            these are train, validation (of ``val_files``) and test.
        revision: Branch, tag or commit of data sets of the hub.
        streaming: Read the training data as they are used, without a copy on this disk. The order is
            that of the source, shuffled within 1,000 records.
        ignore_columns: Columns to ignore, for example ``[id, source]``.
        num_parties: Number of simulated parties to partition ``files`` over; each reads all of them and
            takes its part. It must equal the number of parties of the federation.
        partition: "iid", "dirichlet" (label skew) or "key" (natural partition).
        alpha: Concentration of the Dirichlet distribution: smaller is more heterogeneous.
        key_column: Column of the natural key.
        party: Index of the party; None takes it from the federation.
        seed: Seed of partition, validation split and shuffling.
        num_workers: Number of DataLoader workers.
        num_proc: Number of processes that tokenize.
        cache_dir: Folder for the tokenized data, which also holds their texts; ``{party}`` as in files. By
            default ``party-<k>/data`` below the Trainer's ``default_root_dir``; without a Trainer a
            temporary folder, as where that is no local one.
    """

    _limit: str
    """Name of the argument that bounds the length of a sample."""
    _keyed: tuple[str, ...] = ("key",)
    """Partitions by the column of the natural key."""
    tokenizer: Any
    train_samples: Samples | Stream
    val_samples: Samples | list[Any]
    test_samples: Samples

    def __init__(
        self,
        files: Files,
        tokenizer: str,
        batch_size: int,
        val_fraction: float = 0.1,
        val_files: Files | None = None,
        test_files: Files | None = None,
        split: str | dict[str, str] | None = None,
        revision: str | None = None,
        streaming: bool = False,
        ignore_columns: Sequence[str] = (),
        num_parties: int | None = None,
        partition: Partition = "iid",
        alpha: float = 0.5,
        key_column: str | None = None,
        party: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} should be at least 0 and below 1.")
        at_least(1, batch_size=batch_size, num_proc=num_proc, num_parties=num_parties)
        at_least(0, num_workers=num_workers, party=party)
        if (partition in self._keyed) != (key_column is not None):
            raise ValueError(f"partition={partition!r} and key_column={key_column!r}: each needs the other.")
        if partition not in get_args(Partition):
            raise ValueError(f"partition={partition!r} must be one of {', '.join(get_args(Partition))}.")
        if not alpha > 0:
            raise ValueError(f"alpha={alpha} should be above 0.")
        if streaming and (num_parties is not None or num_workers or (val_files is None and val_fraction)):
            raise ValueError(
                f"streaming=True with num_parties={num_parties}, num_workers={num_workers},"
                f" val_files={val_files!r} and val_fraction={val_fraction}: a stream is neither divided nor"
                " read by workers, since its order is to be repeated. Leave the first two out, and give"
                " val_files or val_fraction=0."
            )
        self.sources: dict[str, Files | None] = {
            "files": files, "val_files": val_files, "test_files": test_files
        }  # fmt: skip
        splits = {"files": split} if isinstance(split, str) else split or {}
        if unknown := sorted(splits.keys() - _SPLITS.keys()):
            raise ValueError(f"split={split!r} names {unknown}; use {', '.join(_SPLITS)}.")
        self._chosen = {*splits, *(["files"] if revision else [])}
        self.splits, self.revision, self.streaming = {**_SPLITS, **splits}, revision, streaming
        self.tokenizer_name, self.batch_size, self.val_fraction = tokenizer, batch_size, val_fraction
        self.ignore_columns = ignored_columns(ignore_columns)
        self.num_parties, self.partition, self.alpha = num_parties, partition, alpha
        self.key_column, self.party, self.seed = key_column, party, seed
        self.num_workers, self.num_proc, self.cache_dir = num_workers, num_proc, cache_dir
        self._summary, self._parts = Summary(), ""
        self._temporary: str | None = None

    # ---- what a kind of data is

    @abstractmethod
    def _mapper(self, argument: str) -> Mapper:
        """Return the mapper of an argument's rows."""

    @abstractmethod
    def _samples(self, records: Stored, source: str, is_split: bool = False) -> Samples:
        """Tokenize records, and note what is left out or cut."""

    @abstractmethod
    def _streamed(self, rows: Iterator[dict[str, Any]]) -> Iterator[Any]:
        """Yield the samples of rows that are read as they are used."""

    @abstractmethod
    def _collate(self) -> Callable[[Any], Any]:
        """Return the collate function of samples with labels."""

    # ---- stages

    def setup(self, stage: str) -> None:
        """Read and tokenize what ``stage`` (fit, validate, test or predict) needs of this party's data."""
        self.tokenizer = self._load_tokenizer()
        with quiet_datasets():
            self._setup(stage)
        limit = f"{self._limit}={getattr(self, self._limit)}"
        kept = None if self._temporary else self._folder()
        self._summary.log_at(self.trainer, self._party(), limit, kept, self._parts)
        self._parts = ""

    def _setup(self, stage: str) -> None:
        if stage in ("fit", "validate"):
            self._setup_fit()
        elif stage == "test":
            self.test_samples = self._samples(self._records("test_files"), "test_files")
        else:
            self._setup_predict()

    @abstractmethod
    def _setup_predict(self) -> None:
        """Read what prediction needs."""

    def _setup_fit(self) -> None:
        held_out, source = None, "val_files"
        if self.streaming:
            source_of_all, mapper = self._source("files"), self._mapper("files")
            rows = partial(streamed_rows, source_of_all, mapper, self.seed)
            self.train_samples = Stream(lambda epoch: self._streamed(rows(epoch)), self.trainer)
        else:
            records = self._records("files")
            if self.sources["val_files"] is None and self.val_fraction:
                records, held_out = self._split(records)
                source = "the validation split"
            self.train_samples = self._samples(records, "files")
        if self.sources["val_files"] is not None:
            held_out = self._records("val_files")
        is_split = source != "val_files"
        self.val_samples = [] if held_out is None else self._samples(held_out, source, is_split)

    def _records(self, argument: str) -> Stored:
        """Read the records of an argument."""
        source = self._source(argument)
        records = store(source, self._mapper(argument), self._folder())
        if argument == "files" and self.num_parties is not None:
            records = self._part(records)
        if all(records.column("blank")):
            raise ValueError(
                f"Party {self._party()} has no text in {argument}: all there is in"
                f" {', '.join(source.names[:3])}{', ...' if len(source.names) > 3 else ''} is blank, or has a"
                " blank prompt, or is a conversation in which the assistant says nothing. Write the files"
                " again, or name others."
            )
        return records

    def _source(self, argument: str) -> Source:
        patterns = self.sources[argument]
        if patterns is None:
            raise ValueError(f"{argument} is not given: name the files of this stage with --data.{argument}.")
        names = locate(argument, patterns, self._party())
        if argument in self._chosen:
            check_splits(argument, names, self.splits[argument], self.revision)
        return Source(names, self.splits[argument], self.revision, self._columns())

    @abstractmethod
    def _columns(self) -> tuple[str, ...]:
        """Return the names of columns by which a table's delimiter is recognised."""

    def _key_of(self, argument: str) -> tuple[str | None, tuple[str, ...]]:
        """Return the column of the natural key, which only ``files`` needs, and the columns to ignore."""
        if argument == "files" or self.key_column is None:
            return self.key_column, self.ignore_columns
        return None, (*self.ignore_columns, self.key_column)

    def _part(self, records: Stored) -> Stored:
        """Pick this party's part in a simulation."""
        assert self.num_parties is not None
        check_num_parties(self.num_parties, self.party, self._topology())
        parts = self._divided(records)
        if self._party() == 0:
            self._parts = label_table(self._groups(records), parts)
        return records.take(parts[self._party()])

    def _divided(self, records: Stored) -> list[list[int]]:
        """Divide records over the simulated parties."""
        assert self.num_parties is not None
        groups = records.column("key") if self.partition in self._keyed else self._groups(records)
        return divide(groups, self.num_parties, self.partition, self.alpha, self.seed)

    def _groups(self, records: Stored) -> list[str]:
        """Return what the parties' parts are grouped by: labels, or else keys."""
        names = [name for name in ("label", "key") if name in records.data.column_names]
        return [name or "records" for name in records.column(names[0])]

    def plot_parties(self) -> Any:
        """Draw who holds what in a simulation, one bar per party, as a matplotlib figure.

        Raises:
            ValueError: If there is no simulation.
            ImportError: If matplotlib is not installed.
        """
        if self.num_parties is None:
            raise ValueError(
                "num_parties is not given: without a simulation a party knows only its own data."
            )
        with quiet_datasets():
            records = store(self._source("files"), self._mapper("files"), self._folder())
        return plot_labels(self._groups(records), self._divided(records))

    def _split(self, records: Stored) -> tuple[Stored, Stored]:
        """Hold out whole records, which keeps them out of their own evaluation."""
        filled, blank = records.parted()
        whose = f"files={self.sources['files']!r} of party {self._party()}"
        held_out = hold_out(len(filled), self.val_fraction, self.seed, whose)
        kept = [row for row in range(len(filled)) if row not in held_out]
        rows = np.sort(np.concatenate([filled.rows[kept], blank.rows]))
        return Stored(records.data, records.key, rows), filled.take(sorted(held_out))

    def _load_tokenizer(self) -> Any:
        """Load the tokenizer: as the model loads its own, with its revision and code, if that is the one."""
        model = getattr(getattr(self.trainer, "lightning_module", None), "pretrained", None)
        if isinstance(model, Pretrained) and model.name == self.tokenizer_name:
            return model.tokenizer()
        return load_tokenizer(self.tokenizer_name)

    def _topology(self) -> Topology:
        return Topology.from_env() if self.trainer is None else topology_of(self.trainer)

    def _party(self) -> int:
        return self._topology().party if self.party is None else self.party

    def _folder(self) -> Path:
        """Return the folder of this party's own for what is made of its data."""
        if self.cache_dir is not None:
            folder = Path(self.cache_dir.replace("{party}", str(self._party())))
        elif self.trainer is not None and "://" not in str(self.trainer.default_root_dir):
            folder = Path(below(self.trainer.default_root_dir, self._party()), "data")
        else:
            self._temporary = self._temporary or str(temporary_folder(self))
            folder = Path(self._temporary)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    # ---- loaders

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches, in a new order each epoch."""
        options: dict[str, Any] = {}
        if isinstance(self.train_samples, Samples):
            options["sampler"] = EpochSampler(self.train_samples, self.trainer, self.seed)
        loader = ResumableLoader(self.train_samples, **self._options(), **options)
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self) -> Sequence[DataLoader[Any]]:
        """Return the held-out batches in their own order; nothing when nothing is held out."""
        return [self._loader(self.val_samples)] if self.val_samples else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the batches of ``test_files`` in their own order."""
        return self._loader(self.test_samples)

    def _loader(self, samples: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(samples, **{**self._options(), **options})

    def _options(self) -> Mapping[str, Any]:
        return {
            "batch_size": self.batch_size,
            "collate_fn": self._collate(),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
        }
