"""Lossy codecs of float32 vectors: bfloat16, block quantization, top-k. Pure, without state.

A codec works on chunks that fit into a core's cache with their intermediate results. Every party decodes the
same bytes by the same few float32 operations, so all get the same bits.
"""

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor
from typing_extensions import override

# Numbers encoded at a time.
_PIECE = 1 << 16
# Smallest absolute maximum of a block: the step of a smaller one could not be inverted in float32.
_TINY = 1e-36


class Codec(ABC):
    """A lossy codec: float32 numbers to bytes and back."""

    piece: int
    """Numbers encoded at a time; only the last piece of a vector has fewer."""
    block: int
    """Numbers encoded together, such as by one scale; vectors should be split between blocks."""

    def size_bytes(self, numbers: int) -> int:
        """Return the encoded size of ``numbers`` numbers; every piece begins at a multiple of 8 bytes."""
        whole, remainder = divmod(numbers, self.piece)
        return whole * _round_up_8(self._size(self.piece)) + _round_up_8(self._size(remainder))

    @abstractmethod
    def _size(self, numbers: int) -> int:
        """Return the encoded size of one piece, before padding."""

    @abstractmethod
    def encode_(self, values: Tensor, data: Tensor, generator: Generator) -> None:
        """Encode a piece, (n,) float32 on the CPU, n <= piece, into ``data``, uint8 of ``size_bytes(n)``."""

    @abstractmethod
    def decode_(self, data: Tensor, out: Tensor) -> None:
        """Decode ``data`` into ``out``, (n,) float32."""


class Bfloat16Codec(Codec):
    """Codec of bfloat16, rounded to nearest: 8 of float32's 24 significant bits, and its whole range."""

    piece = _PIECE
    block = 4

    @override
    def _size(self, numbers: int) -> int:
        return 2 * numbers

    @override
    def encode_(self, values: Tensor, data: Tensor, generator: Generator) -> None:
        data.view(torch.bfloat16)[: len(values)].copy_(values)

    @override
    def decode_(self, data: Tensor, out: Tensor) -> None:
        out.copy_(data.view(torch.bfloat16)[: len(out)])


