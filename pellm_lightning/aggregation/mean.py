"""The weighted mean of every parameter on its own, and the rules that let one factor rest."""

from pellm_lightning.aggregation.base import EVERYTHING, Aggregation, Part, Parts
from pellm_lightning.aggregation.lora import LoraModule

_A: Parts = frozenset({Part.A})
_B: Parts = frozenset({Part.B})


class Mean(Aggregation):
    """Average every trainable parameter: FedAvg (McMahan et al. 2017, arXiv:1602.05629).

    For LoRA that is FedIT (Zhang et al. 2023, arXiv:2305.05644): ``B = sum(w_i B_i)``, ``A = sum(w_i A_i)``,
    which misses the mean of the products by ``sum(w_i (B_i - B) (A_i - A))``. The report says by how much.

    Args:
        measure_deviation: As in ``LowRankMean``.
    """

    requires = "means"

    def __repr__(self) -> str:
        return "Mean()"


class FrozenA(Aggregation):
    """Train and average B only; A stays as party 0 initialised it.

    FFA-LoRA (Sun et al. 2024, arXiv:2403.12313). Exact, since ``sum(w_i B_i A) = sum(w_i B_i) A``, and half
    the bytes, but each party trains half the adapter. What is no LoRA factor is trained and averaged beside
    it.

    Args:
        measure_deviation: As in ``LowRankMean``.
    """

    requires = "means"

    outer = "memoryless"

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return that A would rest at zero, if it is."""
        return "its A is zero and would stay so, and B with it" if module.zero_a else None

    def averaged(self, round: int, counting: int) -> Parts:
        """Return all but A."""
        return EVERYTHING - _A

    def frozen_parts(self, round: int) -> Parts:
        """Return A."""
        return _A

    def __repr__(self) -> str:
        return "FrozenA()"


class Alternating(Aggregation):
    """Train and average B in even rounds (the first is 0), A in odd ones, while the other factor rests.

    RoLoRA (Chen et al. 2024, arXiv:2409.02346) and LoRA-A2 (Koo et al. 2024, arXiv:2410.22815). Each round is
    exact, for the same reason as with ``FrozenA``, and sends half the bytes, yet both factors learn. What is
    no LoRA factor is trained and averaged in each round. The resting factor's gradients are dropped, so
    neither its values nor its optimizer state move; the moments it had are there when its turn comes.

    Args:
        measure_deviation: As in ``LowRankMean``.
    """

    requires = "means"

    outer = "memoryless"

    def averaged(self, round: int, counting: int) -> Parts:
        """Return all but the resting factor."""
        return EVERYTHING - self.frozen_parts(round)

    def frozen_parts(self, round: int) -> Parts:
        """Return A in even rounds, B in odd ones."""
        return _B if round % 2 else _A

    def __repr__(self) -> str:
        return "Alternating()"


class ShareA(Aggregation):
    """Share A only; B, heads and all else stay with their party.

    FedSA-LoRA (Guo et al. 2024, arXiv:2410.01463). The parties end with models of their own around a common
    A: for data that differ in what is to be learned, not only in how much. No deviation is reported, as there
    is no common product to deviate from.

    Args:
        measure_deviation: As in ``LowRankMean``.
    """

    requires = "means"

    shared = _A

    def averaged(self, round: int, counting: int) -> Parts:
        """Return A."""
        return _A

    def __repr__(self) -> str:
        return "ShareA()"
