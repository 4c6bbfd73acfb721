"""Best low-rank means of many LoRA modules at once, by the Gram matrices of their stacked factors.

With ``left = [c_1 B_1, c_2 B_2, ...]`` and ``right = [A_1; A_2; ...]``, the eigenvalues of ``L^T S L`` are
the squared singular values of ``left @ right``, where ``S = left^T left`` and ``L L^T = right right^T``. Only
the Gram matrices and the results need the factors; all between is small, and batched. That squares the
condition number: modules of which rounding might show in float32 are left to QR and SVD
(``factors.truncated_svd``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import Term
from pellm_lightning.aggregation.factorization import AGREEMENT, Coordinates, Factorization, diagonal, nearest

# Relative error of singular vectors up to which results are used: a sixth of what float32 rounds.
_ERROR = 1e-8
_EPSILON = torch.finfo(torch.float64).eps
# Scalars of stacked factors converted at a time, so that they stay in the cache.
_BLOCK = 1 << 16
# Scalars of the Gram matrices of a batch of modules.
_BATCH = 1 << 20


@dataclass(frozen=True)
class Module:
    """A module's factors at the parties that count.

    Args:
        terms: The parties' factors, with shares and scalings.
        scaling: Scaling of the result.
        rank: Rank of the result.
        grams: The ``gram_matrices`` of the factors, if they are known.
    """

    terms: Sequence[Term]
    scaling: float
    rank: int
    grams: tuple[Tensor, Tensor] | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The parties' ranks."""
        return tuple(term.a.shape[0] for term in self.terms)

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """The factors (B, A) of each party."""
        return [(term.b, term.a) for term in self.terms]


@dataclass(frozen=True)
class BestMean:
    """Best low-rank mean of a module.

    Args:
        factors: B (m, r) and A (r, n), float32.
        squares: Squared norms of what the rank cuts off, and of the mean of the products; None if the factors
            are not the best approximation, but those on which all parties agree.
    """

    factors: tuple[Tensor, Tensor]
    squares: tuple[float, float] | None


