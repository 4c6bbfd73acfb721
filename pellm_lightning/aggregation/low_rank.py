"""The best low-rank approximation of the mean of the products."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pellm_lightning.aggregation import factors, gathering
from pellm_lightning.aggregation.base import (
    EVERYTHING,
    FACTORS,
    NOTHING,
    OTHERS,
    Aggregation,
    Combined,
    Factors,
    Parts,
    RoundContext,
    Term,
)
from pellm_lightning.aggregation.deviation import stack_of
from pellm_lightning.aggregation.factors import Gauge, LowRank, MeanFactors
from pellm_lightning.aggregation.lora import LoraModule
from pellm_lightning.comm import Collectives, FederationError

Solver = Literal["power", "exact"]


class LowRankMean(Aggregation):
    """Give each LoRA module the best rank-r approximation of the weighted mean ``sum(w_i s_i B_i A_i)``.

    The mean of the products has rank N r; its best approximation of rank r (Eckart and Young) is what
    FlexLoRA (Bai et al. 2024, arXiv:2402.11505) computes from m x n matrices. Here only factors are handled.
    What is no LoRA factor is averaged beside it. Where a single party counts, its factors are the result.

    Args:
        solver: "exact" sends each module's factors to one party, which decomposes them (QR of the stacks, SVD
            of the small core) and sends the result to all: the bytes of averaging A and B. "power" needs only
            sums over the parties, so no party sees another's factors where the exchange hides them: a step of
            subspace iteration, warm-started with the A that everybody started the round from; the same bytes,
            and 2 r^2 float64 scalars per module. Where the parties drift far in a round, it is not the best.
        steps: Iterations of "power"; each further one costs the bytes of a round again.
        factorization: Which of the factorisations of the result is handed back. "procrustes": the one nearest to the
            parties' mean factors, in which optimizers' moments keep their meaning; "balanced": B and A of
            equal norms, ``U S^1/2`` and ``S^1/2 V^T``; "svd": ``U S`` and ``V^T``. After the latter two, the
            state that local optimizers keep of A and B is dropped each round, and an outer optimizer other
            than ``SGD(lr=1)`` is refused.
            measure_deviation: Report each round by how much the result misses the mean of the LoRA products. It
            takes half as many bytes again as averaging the factors, and other parties see these. Default:
            yes, unless the exchange hides the factors, or compresses and would send them for this alone.

    Raises:
        ValueError: If an argument is none of its choices.
    """

    def __init__(
        self,
        solver: Solver = "exact",
        steps: int = 1,
        factorization: Gauge = "procrustes",
        measure_deviation: bool | None = None,
    ) -> None:
        super().__init__(measure_deviation)
        _one_of("solver", solver, ("power", "exact"))
        _one_of("factorization", factorization, ("procrustes", "balanced", "svd"))
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} must be a whole number, 1 or more.")
        self.solver = solver
        self.steps = steps
        self.factorization = factorization
        self.requires = "sums" if solver == "power" else "parties"
        self.outer = "any" if factorization == "procrustes" else "mean"

    def averaged(self, round: int, counting: int) -> Parts:
        """Return what is no factor; where one party counts, everything."""
        return EVERYTHING if counting == 1 else OTHERS

    def basis_changed(self, counting: int) -> Parts:
        """Return the factors, unless the gauge keeps their coordinates."""
        return NOTHING if self.factorization == "procrustes" or counting <= 1 else FACTORS

    def unsupported_reason(self, module: LoraModule) -> str | None:
        """Return what the module says."""
        return module.unsupported_reason

    def combine(self, pairs: Sequence[Factors], counting: RoundContext) -> Combined:
        """Return the best factors of each pair; of a single party that counts they are its own."""
        if counting.num_counting == 1:
            return Combined()
        return self.solve(pairs, counting)

    def solve(self, pairs: Sequence[Factors], counting: RoundContext) -> Combined:
        """Return the best factors of each pair, however many parties count."""
        return (self._exact if self.solver == "exact" else self._power)(pairs, counting)

    def __repr__(self) -> str:
        return f"LowRankMean(solver={self.solver!r}, steps={self.steps}, gauge={self.factorization!r})"

    def _power(self, pairs: Sequence[Factors], counting: RoundContext) -> Combined:
        own = [(p.b.detach().cpu().double(), p.a.detach().cpu().double()) for p in pairs]

        def total(terms: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
            """Sum what every party holds of each term, each times its share."""
            terms = [counting.share * x if counting.share > 0 else torch.zeros_like(x) for x in terms]
            return gathering.summed(terms, counting.federation, dtype)

        found = self._iterated(pairs, own, counting.federation, total)
        means: list[MeanFactors] | list[None] = [None] * len(pairs)
        if _alike(pairs):
            found = _agreed(found, counting.federation)
            terms = [
                term
                for (b, a), low in zip(own, found, strict=True)
                for term in factors.terms_of_means(b, a, low)
            ]
            sums = iter(total(terms, torch.float64))
            means = [
                MeanFactors(next(sums), next(sums), float(next(sums)), factors.exceeds(low, a))
                for (_, a), low in zip(own, found, strict=True)
            ]
        results = [
            factor.float()
            for pair, low, mean in zip(pairs, found, means, strict=True)
            for factor in _handed_back(pair, low, mean, self.factorization)
        ]
        vector = gathering.flat(results)
        gathering.agree_([vector], counting.federation)
        parts = iter(gathering.split(vector, [factor.shape for factor in results]))
        return Combined(_finite(pairs, [(next(parts), next(parts)) for _ in pairs]))

    def _iterated(
        self,
        pairs: Sequence[Factors],
        own: Sequence[tuple[Tensor, Tensor]],
        federation: Collectives,
        total: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[LowRank]:
        """With Q of orthonormal columns: P = sum(w s B A Q); P = qr(P); Q = sum(w s A^T B^T P); P Q^T.

        Where A says nothing about the rows yet (PEFT starts an embedding's at zero) the columns of B stand
        in: the iteration is that of the transposed product.

        What the parties add up next is seen in columns that each has computed for itself. Columns of which
        the product says nothing, or that it cannot tell apart, consist of rounding errors and are others on
        another processor: so the parties agree on columns before they add up.
        """
        party = federation.party
        turned = [not pair.anchor_a.any() for pair in pairs]
        sides = [(a.T, b.T) if turn else (b, a) for (b, a), turn in zip(own, turned, strict=True)]
        sides = [(pair.scalings[party] * b, a) for pair, (b, a) in zip(pairs, sides, strict=True)]
        q = [p.anchor_b if turn else p.anchor_a.T for p, turn in zip(pairs, turned, strict=True)]
        for _ in range(self.steps):
            q = [factors.orthonormal(x.cpu().double()) for x in q]
            p = total([b @ (a @ x) for (b, a), x in zip(sides, q, strict=True)])
            p = [factors.orthonormal(_checked(pair, x)) for pair, x in zip(pairs, p, strict=True)]
            gathering.agree_(p, federation, within=torch.float32)
            q = total([a.T @ (b.T @ x) for (b, a), x in zip(sides, p, strict=True)])
        found = [factors.from_range(x, _checked(pair, y)) for pair, x, y in zip(pairs, p, q, strict=True)]
        found = [low.transposed() if turn else low for low, turn in zip(found, turned, strict=True)]
        return [
            factors.completed(low, pair.anchor_b.cpu(), pair.anchor_a.cpu(), nothing=1e-6)  # sums in float32
            for low, pair in zip(found, pairs, strict=True)
        ]

    def _exact(self, pairs: Sequence[Factors], counting: RoundContext) -> Combined:
        terms = gathering.to_owners(pairs, counting, FACTORS)
        results = {}
        for k, of_pair in terms.items():
            pair = pairs[k]
            low = factors.best_rank(stack_of(of_pair), pair.anchor_a.shape[0])
            low = factors.completed(low, pair.anchor_b.cpu(), pair.anchor_a.cpu())
            mean = _mean_factors(of_pair, low) if _alike(pairs) else None
            results[k] = _handed_back(pair, low, mean, self.factorization)
        return Combined(_finite(pairs, gathering.from_owners(pairs, results, counting.federation)), terms)


def _handed_back(
    pair: Factors, low: LowRank, mean: MeanFactors | None, factorization: Gauge
) -> tuple[Tensor, Tensor]:
    return factors.hand_back(low, mean, pair.scaling, pair.anchor_a.shape[0], factorization)


def _agreed(found: Sequence[LowRank], federation: Collectives) -> list[LowRank]:
    """Return decompositions that differ by no more than rounding; where they do, party 0's."""
    whole = [gathering.flat([low.u, low.s, low.v]) for low in found]  # u and v of one party
    gathering.agree_(whole, federation, within=torch.float32)
    parts = [
        gathering.split(vector, [low.u.shape, low.s.shape, low.v.shape])
        for vector, low in zip(whole, found, strict=True)
    ]
    return [LowRank(u, s, v) for u, s, v in parts]


def _alike(pairs: Sequence[Factors]) -> bool:
    """Return whether all parties' factors have one shape and scaling, so that they have a mean."""
    return all(len({*pair.ranks}) == 1 and len({*pair.scalings}) == 1 for pair in pairs)


def _mean_factors(terms: Sequence[Term], low: LowRank) -> MeanFactors:
    each = [
        [term.share * part for part in factors.terms_of_means(term.b.double(), term.a.double(), low)]
        for term in terms
    ]
    a, b, squares = (torch.stack(parts).sum(dim=0) for parts in zip(*each, strict=True))
    return MeanFactors(a, b, float(squares), factors.exceeds(low, terms[0].a))


def _finite(pairs: Sequence[Factors], results: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    for pair, both in zip(pairs, results, strict=True):
        for factor in both:
            _checked(pair, factor)
    return results


def _checked(pair: Factors, values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise FederationError(
            f"The products of {pair.pair.name!r} exceed float32, so they have no low-rank mean. No parameter"
            " was changed. Lower the learning rate or clip gradients: factors this large come of a training"
            " that diverges."
        )
    return values


def _one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")
