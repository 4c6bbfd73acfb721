"""Compressed exchanges as users configure them: bfloat16, quantization, top-k sparsification."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm import Collectives
from pellm_lightning.exchange.base import Exchange
from pellm_lightning.exchange.compressed.codecs import Bfloat16Codec, Codec, QuantizationCodec, TopKCodec
from pellm_lightning.exchange.compressed.collectives import (
    CompressedCollectives,
    DenseCollectives,
    SparseCollectives,
)
from pellm_lightning.exchange.error_feedback import ErrorFeedback

_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 1 << 15


class _Compressed(Exchange):
    """Base of the compressed exchanges; metrics and text are not compressed."""

    exact = False
    supports: Literal["parties", "sums", "rounded", "sparse"] = "rounded"
    error_feedback: bool
    seed: int

    @override
    def new_error_feedback(self, vector: Tensor) -> ErrorFeedback:
        """Return residuals of zero."""
        return ErrorFeedback(vector, enabled=self.error_feedback)

    @override
    def open(
        self,
        federation: Collectives,
        on_reveal: Callable[[], None],
        view: str = "",
        error_feedback: ErrorFeedback | None = None,
    ) -> Collectives:
        """Return compressed collectives; without residuals there is no vector, and all else is exact."""
        if error_feedback is None:
            return federation
        return self._collectives()(federation, self._codec(), error_feedback, self.seed)

    def _collectives(self) -> type[CompressedCollectives]:
        return DenseCollectives

    @abstractmethod
    def _codec(self) -> Codec: ...


class Cast(_Compressed):
    """Compressed exchange in bfloat16: half the bytes. Sums are computed in float32.

    Values are rounded to nearest, with a relative error of at most 2^-9. float16 is refused: it cannot
    represent updates of about 1e-6, as a low learning rate and many parties make them, to any precision, and
    rounds those below 3e-8 to zero; ``Quantized(bits=8)`` sends half as many bytes, with a scale per block.

    Args:
        dtype: "bfloat16".
        error_feedback: Whether a party adds compression errors to its next update; takes 8 bytes of memory
            for each parameter.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_steps=100, exchange=Cast("bfloat16"))
    """

    def __init__(self, dtype: Literal["bfloat16"] = "bfloat16", error_feedback: bool = False) -> None:
        if dtype != "bfloat16":
            raise ValueError(
                f"dtype={dtype!r} must be 'bfloat16'. float16 cannot represent updates below 6e-8, nor any"
                " above 65504: use Quantized(bits=8), which has a scale for each block and sends half as many"
                " bytes."
            )
        _check_flag(error_feedback)
        self.dtype = dtype
        self.error_feedback = error_feedback
        self.seed = 0  # rounding to nearest draws nothing

    @override
    def _codec(self) -> Codec:
        return Bfloat16Codec()


class Quantized(_Compressed):
    """Compressed exchange by stochastic block quantization to 8 or 4 bits, for updates and their sums.

    A value is an integer times the block's largest absolute value over 127 (8 bits) or 7 (4 bits), rounded
    stochastically so that it is unbiased: QSGD (Alistarh et al. 2017, arXiv:1610.02132) with the scale of a
    block for the norm. Sums are computed in float32, then quantized likewise. 8 bits take 0.258 of the bytes
    of ``Plain()``, 4 bits 0.133, with blocks of 128.

    Args:
        bits: 8 or 4. With 4 bits Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512) and MuLoCo
            (arXiv:2505.23725) report no loss in pre-training.
        block_size: Numbers that share a scale, a multiple of 8. Smaller blocks are more precise and take more
            bytes: 4 each for the scale.
        error_feedback: Whether a party adds compression errors to its next update (Karimireddy et al. 2019,
            arXiv:1901.09847); takes 8 bytes of memory for each parameter.
        seed: Seed of the stochastic rounding. Parties round independently of each other with the same seed,
            and never use torch's global generator.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_steps=100, exchange=Quantized(bits=4, error_feedback=True))
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

    @override
    def _codec(self) -> Codec:
        return QuantizationCodec(self.bits, self.block_size)


class TopK(_Compressed):
    """Compressed exchange by top-k sparsification: the k largest values of each chunk, by absolute value.

    What is not sent is added to the next update (error feedback); without that it is lost, and training
    stalls early. The defaults are those of SparseLoCo (Sarfi et al. 2025, arXiv:2508.15706), except that
    values have 8 bits and residuals do not decay. A code is 1/84 of an update, and is sent to each of the
    other parties, so N parties send N/168 of the bytes of ``Plain()``.

    Aggregation rules that need more than the mean of the updates are refused.

    Args:
        chunk_size: Length of a chunk, 8 to 32768.
        k: Values sent of each chunk.
        bits: Bits of a value, 8 or 4, quantized as by ``Quantized`` with a scale for each chunk.
        error_feedback: Whether a party adds compression errors to its next update; takes 8 bytes of memory
            for each parameter.
        seed: Seed of the rounding, as in ``Quantized``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_steps=100, exchange=TopK(chunk_size=4096, k=64))
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
                f" {_LARGEST_BLOCK}: indices into a chunk are sent as 16-bit integers."
            )
        if isinstance(k, bool) or not 1 <= k <= chunk_size:
            raise ValueError(f"k={k!r} must be a whole number from 1 to chunk_size={chunk_size}.")
        _check_flag(error_feedback)
        self.chunk_size = chunk_size
        self.k = k
        self.bits = bits
        self.error_feedback = error_feedback
        self.seed = seed

    @override
    def _codec(self) -> Codec:
        return TopKCodec(self.chunk_size, self.k, self.bits)

    @override
    def _collectives(self) -> type[CompressedCollectives]:
        return SparseCollectives


def _check_bits(bits: object) -> None:
    if bits not in (8, 4):
        raise ValueError(f"bits={bits!r} must be 8 or 4.")


def _check_flag(error_feedback: object) -> None:
    if not isinstance(error_feedback, bool):
        raise ValueError(f"error_feedback={error_feedback!r} must be true or false.")
