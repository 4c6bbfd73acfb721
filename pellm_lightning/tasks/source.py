"""Sources of a party's rows: files, saved data sets and data sets of the hub."""

import contextlib
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellm_lightning.comm.errors import did_you_mean
from pellm_lightning.tasks.reading import (
    SUFFIXES,
    Row,
    is_compressed,
    opened,
    read_rows,
    suffix_of,
    unpacking,
)
from pellm_lightning.tasks.signatures import LONGEST, describe_text

_ARROW = {".parquet": "parquet", ".arrow": "arrow"}
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Address of a party's rows: each name is a file, a folder of ``save_to_disk``, or a hub id.

    Args:
        names: The names, in the order in which they are read.
        split: Split of a saved or hub data set that has several.
        revision: Branch, tag or commit of a hub data set.
        columns: Names by which the delimiter of a table is recognised.
    """

    names: tuple[str, ...]
    split: str = "train"
    revision: str | None = None
    columns: tuple[str, ...] = ()

    def rows(self, cache_dir: str | None = None, streaming: bool = False) -> Iterator[tuple[str, Row]]:
        """Yield each row with its place.

        Args:
            cache_dir: Where data sets of the hub are stored.
            streaming: Read data sets of the hub as they are used instead.

        Raises:
            ValueError: Names the file, the row and what to do.
        """
        for name in self.names:
            path = Path(name)
            if path.is_file() and suffix_of(path) in SUFFIXES:
                yield from read_rows(path, self.columns)
            elif path.is_file() and is_compressed(path):
                with _unpacked(path, cache_dir) as whole:
                    yield from self._loaded(name, cache_dir, streaming, whole)
            else:
                yield from self._loaded(name, cache_dir, streaming)

    def stamp(self) -> str:
        """Return a digest of all that the rows depend on, so that nothing stale is taken from a cache.

        Data sets of the hub are identified by commit, which is asked for here.
        """
        digest = hashlib.sha256(repr(self).encode())
        for name in self.names:
            path = Path(name)
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    digest.update(_digest(file))
            if not path.exists():
                digest.update(_commit(name, self.revision).encode())
        return digest.hexdigest()

    def _loaded(
        self, name: str, cache_dir: str | None, streaming: bool, whole: Path | None = None
    ) -> Iterator[tuple[str, Row]]:
        """Yield the rows of a name, or of the file that it was unpacked to."""
        number = 0
        try:
            data = _load(str(whole or name), self.split, self.revision, cache_dir, streaming)
            decoders = _label_names(data.features or {})
            for number, row in enumerate(data, start=1):
                named = {column: decode(row[column]) for column, decode in decoders.items()}
                yield f"{name}:{number}", {**row, **named}
        except Exception as error:  # of pyarrow, fsspec, the hub's client and datasets, each its own
            if number or not _has_no_rows(error):
                raise ValueError(_is_pointer(name) or self._unreadable(name, error)) from error
        if not number:
            raise ValueError(f"{name}: has no rows. Write it again, or take it out of the pattern.")

    def _unreadable(self, name: str, error: Exception) -> str:
        return (
            f"{name}: cannot be read as a data set ({type(error).__name__}: {error}). It should be a file"
            f" of {', '.join([*SUFFIXES, *_ARROW])}, a folder of save_to_disk, or an id on the hub with"
            f" the split {self.split!r}; seen from {Path.cwd()}."
        )


def locate(argument: str, patterns: str | Sequence[str], party: int) -> tuple[str, ...]:
    """Return the files, saved data sets and hub ids that an argument names for one party.

    Args:
        argument: Name of the argument.
        patterns: Glob patterns (``**`` crosses folders), folders or hub ids, ``owner/name`` or
            ``owner/name:configuration``. ``{party}`` stands for the party's index.
        party: Zero-based index.

    Raises:
        ValueError: If one of them is nothing that can be read.
    """
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        asked = os.path.expanduser(pattern.replace("{party}", str(party)))
        # What is there under that very name is no pattern, whatever brackets are in it.
        names = [asked] if os.path.exists(asked) else sorted(glob.glob(asked, recursive=True))
        matches = [Path(name) for name in names]
        readable = [path for path in matches if path.is_file() or _is_saved(path)]
        for path in readable:
            _check_suffix(path)
        if readable:
            found.update(dict.fromkeys(map(str, readable)))
        elif not matches and _HUB.fullmatch(asked) and suffix_of(Path(asked)) not in (*SUFFIXES, *_ARROW):
            found[asked] = None
        else:
            raise ValueError(
                f"No file matches {asked!r} ({argument}={patterns!r}, party {party}, looked from"
                f" {Path.cwd()}).{_advice(asked, matches)} Parties count from 0; a relative pattern is seen"
                " from where the command was started."
            )
    if not found:
        raise ValueError(f"{argument}={patterns!r} names no file. Name one or several.")
    return tuple(found)


def check_splits(argument: str, names: Sequence[str], split: str, revision: str | None) -> None:
    """Validate that ``split`` or ``revision``, where they are given, choose something.

    Raises:
        ValueError: If all that an argument names is plain files.
    """
    if all(Path(name).is_file() for name in names):
        raise ValueError(
            f"split={split!r} and revision={revision!r} choose nothing in {argument}, since {names[0]} is a"
            " file, of which all rows are read. Take them out, or name a saved data set or one of the hub."
        )


def _advice(asked: str, matches: Sequence[Path]) -> str:
    """Return a sentence on why a pattern matches no file, "" if nothing is known."""
    if matches:
        return f" {matches[0]} is a folder: name its files, as {matches[0]}/*."
    if "://" in asked:
        return " Addresses are not read: download the file, or name a data set of the hub."
    if places := re.findall(r"\{\w*[^{},]*\}", asked):
        return f" Nothing replaces {places[0]!r}: the party's index is written '{{party}}'."
    path = Path(asked)
    near = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, near)


def _check_suffix(path: Path) -> None:
    known = (*SUFFIXES, *_ARROW)
    if path.is_file() and suffix_of(path) not in known:
        raise ValueError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}. Use {', '.join(known[:-1])} or"
            f" {known[-1]}, perhaps compressed, as .jsonl.gz; a spreadsheet is exported as CSV UTF-8."
        )


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _load(name: str, split: str, revision: str | None, cache_dir: str | None, streaming: bool) -> Any:
    import datasets

    path = Path(name)
    if path.is_dir():
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.DatasetDict) and split not in saved:
            raise ValueError(f"it has the splits {', '.join(saved)}: name one by --data.split")
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    if path.exists():
        # A stream of the file's rows: no second copy is written.
        return datasets.load_dataset(
            _ARROW[suffix_of(path)], data_files=[str(path.resolve())], split="train", streaming=True
        )
    name, _, configuration = name.partition(":")
    # Offline datasets takes the latest version that it has stored, whatever the revision.
    snapshot = _snapshot(name, revision)
    return datasets.load_dataset(
        snapshot or name,
        configuration or None,
        split=split,
        revision=None if snapshot else revision,
        cache_dir=cache_dir,
        streaming=streaming,
    )


@contextlib.contextmanager
def _unpacked(path: Path, folder: str | None) -> Iterator[Path]:
    """Unpack a file, which has to be read out of order, into the party's folder for as long as it is read."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        whole = Path(temporary, path.stem)
        with unpacking(path), opened(path) as packed, whole.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        yield whole


