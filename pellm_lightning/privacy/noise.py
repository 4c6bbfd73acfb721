"""Gaussian noise from the operating system's cryptographic generator, without a seed."""

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 1 << 18
# The grid is this much finer than the standard deviation, and the draws are 2^22 times finer still.
_GRID = 2.0**-30


class Noise:
    """Sampler of Gaussian noise from the operating system's cryptographic generator.

    There is no seed and no state. So ``seed_everything``, which gives every party the same seed, does not
    affect it, two parties or runs never draw the same noise, a checkpoint cannot repeat it, and torch's
    generators are not advanced. These are not secure: torch uses 32 bits of a CPU seed, which can be found by
    brute force wherever a party's update is known to be zero.

    Draws use the Box-Muller transform in float64. The floating-point numbers that a value plus its noise can
    reach depend on the value, which breaks the privacy of noise that is merely added (Mironov 2012,
    "On significance of the least significant bits for differential privacy"). So sums are computed in float64
    and rounded to a fixed grid, a power of two about 2^-30 of the standard deviation, before they become
    float32: each point of the grid stands for some four million draws. That prevents the known attacks; it is
        no
    proof for finite arithmetic, which discrete mechanisms have. Nothing here runs in constant time.

    Args:
        source: Returns the given number of random bytes.

    Example:
        >>> noisy = Noise().add_(torch.zeros(1000), std=2.0)
        >>> 1.5 < noisy.std() < 2.5
        tensor(True)
    """

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        self._source = source

    @torch.no_grad()
    def add_(self, chunk: Tensor, std: float) -> Tensor:
        """Add independent draws from N(0, std^2) in place.

        Args:
            chunk: Flat float32 tensor, (D,), on any device; noise is drawn on the CPU.
            std: Standard deviation, in the values' unit; 0 leaves the chunk as it is.

        Raises:
            ValueError: If ``std`` is negative or not finite, or the chunk is not flat float32.
        """
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"std={std} must be a finite number >= 0.")
        if chunk.dtype is not torch.float32 or chunk.ndim != 1:
            raise ValueError(
                f"Noise is added to flat float32, not to {chunk.dtype} of {chunk.ndim} dimensions."
            )
        if std == 0 or len(chunk) == 0:
            return chunk
        grid = 2.0 ** (math.floor(math.log2(std))) * _GRID
        for block in chunk.split(_BLOCK):
            noisy = self._normal(len(block)).mul_(std).to(block.device).add_(block)
            block.copy_(noisy.div_(grid).round_().mul_(grid))
        return chunk

    def draw(self, mean: float, std: float) -> float:
        """Return a draw from N(mean, std^2)."""
        return float(self.add_(torch.tensor([mean], dtype=torch.float32), std))

    def _normal(self, size: int) -> Tensor:
        """Draw from N(0, 1), (size,) float64."""
        pairs = (size + 1) // 2
        bits = torch.frombuffer(bytearray(self._source(16 * pairs)), dtype=torch.int64)
        # The shift keeps the sign: [-2^52, 2^52). Moved to (0, 1], whose logarithm is finite.
        uniform = ((bits >> 11) + (2**52 + 1)).double().mul_(2.0**-53)
        radius = uniform[:pairs].log_().mul_(-2).sqrt_()
        angle = uniform[pairs:].mul_(2 * math.pi)
        return torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)])[:size]
