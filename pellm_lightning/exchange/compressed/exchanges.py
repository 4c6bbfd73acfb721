"""Exchanges that send fewer bytes, as users configure them; what they do is in ``encoded.py``."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm import Collectives
from pellm_lightning.exchange.base import Exchange
from pellm_lightning.exchange.compressed.codecs import Blocks, Casting, Codec, Largest
from pellm_lightning.exchange.compressed.collectives import (
    CompressedCollectives,
    DenseCollectives,
    SparseCollectives,
)
from pellm_lightning.exchange.error_feedback import ErrorFeedback

_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 1 << 15


class _Compressed(Exchange):
    """What the compressed exchanges have in common: metrics and words cross as they are."""

    exact = False
    supports: Literal["parties", "sums", "rounded", "sparse"] = "rounded"
    error_feedback: bool
    seed: int

    @override
    def new_error_feedback(self, vector: Tensor) -> ErrorFeedback:
        """Return this party's residuals, zeros."""
        return ErrorFeedback(vector, keeps=self.error_feedback)

    @override
    def open(
        self,
        federation: Collectives,
        revealing: Callable[[], None],
        view: str = "",
        error_feedback: ErrorFeedback | None = None,
    ) -> Collectives:
        """Return sums of codes; without a memory there is no vector to sum, and all else is exact."""
        if error_feedback is None:
            return federation
        return self._sums()(federation, self._codec(), error_feedback, self.seed)

    def _sums(self) -> type[CompressedCollectives]:
        return DenseCollectives

    @abstractmethod
    def _codec(self) -> Codec: ...


class Cast(_Compressed):
    """Send updates and their sums as bfloat16: half the bytes. They are added up in float32.

    The nearest value is taken, which misses a number by 2^-9 of it at most. float16 is refused: an update of
    1e-6 or so, as a low learning rate and many parties make them, would lose its digits in it, and below 3e-8
    all of it; ``Quantized(bits=8)`` sends half as many bytes and has a range of its own for each block.

    Args:
        dtype: "bfloat16".
        error_feedback: Whether a party adds to its next update what the last ones lost; it takes 8 bytes of
            memory for each parameter.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, dtype: Literal["bfloat16"] = "bfloat16", error_feedback: bool = False) -> None:
        if dtype != "bfloat16":
            raise ValueError(
                f"dtype={dtype!r} must be 'bfloat16'. float16 has no room for updates below 6e-8, nor for any"
                " above 65504: use Quantized(bits=8), which has a scale for each block and sends half as many"
                " bytes."
            )
        _check_flag(error_feedback)
        self.dtype = dtype
        self.error_feedback = error_feedback
        self.seed = 0  # nothing is drawn

    def __repr__(self) -> str:
        return f"Cast({self.dtype!r}, error_feedback={self.error_feedback})"

    @override
    def _codec(self) -> Codec:
        return Casting()


class Quantized(_Compressed):
    """Send updates and their sums as whole numbers of few bits, with a scale for each block of them.

    A value is a whole number times the block's largest absolute value over 127 (8 bits) or 7 (4 bits),
    rounded at random so that its expectation is the value: QSGD (Alistarh et al. 2017, arXiv:1610.02132) with
    the scale of a block for the norm. Sums are formed in float32, then rounded likewise. 8 bits take 0.258 of
    the bytes of ``Plain()``, 4 bits 0.133, with blocks of 128.

    Args:
        bits: 8 or 4. Of 4 bits Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512) and MuLoCo
            (arXiv:2505.23725) report no loss in pre-training.
        block_size: Numbers that share a scale, a multiple of 8. Smaller blocks are more precise and take more
            bytes: 4 each for the scale.
        error_feedback: Whether a party adds to its next update what the last ones lost (Karimireddy et al.
            2019, arXiv:1901.09847); it takes 8 bytes of memory for each parameter.
        seed: Of the rounding. Parties round independently of each other whatever it is, and never touch
            torch's global generator.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self, bits: Literal[8, 4] = 8, block_size: int = 128, error_feedback: bool = False, seed: int = 0
    ) -> None:
        _check_bits(bits)
        if block_size % 8 or not _SMALLEST_BLOCK <= block_size <= _LARGEST_BLOCK:
            raise ValueError(
                f"block_size={block_size!r} must be a multiple of 8 from {_SMALLEST_BLOCK} to"
                f" {_LARGEST_BLOCK}: that many numbers share a scale of 4 bytes."
            )
        _check_flag(error_feedback)
        self.bits = bits
        self.block_size = block_size
        self.error_feedback = error_feedback
        self.seed = seed

    def __repr__(self) -> str:
        return (
            f"Quantized(bits={self.bits}, block_size={self.block_size},"
            f" error_feedback={self.error_feedback}, seed={self.seed})"
        )

    @override
    def _codec(self) -> Codec:
        return Blocks(self.bits, self.block_size)


class TopK(_Compressed):
    """Send of each chunk of the update only the k largest values, by absolute value, and where they are.

    What is not sent is added to the next update (error feedback), so all of it is sent some day; without that
    it is lost, and training stops short of where it would go. The defaults are those of SparseLoCo (Sarfi et
    al. 2025, arXiv:2508.15706), but that values have 8 bits and residuals do not decay. A party takes 1/84 of
    the bytes of ``Plain()``, and sends them to each of the others: over lines of their own N parties take N/2
    times that part.

    Rules that need more of the parties than the mean of their updates are refused.

    Args:
        chunk_size: Numbers of a chunk, 8 to 32768.
        k: How many of a chunk are sent.
        bits: 8 or 4, of a value; they are rounded as by ``Quantized``, with a scale for each chunk.
        error_feedback: Whether a party adds to its next update what the last ones lost; it takes 8 bytes of
            memory for each parameter.
        seed: Of the rounding, as in ``Quantized``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    supports = "sparse"

    def __init__(
        self,
        chunk_size: int = 4096,
        k: int = 64,
        bits: Literal[8, 4] = 8,
        error_feedback: bool = True,
        seed: int = 0,
    ) -> None:
        _check_bits(bits)
        if not _SMALLEST_BLOCK <= chunk_size <= _LARGEST_BLOCK:
            raise ValueError(
                f"chunk_size={chunk_size!r} must be a whole number from {_SMALLEST_BLOCK} to"
                f" {_LARGEST_BLOCK}: where a value is in its chunk is sent in 15 bits."
            )
        if isinstance(k, bool) or not 1 <= k <= chunk_size:
            raise ValueError(f"k={k!r} must be a whole number from 1 to chunk_size={chunk_size}.")
        _check_flag(error_feedback)
        self.chunk_size = chunk_size
        self.k = k
        self.bits = bits
        self.error_feedback = error_feedback
        self.seed = seed

    def __repr__(self) -> str:
        return (
            f"TopK(chunk_size={self.chunk_size}, k={self.k}, bits={self.bits},"
            f" error_feedback={self.error_feedback}, seed={self.seed})"
        )

    @override
    def _codec(self) -> Codec:
        return Largest(self.chunk_size, self.k, self.bits)

    @override
    def _sums(self) -> type[CompressedCollectives]:
        return SparseCollectives


def _check_bits(bits: object) -> None:
    if bits not in (8, 4):
        raise ValueError(f"bits={bits!r} must be 8 or 4.")


def _check_flag(error_feedback: object) -> None:
    if not isinstance(error_feedback, bool):
        raise ValueError(f"error_feedback={error_feedback!r} must be true or false.")
