"""Linear algebra of low-rank updates as pairs of factors, in float64, without any m x n matrix.

An update is ``B A`` with B of shape (m, r) and A of shape (r, n). Stacked factors of several parties, each B
times its weight and scaling, represent the weighted mean of the parties' products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellm_lightning.aggregation.factorization import AGREEMENT, NULL, Factorization, diagonal, nearest


@dataclass(frozen=True)
class Stack:
    """The weighted mean of products, ``sum_i c_i B_i A_i``, as stacked factors in float64.

    Args:
        left: ``[c_1 B_1, c_2 B_2, ...]`` of shape (m, R).
        right: ``[A_1; A_2; ...]`` of shape (R, n).
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, terms: Sequence[tuple[float, Tensor, Tensor]]) -> "Stack":
        """Stack (c_i, B_i, A_i), at least one, factors of any floating dtype."""
        return cls(
            torch.cat([coefficient * b.double() for coefficient, b, _ in terms], dim=1),
            torch.cat([a.double() for _, _, a in terms], dim=0),
        )

    def minus(self, scaling: float, b: Tensor, a: Tensor) -> "Stack":
        """Return the stack of the difference to ``scaling * b @ a``."""
        left = torch.cat([self.left, -scaling * b.double()], dim=1)
        return Stack(left, torch.cat([self.right, a.double()], dim=0))

    def squared_norms(self, scaling: float, b: Tensor, a: Tensor) -> tuple[float, float]:
        """Return the squared Frobenius norms of the difference to ``scaling * b @ a``, and of the product.

        ``|L R|^2 = tr((L^T L) (R R^T))``, in O((m + n) R^2); relative differences below 1e-8 are lost
        in rounding.
        """
        difference = self.minus(scaling, b, a)
        products = (difference.left.T @ difference.left) * (difference.right @ difference.right.T)
        own = self.left.shape[1]
        # The order of arguments keeps nan: max(0.0, nan) is 0.0.
        return max(float(products.sum()), 0.0), max(float(products[:own, :own].sum()), 0.0)


@dataclass(frozen=True)
class LowRank:
    """Truncated singular value decomposition of a product, ``U diag(s) V^T``, with signs fixed.

    Args:
        u: Orthonormal columns, (m, k).
        s: Singular values in descending order, (k,).
        v: Orthonormal columns, (n, k).
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def transposed(self) -> "LowRank":
        """Return the transposed product."""
        return LowRank(self.v, self.s, self.u)


@dataclass(frozen=True)
class MeanFactors:
    """Mean factors of the parties, projected onto the singular vectors; each entry is a sum over the parties.

    Factors of a rank above min(m, n) are not determined by the projections; their means are kept whole,
    ``sum_i w_i A_i`` (r, n) and ``sum_i w_i B_i`` (m, r).

    Args:
        a: ``sum_i w_i A_i V``, (r, k).
        b: ``U^T sum_i w_i B_i``, (k, r).
        squares: ``sum_i w_i (|A_i|^2 + |B_i|^2)``; NaN for other factors than a mean, which never agree.
        whole: Whether ``a`` and ``b`` are not projected.
    """

    a: Tensor
    b: Tensor
    squares: float
    whole: bool = False

    @property
    def agree(self) -> bool:
        """Whether the parties have equal factors, with negligible variance around the mean."""
        mean = float(self.a.square().sum() + self.b.square().sum())
        return self.squares - mean <= AGREEMENT * self.squares

    def projected(self, low: LowRank) -> "MeanFactors":
        """Return the means projected onto the singular vectors."""
        if not self.whole:
            return self
        return MeanFactors(self.a @ low.v, low.u.T @ self.b, self.squares)


def terms_of_means(b: Tensor, a: Tensor, low: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Return a party's summands, before its weight, of the three entries of ``MeanFactors``."""
    squares = a.square().sum() + b.square().sum()
    return (a, b, squares) if exceeds_full_rank(low, a) else (a @ low.v, low.u.T @ b, squares)


