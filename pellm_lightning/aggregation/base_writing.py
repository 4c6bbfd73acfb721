"""Exact aggregation rules that update the frozen base weights (FedEx-LoRA, FLoRA)."""

import hashlib
from collections.abc import Mapping, Sequence

import torch

from pellm_lightning.aggregation import gathering
from pellm_lightning.aggregation.base import (
    FACTORS,
    OTHERS,
    Aggregation,
    CombinedFactors,
    Factors,
    Parts,
    RoundContext,
    Term,
)
from pellm_lightning.aggregation.deviation import stack_of
from pellm_lightning.aggregation.factors import Stack
from pellm_lightning.aggregation.lora import LoraModule
from pellm_lightning.comm import Collectives

# Scalars of a base weight updated at a time in float64, to avoid a second copy of the weight.
_BLOCK = 1 << 20


class ResidualMean(Aggregation):
    """Average A and B, and add the residual of their product to the frozen weight: FedEx-LoRA.

    ``W <- W + sum(w_i s_i B_i A_i) - s B A`` (Singhal et al. 2025, arXiv:2410.09432), with B and A rounded
    to the parameters' dtype, so each module's weight is the exact mean of the parties' up to the rounding of
    W. The frozen weights then differ from the base model's: checkpoints contain them, and an exported adapter
    needs the base exported with it. Every party receives all factors, N - 1 times its own.

    Args:
        measure_deviation: As in ``LowRankMean``.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=ResidualMean())
    """

    outer = "mean"
    writes_base = True

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return why the module's update cannot be added to its base weight."""
        return module.unsupported_reason or module.unwritable_base_reason

    def combine(self, pairs: Sequence[Factors], context: RoundContext) -> CombinedFactors:
        """Gather the parties' factors; the plain mean is the result."""
        return CombinedFactors(None, gathering.to_all(pairs, context, FACTORS))


class Stacking(Aggregation):
    """Merge the mean of the products into the frozen weight and reinitialise the adapter: FLoRA.

    ``W <- W + sum(w_i s_i B_i A_i)``, ``B <- 0``, ``A`` drawn anew (Wang et al. 2024, arXiv:2409.05976).
    Exact, and of rank N r in each round, but adapter and optimizer state are reset. Parties may have
    different ranks and scalings.

    Args:
        seed: Seed of the new A, equal at every party; combined with the round.
        measure_deviation: As in ``LowRankMean``.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=Stacking(seed=1))
    """

    outer = "mean"
    writes_base = True
    ranks_may_differ = True

    def __init__(self, seed: int = 0, measure_deviation: bool | None = None) -> None:
        super().__init__(measure_deviation)
        self.seed = seed

    def averaged(self, round: int, num_participants: int) -> Parts:
        """Return all but the factors."""
        return OTHERS

    def basis_changed(self, num_participants: int) -> Parts:
        """Return the factors, which are reinitialised."""
        return FACTORS

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return why the module's update cannot be merged."""
        return module.unsupported_reason or module.unwritable_base_reason

    def combine(self, pairs: Sequence[Factors], context: RoundContext) -> CombinedFactors:
        """Return B = 0 and a new A, uniform as PEFT initialises it, for each pair."""
        terms = gathering.to_all(pairs, context, FACTORS)
        generator = torch.Generator().manual_seed(_round_seed(self.seed, context.round))
        new = []
        for pair in pairs:
            bound = pair.anchor_a.shape[1] ** -0.5  # Kaiming's for a = sqrt(5), over the inputs
            new.append(torch.empty(pair.anchor_a.shape).uniform_(-bound, bound, generator=generator))
        gathering.synchronize_(new, context.federation)
        zeros = [torch.zeros(pair.anchor_b.shape) for pair in pairs]
        return CombinedFactors(list(zip(zeros, new, strict=True)), terms)


def write_residual_(
    pairs: Sequence[Factors], terms: Mapping[int, Sequence[Term]], federation: Collectives
) -> dict[int, tuple[float, float]]:
    """Add to each frozen weight the mean product minus that of the written factors ``pair.b`` and ``pair.a``.

    Returns:
        The squared norms of the rounding error in the weight's dtype, and of the mean of the products, by
        index of the pair.
    """
    squares = {}
    for k, pair in enumerate(pairs):
        mean, b, a = stack_of(terms[k]), pair.b.cpu(), pair.a.cpu()
        _, norm = mean.squared_norms(pair.scaling, b, a)
        squares[k] = _add_(pair, mean.minus(pair.scaling, b, a)), norm
    bases = [pair.base for pair in pairs if pair.base is not None]
    gathering.synchronize_([base if base.is_contiguous() else base.T for base in bases], federation)
    return squares


def _round_seed(seed: int, round: int) -> int:
    """Return a seed for a round; a digest, since a sum of the two would repeat between seeds."""
    digest = hashlib.blake2b(f"{seed} {round}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def _add_(pair: Factors, residual: Stack) -> float:
    if pair.base is None:
        raise ValueError(f"The module of {pair.name!r} has no writable frozen weight.")
    squared_error = 0.0
    rows = max(1, _BLOCK // pair.base.shape[1])
    for block, left in zip(pair.base.split(rows), residual.left.split(rows), strict=True):
        exact = block.cpu().double() + left @ residual.right
        block.copy_(exact)
        squared_error += float((exact - block.cpu().double()).square().sum())
    return squared_error
