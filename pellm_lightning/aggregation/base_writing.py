"""Rules that are exact because the frozen weights take up what factors of rank r cannot hold."""

import hashlib
from collections.abc import Mapping, Sequence

import torch

from pellm_lightning.aggregation import gathering
from pellm_lightning.aggregation.base import (
    FACTORS,
    OTHERS,
    Aggregation,
    Combined,
    Factors,
    Parts,
    RoundContext,
    Term,
)
from pellm_lightning.aggregation.deviation import stack_of
from pellm_lightning.aggregation.factors import Stack
from pellm_lightning.aggregation.lora import LoraModule
from pellm_lightning.comm import Collectives

# Scalars of a base weight that are updated at a time, in float64: no second copy of a weight is ever held.
_BLOCK = 1 << 20


class ResidualMean(Aggregation):
    """Average A and B, and add what their product misses to the frozen weight: FedEx-LoRA.

    ``W <- W + sum(w_i s_i B_i A_i) - s B A`` (Singhal et al. 2025, arXiv:2410.09432), with B and A as they
    were really written, so each module's weight is the exact mean of the parties' up to the rounding of W.
    The frozen weights then differ from the base model's: checkpoints hold them, and an exported adapter needs
    the base that is exported beside it. Every party receives all factors, (N - 1) times those of one.

    Args:
        measure_deviation: As in ``LowRankMean``.
    """

    outer = "mean"
    writes_base = True

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return what stands against writing the module's update into its base weight."""
        return module.unsupported_reason or module.base_obstacle

    def combine(self, pairs: Sequence[Factors], counting: RoundContext) -> Combined:
        """Let the plain mean be the result and remember what the parties held."""
        return Combined(None, gathering.to_all(pairs, counting, FACTORS))

    def __repr__(self) -> str:
        return "ResidualMean()"


class Stacking(Aggregation):
    """Merge the mean of the products into the frozen weight, start each round with a new adapter: FLoRA.

    ``W <- W + sum(w_i s_i B_i A_i)``, ``B <- 0``, ``A`` drawn anew (Wang et al. 2024, arXiv:2409.05976).
    Exact, and of rank N r in each round, but nothing that a party's adapter or optimizer learned of the
    coordinates lives on. Parties may have ranks and scalings of their own.

    Args:
        seed: Of the new A, the same at every party; it is counted up by the round.
        measure_deviation: As in ``LowRankMean``.
    """

    outer = "mean"
    writes_base = True
    ranks_may_differ = True

    def __init__(self, seed: int = 0, measure_deviation: bool | None = None) -> None:
        super().__init__(measure_deviation)
        self.seed = seed

    def averaged(self, round: int, counting: int) -> Parts:
        """Return what is no factor."""
        return OTHERS

    def basis_changed(self, counting: int) -> Parts:
        """Return the factors, which are new."""
        return FACTORS

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return what stands against merging the module."""
        return module.unsupported_reason or module.base_obstacle

    def combine(self, pairs: Sequence[Factors], counting: RoundContext) -> Combined:
        """Return B = 0 and a new A, uniform as PEFT draws it, for each pair."""
        terms = gathering.to_all(pairs, counting, FACTORS)
        generator = torch.Generator().manual_seed(_mixed(self.seed, counting.round))
        new = []
        for pair in pairs:
            bound = pair.anchor_a.shape[1] ** -0.5  # Kaiming's for a = sqrt(5), over the inputs
            new.append(torch.empty(pair.anchor_a.shape).uniform_(-bound, bound, generator=generator))
        gathering.agree_(new, counting.federation)
        none = [torch.zeros(pair.anchor_b.shape) for pair in pairs]
        return Combined(list(zip(none, new, strict=True)), terms)

    def __repr__(self) -> str:
        return f"Stacking(seed={self.seed})"


def write_rest_(
    pairs: Sequence[Factors], terms: Mapping[int, Sequence[Term]], federation: Collectives
) -> dict[int, tuple[float, float]]:
    """Add to each frozen weight what the written factors ``pair.b`` and ``pair.a`` lack of the mean product.

    Returns:
        The squared norms of what rounding to the weight's dtype has lost, and of the mean of the products, by
        index of the pair.
    """
    squares = {}
    for k, pair in enumerate(pairs):
        mean, b, a = stack_of(terms[k]), pair.b.cpu(), pair.a.cpu()
        _, whole = mean.squared_norms(pair.scaling, b, a)
        squares[k] = _add_(pair, mean.minus(pair.scaling, b, a)), whole
    bases = [pair.base for pair in pairs if pair.base is not None]
    gathering.agree_([base if base.is_contiguous() else base.T for base in bases], federation)
    return squares


def _mixed(seed: int, round: int) -> int:
    """Return a seed for a round: a generator looks at 32 bits only, so sums of the two would repeat."""
    digest = hashlib.blake2b(f"{seed} {round}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def _add_(pair: Factors, rest: Stack) -> float:
    if pair.base is None:
        raise ValueError(f"The module of {pair.pair.name!r} has no frozen weight that can be written.")
    lost = 0.0
    rows = max(1, _BLOCK // pair.base.shape[1])
    for block, left in zip(pair.base.split(rows), rest.left.split(rows), strict=True):
        wanted = block.cpu().double() + left @ rest.right
        block.copy_(wanted)
        lost += float((wanted - block.cpu().double()).square().sum())
    return lost
