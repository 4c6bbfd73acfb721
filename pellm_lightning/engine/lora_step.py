"""LoraAggregator: the LoRA pairs of a round, combined by the rule, written to the vector and measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.aggregation import gathering
from pellm_lightning.aggregation.base import EVERYTHING, CombinedFactors, Factors, RoundContext, Term
from pellm_lightning.aggregation.base_writing import write_residual_
from pellm_lightning.aggregation.deviation import deviation, squared_deviations
from pellm_lightning.aggregation.lora import Pair, matrix
from pellm_lightning.engine.context import EngineContext
from pellm_lightning.engine.updates import UpdateReducer
from pellm_lightning.tensors.deviation import Deviation


@dataclass(frozen=True)
class LoraResult:
    """Result of combining the pairs."""

    deviation: Deviation | None
    """Relative deviation of the result, if it is measured yet."""
    terms: dict[int, list[Term]] | None
    """What the parties held, if frozen weights are still to be written."""
    replaced: dict[str, Tensor]
    """Results that the rule computed, rather than means, as matrices by the names of the factors."""


class LoraAggregator:
    """Aggregator of the LoRA pairs, whose products are what the parties' adapters really are.

    Args:
        context: What the aggregator works with.
        parameters: This party's federated parameters.
        specs: Rank and scaling of each pair at each of the parties that meet, by the pair's name.
        reference: Rank and scaling of the global factors, by the pair's name; None takes the largest rank of
            the parties, and the scaling of the first party that has it.
    """

    def __init__(
        self,
        context: EngineContext,
        parameters: Mapping[str, Tensor],
        specs: Sequence[Mapping[str, Any]],
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        self._context = context
        self._plan = context.plan
        self._federation = context.federation
        self._parameters = parameters
        self.specs = specs
        self.reference: dict[str, list[Any]] = {
            pair.name: list(reference[pair.name]) if reference else max(self._specs(pair), key=itemgetter(0))
            for pair in self._plan.products
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

    def has_pairs(self, updates: UpdateReducer) -> bool:
        """Tell whether a fragment holds LoRA pairs."""
        names = set(updates.layout.names)
        return any(pair.a in names for pair in self._plan.products)

    def combine(self, updates: UpdateReducer, counting: RoundContext) -> LoraResult:
        """Combine the pairs of a fragment by the rule, and measure the result; nothing is written yet."""
        pairs = self.factors(updates)
        return self.result(updates, pairs, self._plan.rule.combine(pairs, counting), counting)

    def result(
        self,
        updates: UpdateReducer,
        pairs: Sequence[Factors],
        combined: CombinedFactors,
        counting: RoundContext,
    ) -> LoraResult:
        """Measure what was combined of a fragment's pairs."""
        rule = self._plan.rule
        replaced: dict[str, Tensor] = {}
        if combined.factors is not None:
            for pair, (b, a) in zip(pairs, combined.factors, strict=True):
                replaced |= {pair.pair.b: b, pair.pair.a: a}
        if rule.writes_base:
            return LoraResult(None, combined.terms, replaced)
        if not self._context.measures_deviation:
            return LoraResult(None, None, replaced)
        terms = combined.terms
        if terms is None:
            terms = gathering.to_owners(pairs, counting, EVERYTHING - rule.frozen_parts(counting.round))
        results = combined.factors or [
            (self._mean(updates, p.pair.b), self._mean(updates, p.pair.a)) for p in pairs
        ]
        unknown = [k for k in gathering.owned(len(pairs), self._federation) if k not in combined.squares]
        squares = combined.squares | squared_deviations(pairs, results, terms, unknown)
        return LoraResult(deviation(pairs, squares, self._federation), None, replaced)

    def write_results_(self, updates: UpdateReducer, replaced: Mapping[str, Tensor], *, plain: bool) -> None:
        """Write the rule's results where the outer optimizer reads them.

        Args:
            updates: The fragment's vectors; ``anchor - result`` is written into its pseudo-gradient.
            replaced: Results by the names of the factors.
            plain: Whether the outer optimizer's step gives the result itself. Then the global vector takes it
                as it is: a difference would round it, and add what the last anchor lost in the parameters'
                dtype.
        """
        if not replaced:
            return
        steps = updates.layout.views(updates.pseudo_gradient)
        if plain:
            anchors = updates.layout.views(updates.global_)
            torch._foreach_copy_([matrix(anchors[name]) for name in replaced], [*replaced.values()])
            torch._foreach_zero_([steps[name] for name in replaced])
            return
        for name, result in replaced.items():
            step = matrix(steps[name])
            step.copy_(self._anchor(updates, name) - result.to(step.device))

    def write_base_(self, updates: UpdateReducer, terms: Mapping[int, Sequence[Term]]) -> Deviation:
        """Write into the frozen weights what the factors, as they are now, lack of the parties' mean."""
        pairs = self.factors(updates)
        squares = write_residual_(pairs, terms, self._federation)
        owned = gathering.owned(len(pairs), self._federation)
        return deviation(pairs, {k: squares[k] for k in owned}, self._federation)

    def factors(self, updates: UpdateReducer) -> list[Factors]:
        """Return the pairs of a fragment, with this party's factors."""
        anchors = updates.layout.views(updates.global_)
        return [
            Factors(
                pair=pair,
                b=matrix(self._parameters[pair.b].detach()),
                a=matrix(self._parameters[pair.a].detach()),
                anchor_b=matrix(anchors[pair.b]),
                anchor_a=matrix(anchors[pair.a]),
                ranks=self._ranks(pair),
                scalings=self._scalings(pair),
                scaling=self._scaling(pair),
                base=self._plan.module(pair).base,
            )
            for pair in self._plan.products
            if pair.a in anchors
        ]

    def _mean(self, updates: UpdateReducer, name: str) -> Tensor:
        """Return the mean of a factor that was averaged: the anchor minus the step."""
        return self._anchor(updates, name) - matrix(updates.layout.view(updates.pseudo_gradient, name))

    def _anchor(self, updates: UpdateReducer, name: str) -> Tensor:
        """Return the anchor as the parameters hold it, rounded to their dtype; float32."""
        return matrix(updates.layout.view(updates.global_, name).to(self._parameters[name].dtype).float())

    def _scaling(self, pair: Pair) -> float:
        return float(self.reference[pair.name][1])

    def _specs(self, pair: Pair) -> list[list[Any]]:
        return [of_party[pair.name] for of_party in self.specs]

    def _ranks(self, pair: Pair) -> list[int]:
        return [rank for rank, _ in self._specs(pair)]

    def _scalings(self, pair: Pair) -> list[float]:
        return [scaling for _, scaling in self._specs(pair)]
