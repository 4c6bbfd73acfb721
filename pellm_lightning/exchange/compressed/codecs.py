"""Numbers as fewer bytes, and back. Pure: what is kept from round to round is in ``memory.py``.

A codec works on pieces that stay in a core's cache with all that is computed of them. Every party decodes the
same bytes by the same few operations of float32, so all get the same bits.
"""

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor
from typing_extensions import override

# Numbers encoded at a time.
_PIECE = 1 << 16
# Of a block whose largest value is below, the step could not be inverted in float32.
_TINY = 1e-36


class Codec(ABC):
    """How many numbers become few bytes."""

    piece: int
    """Most numbers that are encoded at a time; all pieces of a vector but the last have so many."""
    block: int
    """Numbers that share something; vectors are best cut between blocks."""

    def size_bytes(self, numbers: int) -> int:
        """Return the bytes of so many numbers; pieces add up, and each begins at a multiple of 8."""
        whole, rest = divmod(numbers, self.piece)
        return whole * _eights(self._size(self.piece)) + _eights(self._size(rest))

    @abstractmethod
    def _size(self, numbers: int) -> int:
        """Return the bytes of a piece."""

    @abstractmethod
    def encode_(self, values: Tensor, data: Tensor, generator: Generator) -> None:
        """Write a piece, (n,) float32 on the CPU, n <= piece, into ``data``, uint8 of ``size_bytes(n)``."""

    @abstractmethod
    def decode_(self, data: Tensor, out: Tensor) -> None:
        """Overwrite ``out``, (n,) float32, by what ``data`` says."""


class Casting(Codec):
    """The nearest bfloat16: 8 of float32's 24 bits, all of its range."""

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


class Blocks(Codec):
    """Whole numbers of few bits times a step for each block: ``q = round(x / step + u)``, u in (-1/2, 1/2).

    The step is the block's largest absolute value over ``2^(bits - 1) - 1``. The rounding is stochastic, so
    the expectation of ``q step`` is x (but for 2^-17 of a step, as u is a multiple of 2^-17): the scheme of
    QSGD (Alistarh et al. 2017, arXiv:1610.02132), with the largest value of a block for the norm.

    Args:
        bits: 8 or 4.
        block: Numbers that share a step.
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
        if len(values) < blocks * self.block:  # the last block is filled up by zeros
            values = torch.nn.functional.pad(values, (0, blocks * self.block - len(values)))
        x = values.view(blocks, self.block)
        largest = _largest_of(x.abs()).clamp_(min=_TINY)
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
        """Return where the steps lie, (blocks, 1), and the codes."""
        codes = data[4 * blocks : 4 * blocks + blocks * self.block * self.bits // 8]
        return data[: 4 * blocks].view(torch.float32).view(-1, 1), codes.view(torch.int8)


class Largest(Codec):
    """The k numbers of each chunk that are largest by absolute value, and where they are; the rest is zero.

    Args:
        chunk: Numbers of a chunk, at most 2^15, so that an index has 16 bits.
        k: How many of them are sent; of a shorter last chunk as large a part.
        bits: Of a value, as in ``Blocks``; the values of a chunk share a step.
    """

    def __init__(self, chunk: int, k: int, bits: int) -> None:
        self.block = chunk
        self.k = k
        self.piece = max(chunk, _PIECE // chunk * chunk)
        self._bits = bits

    @override
    def _size(self, numbers: int) -> int:
        whole, rest = divmod(numbers, self.block)
        return self._size_of(whole, self.k) + self._size_of(bool(rest), self._share(rest))

    @override
    def encode_(self, values: Tensor, data: Tensor, generator: Generator) -> None:
        for x, k, part in self._parts(values, data):
            # Of k alike, any will do: all parties are told which.
            index = x.abs().topk(k, dim=1, sorted=False).indices
            indices, codes = self._split(part, len(x), k)
            indices.copy_(index.view(-1))
            Blocks(self._bits, _evens(k)).encode_(_padded(x.gather(1, index)), codes, generator)

    @override
    def decode_(self, data: Tensor, out: Tensor) -> None:
        out.zero_()
        for x, k, part in self._parts(out, data):
            indices, codes = self._split(part, len(x), k)
            values = torch.empty(len(x) * _evens(k))
            Blocks(self._bits, _evens(k)).decode_(codes, values)
            x.scatter_(1, indices.view(len(x), k).long(), values.view(len(x), -1)[:, :k])

    def _share(self, rest: int) -> int:
        return -(-self.k * rest // self.block)

    def _size_of(self, chunks: int, k: int) -> int:
        if not chunks:
            return 0
        return _eights(2 * chunks * k) + Blocks(self._bits, _evens(k)).size_bytes(chunks * _evens(k))

    def _parts(self, values: Tensor, data: Tensor) -> list[tuple[Tensor, int, Tensor]]:
        """Return the whole chunks, (chunks, chunk), and the rest as one chunk, each with its k and bytes."""
        whole, rest = divmod(len(values), self.block)
        size, end = self._size_of(whole, self.k), whole * self.block
        parts = [(values[:end].view(whole, -1), self.k, data[:size])] if whole else []
        if rest:
            parts.append((values[end:].view(1, -1), self._share(rest), data[size:]))
        return parts

    def _split(self, data: Tensor, chunks: int, k: int) -> tuple[Tensor, Tensor]:
        return data[: 2 * chunks * k].view(torch.int16), data[_eights(2 * chunks * k) :]


def _largest_of(x: Tensor) -> Tensor:
    """Return the largest of each row, (rows, 1); halving runs several times as fast as torch's reduction."""
    width = x.shape[1]
    while width % 2 == 0:
        width //= 2
        x = torch.maximum(x[:, :width], x[:, width : 2 * width])
    return x.clone() if width == 1 else x.amax(dim=1, keepdim=True)


def _uniform(like: Tensor, generator: Generator) -> Tensor:
    """Return numbers that are uniform among the odd multiples of 2^-17 in (-1/2, 1/2).

    64 random bits make four of them, in a fifth of the time that torch's ``uniform_`` takes.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    drawn = words.view(torch.int16)[: like.numel()].to(torch.float32).view_as(like)
    return drawn.add_(0.5).mul_(2.0**-16)


def _padded(values: Tensor) -> Tensor:
    """Return rows of an even length, flat: two codes of four bits share a byte."""
    return torch.nn.functional.pad(values, (0, _evens(values.shape[1]) - values.shape[1])).view(-1)


def _evens(count: int) -> int:
    return -(-count // 2) * 2


def _eights(count: int) -> int:
    return -(-count // 8) * 8
