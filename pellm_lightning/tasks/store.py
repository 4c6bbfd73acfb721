"""Data sets of a party's records on its own disk, cached by all that they depend on."""

import contextlib
import hashlib
import json
import random
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pellm_lightning.tasks.reading import Row
from pellm_lightning.tasks.source import Source

if TYPE_CHECKING:
    from datasets import Dataset


_AHEAD = 1000
"""Rows of a stream among which it is shuffled."""


class Mapper(Protocol):
    """Mapper of a source's rows to the columns of a stored data set; its state is part of the cache's key."""

    def stored(self, where: str, row: Row) -> dict[str, Any]:
        """Return the columns, among them ``where`` and ``blank``.

        Raises:
            ValueError: Names the row and what to do.
        """
        ...

    def features(self) -> Any:
        """Return the type of each column."""
        ...


@dataclass(frozen=True)
class Stored:
    """Rows of a stored data set.

    Args:
        data: The data set.
        key: Digest of all that it depends on.
        rows: Indices of the rows.
    """

    data: "Dataset"
    key: str
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """Return a column's values."""
        values: list[Any] = self.data.data.column(name).take(self.rows).to_pylist()
        return values

    def take(self, rows: Sequence[int] | NDArray[Any]) -> "Stored":
        """Return some of these rows, by their positions among them."""
        return Stored(self.data, self.key, self.rows[np.asarray(rows, dtype=np.int64)])

    def parted(self) -> "tuple[Stored, Stored]":
        """Return the rows with content, and the blank ones."""
        blank = np.array(self.column("blank"), dtype=bool)
        return self.take(np.flatnonzero(~blank)), self.take(np.flatnonzero(blank))

    def check_filled(self, noun: str) -> None:
        """Check that no row is blank.

        Raises:
            ValueError: Names the first that is, as a ``noun``.
        """
        _, blank = self.parted()
        if len(blank):
            raise ValueError(
                f"{blank.where(0)}: the {noun} is blank. Write it, or take the row out of the file:"
                " predictions are in the order of the rows."
            )

    def where(self, position: int) -> str:
        """Return file and line of a row."""
        return str(self.data[int(self.rows[position])]["where"])

    def mapped(
        self,
        function: Callable[..., Mapping[str, Any]],
        features: Any,
        folder: Path,
        num_proc: int | None,
        **settings: Any,
    ) -> "Dataset":
        """Map batches of the rows, or take the result from the cache.

        Args:
            function: Receives a batch of columns, and the settings.
            features: Type of each resulting column.
            folder: Where the result is stored.
            num_proc: Number of processes.
            settings: Arguments of the function, part of the cache's key.
        """
        parts = [self.key, self.rows.tobytes(), function.__qualname__]
        parts += [
            _tokenizer_key(value) if isinstance(value, PreTrainedTokenizerBase) else (name, value)
            for name, value in sorted(settings.items())
        ]
        key = digest(*parts)
        return self.data.select(self.rows).map(
            function,
            batched=True,
            fn_kwargs=settings,
            remove_columns=self.data.column_names,
            features=features,
            num_proc=num_proc if num_proc and 1 < num_proc <= len(self) else None,
            new_fingerprint=key[:32],
            cache_file_name=str(folder / f"tokens-{key[:32]}.arrow"),
        )


def store(source: Source, mapper: Mapper, folder: Path) -> Stored:
    """Read all rows of a source into the folder, or take them from there.

    Raises:
        ValueError: Names the file, the row and what to do.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    key = digest(source.stamp(), type(mapper).__name__, sorted(vars(mapper).items()))
    arguments = {"source": source, "mapper": mapper, "folder": str(folder), "key": key}
    try:
        data = Dataset.from_generator(
            stored_rows, features=mapper.features(), cache_dir=str(folder), gen_kwargs=arguments
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    return Stored(data, key, np.arange(len(data)))


def stored_rows(source: Source, mapper: Mapper, folder: str, key: str) -> Iterator[dict[str, Any]]:
    """Yield the columns of each row, for ``datasets``, which hashes the arguments."""
    for where, row in source.rows(folder):
        yield mapper.stored(where, row)


def streamed_rows(source: Source, mapper: Mapper, seed: int, epoch: int) -> Iterator[dict[str, Any]]:
    """Yield the columns of each row that is not blank, shuffled by seed and epoch within a buffer."""
    generator, buffer = random.Random(f"{seed} {epoch}"), list[dict[str, Any]]()
    for where, row in source.rows(streaming=True):
        columns = mapper.stored(where, row)
        if columns["blank"]:
            continue
        if len(buffer) < _AHEAD:
            buffer.append(columns)
            continue
        index = generator.randrange(_AHEAD)
        yield buffer[index]
        buffer[index] = columns
    generator.shuffle(buffer)
    yield from buffer


def digest(*parts: Any) -> str:
    """Return a digest of plain values, and of this package's code that makes data of them."""
    return hashlib.sha256(repr((_code(), parts)).encode()).hexdigest()


@cache
def _code() -> str:
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return " ".join([code.hexdigest(), *(version(n) for n in ("transformers", "tokenizers", "datasets"))])


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that tokens depend on, equal before and after a tokenizer is used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = repr((sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.init_kwargs.items()))))
    else:
        rules = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return digest(
        type(tokenizer).__name__, rules, sorted(tokenizer.special_tokens_map.items()), tokenizer.chat_template
    )


def temporary_folder(owner: object) -> Path:
    """Make a folder that only this user can read, removed with its owner."""
    folder = tempfile.mkdtemp(prefix="pellm-data-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Show no progress bars of ``datasets``: each party of a terminal would draw its own.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        from datasets import utils as bars
    except ImportError as error:
        raise ImportError(
            "The data modules need the package datasets: pip install 'pellm-lightning[tasks]'."
        ) from error
    if bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()
