"""Norm clipping with a guaranteed bound, robust to non-finite values and to rounding."""

import math

import torch
from torch import Tensor

MIN_NORM, MAX_NORM = 2.0**-64, 2.0**64
"""Range of clipping norms, far enough from the limits of float32 that only relative errors matter."""
# Margin for float32 rounding until the sum, 2^-24 each: of the factor, of the products with it, and of their
# products with a share.
_SLACK = 2.0**-20
_MIN_FACTOR = 2.0**-100


def squared_norm(chunk: Tensor) -> float:
    """Return the sum of squares of a float32 tensor, accurate in float64; not finite if a value is not.

    A norm summed in float32 is accurate to about 1e-4 only, so a bound by it would not hold.
    """
    return float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2


def clip_factor(norm: float, max_norm: float) -> float:
    """Return min(1, max_norm / norm) less a margin, so that the clipped norm is at most ``max_norm``.

    The margin is 2^-20, for later rounding. The factor is 0 for a norm that is not finite, or more than
    10^30 times the bound.

    Args:
        norm: 2-norm of the whole update, measured in float64.
        max_norm: The bound C, from 2^-64 to 2^64.
    """
    within = max_norm * (1 - _SLACK)
    if not math.isfinite(norm):
        return 0.0
    if norm <= within:
        return 1.0
    factor = within / norm
    return factor if factor >= _MIN_FACTOR else 0.0


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """Return `clip_factor` of each norm, (B,) float64."""
    factors = (max_norm * (1 - _SLACK) / norms).clamp(max=1)
    return torch.where(norms.isfinite() & (factors >= _MIN_FACTOR), factors, 0)


def clip_(chunk: Tensor, factor: float) -> Tensor:
    """Multiply by the factor in place; 0 also clears NaN and infinity, which a product would not."""
    return chunk.mul_(factor) if factor else chunk.zero_()


def check_max_norm(max_norm: float, name: str = "max_norm") -> None:
    """Validate a clipping norm."""
    if isinstance(max_norm, bool) or not isinstance(max_norm, int | float):
        raise ValueError(f"{name}={max_norm!r} must be a number.")
    if not MIN_NORM <= max_norm <= MAX_NORM:
        raise ValueError(
            f"{name}={max_norm} must be between 2^-64 and 2^64. Choose about the median of the update"
            " norms, as measured on public data without privacy."
        )
