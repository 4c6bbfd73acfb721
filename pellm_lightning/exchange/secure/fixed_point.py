"""Fixed-point encoding modulo 2^bits, and the key streams that mask encoded numbers. Pure.

Sums modulo 2^bits do not depend on the order of the summands, so they have the same bits for any number of
threads and any topology. A summand plus a uniformly random integer is itself uniformly random, and reveals
nothing of the summand.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

# Numbers processed at a time: they, their integers and a mask fit into a core's cache together.
_NUMBERS = 1 << 14
_ZEROS = bytes(8 * _NUMBERS)

KEY_BYTES = 16


class FixedPoint:
    """Fixed-point encoding modulo 2^bits: ``round(x 2^fractional_bits)``, halves to even.

    A sum of N numbers has an error of at most ``N / 2 * 2^-fractional_bits``. It cannot overflow if no
    summand exceeds ``limit``.

    Args:
        bits: 32 or 64.
        fractional_bits: Number of fractional bits.
        parties: Number of summands N.
    """

    def __init__(self, bits: int, fractional_bits: int, parties: int) -> None:
        self.dtype = torch.int32 if bits == 32 else torch.int64
        self._scale = 2.0**fractional_bits
        largest = (2 ** (bits - 1) - 1) // parties
        # float64 holds 53 of 64 bits, so the conversion may round up.
        rounded = float(largest) if float(largest) <= largest else math.nextafter(float(largest), 0.0)
        self.limit = rounded / self._scale
        """Largest absolute value of a summand."""

    def encodes_in_place(self, x: Tensor) -> bool:
        """Return whether the integers reuse the memory of the numbers, since both have the same width."""
        return x.is_floating_point() and x.itemsize == self.dtype.itemsize

    def encode(
        self,
        x: Tensor,
        out: Tensor | None = None,
        added: "Sequence[KeyStream]" = (),
        subtracted: "Sequence[KeyStream]" = (),
    ) -> Tensor:
        """Encode flat numbers as integers and mask these; integers are only masked.

        Args:
            x: The numbers, (D,), on the CPU.
            out: Output buffer, (D,), unless encoded in place; None allocates one.
            added: Key streams whose next integers are added.
            subtracted: Key streams whose next integers are subtracted.

        Raises:
            OverflowError: If a number exceeds the limit, or is not finite.
        """
        if self.encodes_in_place(x):
            out = x.view(self.dtype)
        elif out is None:
            out = torch.empty(x.shape, dtype=self.dtype)
        # numpy vectorises integer addition and rounding; torch does not.
        numbers, integers = _as_numpy(x), out.numpy()
        scaled = np.empty(min(_NUMBERS, len(numbers)), numbers.dtype)
        stream = np.empty(len(scaled), integers.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # overflow raises below
            for start in range(0, len(numbers), _NUMBERS):
                values = numbers[start : start + _NUMBERS]
                block = integers[start : start + _NUMBERS]
                block[:] = self._rounded(values, scaled[: len(values)]) if x.is_floating_point() else values
                _mask(block, stream[: len(block)], added, subtracted)
        return out

    def decode_(self, encoded: Tensor, into: Tensor, masks: "Sequence[KeyStream]" = ()) -> None:
        """Unmask and decode integers into a tensor, which may share their memory; they are overwritten.

        Args:
            encoded: The integers, (D,).
            into: Of the same shape, on the CPU.
            masks: Key streams whose next integers are subtracted first.
        """
        integers = encoded.numpy()
        numbers = _as_numpy(into)
        stream = np.empty(min(_NUMBERS, len(integers)), integers.dtype)
        scaled = np.empty(len(stream), numbers.dtype)
        for start in range(0, len(integers), _NUMBERS):
            block = integers[start : start + _NUMBERS]
            values = numbers[start : start + _NUMBERS]
            _mask(block, stream[: len(block)], (), masks)
            if into.is_floating_point():
                scaled[: len(block)] = block
                np.multiply(scaled[: len(block)], 1 / self._scale, out=values)
            else:
                values[:] = block
        if numbers.dtype.itemsize != into.itemsize:
            into.copy_(torch.from_numpy(numbers))

    def _rounded(self, values: np.ndarray, scaled: np.ndarray) -> np.ndarray:
        np.multiply(values, self._scale, out=scaled)
        largest = float(max(scaled.max(), -scaled.min())) / self._scale
        if not largest <= self.limit:
            raise OverflowError(largest)
        np.rint(scaled, out=scaled)
        return scaled


class KeyStream:
    """Pseudorandom generator of masks, reproducible by everyone who has the key.

    It is AES-128 in counter mode (NIST SP 800-38A): the nonce is the upper half of the first counter block.

    Args:
        key: 16 bytes.
        nonce: Number used only once with this key, below 2^64.
    """

    def __init__(self, key: bytes, nonce: int = 0) -> None:
        first = nonce.to_bytes(8, "big") + bytes(8)
        self._stream = Cipher(algorithms.AES128(key), modes.CTR(first)).encryptor()

    def write(self, block: np.ndarray) -> None:
        """Overwrite a block with the stream's next integers."""
        if len(block):
            self._stream.update_into(memoryview(_ZEROS)[: block.nbytes], block.data.cast("B"))


def _mask(
    block: np.ndarray, stream: np.ndarray, added: Sequence[KeyStream], subtracted: Sequence[KeyStream]
) -> None:
    """Add and subtract the next integers of key streams, in place and modulo 2^bits."""
    for mask in added:
        mask.write(stream)
        np.add(block, stream, out=block)
    for mask in subtracted:
        mask.write(stream)
        np.subtract(block, stream, out=block)


def _as_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor's memory; for 16-bit floats, which cannot hold scaled values, a float32 copy."""
    return (x.float() if x.is_floating_point() and x.itemsize < 4 else x).numpy()
