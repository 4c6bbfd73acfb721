"""Plain averaging (FedAvg), and rules that freeze or share one factor of LoRA."""

from pellm_lightning.aggregation.base import EVERYTHING, Aggregation, Part, Parts
from pellm_lightning.aggregation.lora import LoraModule

_A: Parts = frozenset({Part.A})
_B: Parts = frozenset({Part.B})


class Mean(Aggregation):
    """Average every trainable parameter: FedAvg (McMahan et al. 2017, arXiv:1602.05629).

    For LoRA that is FedIT (Zhang et al. 2023, arXiv:2305.05644): ``B = sum(w_i B_i)``, ``A = sum(w_i A_i)``,
    which deviates from the mean of the products by ``sum(w_i (B_i - B) (A_i - A))``; the report has the
    relative deviation.

    Args:
        measure_deviation: As in ``LowRankMean``.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=Mean())
    """

    requires = "means"


class FrozenA(Aggregation):
    """Train and average B only; A stays as party 0 initialised it.

    FFA-LoRA (Sun et al. 2024, arXiv:2403.12313). Exact, since ``sum(w_i B_i A) = sum(w_i B_i) A``, and half
    the bytes, but each party trains half the adapter. All other parameters are trained and averaged.

    Args:
        measure_deviation: As in ``LowRankMean``.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=FrozenA())
    """

    requires = "means"
    outer = "memoryless"

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return that a zero A cannot be trained."""
        return "its A is zero, so neither factor would change" if module.zero_a else None

    def averaged(self, round: int, num_participants: int) -> Parts:
        """Return all but A."""
        return EVERYTHING - _A

    def frozen_parts(self, round: int) -> Parts:
        """Return A."""
        return _A


class Alternating(Aggregation):
    """Train and average B in even rounds (the first is 0) and A in odd ones; the other factor is frozen.

    RoLoRA (Chen et al. 2024, arXiv:2409.02346) and LoRA-A2 (Koo et al. 2024, arXiv:2410.22815). Each round is
    exact, as with ``FrozenA``, and sends half the bytes, yet both factors are trained. All other parameters
    are trained and averaged in each round. The frozen factor's gradients are dropped, so neither its values
    nor its optimizer state change.

    Args:
        measure_deviation: As in ``LowRankMean``.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=Alternating())
    """

    requires = "means"
    outer = "memoryless"

    def averaged(self, round: int, num_participants: int) -> Parts:
        """Return all but the frozen factor."""
        return EVERYTHING - self.frozen_parts(round)

    def frozen_parts(self, round: int) -> Parts:
        """Return A in even rounds, B in odd ones."""
        return _B if round % 2 else _A


class ShareA(Aggregation):
    """Share A only; B, heads and all else stay local.

    FedSA-LoRA (Guo et al. 2024, arXiv:2410.01463). The result is a personalized model per party around a
    common A, for data whose label distributions or tasks differ. No deviation is reported, as there is no
    common product.

    Args:
        measure_deviation: As in ``LowRankMean``.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=ShareA())
    """

    requires = "means"
    shared = _A

    def averaged(self, round: int, num_participants: int) -> Parts:
        """Return A."""
        return _A
