"""The interface of aggregation rules, and the values that a round passes to them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from inspect import signature
from typing import Literal, TypeAlias

from torch import Tensor

from pellm_lightning.aggregation.lora import LoraModule, Pair
from pellm_lightning.comm import Collectives


class Part(Enum):
    """Role of a federated parameter in aggregation."""

    A = "A"
    B = "B"
    OTHER = "other"
    """Not a LoRA factor: heads, norms, biases, magnitudes, adapters of other kinds."""


Parts: TypeAlias = frozenset[Part]
Requirement: TypeAlias = Literal["means", "sums", "parties"]
Capability: TypeAlias = Literal["means", "sums", "parties", "rounded", "sparse"]
EVERYTHING: Parts = frozenset(Part)
FACTORS: Parts = frozenset({Part.A, Part.B})
OTHERS: Parts = frozenset({Part.OTHER})
NOTHING: Parts = frozenset()


@dataclass(frozen=True)
class RoundContext:
    """Context of a round: its participants and their shares; equal at every party.

    Args:
        federation: Collectives of the round's members.
        shares: Weight of each party over the sum of the weights; 0 for a party that does not participate.
            With a secure exchange, which hides weights, NaN for the other participants.
        round: Index of the round.
    """

    federation: Collectives
    shares: Sequence[float]
    round: int = 0

    @property
    def share(self) -> float:
        """Share of this party."""
        return self.shares[self.federation.party]

    @property
    def num_participants(self) -> int:
        """Number of participants."""
        return sum(share != 0 for share in self.shares)


@dataclass(frozen=True)
class Factors:
    """LoRA factors of one product at one party, with the anchors of the round: of a pair, or of an expert.

    Args:
        pair: Names of the factors.
        b: This party's factor B after its local steps, (m, r).
        a: This party's factor A, (r, n).
        anchor_b: Factor B at the start of the round, (m, R), float32; equal at every party.
        anchor_a: Factor A at the start of the round, (R, n), float32.
        ranks: Rank r of each party; all R unless the rule allows them to differ.
        scalings: Scaling of each party.
        scaling: Scaling of the global factors.
        base: The frozen weight as a writable (m, n) view, if the module has one.
        expert: Index of the expert whose factors these are; None if the pair is of one product.
    """

    pair: Pair
    b: Tensor
    a: Tensor
    anchor_b: Tensor
    anchor_a: Tensor
    ranks: Sequence[int]
    scalings: Sequence[float]
    scaling: float
    base: Tensor | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """Name of the product in messages and reports."""
        return self.pair.name if self.expert is None else f"{self.pair.name}, expert {self.expert}"


@dataclass(frozen=True)
class Term:
    """Summand of one party in the weighted mean of the products: ``share * scaling * b @ a``."""

    share: float
    scaling: float
    b: Tensor
    a: Tensor


@dataclass(frozen=True)
class CombinedFactors:
    """Aggregated LoRA factors.

    Args:
        factors: The result (B, A) of each pair, bitwise equal at every party; None if the plain mean of the
            parts is the result.
        terms: The parties' factors, by index of the pairs that this party owns or of all; None if not
            gathered.
        squares: Squared norms of the result's distance from the mean of the products, but for rounding, and
            of that mean, by index of those owned pairs for which the rule knows them.
    """

    factors: list[tuple[Tensor, Tensor]] | None = None
    terms: dict[int, list[Term]] | None = None
    squares: dict[int, tuple[float, float]] = field(default_factory=dict)


class Aggregation:
    """An aggregation rule: which parts are averaged or frozen, and how LoRA pairs are combined. Stateless.

    Example:
        >>> class HeadsOnly(Aggregation):
        ...     requires = "means"
        ...     shared = OTHERS  # LoRA factors stay local
        ...
        ...     def averaged(self, round, num_participants):
        ...         return OTHERS
        >>> HeadsOnly().frozen_parts(round=0)
        frozenset()
    """

    shared: Parts = EVERYTHING
    """Federated parts; the others stay local."""
    outer: Literal["any", "memoryless", "mean"] = "any"
    """Supported outer optimizers: any, those without momentum or decay, or only ``SGD(lr=1)``."""
    ranks_may_differ: bool = False
    """Whether parties may have different ranks and scalings."""
    requires: Requirement = "parties"
    """What ``combine`` needs: only means of the parts, sums over the parties, or single parties' factors."""
    writes_base: bool = False
    """Whether the rule adds to the frozen base weights what the factors cannot represent."""
    measure_deviation: bool | None = None
    """Whether each round measures by how much its result misses the mean of the LoRA products; None where the
    parties' factors are at hand."""

    def __init__(self, measure_deviation: bool | None = None) -> None:
        self.measure_deviation = measure_deviation

    def averaged(self, round: int, num_participants: int) -> Parts:
        """Return the parts whose result is their weighted mean, with a number of participants."""
        return EVERYTHING

    def frozen_parts(self, round: int) -> Parts:
        """Return the parts that are not trained in a round, and so are not sent at its end."""
        return NOTHING

    def basis_changed(self, num_participants: int) -> Parts:
        """Return the parts whose basis a round changes, which invalidates an optimizer's moments."""
        return NOTHING

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return why the rule cannot handle a module, None if it can."""
        return None

    def combine(self, pairs: Sequence[Factors], context: RoundContext) -> CombinedFactors:
        """Combine the pairs. All parties call it together, once all values are known to be finite."""
        return CombinedFactors()

    def __repr__(self) -> str:
        """Return the settings, which must be equal at every party: attributes named like the arguments.

        Whether rounds measure the deviation is compared by what follows from it.
        """
        names = [name for name in signature(type(self)).parameters if name != "measure_deviation"]
        settings = (f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({', '.join(settings)})"
