"""Snapshots of the global state: serialization, and durable storage that survives a crash of the party.

The format is a safetensors file whose metadata hold all but the tensors, as JSON; loading runs no code.
safetensors' own functions hold the interpreter lock while they copy (0.6 to 1.8 s for 200 MB to and from
bytes), so that heartbeats would stop and the others declare this party dead, and they copy all tensors. This
module releases the lock and goes tensor by tensor, and so reads and writes its files itself.
"""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pellm_lightning.tensors.digest import bits_digest
from pellm_lightning.tensors.owner_file import claimed, released

# Dtypes by safetensors' names.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# safetensors' limit, in bytes.
_MAX_HEADER = 100_000_000

_NAME = re.compile(r"round-(\d+)\.safetensors")
_KEPT = 2
_ATTEMPTS = "attempts"
_RECYCLED = "recycled.partial"
_OWNER = "owner"
# As long as the one that takes its place.
_NO_DIGEST = "0" * 64
# Above the length of any dimension; products of a few are exact, and can be compared.
_MAX_LENGTH = 1 << 53
# Attempt numbers reserved at a time.
_BLOCK = 1000


class DamagedError(ValueError):
    """A snapshot is truncated, corrupted, or not a snapshot."""


def write(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Write a state of tensors, numbers, strings, lists and dictionaries."""
    tensors, structure = _split(state)
    file.write(_header(tensors, {"structure": structure, "digest": _digest(structure, tensors)}))
    for tensor in tensors.values():
        file.write(bytes_of(tensor))


def read(file: BinaryIO) -> dict[str, Any]:
    """Read what ``write`` has written, each tensor into the memory where it stays.

    Args:
        file: A file that can seek, at its start.

    Raises:
        DamagedError: If it is truncated, corrupted, or not a snapshot.
    """
    with _damaged():
        tensors, metadata = _read(file)
        if metadata["digest"] != _digest(metadata["structure"], tensors):
            raise DamagedError("its digest does not match its content")
        return _joined(metadata["structure"], tensors)


@dataclass(frozen=True)
class Manifest:
    """Manifest of a state: all but the values of its tensors, which are sent on their own.

    Args:
        structure: The state as JSON, with names in place of its tensors.
        tensors: Dtype, by safetensors' name, and shape of each tensor, by name.
        digest: The ``digest`` of the state.
    """

    structure: str
    tensors: Mapping[str, tuple[str, list[int]]]
    digest: str

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> tuple["Manifest", list[Tensor]]:
        """Return the manifest of a state, and its tensors in order, not copied."""
        tensors, structure = _split(state)
        kinds = {name: (_CODES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}
        return cls(structure, kinds, _digest_of_bits(structure, tensors)), list(tensors.values())

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse a manifest that a peer has sent.

        Raises:
            DamagedError: If it is none.
        """
        with _damaged():
            structure, tensors, digest = json.loads(text)
            kinds = {str(name): (code, list(shape)) for name, (code, shape) in tensors.items()}
            for name, (code, shape) in kinds.items():
                if code not in _DTYPES or not all(type(n) is int and 0 <= n < _MAX_LENGTH for n in shape):
                    raise DamagedError(f"{name!r:.100} cannot be a {code!r:.100} of shape {shape!r:.100}")
            return cls(str(structure), kinds, str(digest))

    def to_json(self) -> str:
        """Return the manifest as JSON."""
        return json.dumps([self.structure, self.tensors, self.digest])

    @property
    def sizes_bytes(self) -> list[int]:
        """Bytes of each tensor."""
        return [math.prod(shape) * _DTYPES[code].itemsize for code, shape in self.tensors.values()]

    def new_tensors(self, memory: Tensor | None = None) -> list[Tensor]:
        """Return tensors for the values of the state.

        Args:
            memory: Flat memory for the first tensor of its dtype and size; the others are new.
        """
        made = []
        for code, shape in self.tensors.values():
            dtype = _DTYPES[code]
            if memory is not None and (memory.dtype, memory.numel()) == (dtype, math.prod(shape)):
                made.append(memory.view(shape))
                memory = None
                continue
            with _damaged():
                made.append(torch.empty(shape, dtype=dtype))
        return made

    def state(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Return the state with the values that were received.

        Raises:
            DamagedError: If they are not those that were sent.
        """
        named = dict(zip(self.tensors, tensors, strict=True))
        if _digest_of_bits(self.structure, named) != self.digest:
            raise DamagedError("its digest does not match its content")
        with _damaged():
            return _joined(self.structure, named)


def digest(state: Mapping[str, Any]) -> str:
    """Return a digest of a state, by which parties compare theirs; fast, since large tensors are summed.

    It tells accidental differences apart, as ``bits_digest`` does; what is on disk has a SHA-256.
    """
    tensors, structure = _split(state)
    return _digest_of_bits(structure, tensors)


class SnapshotError(RuntimeError):
    """A snapshot directory cannot be used: it is full, not writable, or another party's."""


class SnapshotDir:
    """Snapshot directory of a party, with the global state of the last rounds.

    Args:
        path: The directory, exclusive to this party; created when first needed.
        party: Name of this party, for the directory and for errors.

    Example:
        >>> snapshots = SnapshotDir("state")
        >>> snapshots.keep(7, {"round": 7, "global": torch.zeros(3)})
        >>> snapshots.newest()["round"]
        7
    """

    def __init__(self, path: str | Path, party: str = "") -> None:
        self.path = Path(path)
        self._party = party
        self._reserved: int | None = None

    def claim(self) -> None:
        """Create the directory, and take it for this party and this process, before anything depends on it.

        Raises:
            SnapshotError: If it cannot be written, or another party or process uses it.
        """
        with self._explained("use"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = claimed(self.path / _OWNER, self._party)
        if owner == self._party:
            return
        used = f"is that of party {owner}" if owner else f"is used by another process of party {self._party}"
        raise SnapshotError(
            f"Party {self._party} cannot use {self.path}, which {used}. Give each party a state_dir of its"
            " own, and start each party once. One that was copied must not be used: a party without any is"
            " sent the newest state by the others."
        )

    def keep(self, round: int, state: Mapping[str, Any]) -> None:
        """Write a snapshot durably, to survive a power failure.

        Its SHA-256 is computed while the disk writes the tensors; it is in the header, which is written last.
        The oldest file is overwritten: that costs half of what the pages of a new one do.
        """
        with self._explained("write"):
            self._keep(round, state)

    def _keep(self, round: int, state: Mapping[str, Any]) -> None:
        tensors, structure = _split(state)

        def written(file: BinaryIO) -> None:
            file.write(_header(tensors, {"structure": structure, "digest": _NO_DIGEST}))
            for tensor in tensors.values():
                file.write(bytes_of(tensor))
            file.truncate()
            _sync(file)

        with self._replaced(self._file(round), _RECYCLED) as file, ThreadPoolExecutor(1) as disk:
            on_disk = disk.submit(written, file)
            digest = _digest(structure, tensors)
            on_disk.result()
            file.seek(0)
            file.write(_header(tensors, {"structure": structure, "digest": digest}))
        for old in self._rounds()[:-_KEPT]:
            self._file(old).replace(self.path / _RECYCLED)

    def reserve(self, attempt: int) -> None:
        """Record durably that this party may take part in an attempt of this number.

        Attempt numbers must stay unique even if all parties crash. They are reserved in blocks, so that
        few rounds wait for the disk twice.
        """
        if attempt > self.reserved():
            with (
                self._explained("write"),
                self._replaced(self.path / _ATTEMPTS, f"{_ATTEMPTS}.partial") as file,
            ):
                file.write(str(attempt + _BLOCK).encode())
                file.truncate()
            self._reserved = attempt + _BLOCK

    def reserved(self) -> int:
        """Return an upper bound of the attempts that this party has taken part in, 0 if there is none."""
        if self._reserved is None:
            try:
                self._reserved = int((self.path / _ATTEMPTS).read_bytes())
            except (FileNotFoundError, ValueError):
                self._reserved = 0
        return self._reserved

    def newest(self) -> dict[str, Any] | None:
        """Load the latest snapshot, None if there is none.

        Raises:
            DamagedError: If the file is damaged; an older one is never taken for it.
            SnapshotError: If it cannot be read.
        """
        rounds = self._rounds()
        if not rounds:
            return None
        path = self._file(rounds[-1])
        try:
            with self._explained("read"):
                return _load(path)
        except DamagedError as error:
            raise DamagedError(
                f"The snapshot {path} is damaged ({error}). Do not delete it: this party may be one of the"
                f" few that have round {rounds[-1]}, which older snapshots lack. Restore the file from a"
                f" backup, or move the whole directory {self.path} away: the other parties then send this"
                " one the newest state, or say that too few of them have it."
            ) from error

    def clear(self) -> None:
        """Remove all snapshots, at the end of the federation."""
        for round in self._rounds():
            self._file(round).unlink()
        for name in (_ATTEMPTS, _RECYCLED, _OWNER):
            (self.path / name).unlink(missing_ok=True)
        released(self.path / _OWNER)
        self._reserved = 0

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say whose directory cannot be used, why, and what helps."""
        try:
            yield
        except OSError as error:
            cure = "Make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Make it writable"
            why = error.strerror or str(error)
            raise SnapshotError(
                f"Party {self._party} cannot {what} its global state in {self.path}: {why}. {cure}, or give"
                " another state_dir, and start this party again: the others send it the newest state."
            ) from error

    @contextmanager
    def _replaced(self, target: Path, partial: str) -> Iterator[BinaryIO]:
        """Replace a file atomically and durably by the one written in the block, which may hold old bytes."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.path / partial
        with open(path, "rb+" if path.exists() else "wb") as file:
            yield file
            _sync(file)
        path.replace(target)
        _sync_directory(self.path)

    def _file(self, round: int) -> Path:
        return self.path / f"round-{round}.safetensors"

    def _rounds(self) -> list[int]:
        if not self.path.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)


def _load(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return read(file)


@contextmanager
def _damaged() -> Iterator[None]:
    """Say of whatever untrusted content causes that it is damaged."""
    try:
        yield
    except DamagedError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise DamagedError(f"it is not a snapshot: {error}") from error


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Split a state into tensors by name and its structure, which holds all else, as JSON."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_structure(state, tensors))
    return tensors, structure


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the file's header: dtypes, shapes and offsets of the tensors, and the metadata."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of an untrusted file."""
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not length <= min(size_bytes - 8, _MAX_HEADER):
        raise DamagedError("its header is truncated")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    tensors, end, left = {}, 0, size_bytes - 8 - length
    # Each byte belongs to exactly one tensor, so that a short file cannot claim large ones.
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, stop), shape, dtype = entry["data_offsets"], entry["shape"], _DTYPES[entry["dtype"]]
        size = math.prod(shape) * dtype.itemsize
        if begin != end or min(shape, default=0) < 0 or stop - begin != size or stop > left:
            raise DamagedError(f"{name!r:.100} has invalid offsets")
        tensors[name], end = torch.empty(shape, dtype=dtype), stop
        if file.readinto(bytes_of(tensors[name])) != size:  # type: ignore[attr-defined]
            raise DamagedError(f"{name!r:.100} is truncated")
    if end != left:
        raise DamagedError("it is longer than its tensors")
    return tensors, metadata


def dtype_code(dtype: str) -> str:
    """Return safetensors' name of a dtype, given torch's, such as "float32"."""
    return _CODES[getattr(torch, dtype)]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's memory as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(structure: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(structure.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _digest_of_bits(structure: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(structure.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {bits_digest(tensor)}".encode())
    return digest.hexdigest()


def _structure(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON; its tensors are moved into ``tensors`` under numbered names."""
    if isinstance(value, Tensor) and value.dtype in _CODES:
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # As pairs, since an optimizer's state has integer keys.
        return {"pairs": [[key, _structure(item, tensors)] for key, item in value.items()]}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_structure(item, tensors) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    kind = f" of {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else ""
    raise TypeError(f"A state cannot hold a {type(value).__name__}{kind}.")


def _joined(structure: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state = _join(json.loads(structure), tensors)
    if not isinstance(state, dict):
        raise DamagedError("it is not a state")
    return state


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _join(item, tensors) for key, item in value["pairs"]}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make a rename durable; not all systems can open a directory."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
