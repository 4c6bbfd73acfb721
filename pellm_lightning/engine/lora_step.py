"""LoraAggregator: the LoRA pairs of a round, combined by the rule, written to the vector and measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.aggregation import gathering
from pellm_lightning.aggregation.base import EVERYTHING, CombinedFactors, Factors, RoundContext, Term
from pellm_lightning.aggregation.base_writing import write_residual_
from pellm_lightning.aggregation.deviation import deviation, squared_deviations
from pellm_lightning.aggregation.lora import Pair, join_experts, matrix, of_experts
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
        specs: Rank, scaling and number of experts of each pair at each of the parties that meet, by the
            pair's name.
        reference: Those of the global factors, by the pair's name; None takes the largest rank of the
            parties, and the scaling of the first party that has it.
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
        """Rank, scaling and number of experts of the global factors, by the pair's name."""

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

    def experts(self, pair: Pair) -> int:
        """Return the number of experts that the factors hold."""
        return self._plan.module(pair).experts

    def larger(self) -> str | None:
        """Return the name of a pair whose rank at this party is above that of the global factors, if any."""
        own = {p.name: self._plan.module(p).rank(self._parameters[p.a]) for p in self._plan.products}
        return next((name for name, rank in own.items() if rank > self.reference[name][0]), None)

    def has_pairs(self, updates: UpdateReducer) -> bool:
        """Tell whether a fragment holds LoRA pairs."""
        return bool(self._pairs(updates))

    def combine(self, updates: UpdateReducer, counting: RoundContext) -> LoraResult:
        """Combine the pairs of a fragment by the rule, and measure the result; nothing is written yet."""
        products = self.factors(updates)
        return self.result(updates, products, self._plan.rule.combine(products, counting), counting)

    def result(
        self,
        updates: UpdateReducer,
        products: Sequence[Factors],
        combined: CombinedFactors,
        counting: RoundContext,
    ) -> LoraResult:
        """Measure what was combined of a fragment's pairs."""
        rule = self._plan.rule
        replaced = _joined(products, combined.factors or [])
        if rule.writes_base:
            return LoraResult(None, combined.terms, replaced)
        if not self._context.measures_deviation:
            return LoraResult(None, None, replaced)
        terms = combined.terms
        if terms is None:
            terms = gathering.to_owners(products, counting, EVERYTHING - rule.frozen_parts(counting.round))
        results = combined.factors or self._means(updates)
        unknown = [k for k in gathering.owned(len(products), self._federation) if k not in combined.squares]
        squares = combined.squares | squared_deviations(products, results, terms, unknown)
        return LoraResult(deviation(products, squares, self._federation), None, replaced)

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
        products = self.factors(updates)
        squares = write_residual_(products, terms, self._federation)
        owned = gathering.owned(len(products), self._federation)
        return deviation(products, {k: squares[k] for k in owned}, self._federation)

    def factors(self, updates: UpdateReducer) -> list[Factors]:
        """Return the products of a fragment: one of each pair, or one of each of its experts."""
        anchors = updates.layout.views(updates.global_)
        return [product for pair in self._pairs(updates) for product in self._of_pair(pair, anchors)]

    def _pairs(self, updates: UpdateReducer) -> list[Pair]:
        names = set(updates.layout.names)
        return [pair for pair in self._plan.products if pair.a in names]

    def _of_pair(self, pair: Pair, anchors: Mapping[str, Tensor]) -> Iterator[Factors]:
        module = self._plan.module(pair)
        ranks, scalings, scaling = self._ranks(pair), self._scalings(pair), self._scaling(pair)
        own_b, own_a = (self._parameters[name].detach() for name in (pair.b, pair.a))
        each = zip(
            of_experts(own_b, own_a, module.experts),
            of_experts(anchors[pair.b], anchors[pair.a], module.experts),
            module.bases(),
            strict=True,
        )
        for expert, ((b, a), (anchor_b, anchor_a), base) in enumerate(each):
            of = expert if module.experts > 1 else None
            yield Factors(pair, b, a, anchor_b, anchor_a, ranks, scalings, scaling, base, of)

    def _means(self, updates: UpdateReducer) -> list[tuple[Tensor, Tensor]]:
        """Return the means of averaged factors (B, A), of each product of a fragment."""
        return [
            both
            for pair in self._pairs(updates)
            for both in of_experts(
                self._mean(updates, pair.b), self._mean(updates, pair.a), self._plan.module(pair).experts
            )
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
        return [rank for rank, *_ in self._specs(pair)]

    def _scalings(self, pair: Pair) -> list[float]:
        return [scaling for _, scaling, _ in self._specs(pair)]


def _joined(products: Sequence[Factors], results: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return results of products as those of the parameters, as matrices by name."""
    if not results:
        return {}
    of_pairs: dict[Pair, list[tuple[Tensor, Tensor]]] = {}
    for product, both in zip(products, results, strict=True):
        of_pairs.setdefault(product.pair, []).append(both)
    joined: dict[str, Tensor] = {}
    for pair, each in of_pairs.items():
        joined[pair.b], joined[pair.a] = join_experts(each)
    return joined