def gram_matrices(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return ``B^T B`` and ``A A^T``, (R, R) float64, of B = [B_1, B_2, ...] and A = [A_1; A_2; ...]."""
    size = sum(a.shape[0] for _, a in factors)
    left, right = torch.zeros(2, size, size, dtype=torch.float64)
    for _, block in _blocks([b for b, _ in factors], dim=0):
        left.addmm_(block.T, block)
    for _, block in _blocks([a for _, a in factors], dim=1):
        right.addmm_(block, block.T)
    return left, right


def product_gram(module: Module) -> Tensor:
    """Return the inner products ``<s_i B_i A_i, s_j B_j A_j>``, (n, n) float64, of terms of equal ranks.

    ``tr((B_j^T B_i) (A_i A_j^T))`` is the sum of the entries of a block of ``B^T B * A A^T``; it is the same
    for all factors of the same products.
    """
    left, right = module.grams or gram_matrices(module.factors)
    n = len(module.terms)
    scalings = torch.tensor([term.scaling for term in module.terms], dtype=torch.float64)
    sums = (left * right).reshape(n, module.rank, n, module.rank).sum(dim=(1, 3))
    return scalings[:, None] * sums * scalings


def best_means(
    modules: Mapping[int, Module],
    factorization: Factorization,
    *,
    have_mean: bool = True,
    center: int | None = None,
) -> dict[int, BestMean]:
    """Return the best low-rank means of the modules for which Gram matrices are accurate enough.

    Args:
        modules: Modules by any index.
        factorization: As in ``LowRankMean``; "procrustes" needs modules that have a mean.
        have_mean: Whether the factors of each module have a mean: all parties' ranks and scalings are those
            of the result, not only those of the parties that count.
        center: Index of the term whose factors "procrustes" stays near to; None for the mean of all.
    """
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for k, module in modules.items():
        m, n = module.terms[0].b.shape[0], module.terms[0].a.shape[1]
        if module.rank <= min(m, n, sum(module.ranks)):  # else the mean has null directions
            groups.setdefault((module.rank, module.ranks), []).append(k)
    found: dict[int, BestMean] = {}
    for (_, ranks), indices in groups.items():
        size = max(1, _BATCH // sum(ranks) ** 2)
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            means = _best_of_batch([modules[k] for k in batch], factorization, have_mean, center)
            found.update({k: mean for k, mean in zip(batch, means, strict=True) if mean is not None})
    return found


def _best_of_batch(
    modules: Sequence[Module], factorization: Factorization, have_mean: bool, center: int | None
) -> list[BestMean | None]:
    """Return the best means of modules that have ranks in common; None where Gram matrices are too coarse."""
    found: list[BestMean | None] = [None] * len(modules)
    stacks = _Stacks.of(modules, center)
    svd, accurate = stacks.decompose(modules[0].rank)
    (at,) = accurate.nonzero(as_tuple=True)
    if not len(at):
        return found
    svd, stacks = svd.select(at), stacks.select(at)
    target = svd.s / torch.tensor([[modules[k].scaling] for k in at], dtype=torch.float64)
    agree = torch.zeros(len(at), dtype=torch.bool)
    if have_mean:
        mean = stacks.mean_factors(svd)
        agree = stacks.agree() if center is None else agree
    if have_mean and factorization == "procrustes":
        left, right = nearest(mean, target)
    else:
        left, right = diagonal(target, modules[0].rank, factorization)
    if agree.any():
        left = torch.where(agree[:, None, None], mean[0], left)
        right = torch.where(agree[:, None, None], mean[1], right)
    x, y = svd.u @ left, right @ svd.v.mT
    for i, k in enumerate(at.tolist()):
        b, a = _products(modules[k].factors, x[i], y[i])
        if factorization != "procrustes" and not agree[i]:
            _fix_signs_(b, a, target[i])
        squares = None if agree[i] else (float(svd.cut[i]), float(svd.whole[i]))
        found[k] = BestMean((b, a), squares)
    return found


@dataclass(frozen=True)
class _Decompositions:
    """Truncated singular value decompositions of the mean products, by coordinates in the parties' factors.

    Args:
        u: U as a combination of the columns of ``[B_1, B_2, ...]``, (modules, R, k).
        v: V as a combination of the rows of ``[A_1; A_2; ...]``, (modules, R, k).
        s: Singular values in descending order, (modules, k).
        cut: Sum of the squares of the other singular values, (modules,).
        whole: Sum of the squares of all, (modules,).
    """

    u: Tensor
    v: Tensor
    s: Tensor
    cut: Tensor
    whole: Tensor

    def select(self, at: Tensor) -> "_Decompositions":
        return _Decompositions(self.u[at], self.v[at], self.s[at], self.cut[at], self.whole[at])


@dataclass(frozen=True)
class _Stacks:
    """Stacked factors of modules that have ranks in common.

    Args:
        b: Gram matrices of ``[B_1, B_2, ...]``, (modules, R, R).
        a: Gram matrices of ``[A_1; A_2; ...]``, (modules, R, R).
        shares: The parties' shares in the mean factors, one for each of their ranks, (modules, R).
        coefficients: The shares times the parties' scalings, (modules, R).
        ranks: The parties' ranks.
    """

    b: Tensor
    a: Tensor
    shares: Tensor
    coefficients: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, modules: Sequence[Module], center: int | None) -> "_Stacks":
        grams = [module.grams or gram_matrices(module.factors) for module in modules]
        ranks = modules[0].ranks
        repeats = torch.tensor(ranks)
        shares = torch.tensor([[t.share for t in module.terms] for module in modules], dtype=torch.float64)
        scalings = torch.tensor(
            [[t.scaling for t in module.terms] for module in modules], dtype=torch.float64
        )
        coefficients = shares * scalings
        if center is not None:
            shares = torch.zeros_like(shares)
            shares[:, center] = 1
        return cls(
            torch.stack([b for b, _ in grams]),
            torch.stack([a for _, a in grams]),
            shares.repeat_interleave(repeats, dim=1),
            coefficients.repeat_interleave(repeats, dim=1),
            ranks,
        )

    def select(self, at: Tensor) -> "_Stacks":
        return _Stacks(self.b[at], self.a[at], self.shares[at], self.coefficients[at], self.ranks)

    def decompose(self, rank: int) -> tuple[_Decompositions, Tensor]:
        """Return the best approximations of a rank, and for which of them rounding is negligible.

        The eigenvalues have errors of ``eps |S| |A A^T|``; relative to the smallest that counts, that is the
        error of its vectors. So a Cholesky factor of ``A A^T`` plus as much is as good, and always exists,
        but for matrices that are next to zero.
        """
        s = self.coefficients[:, :, None] * self.b * self.coefficients[:, None, :]
        trace = _trace(self.a)
        shifted = self.a + torch.diag_embed((4 * _EPSILON * trace)[:, None].expand(self.a.shape[:2]))
        lower, failed = torch.linalg.cholesky_ex(shifted)
        lower = torch.where(failed[:, None, None] > 0, 0.0, lower)
        core = lower.mT @ s @ lower
        eigenvalues, w = torch.linalg.eigh((core + core.mT) / 2)
        kept = eigenvalues[:, -rank:].flip(1)
        accurate = (kept[:, -1] > 0) & (_EPSILON * trace * _trace(s) <= _ERROR * kept[:, -1])
        singular = kept.clamp_min(0).sqrt()
        u = lower @ w[:, :, -rank:].flip(2) / singular[:, None, :]
        # V = (left right)^T U / s: so the condition of the Cholesky factor does not matter.
        v = s @ u / singular[:, None, :]
        cut = eigenvalues[:, :-rank].clamp_min(0).sum(dim=1)
        u = self.coefficients[:, :, None] * u
        return _Decompositions(u, v, singular, cut, cut + kept.sum(dim=1)), accurate

    def mean_factors(self, svd: _Decompositions) -> Coordinates:
        """Return the means of the parties' factors as ``U^T B`` and ``A V``, for equal ranks."""
        averaging = self._averaging()
        return (averaging @ self.b @ svd.u).mT, averaging @ self.a @ svd.v

    def agree(self) -> Tensor:
        """Return for which modules the parties have equal factors, up to a negligible variance."""
        grams, averaging = self.a + self.b, self._averaging()
        squares = (self.shares * grams.diagonal(dim1=1, dim2=2)).sum(dim=1)
        return squares - _trace(averaging @ grams @ averaging.mT) <= AGREEMENT * squares

    def _averaging(self) -> Tensor:
        """Return the matrices (modules, r, R) that average stacked factors of equal ranks."""
        return self.shares[:, None, :] * torch.eye(self.ranks[0], dtype=torch.float64).repeat(
            1, len(self.ranks)
        )


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(dim=1)


def _products(factors: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[B_1, B_2, ...] x`` and ``y [A_1; A_2; ...]``, float32."""
    b = torch.empty(factors[0][0].shape[0], x.shape[1])
    a = torch.empty(y.shape[0], factors[0][1].shape[1])
    for at, block in _blocks([b for b, _ in factors], dim=0):
        b[at] = block @ x
    for at, block in _blocks([a for _, a in factors], dim=1):
        a[:, at] = y @ block
    return b, a


def _fix_signs_(b: Tensor, a: Tensor, target: Tensor) -> None:
    """Fix the signs as ``LowRank`` has them: the largest entry of each column of U is positive."""
    largest = b.gather(0, b.abs().argmax(dim=0, keepdim=True))[0]
    sign = torch.where(largest * target.sign() < 0, -1.0, 1.0)
    b *= sign
    a *= sign[:, None]


def _blocks(parts: list[Tensor], dim: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield ranges of ``torch.cat(parts, 1 - dim)`` along ``dim`` in float64, in a buffer that is reused."""
    size = sum(part.shape[1 - dim] for part in parts)
    length = parts[0].shape[dim]
    step = min(length, max(64, _BLOCK // size))
    buffer = torch.empty((step, size) if dim == 0 else (size, step), dtype=torch.float64)
    for start in range(0, length, step):
        at = slice(start, min(start + step, length))
        some = parts if step == length else [part.narrow(dim, start, at.stop - start) for part in parts]
        yield at, torch.cat(some, 1 - dim, out=buffer.narrow(dim, 0, at.stop - start))
