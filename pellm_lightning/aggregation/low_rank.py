"""Aggregation by the best low-rank approximation of the mean of the products."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from pellm_lightning.aggregation import factors, gathering, gram
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
    Term,
)
from pellm_lightning.aggregation.deviation import stack_of
from pellm_lightning.aggregation.factorization import Factorization
from pellm_lightning.aggregation.factors import LowRank, MeanFactors
from pellm_lightning.aggregation.lora import LoraModule
from pellm_lightning.comm import Collectives, FederationError
from pellm_lightning.tensors.flat_buffer import are_finite, is_finite

Solver = Literal["power", "exact"]


class LowRankMean(Aggregation):
    """Low-rank mean: the best rank-r approximation of ``sum(w_i s_i B_i A_i)`` for each LoRA module.

    The mean of the products has rank N r; its best approximation of rank r (Eckart and Young) is what
    FlexLoRA (Bai et al. 2024, arXiv:2402.11505) computes from m x n matrices. Here only factors are handled.
    All other parameters are averaged. With a single participant its factors are the result.

    Args:
        solver: "exact" gathers each module's factors at one party, which decomposes them (QR of the stacks,
            SVD of the small core) and sends the result to all: the bytes of averaging A and B. "power" needs
            only sums over the parties, for secure aggregation: a step of subspace iteration, warm-started
            with the round's initial A; the same bytes, and 2 r^2 float64 scalars per module. It is not
            optimal if the parties drift far in a round.
        steps: Iterations of "power"; each further one costs the bytes of a round again.
        factorization: Factorization of the result. "procrustes": the one nearest to the parties' mean
            factors, which keeps optimizers' moments valid; "balanced": B and A of equal norms, ``U S^1/2``
            and ``S^1/2 V^T``; "svd": ``U S`` and ``V^T``. The latter two reset the local optimizers' state of
            A and B in each round, and allow no outer optimizer but ``SGD(lr=1)``.
        measure_deviation: Report in each round the deviation of the result from the mean of the LoRA
            products. It takes half as many bytes again as averaging the factors, and other parties see these.
            Default: yes, unless the exchange hides the factors, or compresses and would send them for this
            alone.

    Raises:
        ValueError: If an argument is none of its choices.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_epochs=1, aggregation=LowRankMean(solver="power"))
    """

    def __init__(
        self,
        solver: Solver = "exact",
        steps: int = 1,
        factorization: Factorization = "procrustes",
        measure_deviation: bool | None = None,
    ) -> None:
        super().__init__(measure_deviation)
        _one_of("solver", solver, ("power", "exact"))
        _one_of("factorization", factorization, ("procrustes", "balanced", "svd"))
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} must be an integer >= 1.")
        self.solver = solver
        self.steps = steps
        self.factorization = factorization
        self.requires = "sums" if solver == "power" else "parties"
        self.outer = "any" if factorization == "procrustes" else "mean"

    def averaged(self, round: int, num_participants: int) -> Parts:
        """Return all but the factors; everything with one participant."""
        return EVERYTHING if num_participants == 1 else OTHERS

    def basis_changed(self, num_participants: int) -> Parts:
        """Return the factors, unless the factorization keeps their basis."""
        return NOTHING if self.factorization == "procrustes" or num_participants <= 1 else FACTORS

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return the module's own reason."""
        return module.unsupported_reason

    def combine(self, pairs: Sequence[Factors], context: RoundContext) -> CombinedFactors:
        """Return the best factors of each pair; a single participant keeps its own."""
        if context.num_participants == 1:
            return CombinedFactors()
        return self.solve(pairs, context)

    def solve(self, pairs: Sequence[Factors], context: RoundContext) -> CombinedFactors:
        """Return the best factors of each pair, for any number of participants."""
        return (self._exact if self.solver == "exact" else self._power)(pairs, context)

    def _power(self, pairs: Sequence[Factors], context: RoundContext) -> CombinedFactors:
        own = [(p.b.detach().cpu().double(), p.a.detach().cpu().double()) for p in pairs]

        def total(terms: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
            """Sum each term over the parties, weighted by their shares."""
            terms = [context.share * x if context.share > 0 else torch.zeros_like(x) for x in terms]
            return gathering.summed(terms, context.federation, dtype)

        found = self._iterated(pairs, own, context.federation, total)
        means: list[MeanFactors] | list[None] = [None] * len(pairs)
        if _have_mean(pairs):
            found = _synchronized(found, context.federation)
            terms = [
                term
                for (b, a), low in zip(own, found, strict=True)
                for term in factors.terms_of_means(b, a, low)
            ]
            sums = iter(total(terms, torch.float64))
            means = [
                MeanFactors(next(sums), next(sums), float(next(sums)), factors.exceeds_full_rank(low, a))
                for (_, a), low in zip(own, found, strict=True)
            ]
        results = [
            factor.float()
            for pair, low, mean in zip(pairs, found, means, strict=True)
            for factor in _factorize(pair, low, mean, self.factorization)
        ]
        vector = gathering.flat(results)
        gathering.synchronize_([vector], context.federation)
        parts = iter(gathering.split(vector, [factor.shape for factor in results]))
        return CombinedFactors(_finite(pairs, [(next(parts), next(parts)) for _ in pairs]))

    def _iterated(
        self,
        pairs: Sequence[Factors],
        own: Sequence[tuple[Tensor, Tensor]],
        federation: Collectives,
        total: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[LowRank]:
        """Iterate, with orthonormal Q: P = sum(w s B A Q); P = qr(P); Q = sum(w s A^T B^T P); return P Q^T.

        If A is zero (as PEFT initialises an embedding's), the iteration starts from the columns of B and is
        that of the transposed product.

        The next sum is projected onto columns that each party computed redundantly. Null or degenerate
        directions consist of rounding errors, which depend on the processor: so the columns are synchronized
        before each sum.
        """
        party = federation.party
        swapped = [not pair.anchor_a.any() for pair in pairs]
        sides = [(a.T, b.T) if swap else (b, a) for (b, a), swap in zip(own, swapped, strict=True)]
        sides = [(pair.scalings[party] * b, a) for pair, (b, a) in zip(pairs, sides, strict=True)]
        q = [p.anchor_b if swap else p.anchor_a.T for p, swap in zip(pairs, swapped, strict=True)]
        for _ in range(self.steps):
            q = [factors.orthonormal(x.cpu().double()) for x in q]
            p = total([b @ (a @ x) for (b, a), x in zip(sides, q, strict=True)])
            p = [factors.orthonormal(_checked(pair, x)) for pair, x in zip(pairs, p, strict=True)]
            gathering.synchronize_(p, federation, tolerance=torch.float32)
            q = total([a.T @ (b.T @ x) for (b, a), x in zip(sides, p, strict=True)])
        found = [factors.from_range(x, _checked(pair, y)) for pair, x, y in zip(pairs, p, q, strict=True)]
        found = [low.transposed() if swap else low for low, swap in zip(found, swapped, strict=True)]
        null = 1e-6  # the sums are in float32
        return [
            factors.fill_null_directions(low, pair.anchor_b.cpu(), pair.anchor_a.cpu(), null)
            for low, pair in zip(found, pairs, strict=True)
        ]

    def _exact(self, pairs: Sequence[Factors], context: RoundContext) -> CombinedFactors:
        terms = gathering.to_owners(pairs, context, FACTORS)
        have_mean = _have_mean(pairs)
        best = gram.best_means(
            {k: gram.Module(of, pairs[k].scaling, pairs[k].anchor_a.shape[0]) for k, of in terms.items()},
            self.factorization,
            have_mean=have_mean,
        )
        results = {k: mean.factors for k, mean in best.items()}
        for k in terms.keys() - best.keys():
            pair, pair_terms = pairs[k], terms[k]
            low = factors.truncated_svd(stack_of(pair_terms), pair.anchor_a.shape[0])
            low = factors.fill_null_directions(low, pair.anchor_b.cpu(), pair.anchor_a.cpu())
            mean = _mean_factors(pair_terms, low) if have_mean else None
            results[k] = _factorize(pair, low, mean, self.factorization)
        combined = gathering.from_owners(pairs, results, context.federation)
        known = {} if context.federation.lossy else {k: x.squares for k, x in best.items() if x.squares}
        return CombinedFactors(_finite(pairs, combined), terms, known)


def nearest_to_anchors(
    pairs: Sequence[Factors], modules: Mapping[int, gram.Module], federation: Collectives
) -> CombinedFactors:
    """Return the best factors of weighted products, chosen nearest to the anchors, whatever the parties'.

    Args:
        pairs: All pairs.
        modules: Those that this party owns, by index; the last term of each is the anchor.
        federation: Collectives of the round's members.
    """
    terms = {k: list(module.terms) for k, module in modules.items()}
    results = {k: same for k, of_pair in terms.items() if (same := _in_common(of_pair)) is not None}
    center = max((len(of_pair) for of_pair in terms.values()), default=1) - 1
    others = {k: module for k, module in modules.items() if k not in results}
    best = gram.best_means(others, "procrustes", center=center)
    results |= {k: mean.factors for k, mean in best.items()}
    for k in terms.keys() - results.keys():
        b, a = terms[k][-1].b.double(), terms[k][-1].a.double()
        low = factors.truncated_svd(stack_of(terms[k]), modules[k].rank)
        low = factors.fill_null_directions(low, b, a)
        of_a, of_b, _ = factors.terms_of_means(b, a, low)
        near = MeanFactors(of_a, of_b, math.nan, factors.exceeds_full_rank(low, a))
        results[k] = _factorize(pairs[k], low, near, "procrustes")
    combined = gathering.from_owners(pairs, results, federation)
    known = {} if federation.lossy else {k: x.squares for k, x in best.items() if x.squares}
    return CombinedFactors(_finite(pairs, combined), terms, known)


def _in_common(terms: Sequence[Term]) -> tuple[Tensor, Tensor] | None:
    """Return the parties' factors if they are the same to the bit and are the result; None if not."""
    first, *others, anchor = terms
    alike = all(_equal(first, other) for other in others)
    is_whole = abs(anchor.share) < 1e-9 or _equal(first, anchor)
    return (first.b.float(), first.a.float()) if alike and is_whole else None


def _equal(term: Term, other: Term) -> bool:
    return torch.equal(term.b, other.b) and torch.equal(term.a, other.a)


def _factorize(
    pair: Factors, low: LowRank, mean: MeanFactors | None, factorization: Factorization
) -> tuple[Tensor, Tensor]:
    return factors.factorize(low, mean, pair.scaling, pair.anchor_a.shape[0], factorization)


def _synchronized(found: Sequence[LowRank], federation: Collectives) -> list[LowRank]:
    """Synchronize decompositions between the parties where they differ by more than rounding."""
    whole = [gathering.flat([low.u, low.s, low.v]) for low in found]  # u and v must be of the same party
    gathering.synchronize_(whole, federation, tolerance=torch.float32)
    parts = [
        gathering.split(vector, [low.u.shape, low.s.shape, low.v.shape])
        for vector, low in zip(whole, found, strict=True)
    ]
    return [LowRank(u, s, v) for u, s, v in parts]


def _have_mean(pairs: Sequence[Factors]) -> bool:
    """Return whether the factors have a mean: all parties' ranks and scalings are those of the result."""
    return all(
        {*pair.ranks} == {pair.anchor_a.shape[0]} and {*pair.scalings} == {pair.scaling} for pair in pairs
    )


def _mean_factors(terms: Sequence[Term], low: LowRank) -> MeanFactors:
    each = [
        [term.share * part for part in factors.terms_of_means(term.b.double(), term.a.double(), low)]
        for term in terms
    ]
    a, b, squares = (torch.stack(parts).sum(dim=0) for parts in zip(*each, strict=True))
    return MeanFactors(a, b, float(squares), factors.exceeds_full_rank(low, terms[0].a))


def _finite(pairs: Sequence[Factors], results: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    if not are_finite([factor for both in results for factor in both]):
        for pair, both in zip(pairs, results, strict=True):
            for factor in both:
                _checked(pair, factor)
    return results


def _checked(pair: Factors, values: Tensor) -> Tensor:
    if not is_finite(values):
        raise FederationError(
            f"The products of {pair.name!r} exceed float32, so they have no low-rank mean. No parameter"
            " was changed. Training diverges: lower the learning rate or clip gradients."
        )
    return values


def _one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")
