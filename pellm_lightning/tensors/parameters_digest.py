"""Digest of named parameters, in memory or in a safetensors file; it resists forgery, and needs no torch."""

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer

Part: TypeAlias = "tuple[str, str, Sequence[int], Buffer]"
"""Name, dtype by safetensors' name ("F32"), shape, and the values as they lie in memory, little-endian."""

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# safetensors' limit, in bytes.
_MAX_HEADER = 100_000_000


def parameters_digest(parts: Iterable[Part]) -> str:
    """Return the SHA-256 of parameters: of names, dtypes, shapes, and the SHA-256 of each one's values.

    Example:
        >>> parameters_digest([("w", "F32", (1,), b"0000")])[:8]
        'f8786561'
    """
    rows = sorted(
        [name, dtype, [*shape], hashlib.sha256(data).hexdigest()] for name, dtype, shape, data in parts
    )
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def parts_in(path: Path) -> Iterator[Part]:
    """Yield the parameters in a safetensors file, whose memory is valid until the next one.

    Raises:
        ValueError: If the file is malformed.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        length = int.from_bytes(mapped[:8], "little")
        if not 0 < length <= min(len(mapped) - 8, _MAX_HEADER):
            raise ValueError(f"{path} is no safetensors file: its header is cut off.")
        try:
            header = json.loads(mapped[8 : 8 + length])
            entries = [(name, *_entry(of)) for name, of in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no safetensors file: {error!r}.") from error
        with memoryview(mapped) as memory:
            for name, dtype, shape, start, stop in entries:
                if not (0 <= start <= stop <= len(memory) - 8 - length):
                    raise ValueError(f"{path} is cut off in {name!r}.")
                with memory[8 + length + start : 8 + length + stop] as data:
                    yield name, dtype, shape, data


def _entry(of: dict[str, object]) -> tuple[str, list[int], int, int]:
    """Return dtype, shape and place of a tensor in a header."""
    dtype, shape, place = of["dtype"], of["shape"], of["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(place, list):
        raise TypeError("a tensor without dtype, shape and place")
    start, stop = map(int, place)
    if dtype in _SIZES and stop - start != _SIZES[dtype] * math.prod(shape):
        raise ValueError("a tensor of another size than its shape")
    return dtype, shape, start, stop
