"""Digests of tensors: equal for equal values on any processor or device, computed without copies.

A tensor's bytes are read as 32-bit integers and split into segments of ``_SEGMENT``. Each segment's sum with
odd 64-bit weights, one per position, is taken modulo 2^64; the sums are then hashed in order. Integer sums do
not depend on the order of addition, so threads, vector units and GPUs agree. A change of one value always
changes the digest; any other change, such as two swapped rows, is missed with a probability of at segments
2^-32 (multilinear hashing: Carter and Wegman 1979). It detects accidents, not forgery.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

_SEGMENT = 4096
_SEGMENT_BYTES = 4 * _SEGMENT
_CPU_SEGMENTS = 16
"""Segments at a time on a CPU, so that their products fit into its cache."""
_GPU_SEGMENTS = 1024
# Blocks of ``bits_digest``: 1 MiB fits into a core's cache, from which the second sum reads.
_ROWS, _COLUMNS = 128, 1024
_BLOCK_BYTES = 8 * _ROWS * _COLUMNS
# An odd number of 63 bits, drawn at random.
_FACTOR = 0x5851F42D4C957F2D


@dataclass(frozen=True)
class TensorDigest:
    """Digest of a tensor: its dtype and shape, and hashes of its values.

    Args:
        kind: Data type and shape, as in ``"float32[1000,32]"``.
        values: Hash of all values, in hexadecimal digits.
        blocks: Hashes of the blocks of rows between ``row_bounds``; empty unless it is a tall matrix.
    """

    kind: str
    values: str
    blocks: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "TensorDigest":
        """Parse the text of ``str``; other text is taken as values."""
        kind, _, tail = text.rpartition(" ") if text.count(" ") < 2 else text.partition(" ")
        values, _, blocks = tail.partition(" ")
        return cls(kind, values, tuple(blocks[at : at + 4] for at in range(0, len(blocks), 4)))

    def __str__(self) -> str:
        return f"{self.kind} {self.values} {''.join(self.blocks)}".rstrip()

    @property
    def shape(self) -> list[int]:
        """The tensor's shape."""
        inner = self.kind.partition("[")[2].rstrip("]")
        return [int(size) for size in inner.split(",") if size]


def tensor_digest(tensor: Tensor) -> TensorDigest:
    """Return the digest of a tensor: of its data type, its shape and every value.

    A tensor on the meta device has no values; a wrapper subclass, such as torchao's quantised tensors, is
    hashed by its inner tensors.
    """
    kind = f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"
    if tensor.is_meta:
        return TensorDigest(kind, "meta")
    parts = list(_parts(tensor.detach()))
    if len(parts) != 1 or parts[0][0]:
        hashed = hashlib.blake2b(digest_size=8)
        for name, part in parts:
            hashed.update(f"{name} {tensor_digest(part)}".encode())
        return TensorDigest(kind, hashed.hexdigest())
    plain = parts[0][1]
    bounds = row_bounds(plain.shape)
    blocks = [
        _values_digest(plain[start:stop] if len(bounds) > 2 else plain) for start, stop in pairwise(bounds)
    ]
    whole = blocks[0] if len(blocks) == 1 else hashlib.blake2b(b"".join(blocks), digest_size=8).digest()
    return TensorDigest(kind, whole.hex(), tuple(b.hex()[:4] for b in blocks) if len(blocks) > 1 else ())


def row_bounds(shape: Sequence[int]) -> list[int]:
    """Return the row boundaries of a tall matrix's blocks, finest at its last rows.

    Rows added to an embedding are its last: the last eight have a block each, earlier ones blocks of at
    segments a quarter of their distance from the end. Any other tensor is one block.
    """
    rows = shape[0] if shape else 1
    if len(shape) != 2 or rows < 4 * shape[1] or rows < 2:
        return [0, rows]
    distances, step = [0], 1
    while distances[-1] + step < rows:
        distances.append(distances[-1] + step)
        if distances[-1] >= 8 * step:
            step *= 2
    return [0, *(rows - distance for distance in reversed(distances))]


def differing_rows(shape: Sequence[int], ours: Sequence[str], theirs: Sequence[str]) -> list[range]:
    """Return the ranges of rows whose blocks differ; adjacent ones are merged."""
    bounds = row_bounds(shape)
    found: list[range] = []
    for start, stop, one, other in zip(bounds, bounds[1:], ours, theirs, strict=False):
        if one == other:
            continue
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(range(start, stop))
    return found


def _parts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the inner tensors of a tensor by name; a plain one has an empty name."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        for name in names:
            yield name, getattr(tensor, name)
        yield f"context {_settings(context)}", torch.empty(0)
        return
    if tensor.is_quantized:
        yield "integers", tensor.int_repr()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"scale {tensor.q_scale()} zero {tensor.q_zero_point()}", torch.empty(0)
        else:
            yield "scales", tensor.q_per_channel_scales()
            yield "zeros", tensor.q_per_channel_zero_points()
        return
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    # Subclasses of Parameter, such as bitsandbytes', may override these methods.
    yield "", tensor.as_subclass(Tensor).resolve_conj().resolve_neg()


