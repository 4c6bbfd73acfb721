"""Real numbers as integers of a ring, and the masks that hide them there. Pure.

Sums modulo 2^bits do not depend on the order of the summands, so they have the same bits for any number of
threads and any topology. A summand plus a uniformly random integer is itself uniformly random: it says
nothing about the summand.
"""

import math
from collections.abc import Sequence

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

# Bytes masked at a time: what is added, its mask and zeros to make it from stay in a core's cache together.
_BLOCK_BYTES = 1 << 17
_ZEROS = bytes(_BLOCK_BYTES)
# Numbers encoded at a time, for the same reason.
_NUMBERS = 1 << 15

KEY_BYTES = 32


class Ring:
    """Fixed-point numbers modulo 2^bits: ``round(x 2^fractional_bits)``, halves to even.

    A sum of N numbers is off by at most ``N / 2 * 2^-fractional_bits``. It cannot overflow if no summand
    exceeds ``limit``.

    Args:
        bits: 32 or 64.
        fractional_bits: Binary digits behind the point.
        parties: Number of summands N.
    """

    def __init__(self, bits: int, fractional_bits: int, parties: int) -> None:
        self.dtype = torch.int32 if bits == 32 else torch.int64
        self._scale = 2.0**fractional_bits
        largest = (2 ** (bits - 1) - 1) // parties
        # Of 64 bits float64 holds 53, and may be the next above.
        rounded = float(largest) if float(largest) <= largest else math.nextafter(float(largest), 0.0)
        self.limit = rounded / self._scale
        """Largest absolute value of a summand."""

    def encodes_in_place(self, x: Tensor) -> bool:
        """Tell whether the integers are put where the numbers lie, since they are as wide."""
        return x.is_floating_point() and x.itemsize == self.dtype.itemsize

    def encode(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return flat numbers as integers. Integers stay what they are.

        Args:
            x: The numbers, (D,), on the CPU.
            out: Where to put the integers if not in the place of the numbers, (D,); None for new memory.

        Raises:
            OverflowError: If a number exceeds the limit, or is not finite.
        """
        encoded = torch.empty(x.shape, dtype=self.dtype) if out is None else out
        if not x.is_floating_point():
            return encoded.copy_(x)
        if self.encodes_in_place(x):
            encoded = x.view(self.dtype)
        # Halves cannot hold what is scaled; a power of two costs the others no digit.
        scaled = torch.empty(min(_NUMBERS, x.numel()), dtype=torch.promote_types(x.dtype, torch.float32))
        for values, into in zip(x.split(_NUMBERS), encoded.split(_NUMBERS), strict=True):
            block = scaled[: values.numel()]
            torch.mul(values.to(block.dtype), self._scale, out=block)
            largest = max(map(abs, map(float, torch.aminmax(block)))) / self._scale if len(block) else 0.0
            if not largest <= self.limit:
                raise OverflowError(largest)
            into.copy_(block.round_())
        return encoded

    def decode_(self, encoded: Tensor, into: Tensor) -> None:
        """Write what integers stand for into a tensor, which may share their memory."""
        if not into.is_floating_point():
            into.copy_(encoded)
            return
        scaled = torch.empty(
            min(_NUMBERS, into.numel()), dtype=torch.promote_types(into.dtype, torch.float32)
        )
        for integers, values in zip(encoded.split(_NUMBERS), into.split(_NUMBERS), strict=True):
            values.copy_(scaled[: values.numel()].copy_(integers).mul_(1 / self._scale))


class Mask:
    """An endless stream of random integers that whoever has the key can make again: ChaCha20 (RFC 8439).

    Args:
        key: 32 bytes.
        nonce: Number that this key is used with only once, below 2^96.
    """

    def __init__(self, key: bytes, nonce: int = 0) -> None:
        counter = (0).to_bytes(4, "little")
        cipher = Cipher(algorithms.ChaCha20(key, counter + nonce.to_bytes(12, "little")), mode=None)
        self._stream = cipher.encryptor()
        self._scratch = bytearray(_BLOCK_BYTES)

    def next(self, block: Tensor) -> Tensor:
        """Return the stream's next integers, of a block's dtype and size, until it is called again."""
        size = block.nbytes
        if not size:
            return block  # torch makes no tensor of nothing
        self._stream.update_into(memoryview(_ZEROS)[:size], self._scratch)
        return torch.frombuffer(self._scratch, dtype=block.dtype, count=block.numel())


def add_masks_(integers: Tensor, added: Sequence[Mask], subtracted: Sequence[Mask] = ()) -> None:
    """Add the next integers of some masks, and subtract those of others, in place and modulo 2^bits."""
    for block in integers.split(_BLOCK_BYTES // integers.itemsize):
        for mask in added:
            block += mask.next(block)
        for mask in subtracted:
            block -= mask.next(block)
