"""A vector in memory that all parties of one host share: sums over it move no bytes through a socket.

Each party has a segment of its own in one anonymous file. For a sum each party adds up one shard of all segments and
writes the result into the same place of each, so the work is split and every party reads the very same bits.
"""

import mmap
import os
import secrets
from pathlib import Path

import torch
from torch import Tensor

_MEMORY_FILES = Path("/dev/shm")
# Scalars that are added up at a time: the chunks of four parties stay in a core's cache.
_CHUNK = 1 << 16


class SharedVector:
    """One party's view of the segments of all parties.

    Args:
        buffer: The shared mapping, large enough for ``num_parties`` segments.
        size: Scalars in a segment.
        party: This party.
        num_parties: Number of parties.
    """

    def __init__(self, buffer: mmap.mmap, size: int, party: int, num_parties: int) -> None:
        self._segments = torch.frombuffer(buffer, dtype=torch.float32)[: size * num_parties].view(
            num_parties, size
        )
        self._scratch = torch.empty(min(_CHUNK, size))
        self.party = party
        self.mine: Tensor = self._segments[party]
        """This party's segment, of shape (size,)."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a part of this party's segment."""
        offset = tensor.data_ptr() - self.mine.data_ptr()
        return offset >= 0 and offset + tensor.nbytes <= self.mine.nbytes

    def sum_shard_(self, tensors: list[Tensor]) -> None:
        """Sum this party's share of the given parts over all segments, in the order of the parties.

        All parties must have filled theirs, and must wait for all before they read the result.
        """
        for tensor in tensors:
            start = (tensor.data_ptr() - self.mine.data_ptr()) // tensor.element_size()
            parts = self._segments[:, start : start + tensor.numel()].tensor_split(len(self._segments), dim=1)
            for chunk in parts[self.party].split(_CHUNK, dim=1):
                self._sum_(chunk)

    def _sum_(self, chunk: Tensor) -> None:
        total = self._scratch[: chunk.shape[1]].copy_(chunk[0])
        for segment in chunk[1:]:
            total.add_(segment)
        for segment in chunk:
            segment.copy_(total)


def create(size_bytes: int) -> tuple[str, mmap.mmap] | None:
    """Create a memory file, readable by this user only; return its path and mapping, or None if there is no room.

    The memory is reserved at once: a page that cannot be had later would kill the process.
    """
    path = _MEMORY_FILES / f"pellm-{secrets.token_hex(16)}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        return str(path), mmap.mmap(descriptor, size_bytes)
    except OSError:
        path.unlink()
        return None
    finally:
        os.close(descriptor)


def attach(path: str, size_bytes: int) -> mmap.mmap | None:
    """Map a memory file that another party has created; None if it cannot be seen from here (another host or user)."""
    if Path(path).parent != _MEMORY_FILES:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return mmap.mmap(descriptor, size_bytes) if os.fstat(descriptor).st_size == size_bytes else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def unlink(path: str) -> None:
    """Remove the file's name; the memory lives as long as a party maps it, and no longer."""
    Path(path).unlink()
