"""Choice of the factors of low-rank products, batched: L and K with ``L K = diag(target)``.

A product ``U diag(s) V^T`` has factors ``B = U L`` and ``A = K V^T`` for all L (k, r) and K (r, k) with
``L K = diag(s) / scaling``. All tensors here have a leading dimension of products.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Factorization: TypeAlias = Literal["procrustes", "balanced", "svd"]
Coordinates: TypeAlias = tuple[Tensor, Tensor]
"""L of shape (products, k, r) and K of shape (products, r, k), float64."""

# Relative variance of the parties' factors below which they count as equal, and are kept as they are.
AGREEMENT = 1e-10
# Singular values below this fraction of the largest are rounding errors.
NULL = 1e-12
# A null direction of the product keeps a row of A of this fraction of the usual length, so it can be trained.
_NULL_ROW = 1e-2
_PROJECTIONS = 100


def diagonal(target: Tensor, rank: int, factorization: Factorization) -> Coordinates:
    """Return diagonal L and K for targets (products, k), zero-padded where k < r."""
    k = target.shape[1]
    if factorization == "svd":
        scale = torch.ones_like(target)
    else:
        root = target.abs().sqrt()
        least = _NULL_ROW * root[:, :1]
        scale = root.maximum(torch.where(least > 0, least, 1.0))
    left, right = target.new_zeros(len(target), k, rank), target.new_zeros(len(target), rank, k)
    left.diagonal(dim1=1, dim2=2).copy_(target / scale)
    right.diagonal(dim1=1, dim2=2).copy_(scale)
    return left, right


def nearest(mean: Coordinates, target: Tensor) -> Coordinates:
    """Return the L and K that are nearest to those of the parties' mean factors: "procrustes".

    If the parties' factors are rotated against each other, the mean is short and the projection may not
    converge; the fallback is the balanced factors, rotated towards the mean.
    """
    found = _rotated(mean, diagonal(target, mean[0].shape[2], "balanced"))
    projected, converged = _projected(mean, target)
    better = converged & (_distance(mean, projected) <= _distance(mean, found))
    left, right = (torch.where(better[:, None, None], *both) for both in zip(projected, found, strict=True))
    return left, right


def _projected(mean: Coordinates, target: Tensor) -> tuple[Coordinates, Tensor]:
    """Project the means onto ``L K = diag(target)``; also return for which products that converged.

    Each iteration projects it onto the constraint linearised at the last iterate: the multiplier X solves the
    Sylvester equation ``L L^T X + X K^T K = C``.
    """
    mean_left, mean_right = mean
    left, right = mean_left.clone(), mean_right.clone()
    products = torch.diag_embed(target)
    # The eigenvalues are at least 2 |target| but for a mean that cancels, where they are far smaller.
    least = 2e-3 * target.abs().amin(dim=1)
    converged = torch.zeros(len(target), dtype=torch.bool)
    at = torch.arange(len(target))
    for _ in range(_PROJECTIONS):
        of_left, of_right, product = mean_left[at], mean_right[at], products[at]
        lam, p = torch.linalg.eigh(left[at] @ left[at].mT)
        mu, q = torch.linalg.eigh(right[at].mT @ right[at])
        eigenvalues = lam[:, :, None] + mu[:, None, :]
        floor = torch.maximum(least[at], NULL * eigenvalues.amax(dim=(1, 2)))
        regular = eigenvalues.amin(dim=(1, 2)) > floor
        residual = product + left[at] @ right[at] - of_left @ right[at] - left[at] @ of_right
        x = p @ ((p.mT @ residual @ q) / eigenvalues) @ q.mT
        right[at] = of_right + left[at].mT @ x
        left[at] = of_left + x @ right[at].mT
        missed = (left[at] @ right[at] - product).norm(dim=(1, 2))
        done = regular & (missed <= 1e-13 * product.norm(dim=(1, 2)))
        converged[at[done]] = True
        at = at[regular & ~done & missed.isfinite()]
        if not len(at):
            break
    return (left, right), converged


def _rotated(mean: Coordinates, of: Coordinates) -> Coordinates:
    """Rotate L and K towards the mean: orthogonal Procrustes (Schoenemann 1966)."""
    u, _, vt = torch.linalg.svd(mean[1] @ of[1].mT + mean[0].mT @ of[0])
    rotation = u @ vt
    return of[0] @ rotation.mT, rotation @ of[1]


def _distance(mean: Coordinates, of: Coordinates) -> Tensor:
    return (of[0] - mean[0]).square().sum(dim=(1, 2)) + (of[1] - mean[1]).square().sum(dim=(1, 2))
