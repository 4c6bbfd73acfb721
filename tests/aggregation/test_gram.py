"""Best low-rank means by Gram matrices, against QR and SVD in float64 and against dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_oracles import away, best, cut, random

from pellm_lightning.aggregation import gram
from pellm_lightning.aggregation.base import Term
from pellm_lightning.aggregation.factorization import Factorization
from pellm_lightning.aggregation.factors import MeanFactors, Stack, factorize, truncated_svd

FACTORIZATIONS: list[Factorization] = ["procrustes", "balanced", "svd"]
WEIGHTS = [0.125, 0.375, 0.5]


def terms_of(seed: int, m: int, n: int, r: int, far: float, decay: float, scaling: float = 2.0) -> list[Term]:
    """Factors of three parties; the singular values of what they have in common fall to 10^-decay."""
    scale = 10 ** (-decay * torch.arange(r) / max(1, r - 1) / 2)
    b, a = random(seed, m, r) * scale, scale[:, None] * random(seed + 1, r, n)
    return [
        Term(
            w,
            scaling,
            b + far * random(seed + 2 * i + 2, m, r) * scale,
            a + far * random(seed + 2 * i + 3, r, n) * scale[:, None],
        )
        for i, w in enumerate(WEIGHTS)
    ]


def dense(terms: list[Term]) -> np.ndarray:
    return np.asarray(sum(t.share * t.scaling * (t.b.double() @ t.a.double()).numpy() for t in terms))


def by_qr(terms: list[Term], scaling: float, r: int, factorization: Factorization) -> tuple[np.ndarray, ...]:
    low = truncated_svd(Stack.of([(t.share * t.scaling, t.b, t.a) for t in terms]), r)
    mean = MeanFactors(
        a=torch.stack([t.share * t.a.double() @ low.v for t in terms]).sum(0),
        b=torch.stack([t.share * low.u.T @ t.b.double() for t in terms]).sum(0),
        squares=sum(
            t.share * float(t.b.double().square().sum() + t.a.double().square().sum()) for t in terms
        ),
    )
    return tuple(x.numpy() for x in factorize(low, mean, scaling, r, factorization))


@settings(deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(30, 20, 3), (9, 14, 4), (5, 5, 5), (12, 3, 1)]),
    st.sampled_from([1e-3, 0.1, 1.0]),
    st.sampled_from([0.0, 1.0, 2.0, 3.0]),
    st.sampled_from(FACTORIZATIONS),
    st.sampled_from([2.0, 0.5]),
)
def test_the_result_is_that_of_qr_rounded_to_float32(
    seed: int,
    shape: tuple[int, int, int],
    far: float,
    decay: float,
    factorization: Factorization,
    scaling: float,
) -> None:
    m, n, r = shape
    terms = terms_of(seed, m, n, r, far, decay, scaling)
    found = gram.best_means({7: gram.Module(terms, scaling, r)}, factorization)
    if not found:  # ill-conditioned by chance, which QR is for
        return
    b, a = (x.double().numpy() for x in found[7].factors)
    wanted = by_qr(terms, scaling, r, factorization)
    assert away(scaling * b @ a, scaling * wanted[0] @ wanted[1]) < 2e-7
    if factorization == "procrustes":  # of two equal singular values any basis is as good
        assert away(b, wanted[0]) < 1e-6
        assert away(a, wanted[1]) < 1e-6
    assert found[7].squares is not None
    missed, whole = found[7].squares
    matrix = dense(terms)
    assert whole == pytest.approx(np.sum(matrix**2), rel=1e-9)
    assert np.sqrt(missed) == pytest.approx(cut(matrix, r), rel=1e-4, abs=1e-7 * np.sqrt(whole))


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_modules_of_unlike_shapes_and_scalings_are_each_their_own(factorization: Factorization) -> None:
    shapes = [(30, 20, 3), (20, 30, 3), (30, 20, 2), (8, 8, 3)]
    modules = {
        k: gram.Module(terms_of(10 * k, m, n, r, 0.3, 1.0, 1.0 + k), 1.0 + k, r)
        for k, (m, n, r) in enumerate(shapes)
    }
    found = gram.best_means(modules, factorization)
    assert sorted(found) == [0, 1, 2, 3]
    for k, module in modules.items():
        (alone,) = gram.best_means({0: module}, factorization).values()
        b, a = found[k].factors
        torch.testing.assert_close((b, a), alone.factors, rtol=0, atol=1e-6)
        assert away((1.0 + k) * (b @ a).numpy(), best(dense(list(module.terms)), module.rank)) < 1e-6


@pytest.mark.parametrize("case", ["B is zero", "A is zero", "a direction is zero", "1e-6", "rank above m"])
def test_what_gram_matrices_cannot_resolve_is_left_to_qr(case: str) -> None:
    terms = terms_of(0, 3 if case == "rank above m" else 30, 20, 4, 0.0, 6.0 if case == "1e-6" else 0.0)
    for i, term in enumerate(terms):
        if case == "B is zero":
            term.b.zero_()
        if case == "A is zero":
            term.a.zero_()
        if case == "a direction is zero":
            term.b[:, 2].zero_()
            term.a[:3].add_(0.1 * random(i, 3, 20))
    assert gram.best_means({0: gram.Module(terms, 2.0, 4)}, "procrustes") == {}


def test_parties_that_cancel_out_are_left_to_qr() -> None:
    # The product is a millionth of its terms, so its error would be a millionth of float64's at best.
    b, a = random(0, 30, 3), random(1, 3, 20)
    terms = [Term(0.5, 1.0, b, a), Term(0.5, 1.0, -b + 1e-6 * random(2, 30, 3), a)]
    assert gram.best_means({0: gram.Module(terms, 1.0, 3)}, "balanced") == {}


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_equal_factors_come_back(factorization: Factorization) -> None:
    terms = terms_of(3, 30, 20, 4, 0.0, 2.0)
    found = gram.best_means({0: gram.Module(terms, 2.0, 4)}, factorization)[0]
    torch.testing.assert_close(found.factors, (terms[0].b, terms[0].a), rtol=1e-6, atol=1e-7)
    assert found.squares is None, "it is not the truncated product, but what the parties hold"


def test_blocks_do_not_change_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = terms_of(5, 333, 500, 4, 0.3, 0.0)
    factors = [(term.b, term.a) for term in terms]
    whole = gram.gram_matrices(factors)
    monkeypatch.setattr(gram, "_BLOCK", 1)
    left = torch.cat([term.b for term in terms], dim=1).double()
    right = torch.cat([term.a for term in terms]).double()
    for found in (whole, gram.gram_matrices(factors)):
        torch.testing.assert_close(found, (left.T @ left, right @ right.T), rtol=1e-12, atol=1e-10)
