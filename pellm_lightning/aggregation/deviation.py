"""By how much a round's result misses the weighted mean of the parties' products."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import Factors, Term
from pellm_lightning.aggregation.factors import Stack
from pellm_lightning.comm import Collectives


@dataclass(frozen=True)
class Deviation:
    """Relative deviation ``|sum(w_i s_i B_i A_i) - s B A| / |sum(w_i s_i B_i A_i)|``, Frobenius norms."""

    total: float
    """Over all adapted modules together."""
    worst: float
    """Of the module where it is largest."""
    worst_module: str
    """Name of that module's pair."""


def stack_of(terms: Sequence[Term]) -> Stack:
    """Return the weighted mean of the parties' products."""
    return Stack.of([(term.share * term.scaling, term.b, term.a) for term in terms])


def missed(
    pairs: Sequence[Factors],
    results: Sequence[tuple[Tensor, Tensor]],
    terms: Mapping[int, Sequence[Term]],
    owned: Sequence[int],
) -> dict[int, tuple[float, float]]:
    """Return, by index of the pairs owned here, the squared norms of what is missed and of the mean."""
    squares = {}
    for k in owned:
        b, a = (factor.cpu() for factor in results[k])
        squares[k] = stack_of(terms[k]).squared_norms(pairs[k].scaling, b, a)
    return squares


def deviation(
    pairs: Sequence[Factors], squares: Mapping[int, tuple[float, float]], federation: Collectives
) -> Deviation:
    """Put together what the owners of the pairs found; the same at every party."""
    table = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for k, both in squares.items():
        table[k] = torch.tensor(both, dtype=torch.float64)
    federation.all_reduce_(table)
    relative = [_ratio(away, whole) for away, whole in table.tolist()]
    worst = max(range(len(pairs)), key=relative.__getitem__)
    away, whole = table.sum(dim=0).tolist()
    return Deviation(_ratio(away, whole), relative[worst], pairs[worst].pair.name)


def _ratio(away: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if away == 0 else math.inf
    return math.sqrt(away / whole)
