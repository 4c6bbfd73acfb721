"""Global state as bytes: what a party keeps on disk through its own death, and hands to one that comes back.

The bytes are a safetensors file whose metadata hold everything that is no tensor, as JSON; nothing in them
can run code. They are written and read here and not by safetensors' own functions, which hold the interpreter
while they copy: seconds for a large state, in which this party's heartbeat would stand still and the others
take it for dead.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What safetensors calls the dtypes.
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
# As in safetensors.
_MAX_HEADER = 100_000_000

_NAME = re.compile(r"round-(\d+)\.safetensors")
_KEPT = 2
_ATTEMPTS = "attempts"
# Numbers of attempts that are reserved at a time.
_BLOCK = 1000


class DamagedError(ValueError):
    """Bytes that are no whole state."""


def pack(state: Mapping[str, Any]) -> memoryview:
    """Return a state of tensors, numbers, strings, lists and dictionaries as bytes."""
    tensors, metadata = _apart(state)
    parts = [np.frombuffer(_header(tensors, metadata), np.uint8), *map(_bytes_of, tensors.values())]
    packed = np.empty(sum(part.nbytes for part in parts), np.uint8)
    np.concatenate(parts, out=packed)
    return packed.data


def unpack(packed: bytes | memoryview) -> dict[str, Any]:
    """Return what ``pack`` has packed.

    Raises:
        DamagedError: If the bytes are cut short, changed, or something else.
    """
    try:
        tensors, metadata = _read(memoryview(packed))
        if metadata["digest"] != _digest(metadata["words"], tensors):
            raise DamagedError("its digest is not that of what it holds")
        state = _put_together(json.loads(metadata["words"]), tensors)
    except DamagedError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RecursionError,
        RuntimeError,
    ) as error:
        raise DamagedError(f"it is no whole state: {error}") from error
    if not isinstance(state, dict):
        raise DamagedError("it is no state")
    return state


def digest(state: Mapping[str, Any]) -> str:
    """Return a digest of a state: equal for equal bits only; 64 hex digits (SHA-256)."""
    return _apart(state)[1]["digest"]


class SnapshotDir:
    """The directory in which a party keeps the global state of the last rounds.

    Args:
        path: The directory, this party's own; made when something is first kept.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reserved: int | None = None

    def keep(self, round: int, state: Mapping[str, Any]) -> str:
        """Make a state durable, so that it survives the machine's loss of power; return its digest."""
        tensors, metadata = _apart(state)

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                file.write(_header(tensors, metadata))
                for tensor in tensors.values():
                    file.write(_bytes_of(tensor).data)

        self._replace(self._file(round), write)
        for old in self._rounds()[:-_KEPT]:
            self._file(old).unlink()
        return metadata["digest"]

    def reserve(self, attempt: int) -> None:
        """Make durable that this party may take part in an attempt of this number.

        Attempts are told apart by their numbers, also when all parties have died in between. A block of
        numbers is reserved at a time, so that few rounds wait for the disk twice.
        """
        if attempt > self.reserved():
            content = str(attempt + _BLOCK)
            self._replace(self.path / _ATTEMPTS, lambda partial: partial.write_text(content))
            self._reserved = attempt + _BLOCK

    def reserved(self) -> int:
        """Return a number that is not below any attempt this party has taken part in, 0 if there is none."""
        if self._reserved is None:
            try:
                self._reserved = int((self.path / _ATTEMPTS).read_bytes())
            except (FileNotFoundError, ValueError):
                self._reserved = 0
        return self._reserved

    def newest(self) -> dict[str, Any] | None:
        """Return the state of the latest round, None if there is none.

        Raises:
            DamagedError: If the file was damaged; the message names the last good one.
        """
        rounds = self._rounds()
        if not rounds:
            return None
        path = self._file(rounds[-1])
        try:
            return unpack(path.read_bytes())
        except DamagedError as error:
            good = next((self._file(r) for r in reversed(rounds[:-1]) if self._is_good(r)), None)
            cure = (
                f"The last good one is {good}: remove the damaged file to go on from there"
                if good
                else "No other is there: remove it to begin without state"
            )
            raise DamagedError(
                f"The federation's state in {path} is damaged ({error}). {cure}; the other parties then bring"
                " this one up to date."
            ) from error

    def clear(self) -> None:
        """Remove all states, since the federation has ended."""
        for round in self._rounds():
            self._file(round).unlink()
        (self.path / _ATTEMPTS).unlink(missing_ok=True)
        self._reserved = 0

    def _replace(self, target: Path, write: Callable[[Path], object]) -> None:
        """Replace a file as a whole, and durably, by what is written to another path."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
        _sync_directory(self.path)

    def _file(self, round: int) -> Path:
        return self.path / f"round-{round}.safetensors"

    def _rounds(self) -> list[int]:
        if not self.path.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _is_good(self, round: int) -> bool:
        try:
            unpack(self._file(round).read_bytes())
        except DamagedError:
            return False
        return True


def _apart(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a state's tensors by name, and all else as a safetensors file's metadata."""
    tensors: dict[str, Tensor] = {}
    words = json.dumps(_taken_apart(state, tensors))
    return tensors, {"words": words, "digest": _digest(words, tensors)}


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return what comes before the tensors: where each one lies, and the metadata."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    return len(words).to_bytes(8, "little") + words


def _read(packed: memoryview) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata; what a peer sent may be anything."""
    length = int.from_bytes(packed[:8], "little")
    if not length <= min(len(packed) - 8, _MAX_HEADER):
        raise DamagedError("its header is cut short")
    header = json.loads(bytes(packed[8 : 8 + length]))
    metadata = header.pop("__metadata__")
    data = np.frombuffer(packed[8 + length :], np.uint8)
    tensors, end = {}, 0
    # Each byte belongs to one tensor, so that a short file cannot stand for large ones.
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, stop), shape, dtype = told["data_offsets"], told["shape"], _DTYPES[told["dtype"]]
        size = math.prod(shape) * dtype.itemsize
        if begin != end or min(shape, default=0) < 0 or stop - begin != size or stop > len(data):
            raise DamagedError(f"{name!r:.100} does not fit its place")
        tensors[name], end = torch.empty(shape, dtype=dtype), stop
        np.copyto(_bytes_of(tensors[name]), data[begin:stop])
    if end != len(data):
        raise DamagedError("it is longer than its tensors")
    return tensors, metadata


def _bytes_of(tensor: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Return a contiguous tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _digest(words: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(words.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor).data)
    return digest.hexdigest()


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON can hold it; its tensors are put aside, by numbered names."""
    if isinstance(value, Tensor) and value.dtype in _CODES:
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # As pairs, since an optimizer's state has numbers for keys.
        return {"pairs": [[key, _taken_apart(item, tensors)] for key, item in value.items()]}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_taken_apart(item, tensors) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    kind = f" of {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else ""
    raise TypeError(f"A state cannot hold a {type(value).__name__}{kind}.")


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _put_together(item, tensors) for key, item in value["pairs"]}
    if isinstance(value, list):
        return [_put_together(item, tensors) for item in value]
    return value


def _sync_directory(path: Path) -> None:
    """Make a rename durable; not all systems let a directory be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