def exceeds_full_rank(low: LowRank, a: Tensor) -> bool:
    """Return whether the rank of factors exceeds that of any m x n matrix."""
    return a.shape[0] > low.s.numel()


def orthonormal(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of ``x`` (n, r): (n, min(n, r))."""
    q: Tensor = torch.linalg.qr(x).Q
    return q


def truncated_svd(stack: Stack, rank: int) -> LowRank:
    """Return the best rank-``rank`` approximation (Eckart and Young 1936) of a stack's product.

    With left = Q_B R_B and right^T = Q_A R_A the SVD of the core R_B R_A^T (R x R) is that of the product.
    """
    q_left, r_left = torch.linalg.qr(stack.left)
    q_right, r_right = torch.linalg.qr(stack.right.T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    k = min(rank, s.numel())
    return _signed(q_left @ u[:, :k], s[:k], q_right @ vt[:k].T)


def from_range(p: Tensor, projected: Tensor) -> LowRank:
    """Return the decomposition of ``p projected^T``, with p (m, k) orthonormal and projected (n, k)."""
    v, s, ut = torch.linalg.svd(projected, full_matrices=False)
    return _signed(p @ ut.T, s, v)


def fill_null_directions(low: LowRank, b: Tensor, a: Tensor, null: float = NULL) -> LowRank:
    """Replace the null directions of a product by directions of the factors b (m, r) and a (r, n).

    So a factorization leaves the factors unchanged where the product does not determine them.

    Args:
        low: The product.
        b: Factor whose columns fill the left null directions.
        a: Factor whose rows fill the right null directions.
        null: Singular values below this fraction of the largest are rounding errors.
    """
    rank = int((low.s > low.s[0] * null).sum()) if float(low.s[0]) > 0 else 0
    if rank == low.s.numel():
        return low
    s = low.s.clone()
    s[rank:] = 0
    return LowRank(_extended(low.u, rank, b.double()), s, _extended(low.v, rank, a.double().T))


def factorize(
    low: LowRank, mean: MeanFactors | None, scaling: float, rank: int, factorization: Factorization
) -> tuple[Tensor, Tensor]:
    """Return factors B (m, r) and A (r, n) with ``scaling * B A`` equal to the low-rank product.

    They are ``B = U L`` and ``A = K V^T`` with ``L K = diag(s) / scaling``. The factorization is one of:

    - "procrustes": nearest to the mean factors, ``min |K - mean.a|^2 + |L - mean.b|^2``. It keeps the basis,
      so an optimizer's moments stay valid.
    - "balanced": ``L = K = (s / scaling)^1/2``.
    - "svd": ``K = 1``, so A has orthonormal rows.

    Equal factors of all parties are returned as they are, whatever the factorization. Factors of different
    shapes have no mean (None); then the factorization is "balanced" or "svd".
    """
    target = low.s / scaling
    if mean is not None and mean.agree:
        if mean.whole:
            return mean.b, mean.a
        left, right = mean.b, mean.a
    elif mean is not None and factorization == "procrustes":
        projected = mean.projected(low)
        (left,), (right,) = nearest((projected.b[None], projected.a[None]), target[None])
    else:
        (left,), (right,) = diagonal(target[None], rank, factorization)
    return low.u @ left, right @ low.v.T


def _extended(basis: Tensor, rank: int, others: Tensor) -> Tensor:
    """Keep the first ``rank`` columns and complete them orthonormally from ``others``."""
    kept, size = basis[:, :rank], basis.shape[1]
    complement, _, _ = torch.linalg.svd(others - kept @ (kept.T @ others), full_matrices=False)
    q = orthonormal(torch.cat([kept, complement], dim=1))[:, :size].clone()
    q[:, :rank] = kept  # QR may have flipped their signs
    return q


def _signed(u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    """Fix the signs, which the SVD leaves undetermined: the largest entry of each column of U is positive."""
    largest = u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u.gather(0, largest) < 0, -1.0, 1.0).to(u.dtype)
    return LowRank(u * sign, s, v * sign)
