"""Robust aggregation rules: a minority of parties cannot move the result far from the others' updates."""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from pellm_lightning.aggregation import influence
from pellm_lightning.aggregation.base import (
    EVERYTHING,
    NOTHING,
    OTHERS,
    Aggregation,
    Part,
    Parts,
    Requirement,
)
from pellm_lightning.aggregation.lora import LoraModule


class RobustRule(Aggregation):
    """Robust aggregation rule: needs the parties' single updates, and a majority of honest parties.

    Args:
        mixing: Number f of malicious parties for nearest-neighbour mixing (NNM, Allouah et al. 2023,
            arXiv:2302.01772): first each update is replaced by the mean of the N - f nearest to it, which
            helps where honest parties' data differ much. 0 mixes nothing.
        measure_deviation: As in ``LowRankMean``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    requires: Requirement = "parties"

    def __init__(self, mixing: int = 0, measure_deviation: bool | None = None) -> None:
        super().__init__(measure_deviation)
        _count("mixing", mixing, least=0)
        self.mixing = mixing

    @property
    def min_parties(self) -> int:
        """Number of parties from which on the rule protects: more than twice the malicious."""
        return max(3, 2 * self.mixing + 1)

    def mixing_matrix(self, gram: Tensor, shares: Tensor) -> Tensor:
        """Return the matrix (n, n) that mixes updates of given inner products."""
        return influence.nearest_mixing(gram, shares, self.mixing)


class WeighingRule(RobustRule):
    """Robust rule that weighs whole updates by their distances from each other.

    For LoRA an update is the change of the product ``s B A``, whatever the factors. The result is the anchor
    plus ``sum(u_i Delta_i)``; of LoRA modules its best approximation of rank r, factorized nearest to the
    anchor's factors.
    """

    @override
    def averaged(self, round: int, num_participants: int) -> Parts:
        return OTHERS

    @override
    def unsupported_reason(self, module: LoraModule) -> str | None:
        return module.unsupported_reason

    @abstractmethod
    def weights(self, gram: Tensor, shares: Tensor) -> Tensor:
        """Return the weights u_i (n,) of the updates, of sum 1 or less.

        Args:
            gram: Inner products of the updates, (n, n) float64.
            shares: The parties' shares (n,), of sum 1.
        """

    def influence(self, gram: Tensor, shares: Tensor) -> Tensor:
        """Return the weights u_i (n,) of the updates, mixed before if asked for; 0 if not finite."""
        gram = gram.clone()
        gram.diagonal().clamp_min_(0)  # differences of products of almost equal factors round below
        fine = gram.diagonal().isfinite()
        result = torch.zeros_like(shares)
        if not fine.any():
            return result
        gram, shares = gram[fine][:, fine], shares[fine] / shares[fine].sum()
        if self.mixing:
            mixing = self.mixing_matrix(gram, shares)
            result[fine] = self.weights(mixing @ gram @ mixing.T, shares) @ mixing
        else:
            result[fine] = self.weights(gram, shares)
        return result


class NormBound(WeighingRule):
    """Mean of updates that are scaled down to a multiple of their median norm.

    ``u_i = w_i min(1, factor * median_j |Delta_j| / |Delta_i|)`` (Sun et al. 2019, arXiv:1911.07963): a party
    can pull in any direction, but no further than others. What is cut off stays at the anchor. With secure
    aggregation each party bounds its own update by the parties' mean norm of the round before.

    Args:
        factor: Multiple of the median norm that is allowed.
        mixing: As in ``Median``.
        measure_deviation: As in ``LowRankMean``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=NormBound(factor=1.0))
    """

    def __init__(self, factor: float = 1.0, mixing: int = 0, measure_deviation: bool | None = None) -> None:
        super().__init__(mixing, measure_deviation)
        if not 0 < factor < float("inf"):
            raise ValueError(f"factor={factor!r} must be a number above 0.")
        self.factor = factor

    @override
    def weights(self, gram: Tensor, shares: Tensor) -> Tensor:
        """Return the shares, scaled down where a norm is above the bound."""
        return shares * influence.bounded_norms(gram, self.factor)


class SenderNormBound(Aggregation):
    """``NormBound`` where only sums are revealed: the mean of updates that each party has bounded itself.

    Args:
        factor: Multiple of the parties' mean norm of the round before that is allowed.
    """

    requires = "means"

    def __init__(self, factor: float) -> None:
        super().__init__(measure_deviation=False)
        self.factor = factor

    @override
    def __repr__(self) -> str:
        return f"NormBound(factor={self.factor!r}), by each party itself"


class GeometricMedian(WeighingRule):
    """Geometric median of the updates: the point whose weighted sum of distances from them is least.

    RFA (Pillutla et al. 2019, arXiv:1912.13445), by the smoothed Weiszfeld algorithm. It withstands
    parties that together have less than half of the weight.

    Args:
        smoothing: Distance below which an update's weight does not grow any more, as a fraction of the median
            norm of the updates.
        mixing: As in ``Median``.
        measure_deviation: As in ``LowRankMean``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=GeometricMedian())
    """

    def __init__(
        self, smoothing: float = 1e-6, mixing: int = 0, measure_deviation: bool | None = None
    ) -> None:
        super().__init__(mixing, measure_deviation)
        if not 0 < smoothing < float("inf"):
            raise ValueError(f"smoothing={smoothing!r} must be a number above 0.")
        self.smoothing = smoothing

    @override
    def weights(self, gram: Tensor, shares: Tensor) -> Tensor:
        """Return the weights of the smoothed Weiszfeld algorithm."""
        return influence.geometric_median(gram, shares, self.smoothing)


class Krum(WeighingRule):
    """The one update that is nearest to its N - f - 2 nearest others, whatever the weights.

    Krum (Blanchard et al. 2017, arXiv:1703.02757). It needs N >= 2 f + 3 parties, and learns from one party
    in each round, so it suits parties with similar data; see ``MultiKrum``.

    Args:
        num_malicious: Number f of malicious parties to withstand.
        mixing: As in ``Median``.
        measure_deviation: As in ``LowRankMean``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=Krum(num_malicious=1))
    """

    def __init__(
        self, num_malicious: int = 1, mixing: int = 0, measure_deviation: bool | None = None
    ) -> None:
        super().__init__(mixing, measure_deviation)
        _count("num_malicious", num_malicious, least=0)
        self.num_malicious = num_malicious

    @property
    @override
    def min_parties(self) -> int:
        return max(super().min_parties, 2 * self.num_malicious + 3)

    @override
    def weights(self, gram: Tensor, shares: Tensor) -> Tensor:
        """Return 1 for the selected update, 0 for all others."""
        return _only(shares, influence.krum_order(gram, self.num_malicious)[:1])


class MultiKrum(WeighingRule):
    """Weighted mean of the updates that are best by Krum's score.

    Multi-Krum (Blanchard et al. 2017, arXiv:1703.02757). It needs N >= 2 f + 3 parties.

    Args:
        num_malicious: Number f of malicious parties to withstand.
        num_selected: How many updates are averaged. Default: all but f.
        mixing: As in ``Median``.
        measure_deviation: As in ``LowRankMean``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=MultiKrum(num_malicious=1))
    """

    def __init__(
        self,
        num_malicious: int = 1,
        num_selected: int | None = None,
        mixing: int = 0,
        measure_deviation: bool | None = None,
    ) -> None:
        super().__init__(mixing, measure_deviation)
        _count("num_malicious", num_malicious, least=0)
        if num_selected is not None:
            _count("num_selected", num_selected, least=1)
        self.num_malicious = num_malicious
        self.num_selected = num_selected

    @property
    @override
    def min_parties(self) -> int:
        return max(super().min_parties, 2 * self.num_malicious + 3, (self.num_selected or 0))

    @override
    def weights(self, gram: Tensor, shares: Tensor) -> Tensor:
        """Return the shares of the selected updates, of sum 1."""
        selected = self.num_selected or max(1, len(gram) - self.num_malicious)
        return _only(shares, influence.krum_order(gram, self.num_malicious)[:selected])


class CoordinatewiseRule(RobustRule):
    """Robust rule that combines each number of the parameters by itself, LoRA factors one by one.

    Every number of the result lies among those of the honest parties, whatever the gauge of an attacker's
    factors. The product of the results is not that of the products, as with ``Mean``; with ``frozen_a`` it
    is, since all parties have the same A.

    Args:
        frozen_a: Train and send B only, as ``FrozenA``.
        mixing: As in ``RobustRule``.
    """

    def __init__(self, frozen_a: bool = False, mixing: int = 0) -> None:
        super().__init__(mixing, measure_deviation=False)
        self.frozen_a = frozen_a
        self.outer: Literal["any", "memoryless", "mean"] = "memoryless" if frozen_a else "any"

    @override
    def averaged(self, round: int, num_participants: int) -> Parts:
        return EVERYTHING - self.frozen_parts(round)

    @override
    def frozen_parts(self, round: int) -> Parts:
        return frozenset({Part.A}) if self.frozen_a else NOTHING

    @override
    def unsupported_reason(self, module: LoraModule) -> str | None:
        if self.frozen_a and module.zero_a:
            return "its A is zero, so neither factor would change"
        return None

    @abstractmethod
    def combine_columns(self, values: Tensor, shares: Tensor) -> Tensor:
        """Return the result (k,) of each column of ``values`` (n, k), float32.

        Args:
            values: The parties' updates, one row each.
            shares: The parties' shares (n,), of sum 1.
        """


class Median(CoordinatewiseRule):
    """Weighted median of each number of the updates (Yin et al. 2018, arXiv:1803.01498).

    It withstands parties that together have less than half of the weight.

    Args:
        frozen_a: Train and send only B of LoRA modules, as ``FrozenA``; else medians of A and of B are taken.
        mixing: Number f of malicious parties for nearest-neighbour mixing (NNM, Allouah et al. 2023,
            arXiv:2302.01772): first each update is replaced by the mean of the N - f nearest to it, which
            helps where honest parties' data differ much. 0 mixes nothing.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=Median())
    """

    @override
    def combine_columns(self, values: Tensor, shares: Tensor) -> Tensor:
        """Return the weighted medians."""
        return influence.weighted_median(values, shares)


class TrimmedMean(CoordinatewiseRule):
    """Weighted mean of each number of the updates, without the f smallest and the f largest.

    (Yin et al. 2018, arXiv:1803.01498.) It withstands f parties of N >= 2 f + 1, whatever their weights.

    Args:
        num_malicious: Number f of malicious parties to withstand.
        frozen_a: As in ``Median``.
        mixing: As in ``Median``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=TrimmedMean(num_malicious=1))
    """

    def __init__(self, num_malicious: int = 1, frozen_a: bool = False, mixing: int = 0) -> None:
        super().__init__(frozen_a, mixing)
        _count("num_malicious", num_malicious, least=1)
        self.num_malicious = num_malicious

    @property
    @override
    def min_parties(self) -> int:
        return max(super().min_parties, 2 * self.num_malicious + 1)

    @override
    def combine_columns(self, values: Tensor, shares: Tensor) -> Tensor:
        """Return the trimmed means."""
        return influence.trimmed_mean(values, shares, self.num_malicious)


def _only(shares: Tensor, selected: list[int]) -> Tensor:
    kept = torch.zeros_like(shares)
    kept[selected] = shares[selected]
    return kept / kept.sum()


def _count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more.")
