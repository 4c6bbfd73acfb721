"""The LoRA side of a round: hand the pairs to the rule, put its results into the vector, measure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor

from pellm_lightning.aggregation import gathering
from pellm_lightning.aggregation.base import EVERYTHING, Factors, RoundContext, Term
from pellm_lightning.aggregation.base_writing import write_residual_
from pellm_lightning.aggregation.deviation import Deviation, deviation, squared_deviations
from pellm_lightning.aggregation.lora import Pair, matrix
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import Collectives
from pellm_lightning.tensors.flat_buffer import Layout


@dataclass(frozen=True)
class LoraResult:
    """What came of combining the pairs."""

    deviation: Deviation | None
    """Relative deviation of the result, if it is measured yet."""
    terms: dict[int, list[Term]] | None
    """What the parties held, if frozen weights are still to be written."""
    replaced: dict[str, Tensor]
    """Results that the rule computed, rather than means, as matrices by the names of the factors."""


class LoraAggregator:
    """The pairs of a federation, whose products are what the parties' adapters really are.

    Args:
        plan: The rule applied to this party's parameters.
        parameters: This party's federated parameters.
        federation: The joined parties.
        told: Rank and scaling of each pair at each of the parties that meet, by the pair's name.
        measure: Whether to measure the deviation, where the rule does not know it anyway.
        reference: Rank and scaling of the global factors, by the pair's name; None takes the largest rank of
            the parties, and the scaling of the first party that has it.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Mapping[str, Tensor],
        federation: Collectives,
        told: Sequence[Mapping[str, Any]],
        measure: bool,
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        self._plan = plan
        self._parameters = parameters
        self._federation = federation
        self.told = told
        self._measure = measure
        self.reference: dict[str, list[Any]] = {
            pair.name: list(reference[pair.name]) if reference else max(self._told(pair), key=itemgetter(0))
            for pair in plan.products
        }
        """Rank and scaling of the global factors, by the pair's name."""

    def rank(self, pair: Pair) -> int:
        """Return the rank of the global factors."""
        return int(self.reference[pair.name][0])

    def source(self, pair: Pair) -> int:
        """Return the first party of the largest rank, whose factors the others take over at the start."""
        ranks = self._ranks(pair)
        return ranks.index(max(ranks))

    def ratio(self, pair: Pair) -> float:
        """Return this party's scaling over that of the global factors."""
        return self._plan.module(pair).scaling / self._scaling(pair)

    def larger(self) -> str | None:
        """Return the name of a pair whose rank at this party is above that of the global factors, if any."""
        own = {pair.name: self._parameters[pair.a].shape[0] for pair in self._plan.products}
        return next((name for name, rank in own.items() if rank > self.reference[name][0]), None)

    def combine(self, layout: Layout, global_: Tensor, staging: Tensor, counting: RoundContext) -> LoraResult:
        """Let the rule combine the pairs, and measure what comes of it; nothing is written yet."""
        rule = self._plan.rule
        pairs = self._factors(layout, global_)
        combined = rule.combine(pairs, counting)
        replaced: dict[str, Tensor] = {}
        if combined.factors is not None:
            for pair, (b, a) in zip(pairs, combined.factors, strict=True):
                replaced |= {pair.pair.b: b, pair.pair.a: a}
        if rule.writes_base:
            return LoraResult(None, combined.terms, replaced)
        if not self._measure:
            return LoraResult(None, None, replaced)
        terms = combined.terms
        if terms is None:
            terms = gathering.to_owners(pairs, counting, EVERYTHING - rule.frozen_parts(counting.round))
        results = combined.factors or [
            (self._mean(layout, global_, staging, p.pair.b), self._mean(layout, global_, staging, p.pair.a))
            for p in pairs
        ]
        squares = squared_deviations(pairs, results, terms, gathering.owned(len(pairs), self._federation))
        return LoraResult(deviation(pairs, squares, self._federation), None, replaced)

    def put_(
        self, layout: Layout, global_: Tensor, staging: Tensor, replaced: Mapping[str, Tensor], *, plain: bool
    ) -> None:
        """Put the results where the outer optimizer finds them.

        Args:
            layout: Of the vectors.
            global_: The global vector.
            staging: The pseudo-gradient, in which ``anchor - result`` is put.
            replaced: Results by the names of the factors.
            plain: Whether the outer optimizer lands on the result. Then the global vector takes it as it is:
                a difference would round it, and carry what the last anchor lost in the parameters' dtype.
        """
        for name, result in replaced.items():
            anchor, step = matrix(layout.view(global_, name)), matrix(layout.view(staging, name))
            if plain:
                anchor.copy_(result)
                step.zero_()
            else:
                step.copy_(self._anchor(layout, global_, name) - result.to(step.device))

    def write_base_(self, layout: Layout, global_: Tensor, terms: Mapping[int, Sequence[Term]]) -> Deviation:
        """Write into the frozen weights what the factors, as they are now, lack of the parties' mean."""
        pairs = self._factors(layout, global_)
        squares = write_residual_(pairs, terms, self._federation)
        owned = gathering.owned(len(pairs), self._federation)
        return deviation(pairs, {k: squares[k] for k in owned}, self._federation)

    def _factors(self, layout: Layout, global_: Tensor) -> list[Factors]:
        return [
            Factors(
                pair=pair,
                b=matrix(self._parameters[pair.b].detach()),
                a=matrix(self._parameters[pair.a].detach()),
                anchor_b=matrix(layout.view(global_, pair.b)),
                anchor_a=matrix(layout.view(global_, pair.a)),
                ranks=self._ranks(pair),
                scalings=self._scalings(pair),
                scaling=self._scaling(pair),
                base=self._plan.module(pair).base,
            )
            for pair in self._plan.products
        ]

    def _mean(self, layout: Layout, global_: Tensor, staging: Tensor, name: str) -> Tensor:
        """Return the mean of a factor that was averaged: the anchor minus the step."""
        return self._anchor(layout, global_, name) - matrix(layout.view(staging, name))

    def _anchor(self, layout: Layout, global_: Tensor, name: str) -> Tensor:
        """Return the anchor as the parameters hold it, rounded to their dtype; float32."""
        return matrix(layout.view(global_, name).to(self._parameters[name].dtype).float())

    def _scaling(self, pair: Pair) -> float:
        return float(self.reference[pair.name][1])

    def _told(self, pair: Pair) -> list[list[Any]]:
        return [of_party[pair.name] for of_party in self.told]

    def _ranks(self, pair: Pair) -> list[int]:
        return [rank for rank, _ in self._told(pair)]

    def _scalings(self, pair: Pair) -> list[float]:
        return [scaling for _, scaling in self._told(pair)]
