"""Digests of whole tensors: equal for equal values on any processor or device, computed in place.

A tensor's bytes are read as 32-bit integers and cut into segments of ``_SEGMENT`` of them. Each segment's sum
with odd 64-bit weights, one per position, wraps at 2^64; the sums are then hashed in their order. Sums of
integers do not depend on the order of addition, so threads, vector units and GPUs agree. One value that
changes always changes the digest; any other change, such as two rows that are swapped, escapes with a
probability of at most 2^-32 (multilinear hashing: Carter and Wegman 1979). It guards against accidents, not
against forgery.
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
"""Segments at a time on a CPU: their products then stay in its cache."""
_GPU_SEGMENTS = 1024


@dataclass(frozen=True)
class TensorDigest:
    """Digest of a tensor, as text: what it is, then the digest of its values.

    Args:
        kind: Data type and shape, as in ``"float32[1000,32]"``.
        values: Digest of all values, in hexadecimal digits.
        blocks: Digests of the blocks of rows between ``row_bounds``; empty for what is no tall matrix.
    """

    kind: str
    values: str
    blocks: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "TensorDigest":
        """Return what ``str`` of a digest was made from; text of another form is taken as values."""
        kind, _, rest = text.rpartition(" ") if text.count(" ") < 2 else text.partition(" ")
        values, _, blocks = rest.partition(" ")
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

    A tensor on the meta device has no values, and those of a subclass that is made of others (the quantised
    tensors of torchao, for example) are those of its parts.
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
    """Return between which rows blocks of a tall matrix begin and end, finest at its last rows.

    Rows that were added to an embedding stand at its end: the last eight have a block each, those before them
    come in blocks of at most a quarter of their distance from the end. Anything else is one block.
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
    """Return the ranges of rows whose blocks differ; neighbours are joined."""
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
    """Yield the plain tensors that a tensor is made of; a plain one has no name."""
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
    # A subclass of Parameter, such as that of bitsandbytes, may do something else with what it is asked.
    yield "", tensor.as_subclass(Tensor).resolve_conj().resolve_neg()


def _settings(context: object) -> str:
    """Return the plain values of a subclass's context; an object's representation may hold addresses."""
    if isinstance(context, dict):
        return "{" + ", ".join(f"{key}: {_settings(value)}" for key, value in context.items()) + "}"
    if isinstance(context, tuple | list):
        return "(" + ", ".join(map(_settings, context)) + ")"
    plain = isinstance(context, str | int | float | bool | None | torch.dtype)
    return str(context) if plain else type(context).__name__


def _values_digest(tensor: Tensor) -> bytes:
    hashed = hashlib.blake2b(f"{tensor.numel() * tensor.element_size()}".encode(), digest_size=8)
    most = _CPU_SEGMENTS if tensor.device.type == "cpu" else _GPU_SEGMENTS
    weights = _weights(tensor.device)
    scratch: Tensor | None = None
    sums: list[Tensor] = []
    for piece in _pieces(tensor, most * _SEGMENT_BYTES):
        for words in _words(piece):
            if scratch is None or scratch.shape != words.shape:
                scratch = torch.empty(words.shape, dtype=torch.int64, device=tensor.device)
            sums.append(scratch.copy_(words).mul_(weights[: words.shape[1]]).sum(dim=1))
    if sums:
        hashed.update(torch.cat(sums).cpu().numpy().astype("<i8").tobytes())
    return hashed.digest()


def _pieces(tensor: Tensor, size_bytes: int) -> Iterator[Tensor]:
    """Yield the bytes of a tensor in the order of its indices, all pieces but the last of whole segments.

    Only a tensor that is not contiguous is copied, some rows at a time.
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
        # A checkpoint's tensors may lie at any address, integers may not.
        yield piece.clone() if piece.data_ptr() % 4 or piece.storage_offset() % 4 else piece


def _words(piece: Tensor) -> Iterator[Tensor]:
    """Yield bytes as 32-bit integers of shape (segments, words); the last ones are filled up with zeros."""
    whole = piece.numel() // _SEGMENT_BYTES * _SEGMENT_BYTES
    if whole:
        yield piece[:whole].view(torch.int32).view(-1, _SEGMENT)
    rest = piece[whole:]
    if rest.numel():
        rest = torch.nn.functional.pad(rest, (0, -rest.numel() % 4))
        yield rest.view(torch.int32).view(1, -1)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """Return odd 64-bit integers, which are the same everywhere, of shape (_SEGMENT,)."""
    drawn = hashlib.shake_128(b"pellm_lightning.tensors.digest").digest(8 * _SEGMENT)
    weights = [
        int.from_bytes(drawn[at : at + 8], "little", signed=True) | 1 for at in range(0, len(drawn), 8)
    ]
    return torch.tensor(weights, dtype=torch.int64, device=device)


def bits_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's bits: equal for equal bits only, order included; 16 hex digits."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=8).hexdigest()
