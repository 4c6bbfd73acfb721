"""Bounds on the influence of single parties, as pure functions of weights, norms and inner products.

Robust rules that weigh whole updates see only their Gram matrix, ``G_ij = <Delta_i, Delta_j>``. It gives
norms, distances, and the distance of any combination ``sum_j u_j Delta_j`` from an update.
"""

import math
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

# An update is absurd if its norm is so many times the median of the others': local steps differ by less.
ABSURD = 1000.0
# An update of a smaller norm is not left out, whatever the others' are.
HARMLESS = 1e-3
_MAX_STEPS = 1000
_CONVERGED = 1e-13
# Norms above so many median norms would cost the digits in which the others differ.
_FAR = 1e4
# Columns sorted at a time, so that they stay in the cache.
_BLOCK = 1 << 14
# Rows up to which a sorting network of minima and maxima is faster than a sort of each column.
_NETWORK = 16


def capped(weights: Sequence[float], max_share: float) -> list[float]:
    """Return ``min(w_i, C)`` with the largest C for which no share of the sum exceeds ``max_share``.

    If there are too few parties for that, with ``n * max_share <= 1``, all that count have equal weights.

    Args:
        weights: Weight of each party, 0 for who does not count.
        max_share: In (0, 1].

    Example:
        >>> capped([100.0, 1.0, 1.0, 0.0], 0.5)
        [2.0, 1.0, 1.0, 0.0]
    """
    ordered = sorted((weight for weight in weights if weight > 0), reverse=True)
    if not ordered:
        return list(weights)
    cap = ordered[-1]
    if len(ordered) * max_share > 1:
        for count, largest in enumerate(ordered):  # how many weights are above the cap
            cap = max_share * math.fsum(ordered[count:]) / (1 - max_share * count)
            if cap >= largest or max_share * (count + 1) >= 1:  # so many at the cap have all of the sum
                cap = max(cap, largest)
                break
    return [min(weight, cap) for weight in weights]


def absurd(norms: Sequence[float]) -> list[int]:
    """Return the indices of updates whose norm is a thousand times the median of the others', or more.

    With fewer than three updates there is no median of others that could judge: nobody is absurd then. Nor is
    a norm below ``HARMLESS``: updates of parties that have converged are rounding, and so are their ratios.
    """
    if len(norms) < 3:
        return []
    others = [median([*norms[:index], *norms[index + 1 :]]) for index in range(len(norms))]
    return [k for k, norm in enumerate(norms) if norm >= max(HARMLESS, ABSURD * others[k]) and others[k] > 0]


# ---- of whole updates


def squared_distances(gram: Tensor) -> Tensor:
    """Return the squared distances (n, n) of updates, infinite from those that are not finite."""
    squares = gram.diagonal()
    squared = squares[:, None] + squares[None, :] - 2 * gram
    return squared.nan_to_num(nan=math.inf, posinf=math.inf).clamp_min(0).fill_diagonal_(0)


def nearest_mixing(gram: Tensor, shares: Tensor, num_malicious: int) -> Tensor:
    """Return the matrix (n, n) that replaces each update by the weighted mean of the n - f nearest to it.

    Nearest-neighbour mixing (Allouah et al. 2023, arXiv:2302.01772); an update is nearest to itself.
    """
    kept = max(1, len(gram) - num_malicious)
    nearest = squared_distances(gram).sort(dim=1, stable=True).indices[:, :kept]
    mixing = torch.zeros_like(gram).scatter_(1, nearest, shares[nearest])
    return mixing / mixing.sum(dim=1, keepdim=True)