def _settings(context: object) -> str:
    """Return the plain values of a subclass's context; an object's repr may contain addresses."""
    if isinstance(context, dict):
        return "{" + ", ".join(f"{key}: {_settings(value)}" for key, value in context.items()) + "}"
    if isinstance(context, tuple | list):
        return "(" + ", ".join(map(_settings, context)) + ")"
    plain = isinstance(context, str | int | float | bool | None | torch.dtype)
    return str(context) if plain else type(context).__name__


def _values_digest(tensor: Tensor) -> bytes:
    hashed = hashlib.blake2b(f"{tensor.numel() * tensor.element_size()}".encode(), digest_size=8)
    segments = _CPU_SEGMENTS if tensor.device.type == "cpu" else _GPU_SEGMENTS
    weights = _weights(tensor.device)
    scratch: Tensor | None = None
    sums: list[Tensor] = []
    for piece in _pieces(tensor, segments * _SEGMENT_BYTES):
        for integers in _integers(piece):
            if scratch is None or scratch.shape != integers.shape:
                scratch = torch.empty(integers.shape, dtype=torch.int64, device=tensor.device)
            sums.append(scratch.copy_(integers).mul_(weights[: integers.shape[1]]).sum(dim=1))
    if sums:
        hashed.update(torch.cat(sums).cpu().numpy().astype("<i8").tobytes())
    return hashed.digest()


def _pieces(tensor: Tensor, size_bytes: int) -> Iterator[Tensor]:
    """Yield the bytes of a tensor in index order, in pieces of whole segments but for the last.

    Only a non-contiguous tensor is copied, some rows at a time.
    """
    if not tensor.numel():
        return
    if not tensor.is_contiguous():
        row_bytes = tensor[0].numel() * tensor.element_size()
        rows = _SEGMENT_BYTES // math.gcd(row_bytes, _SEGMENT_BYTES)
        rows *= max(1, size_bytes // (rows * row_bytes))
        for some in tensor.split(rows):
            yield from _pieces(some.contiguous(), size_bytes)
        return
    flat = tensor.reshape(-1).view(torch.uint8)
    for piece in flat.split(size_bytes):
        # A checkpoint's tensors may be unaligned, integers may not.
        yield piece.clone() if piece.data_ptr() % 4 or piece.storage_offset() % 4 else piece


def _integers(piece: Tensor) -> Iterator[Tensor]:
    """Yield bytes as 32-bit integers of shape (segments, integers), zero-padded at the end."""
    whole = piece.numel() // _SEGMENT_BYTES * _SEGMENT_BYTES
    if whole:
        yield piece[:whole].view(torch.int32).view(-1, _SEGMENT)
    tail = piece[whole:]
    if tail.numel():
        tail = torch.nn.functional.pad(tail, (0, -tail.numel() % 4))
        yield tail.view(torch.int32).view(1, -1)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """Return the pseudorandom odd 64-bit weights, equal at all parties, of shape (_SEGMENT,)."""
    drawn = hashlib.shake_128(b"pellm_lightning.tensors.digest").digest(8 * _SEGMENT)
    weights = [
        int.from_bytes(drawn[at : at + 8], "little", signed=True) | 1 for at in range(0, len(drawn), 8)
    ]
    return torch.tensor(weights, dtype=torch.int64, device=device)


def bits_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's bits, in order, almost as fast as memory is read; 32 hex digits.

    The bytes are read as blocks of ``_ROWS`` x ``_COLUMNS`` 64-bit integers. Hashed (SHA-256) are the sum of
    each row; the sum of each column, with another odd factor in each block; and what is left behind the last
    block. All sums are modulo 2^64, so threads and vector units agree. A difference in one value, row or
    column always shows, and so do rows, columns and blocks that have changed places. Missed are four
    differences or more that cancel in all rows and columns of a block: no accident does that, a forger can.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    count = flat.numel() // _BLOCK_BYTES
    rows = torch.empty((count, _ROWS), dtype=torch.int64)
    columns = torch.zeros(_COLUMNS, dtype=torch.int64)
    of_block = torch.empty_like(columns)
    *blocks, rest = flat.split([*[_BLOCK_BYTES] * count, flat.numel() - count * _BLOCK_BYTES])
    for block, its_rows in zip(blocks, rows, strict=True):
        integers = _aligned(block).view(torch.int64).view(_ROWS, _COLUMNS)
        torch.sum(integers, dim=1, out=its_rows)
        columns.mul_(_FACTOR).add_(torch.sum(integers, dim=0, out=of_block))
    hashed = hashlib.sha256(rest.cpu().numpy().data)
    for sums in (rows, columns):
        hashed.update(sums.flatten().numpy().astype("<i8", copy=False).data)
    return hashed.hexdigest()[:32]


def _aligned(block: Tensor) -> Tensor:
    """Return bytes on the CPU that can be read as integers, which a part of a larger tensor may not be."""
    block = block.cpu()
    return block.clone() if block.data_ptr() % 8 or block.storage_offset() % 8 else block
