"""Aggregation of adapters of different ranks (FlexLoRA, HetLoRA)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import (
    EVERYTHING,
    FACTORS,
    NOTHING,
    OTHERS,
    Aggregation,
    CombinedFactors,
    Factors,
    Parts,
    RoundContext,
)
from pellm_lightning.aggregation.lora import LoraModule, Pair
from pellm_lightning.aggregation.low_rank import LowRankMean, Solver


class HeterogeneousRank(Aggregation):
    """Aggregation rule for parties with adapters of different rank and scaling (alpha, rsLoRA).

    The global factors have the largest rank R of the parties. "low_rank" gives every party the best
    approximation of the mean product at its own rank (FlexLoRA, Bai et al. 2024, arXiv:2402.11505): factors
    sorted by singular values, of which a party takes the first r. "zero_pad" averages zero-padded factors and
    truncates the result (HetLoRA, Cho et al. 2024, arXiv:2401.06432, without its pruning and sparsity
    weights): simpler, and worse, since every party pulls the directions that it lacks towards zero.

    Args:
        method: "low_rank" or "zero_pad".
        solver: As in ``LowRankMean``.
        steps: As in ``LowRankMean``.
        factorization: "balanced" or "svd", as in ``LowRankMean``; both sort the directions.
        measure_deviation: As in ``LowRankMean``.

    Raises:
        ValueError: If an argument is none of its choices.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=HeterogeneousRank())
    """

    outer = "mean"
    ranks_may_differ = True

    def __init__(
        self,
        method: Literal["low_rank", "zero_pad"] = "low_rank",
        solver: Solver = "exact",
        steps: int = 1,
        factorization: Literal["balanced", "svd"] = "balanced",
        measure_deviation: bool | None = None,
    ) -> None:
        super().__init__(measure_deviation)
        if method not in ("low_rank", "zero_pad"):
            raise ValueError(f"method={method!r} must be 'low_rank' or 'zero_pad'.")
        if factorization not in ("balanced", "svd"):
            raise ValueError(
                f"factorization={factorization!r} must be 'balanced' or 'svd': a party takes the first r"
                " directions, so they must be sorted by singular values."
            )
        self.method = method
        self.solver = solver
        self.steps = steps
        self.factorization = factorization
        self._low_rank = LowRankMean(solver, steps, factorization)
        self.requires = "means" if method == "zero_pad" else self._low_rank.requires

    def averaged(self, round: int, num_participants: int) -> Parts:
        """Return all but the factors; with "zero_pad" everything."""
        return EVERYTHING if self.method == "zero_pad" else OTHERS

    def basis_changed(self, num_participants: int) -> Parts:
        """Return the factors, with "zero_pad" nothing."""
        return NOTHING if self.method == "zero_pad" else FACTORS

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return the module's own reason."""
        return module.unsupported_reason

    def combine(self, pairs: Sequence[Factors], context: RoundContext) -> CombinedFactors:
        """Return the best factors of rank R of each pair; with "zero_pad" the mean is the result."""
        if self.method == "zero_pad":
            return CombinedFactors()
        return self._low_rank.solve(pairs, context)


class PaddedFactors:
    """Buffers of a party's factors, zero-padded to the global rank and in the global scaling.

    The global factors are ``B_i s_i / s`` and ``A_i``, so that products compare at one scaling s.

    Args:
        parameters: This party's parameters by name.
        pairs: The largest rank of each pair, the ratio ``s_i / s`` at this party, and the number of experts.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], pairs: Mapping[Pair, tuple[int, float, int]]
    ) -> None:
        self._views: dict[str, tuple[Tensor, Tensor, Tensor, float]] = {}
        self.tensors = dict(parameters)
        """The parameters with padded factors, for a layout."""
        for pair, (rank, ratio_b, experts) in pairs.items():
            bias = pair.b.removesuffix("weight") + "bias"  # PEFT's lora_bias, which is scaled like B
            if bias in parameters:
                own = parameters[bias]
                padded = torch.zeros_like(own)
                self._views[bias] = (own, padded, padded, ratio_b)
                self.tensors[bias] = padded
            for name, dim, ratio in ((pair.a, 0, 1.0), (pair.b, 1, ratio_b)):
                own = parameters[name]
                shape = list(own.shape)
                shape[dim] = rank * experts
                padded = torch.zeros(shape, dtype=own.dtype, device=own.device)
                view = padded.narrow(dim, 0, own.shape[dim])
                if dim == 0 and experts > 1:  # the rows of A are by expert, the columns of B by rank
                    view = padded.unflatten(0, (experts, rank))[:, : own.shape[0] // experts]
                self._views[name] = (own, padded, view, ratio)
                self.tensors[name] = padded

    def read_(self, names: Iterable[str]) -> None:
        """Copy the party's factors among ``names`` into the padded ones, and zero the rest."""
        for own, padded, view, ratio in self._named(names):
            padded.zero_()
            view.copy_((own * ratio).view(view.shape))

    def write_(self, names: Iterable[str]) -> None:
        """Copy the first rows and columns of the padded factors among ``names`` into the party's."""
        for own, _, view, ratio in self._named(names):
            own.copy_((view / ratio).view(own.shape))

    def _named(self, names: Iterable[str]) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        return (self._views[name] for name in names if name in self._views)