class QuantizationCodec(Codec):
    """Stochastic block quantization: ``q = round(x / step + u)``, u uniform in (-1/2, 1/2).

    The step is the block's largest absolute value over ``2^(bits - 1) - 1``. The rounding is stochastic, so
    the expectation of ``q step`` is x (but for 2^-17 of a step, as u is a multiple of 2^-17): QSGD (Alistarh
    et al. 2017, arXiv:1610.02132), with the infinity norm of a block for the 2-norm.

    Args:
        bits: 8 or 4.
        block: Numbers that share a step, the scale.
    """

    def __init__(self, bits: int, block: int) -> None:
        self.bits = bits
        self.block = block
        self.piece = max(block, _PIECE // block * block)
        self._largest = float(2 ** (bits - 1) - 1)

    @override
    def _size(self, numbers: int) -> int:
        return -(-numbers // self.block) * (4 + self.block * self.bits // 8)

    @override
    def encode_(self, values: Tensor, data: Tensor, generator: Generator) -> None:
        blocks = -(-len(values) // self.block)
        if len(values) < blocks * self.block:  # zero-pad the last block
            values = torch.nn.functional.pad(values, (0, blocks * self.block - len(values)))
        x = values.view(blocks, self.block)
        largest = _row_max(x.abs()).clamp_(min=_TINY)
        steps, codes = self._parts(data, blocks)
        torch.div(largest, self._largest, out=steps)
        y = x * (self._largest / largest)
        y.add_(_uniform(y, generator)).round_().clamp_(-self._largest, self._largest)
        if self.bits == 4:
            low, high = y.view(2, -1)
            y = low.add_(high, alpha=16).add_(8)
        codes.copy_(y.view(-1))

    @override
    def decode_(self, data: Tensor, out: Tensor) -> None:
        blocks = -(-len(out) // self.block)
        steps, codes = self._parts(data, blocks)
        whole = len(out) == blocks * self.block
        y = out.view(blocks, -1) if whole else out.new_empty(blocks, self.block)
        if self.bits == 4:
            low, high = y.view(2, -1)
            low.copy_(codes)
            torch.mul(low, 1 / 16, out=high).floor_()
            low.sub_(8).sub_(high, alpha=16)
        else:
            y.view(-1).copy_(codes)
        y.mul_(steps)
        if not whole:
            out.copy_(y.view(-1)[: len(out)])

    def _parts(self, data: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """Return views of the steps, (blocks, 1), and of the codes."""
        codes = data[4 * blocks : 4 * blocks + blocks * self.block * self.bits // 8]
        return data[: 4 * blocks].view(torch.float32).view(-1, 1), codes.view(torch.int8)


class TopKCodec(Codec):
    """Top-k sparsification by absolute value in each chunk: k indices and quantized values, else zero.

    Args:
        chunk: Numbers of a chunk, at most 2^15, so that an index has 16 bits.
        k: Values kept of a chunk; of a shorter last chunk as large a fraction.
        bits: Bits of a value, as in ``QuantizationCodec``; the values of a chunk share a step.
    """

    def __init__(self, chunk: int, k: int, bits: int) -> None:
        self.block = chunk
        self.k = k
        self.piece = max(chunk, _PIECE // chunk * chunk)
        self._bits = bits

    @override
    def _size(self, numbers: int) -> int:
        whole, remainder = divmod(numbers, self.block)
        return self._chunks_size(whole, self.k) + self._chunks_size(
            bool(remainder), self._scaled_k(remainder)
        )

    @override
    def encode_(self, values: Tensor, data: Tensor, generator: Generator) -> None:
        for x, k, part in self._parts(values, data):
            # Ties may be broken in any way: the indices are sent.
            index = x.abs().topk(k, dim=1, sorted=False).indices
            indices, codes = self._split(part, len(x), k)
            indices.copy_(index.view(-1))
            QuantizationCodec(self._bits, _round_up_2(k)).encode_(
                _padded(x.gather(1, index)), codes, generator
            )

    @override
    def decode_(self, data: Tensor, out: Tensor) -> None:
        out.zero_()
        for x, k, part in self._parts(out, data):
            indices, codes = self._split(part, len(x), k)
            values = torch.empty(len(x) * _round_up_2(k))
            QuantizationCodec(self._bits, _round_up_2(k)).decode_(codes, values)
            x.scatter_(1, indices.view(len(x), k).long(), values.view(len(x), -1)[:, :k])

    def _scaled_k(self, remainder: int) -> int:
        return -(-self.k * remainder // self.block)

    def _chunks_size(self, chunks: int, k: int) -> int:
        if not chunks:
            return 0
        return _round_up_8(2 * chunks * k) + QuantizationCodec(self._bits, _round_up_2(k)).size_bytes(
            chunks * _round_up_2(k)
        )

    def _parts(self, values: Tensor, data: Tensor) -> list[tuple[Tensor, int, Tensor]]:
        """Return the whole chunks, (chunks, chunk), and the remainder as one, each with its k and bytes."""
        whole, remainder = divmod(len(values), self.block)
        size, end = self._chunks_size(whole, self.k), whole * self.block
        parts = [(values[:end].view(whole, -1), self.k, data[:size])] if whole else []
        if remainder:
            parts.append((values[end:].view(1, -1), self._scaled_k(remainder), data[size:]))
        return parts

    def _split(self, data: Tensor, chunks: int, k: int) -> tuple[Tensor, Tensor]:
        return data[: 2 * chunks * k].view(torch.int16), data[_round_up_8(2 * chunks * k) :]


def _row_max(x: Tensor) -> Tensor:
    """Return each row's maximum, (rows, 1); halving is several times as fast as torch's reduction."""
    width = x.shape[1]
    while width % 2 == 0:
        width //= 2
        x = torch.maximum(x[:, :width], x[:, width : 2 * width])
    return x.clone() if width == 1 else x.amax(dim=1, keepdim=True)


def _uniform(like: Tensor, generator: Generator) -> Tensor:
    """Draw uniformly from the odd multiples of 2^-17 in (-1/2, 1/2), in the shape of a tensor.

    64 random bits give four of them, in a fifth of the time of torch's ``uniform_``.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    drawn = words.view(torch.int16)[: like.numel()].to(torch.float32).view_as(like)
    return drawn.add_(0.5).mul_(2.0**-16)


def _padded(values: Tensor) -> Tensor:
    """Zero-pad rows to an even length and flatten: two codes of four bits share a byte."""
    return torch.nn.functional.pad(values, (0, _round_up_2(values.shape[1]) - values.shape[1])).view(-1)


def _round_up_2(count: int) -> int:
    return -(-count // 2) * 2


def _round_up_8(count: int) -> int:
    return -(-count // 8) * 8
