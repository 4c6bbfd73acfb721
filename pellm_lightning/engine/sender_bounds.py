"""SenderBounds: limits of a party's own influence where its update is hidden, from the last round's sums."""

from collections.abc import Mapping
from typing import Any

# A party reports its norm up to so many times the last mean, so that one outlier raises the bound a little.
_REPORTED = 2.0


class SenderBounds:
    """Bounds of one fragment, which each party applies to what it sends in a secure sum.

    The first round has none. They protect from parties that run this software and err, not from those that
    change it: nobody can see what a masked update holds.

    Args:
        norm_factor: Norm that an update may have, in units of the parties' mean norm; None for any.
        max_share: Share of the weights that a party may have; None for any.

    Example:
        >>> bounds = SenderBounds(norm_factor=1.0, max_share=0.5)
        >>> bounds.scale(norm=8.0), bounds.weight(6.0, num_participants=3)
        (1.0, 6.0)
        >>> bounds.end_round(total_weight=8.0, mean_norm=2.0)
        >>> bounds.scale(norm=8.0), bounds.weight(6.0, num_participants=3)
        (0.25, 2.0)
    """

    def __init__(self, norm_factor: float | None, max_share: float | None) -> None:
        self.norm_factor = norm_factor
        self.max_share = max_share
        self._mean_norm: float | None = None
        self._total_weight: float | None = None
        self._own_weight = self._pending_weight = 0.0

    def weight(self, weight: float, num_participants: int) -> float:
        """Return this party's weight, capped by what the others had in the round before."""
        capped = weight
        if self.max_share is not None and self._total_weight is not None:
            share = max(self.max_share, 1 / max(num_participants, 1))  # fewer parties cannot all stay below
            # Of a sum that this party cannot have been in, all is the others'.
            others = self._total_weight - (self._own_weight if self._own_weight < self._total_weight else 0.0)
            if share < 1 and others > 0:
                capped = min(weight, others * share / (1 - share))
        self._pending_weight = capped
        return capped

    def scale(self, norm: float) -> float:
        """Return the factor by which an update of a norm is scaled down."""
        if self.norm_factor is None or not self._mean_norm:
            return 1.0
        bound = self.norm_factor * self._mean_norm
        return 1.0 if norm <= bound else bound / norm

    def reported(self, norm: float) -> float:
        """Return the norm that counts in the parties' mean."""
        return min(norm, _REPORTED * self._mean_norm) if self._mean_norm else norm

    def end_round(self, total_weight: float, mean_norm: float) -> None:
        """Take note of a round's sums; the same at every party."""
        self._total_weight, self._mean_norm = total_weight, mean_norm
        self._own_weight, self._pending_weight = self._pending_weight, 0.0

    def state(self) -> dict[str, float | None]:
        """Return what all parties know."""
        return {"total_weight": self._total_weight, "mean_norm": self._mean_norm}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state; of another round than the last this party does not know its own weight."""
        if state["total_weight"] != self._total_weight:
            self._own_weight = 0.0
        self._pending_weight = 0.0
        self._total_weight, self._mean_norm = state["total_weight"], state["mean_norm"]
