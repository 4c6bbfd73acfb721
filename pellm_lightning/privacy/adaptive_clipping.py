"""Adaptive clipping: a private estimate of a quantile of the update norms."""

import math
from decimal import Context, Decimal, localcontext

from pellm_lightning.privacy.clipping import MAX_NORM, MIN_NORM


class AdaptiveClipping:
    """Adaptive clipping norm C, which follows a quantile of the update norms.

    The method is Andrew et al. 2021, "Differentially private learning with adaptive clipping"
    (arXiv:1905.03871). Each participant adds one bit to the round: whether its norm
    is at most C. The noisy fraction b of such parties moves the bound geometrically,
    ``C <- C exp(-learning_rate (b - target_quantile))``.

    The bit takes part of the privacy budget, so that update and bit together cost what the noise
    multiplier z alone costs: with noise of standard deviation s on the sum of the bits, the update gets the
    multiplier ``(z^-2 - (2 s)^-2)^(-1/2)``, above z. The bits are sent as +1/2 and -1/2, so that a bit has
    the sensitivity 1/2; hence the 2.

    With few parties the noise on the bit outweighs the bit: at z = 4 and four parties, b has a standard
    deviation of 1. If a good C is known, fix it.

    Args:
        target_quantile: Fraction of the updates that should not be clipped, from 0 to 1.
        learning_rate: Step size in log space: one round moves the bound by a factor of about e^learning_rate.
        bit_std: Standard deviation s of the noise on the sum of the bits, above z / 2. Default: the number of
            participants / 20 as in the paper, but at least z, so that the bits take at most a quarter of the
            budget.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> adaptive = AdaptiveClipping(target_quantile=0.5, learning_rate=0.2)
        >>> adaptive.updated(max_norm=1.0, mean_bit=0.5) < 1.0  # nobody was clipped
        True
    """

    def __init__(
        self, target_quantile: float = 0.5, learning_rate: float = 0.2, bit_std: float | None = None
    ) -> None:
        if not 0 <= target_quantile <= 1:
            raise ValueError(f"target_quantile={target_quantile} must be from 0 to 1.")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning_rate={learning_rate} must be a finite number above 0; 0.2 is usual.")
        if bit_std is not None and not (math.isfinite(bit_std) and bit_std > 0):
            raise ValueError(f"bit_std={bit_std} must be a finite number above 0.")
        self.target_quantile = target_quantile
        self.learning_rate = learning_rate
        self.bit_std = bit_std

    @staticmethod
    def bit(norm: float, max_norm: float) -> float:
        """Return 1/2 if an update is within the bound, -1/2 if it is clipped or not finite."""
        return 0.5 if norm <= max_norm else -0.5

    def sum_std(self, noise_multiplier: float, num_participants: int) -> float:
        """Return the standard deviation s of the noise on the sum of the bits; 0 if z is 0."""
        if noise_multiplier == 0:
            return 0.0
        return max(num_participants / 20, noise_multiplier) if self.bit_std is None else self.bit_std

    def update_multiplier(self, noise_multiplier: float, num_participants: int) -> float:
        """Return the update's own noise multiplier, for which update and bit together cost z."""
        if noise_multiplier == 0:
            return 0.0
        # (z^-2 - (2 s)^-2)^(-1/2), without squares that may overflow.
        ratio = noise_multiplier / (2 * self.sum_std(noise_multiplier, num_participants))
        return noise_multiplier / math.sqrt((1 - ratio) * (1 + ratio))

    def updated(self, max_norm: float, mean_bit: float) -> float:
        """Return the next round's bound.

        Args:
            max_norm: This round's bound C.
            mean_bit: Noisy sum of the participants' bits over their number; the same at every party.

        Raises:
            ValueError: If ``mean_bit`` is not finite.
        """
        if not math.isfinite(mean_bit):
            raise ValueError(f"The mean of the clipping bits is {mean_bit}; it must be finite.")
        step = self.learning_rate * (mean_bit + 0.5 - self.target_quantile)
        exponent = min(max(-step, -100.0), 100.0)  # e^89 lies between the bounds
        # Decimal, since the last bit of math.exp depends on the processor, and all parties need the same.
        with localcontext(Context(prec=30)):
            moved = float(Decimal(max_norm) * Decimal(exponent).exp())
        return min(max(moved, MIN_NORM), MAX_NORM)

    def __repr__(self) -> str:
        return (
            f"AdaptiveClipping(target_quantile={self.target_quantile}, learning_rate={self.learning_rate},"
            f" bit_std={self.bit_std})"
        )
