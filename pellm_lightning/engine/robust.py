"""RobustReducer: a round under a robust rule, all-to-all of updates, the rule, all-gather of its result."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from pellm_lightning.aggregation import gathering
from pellm_lightning.aggregation.base import FACTORS, Factors, RoundContext, Term
from pellm_lightning.aggregation.gram import Module, gram_matrices, product_gram
from pellm_lightning.aggregation.low_rank import nearest_to_anchors
from pellm_lightning.aggregation.robust import CoordinatewiseRule, WeighingRule
from pellm_lightning.comm import Collectives
from pellm_lightning.comm.collectives import concatenated
from pellm_lightning.engine.lora_step import LoraAggregator, LoraResult
from pellm_lightning.engine.updates import UpdateReducer

log = logging.getLogger(__name__)

# Numbers of an update converted to float64 at a time, so that they stay in the cache.
_BLOCK = 1 << 14


class RobustReducer:
    """Reducer of the parties' single updates under a robust rule, at the bytes of an all-reduce.

    Each party receives its N-th of every update, and the factors of its N-th of the LoRA modules. The inner
    products of whole updates are sums over these parts, so they take one all-reduce of N x N numbers. Then
    each party computes its part of the result for all.

    Args:
        rule: The robust rule.
    """

    def __init__(self, rule: WeighingRule | CoordinatewiseRule) -> None:
        self._rule = rule
        self._warned = False

    def reduce_(
        self, updates: UpdateReducer, lora: LoraAggregator | None, counting: RoundContext
    ) -> tuple[Sequence[float], LoraResult | None]:
        """Replace this party's update by the rule's result.

        Returns:
            The weight of each member's update in the result, empty where the rule combines single numbers;
            and the results for LoRA pairs, if the rule combines their products.
        """
        federation, rule = counting.federation, self._rule
        self._warn_of_few(counting)
        values = updates.sent(counting)
        rows = _received(values, counting)
        shares = torch.tensor([share for share in counting.shares if share > 0], dtype=torch.float64)
        if not isinstance(rule, WeighingRule):
            if rule.mixing:
                gram = federation.all_reduce_(_inner_products(rows))
                rows = _agreed(rule.mixing_matrix(gram, shares), federation).float() @ rows
            _gather_(values, rule.combine_columns(rows, shares), federation)
            return (), None
        gram = _inner_products(rows)
        pairs = [] if lora is None or not lora.has_pairs(updates) else lora.factors(updates)
        terms = _terms(pairs, counting)
        modules = {k: _module(pairs[k], of) for k, of in terms.items()}
        for module in modules.values():
            gram += _of_differences(product_gram(module))
        weights = _agreed(rule.influence(federation.all_reduce_(gram), shares), federation)
        _gather_(values, _weighted(rows, weights), federation)
        by_member = iter(weights.tolist())
        result = [next(by_member) if share > 0 else 0.0 for share in counting.shares]
        if lora is None or not pairs:
            return result, None
        combined = nearest_to_anchors(pairs, _weighted_modules(modules, weights), federation)
        return result, lora.result(updates, pairs, combined, counting)

    def _warn_of_few(self, counting: RoundContext) -> None:
        count, needed = counting.num_participants, self._rule.min_parties
        if not self._warned and count < needed and counting.federation.num_parties > 1:
            self._warned = True
            log.warning(
                "[party %s] Round %d: %d parties count, and %r protects %d or more.",
                counting.federation.name,
                counting.round,
                count,
                self._rule,
                needed,
            )


# ---- of the flat vector


def _received(values: Tensor, counting: RoundContext) -> Tensor:
    """Return this party's part of each participant's values, (n, k) float32."""
    federation, sends = counting.federation, counting.share > 0
    parts = _parts(values, federation) if sends else [torch.zeros(0)] * federation.num_parties
    size, participants = len(_parts(values, federation)[federation.party]), counting.num_participants
    if not len(values):
        return torch.zeros(participants, 0)
    received = federation.all_to_all(parts, [size if share > 0 else 0 for share in counting.shares])
    sent = [part for part, share in zip(received, counting.shares, strict=True) if share > 0]
    return concatenated(sent).view(participants, size)


def _gather_(values: Tensor, part: Tensor, federation: Collectives) -> None:
    """Overwrite the values by the parts that the parties have computed."""
    if not len(values):
        return
    sizes = [len(of_party) for of_party in _parts(values, federation)]
    padded = torch.cat([part, part.new_zeros(max(sizes) - len(part))])  # Gloo gathers equal sizes best
    gathered = federation.all_gather(padded, [max(sizes)] * len(sizes))
    for place, of_party in zip(_parts(values, federation), gathered, strict=True):
        place.copy_(of_party[: len(place)])


def _parts(values: Tensor, federation: Collectives) -> list[Tensor]:
    """Divide a vector among the parties, as views of equal sizes but for the last."""
    size = -(-len(values) // federation.num_parties)
    starts = [min(party * size, len(values)) for party in range(federation.num_parties + 1)]
    return [values[start:stop] for start, stop in pairwise(starts)]


def _inner_products(rows: Tensor) -> Tensor:
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for block in rows.split(_BLOCK, dim=1):
        exact = block.double()
        gram.addmm_(exact, exact.T)
    return gram


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the rows; those of weight 0 may hold anything."""
    result = torch.zeros(rows.shape[1])
    for row, weight in zip(rows, weights.tolist(), strict=True):
        if weight:
            result.add_(row, alpha=weight)
    return result


def _agreed(weights: Tensor, federation: Collectives) -> Tensor:
    """Return weights that each party computed for itself, the same at all: a tie may be broken either way."""
    flat = weights.contiguous()
    gathering.synchronize_([flat], federation)
    return flat


# ---- of LoRA products


def _terms(pairs: Sequence[Factors], counting: RoundContext) -> dict[int, list[Term]]:
    """Return the parties' factors of the pairs that this party owns, with the anchor's as the last."""
    if not pairs:
        return {}
    terms = gathering.to_owners(pairs, counting, FACTORS)
    for k, of_pair in terms.items():
        b, a = (
            anchor.to("cpu", factor.dtype).float()  # as the parties had it
            for anchor, factor in ((pairs[k].anchor_b, pairs[k].b), (pairs[k].anchor_a, pairs[k].a))
        )
        of_pair.append(Term(0.0, pairs[k].scaling, b, a))
    return terms


def _module(pair: Factors, terms: Sequence[Term]) -> Module:
    module = Module(terms, pair.scaling, pair.anchor_a.shape[0])
    return replace(module, grams=gram_matrices(module.factors))


def _of_differences(gram: Tensor) -> Tensor:
    """Return the inner products of products minus the last of them, from those of the products."""
    away = gram - gram[-1:] - gram[:, -1:] + gram[-1, -1]
    return away[:-1, :-1]


def _weighted_modules(modules: Mapping[int, Module], weights: Tensor) -> dict[int, Module]:
    """Return the modules with the rule's weights as shares; what they lack of 1 is the anchor's."""
    shares = [*weights.tolist(), 1 - float(weights.sum())]
    return {
        k: replace(module, terms=[replace(t, share=s) for t, s in zip(module.terms, shares, strict=True)])
        for k, module in modules.items()
    }
