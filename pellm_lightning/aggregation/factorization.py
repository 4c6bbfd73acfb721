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
    found = mean[0].clone(), mean[1].clone()
    converged = torch.zeros(len(target), dtype=torch.bool)
    at = torch.arange(len(target))
    product, (of_left, of_right) = torch.diag_embed(target), mean
    left, right = mean
    # The eigenvalues are at least 2 |target| but for a mean that cancels, where they are far smaller.
    least = 2e-3 * target.abs().amin(dim=1)
    for _ in range(_PROJECTIONS):
        lam, p = torch.linalg.eigh(left @ left.mT)
        mu, q = torch.linalg.eigh(right.mT @ right)
        eigenvalues = lam[:, :, None] + mu[:, None, :]
        smallest, largest = eigenvalues[:, 0, 0], eigenvalues[:, -1, -1]
        regular = smallest > torch.maximum(least, NULL * largest)
        residual = product + left @ right - of_left @ right - left @ of_right
        x = p @ ((p.mT @ residual @ q) / eigenvalues) @ q.mT
        right = of_right + left.mT @ x
        left = of_left + x @ right.mT
        missed = (left @ right - product).norm(dim=(1, 2))
        done = regular & (missed <= 1e-13 * product.norm(dim=(1, 2)))
        found[0][at[done]], found[1][at[done]], converged[at[done]] = left[done], right[done], True
        open_ = regular & ~done & missed.isfinite()
        if not open_.any():
            break
        if not open_.all():
            at, least = at[open_], least[open_]
            product, of_left, of_right = product[open_], of_left[open_], of_right[open_]
            left, right = left[open_], right[open_]
    return found, converged


def _rotated(mean: Coordinates, of: Coordinates) -> Coordinates:
    """Rotate L and K towards the mean: orthogonal Procrustes (Schoenemann 1966)."""
    u, _, vt = torch.linalg.svd(mean[1] @ of[1].mT + mean[0].mT @ of[0])
    rotation = u @ vt
    return of[0] @ rotation.mT, rotation @ of[1]


def _distance(mean: Coordinates, of: Coordinates) -> Tensor:
    return (of[0] - mean[0]).square().sum(dim=(1, 2)) + (of[1] - mean[1]).square().sum(dim=(1, 2))
