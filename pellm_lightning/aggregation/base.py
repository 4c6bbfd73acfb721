"""What an aggregation is, and what it gets to see in a round."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias

from torch import Tensor

from pellm_lightning.aggregation.lora import LoraModule, Pair
from pellm_lightning.comm import Collectives


class Part(Enum):
    """What a federated parameter is to an aggregation."""

    A = "A"
    B = "B"
    OTHER = "other"
    """No factor of a LoRA pair: heads, norms, biases, magnitudes, adapters of other kinds."""


Parts: TypeAlias = frozenset[Part]
Requirement: TypeAlias = Literal["means", "sums", "parties"]
Capability: TypeAlias = Literal["means", "sums", "parties", "rounded", "sparse"]
EVERYTHING: Parts = frozenset(Part)
FACTORS: Parts = frozenset({Part.A, Part.B})
OTHERS: Parts = frozenset({Part.OTHER})
NOTHING: Parts = frozenset()


@dataclass(frozen=True)
class RoundContext:
    """Who counts how much in a round; the same at every party.

    Args:
        federation: The joined parties.
        shares: Weight of each party over the sum of the weights; 0 for who does not count. Where the exchange
            hides weights, NaN for all that count but this party.
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
    def num_counting(self) -> int:
        """Number of parties that count."""
        return sum(share != 0 for share in self.shares)


@dataclass(frozen=True)
class Factors:
    """One LoRA pair in a round, seen from one party.

    Args:
        pair: Its names.
        b: This party's factor B after its local steps, (m, r).
        a: This party's factor A, (r, n).
        anchor_b: The factor B that every party started the round from, (m, R), float32.
        anchor_a: The factor A that every party started the round from, (R, n), float32.
        ranks: Rank r of each party; all R unless the aggregation allows them to differ.
        scalings: Scaling of each party.
        scaling: Scaling of the global factors.
        base: The frozen weight as a writable (m, n) view, if the module has one.
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


@dataclass(frozen=True)
class Term:
    """What one party adds to the weighted mean of the products: ``share * scaling * b @ a``."""

    share: float
    scaling: float
    b: Tensor
    a: Tensor


@dataclass(frozen=True)
class Combined:
    """What an aggregation made of the LoRA pairs.

    Args:
        factors: The result (B, A) of each pair, equal to the bit at every party; None where the plain mean of
            the parts is the result.
        terms: What all parties held, by index of the pairs that this party owns or of all; None if nobody
            gathered it.
    """

    factors: list[tuple[Tensor, Tensor]] | None = None
    terms: dict[int, list[Term]] | None = None


class Aggregation(ABC):
    """What is computed from the parties' parameters.

    A rule says which parts are averaged plainly and which rest, and combines the LoRA pairs itself if that is
    not all. It is configuration only: it keeps nothing between rounds.
    """

    shared: Parts = EVERYTHING
    """Parts that federate; the others stay local."""
    outer: Literal["any", "memoryless", "mean"] = "any"
    """Outer optimizers that make sense: any, those without momentum or decay, or only ``SGD(lr=1)``."""
    ranks_may_differ: bool = False
    """Whether parties may have other ranks and scalings than one another."""
    requires: Requirement = "parties"
    """What ``combine`` needs: only means of the parts, sums over the parties, or what single parties have."""
    writes_base: bool = False
    """Whether the frozen weights take up what the factors cannot hold."""
    measure_deviation: bool | None = None
    """Whether each round measures by how much its result misses the mean of the LoRA products; None where the
    parties' factors are at hand."""

    def __init__(self, measure_deviation: bool | None = None) -> None:
        self.measure_deviation = measure_deviation

    def averaged(self, round: int, counting: int) -> Parts:
        """Return the parts whose result is their weighted mean, where ``counting`` parties count."""
        return EVERYTHING

    def frozen_parts(self, round: int) -> Parts:
        """Return the parts that are not trained during a round and so do not cross at its end."""
        return NOTHING

    def basis_changed(self, counting: int) -> Parts:
        """Return the parts whose coordinates a round changes, so that an optimizer's moments say nothing."""
        return NOTHING

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return why the rule cannot handle a module, in words, or None."""
        return None

    def combine(self, pairs: Sequence[Factors], counting: RoundContext) -> Combined:
        """Combine the pairs; all parties do so at the same time, once their values are known to be finite."""
        return Combined()

    @abstractmethod
    def __repr__(self) -> str:
        """Return the rule with its settings, which must be the same at every party."""
