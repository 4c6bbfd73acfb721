"""Weighting of the parties: what they count by, and how much one may count at most."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pellm_lightning.engine.metrics import MAX_WEIGHT

Measure: TypeAlias = Literal["samples", "uniform"] | float


@dataclass(frozen=True)
class Weighting:
    """Weighting of the parties, with a cap on the share of each.

    Example:
        No hospital decides more than 40 % of the result, whatever it says of its samples.

        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(weighting=Weighting("samples", max_share=0.4))

    Args:
        by: As the argument ``weighting`` of ``FederatedAveraging``: "samples", "uniform" or a number.
        max_share: Share of the sum of the weights that a party may have, above 0 and at most 1; what exceeds
            it does not count. Parties that are too few for that count alike. With secure aggregation each
            party caps its own weight by the sum of the round before. Default: no cap.

    Raises:
        ValueError: If an argument is out of its range.
    """

    by: Measure = "samples"
    max_share: float | None = None

    def __post_init__(self) -> None:
        by, cap = self.by, self.max_share
        if isinstance(by, str) and by not in ("samples", "uniform"):
            raise ValueError(f"weighting={by!r} must be one of 'samples', 'uniform', or a number.")
        if not isinstance(by, str) and (
            isinstance(by, bool) or not isinstance(by, int | float) or not 0 <= by <= MAX_WEIGHT
        ):
            raise ValueError(
                f"weighting={by!r} must be 'samples', 'uniform' or a number of 0 to {MAX_WEIGHT:g} (2^53)."
            )
        if cap is not None and (
            isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap <= 1
        ):
            raise ValueError(f"max_share={cap!r} must be above 0 and at most 1, as a share of the weights.")

    @classmethod
    def of(cls, weighting: "Measure | Weighting") -> "Weighting":
        """Return an argument ``weighting`` as an object.

        Raises:
            ValueError: If it is none.
        """
        return weighting if isinstance(weighting, Weighting) else cls(weighting)
