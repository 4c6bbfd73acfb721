"""Deviation metric: distance of a round's result from the weighted mean of the parties' products."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import Factors, Term
from pellm_lightning.aggregation.factors import Stack
from pellm_lightning.comm import Collectives
from pellm_lightning.tensors.deviation import Deviation


def stack_of(terms: Sequence[Term]) -> Stack:
    """Return the weighted mean of the parties' products."""
    return Stack.of([(term.share * term.scaling, term.b, term.a) for term in terms])


def squared_deviations(
    pairs: Sequence[Factors],
    results: Sequence[tuple[Tensor, Tensor]],
    terms: Mapping[int, Sequence[Term]],
    owned: Sequence[int],
) -> dict[int, tuple[float, float]]:
    """Return the squared norms of the deviation and of the mean, by index of the owned pairs."""
    squares = {}
    for k in owned:
        b, a = (factor.cpu() for factor in results[k])
        squares[k] = stack_of(terms[k]).squared_norms(pairs[k].scaling, b, a)
    return squares


def deviation(
    pairs: Sequence[Factors], squares: Mapping[int, tuple[float, float]], federation: Collectives
) -> Deviation:
    """All-reduce the owners' squared norms to the deviation."""
    table = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for k, both in squares.items():
        table[k] = torch.tensor(both, dtype=torch.float64)
    federation.all_reduce_(table)
    relative = [_ratio(difference, whole) for difference, whole in table.tolist()]
    worst = max(range(len(pairs)), key=relative.__getitem__)
    difference, whole = table.sum(dim=0).tolist()
    return Deviation(_ratio(difference, whole), relative[worst], pairs[worst].name)


def _ratio(difference: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / whole)