def bounded_norms(gram: Tensor, factor: float) -> Tensor:
    """Return ``min(1, factor * median_j |Delta_j| / |Delta_i|)`` for each update, (n,)."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    bound = factor * median(norms.tolist())
    return torch.where(norms <= bound, 1.0, bound / norms)


def geometric_median(gram: Tensor, shares: Tensor, smoothing: float) -> Tensor:
    """Return the weights (n,) of the updates in their weighted geometric median.

    The smoothed Weiszfeld algorithm: ``u_i ~ w_i / max(nu, |v - Delta_i|)`` with ``v = sum_i u_i Delta_i``.

    Args:
        gram: Inner products (n, n).
        shares: Weights w_i (n,) of sum 1.
        smoothing: The smoothing nu as a fraction of the median norm.
    """
    norms = gram.diagonal().sqrt()
    unit = median(norms.tolist()) or float(norms.max()) or 1.0
    near = (_FAR * unit / norms).clamp_max(1.0)  # from there on only the direction of an update matters
    gram = near[:, None] * gram * near
    weights = shares
    for _ in range(_MAX_STEPS):
        products = gram @ weights
        distances = (weights @ products - 2 * products + gram.diagonal()).clamp_min(0).sqrt()
        updated = shares / distances.clamp_min(smoothing * unit)
        updated = updated / updated.sum()
        change = float((updated - weights).abs().max())
        weights = updated
        if change <= _CONVERGED:
            break
    return weights * near


def krum_order(gram: Tensor, num_malicious: int) -> list[int]:
    """Return the updates from the best to the worst by Krum's score.

    It is the sum of the squared distances from the ``n - f - 2`` nearest others.
    """
    closest = max(1, len(gram) - num_malicious - 2)
    ordered = squared_distances(gram).sort(dim=1).values  # the first is an update's distance from itself
    scores = ordered[:, 1 : 1 + closest].sum(dim=1)
    return [int(index) for index in scores.sort(stable=True).indices]


# ---- by coordinate


def weighted_median(values: Tensor, shares: Tensor) -> Tensor:
    """Return the weighted median of each column of ``values`` (n, k), float32; NaN counts as infinity.

    It is halfway between the smallest value that at least half of the weight does not exceed, and the one
    that more than half does not exceed: of an even number of equal weights the mean of the middle two.
    """

    def middle(rows: Tensor, weights: Tensor) -> Tensor:
        below = weights.cumsum(dim=0)
        ends = [(below < 0.5 + sign * 1e-9).sum(dim=0).clamp_max(len(rows) - 1) for sign in (-1, 1)]
        if len(weights[0]) == 1:
            low, high = rows[int(ends[0])], rows[int(ends[1])]
        else:
            low, high = (rows.gather(0, end[None])[0] for end in ends)
        return torch.where(low == high, low, low / 2 + high / 2)

    return _by_column(values, shares, middle)


def trimmed_mean(values: Tensor, shares: Tensor, trimmed: int) -> Tensor:
    """Return the weighted mean of each column without its ``trimmed`` smallest and largest values."""
    cut = min(trimmed, (len(values) - 1) // 2)
    kept = slice(cut, len(values) - cut)

    def mean(rows: Tensor, weights: Tensor) -> Tensor:
        of_kept = weights[kept]
        return (rows[kept] * (of_kept / of_kept.sum(dim=0)).float()).sum(dim=0)

    return _by_column(values, shares, mean)


def _by_column(values: Tensor, shares: Tensor, reduce: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply ``reduce`` to sorted columns and the weights of their values, (n, 1) where all are equal."""
    result = values.new_empty(values.shape[1])
    equal = bool((shares == shares[0]).all())
    for start in range(0, values.shape[1], _BLOCK):
        block = values[:, start : start + _BLOCK].nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        if equal:
            rows, weights = _sorted(block), shares[:, None]
        else:
            rows, order = block.sort(dim=0, stable=True)
            weights = shares[order]
        result[start : start + _BLOCK] = reduce(rows, weights)
    return result


def _sorted(block: Tensor) -> Tensor:
    """Return a block with each column sorted: few rows by an odd-even transposition network."""
    if len(block) > _NETWORK:
        return block.sort(dim=0).values
    rows = list(block)
    for turn in range(len(rows)):
        for k in range(turn % 2, len(rows) - 1, 2):
            rows[k], rows[k + 1] = torch.minimum(rows[k], rows[k + 1]), torch.maximum(rows[k], rows[k + 1])
    return torch.stack(rows)