def _is_pointer(name: str) -> str | None:
    """Return what is wrong with a file that stands for another."""
    path = Path(name)
    if not path.is_file() or is_compressed(path):
        return None
    with path.open("rb") as file:
        problem = describe_text(file.read(LONGEST))
    return f"{name}: {problem}" if problem else None


def _has_no_rows(error: Exception) -> bool:
    return "BatchSize must be greater than 0" in str(error)  # of datasets, where a parquet file has none


def _label_names(features: Mapping[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """Return a decoder for each column of class indices that have names."""
    from datasets import ClassLabel

    def decoder(feature: ClassLabel) -> Callable[[Any], Any]:
        # -1 is what data sets without labels for a split have.
        return lambda index: None if index is None or index < 0 else feature.int2str(index)

    return {name: decoder(kind) for name, kind in features.items() if isinstance(kind, ClassLabel)}


def _digest(file: Path) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.digest()


def _commit(name: str, revision: str | None) -> str:
    """Return the commit of a hub data set; the revision if it is unknown."""
    from huggingface_hub import HfApi

    name = name.partition(":")[0]
    if snapshot := _snapshot(name, revision):
        return Path(snapshot).name
    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=10).sha)
    except Exception:  # offline or unknown: reading it says so
        return str(revision)


def _snapshot(name: str, revision: str | None) -> str | None:
    """Return the folder of a revision that was downloaded before, where there is no network."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not constants.HF_HUB_OFFLINE:
        return None
    with contextlib.suppress(LocalEntryNotFoundError):
        return str(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    return None
