"""How factors cross: to the party that owns a pair, to all, or in sums; and bits that all parties share."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_oracles import bits, random
from message_transcript import Message, tapped
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Federation
from pellm_lightning.aggregation import gathering
from pellm_lightning.aggregation.base import EVERYTHING, FACTORS, Factors, Part, Parts, RoundContext, Term
from pellm_lightning.aggregation.lora import Pair

M, N = 5, 7
WEIGHTS = [1.0, 3.0, 0.0]
SHARES = [0.25, 0.75, 0.0]
B_ONLY: Parts = frozenset({Part.B, Part.OTHER})
A_ONLY: Parts = frozenset({Part.A})


def rank(k: int, party: int) -> int:
    """Rank of pair k at a party: 1 to 4, so that no two sizes are alike by chance."""
    return 1 + (k + 2 * party) % 4


def factor_b(k: int, party: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(100 * k + party, M, rank(k, party)).to(dtype)


def factor_a(k: int, party: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(100 * k + party + 50, rank(k, party), N).to(dtype)


def pairs_of(
    party: int, num_pairs: int, num_parties: int, dtype: torch.dtype = torch.float32
) -> list[Factors]:
    """What a party holds: of party 2, which does not count, nothing is a number."""
    made = []
    for k in range(num_pairs):
        ranks = [rank(k, other) for other in range(num_parties)]
        b, a = factor_b(k, party, dtype), factor_a(k, party, dtype)
        made.append(
            Factors(
                pair=Pair(f"{k}", f"{k}.a", f"{k}.b"),
                b=b.fill_(math.nan) if party == 2 else b,
                a=a.fill_(math.nan) if party == 2 else a,
                anchor_b=random(1000 + k, M, max(ranks)),
                anchor_a=random(2000 + k, max(ranks), N),
                ranks=ranks,
                scalings=[1.0 + other for other in range(num_parties)],
                scaling=1.0,
            )
        )
    return made


def check(terms: list[Term], k: int, num_parties: int) -> None:
    """A term of each party that counts, in order, with its share, scaling and factors, to the bit."""
    counting = [party for party in range(num_parties) if SHARES[party]]
    assert [term.share for term in terms] == [SHARES[party] for party in counting]
    assert [term.scaling for term in terms] == [1.0 + party for party in counting]
    for term, party in zip(terms, counting, strict=True):
        assert torch.equal(term.b, factor_b(k, party).float())
        assert torch.equal(term.a, factor_a(k, party).float())


# ---- terms


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 7])
def test_pairs_are_owned_in_turn(num_pairs: int) -> None:
    of_parties = run_parties(3, lambda federation: gathering.owned(num_pairs, federation))
    assert of_parties == [list(range(num_pairs))[party::3] for party in range(3)]


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 7])
def test_owners_receive_the_terms_of_their_pairs_and_nobody_else(num_pairs: int) -> None:
    def act(federation: Federation) -> tuple[dict[int, list[Term]], int]:
        pairs = pairs_of(federation.party, num_pairs, 3)
        terms = gathering.to_owners(pairs, RoundContext(federation, SHARES), FACTORS)
        return terms, federation.bytes_sent

    for party, (terms, sent) in enumerate(run_parties(3, act)):
        assert sorted(terms) == list(range(party, num_pairs, 3))
        for k, of_pair in terms.items():
            check(of_pair, k, 3)
        # 4 bytes for each scalar of the pairs that it does not own; nothing if it does not count.
        others = [k for k in range(num_pairs) if k % 3 != party]
        assert sent == (4 * sum((M + N) * rank(k, party) for k in others) if SHARES[party] else 0)


@pytest.mark.parametrize("num_pairs", [1, 2, 7])
def test_all_receive_the_terms_of_all_pairs(num_pairs: int) -> None:
    def act(federation: Federation) -> tuple[dict[int, list[Term]], int]:
        pairs = pairs_of(federation.party, num_pairs, 3)
        terms = gathering.to_all(pairs, RoundContext(federation, SHARES), FACTORS)
        return terms, federation.bytes_sent

    for party, (terms, sent) in enumerate(run_parties(3, act)):
        assert sorted(terms) == list(range(num_pairs))
        for k, of_pair in terms.items():
            check(of_pair, k, 3)
        mine = sum((M + N) * rank(k, party) for k in range(num_pairs))
        assert sent == (4 * mine if SHARES[party] else 0)


Gather = Callable[[list[Factors], RoundContext, Parts], dict[int, list[Term]]]


@pytest.mark.parametrize("gather", [gathering.to_owners, gathering.to_all])
@pytest.mark.parametrize("parts", [B_ONLY, A_ONLY])
def test_a_factor_that_rested_does_not_cross(gather: Gather, parts: Parts) -> None:
    # It is the anchor's at every party, as a bf16 parameter holds it.
    def act(federation: Federation) -> tuple[dict[int, list[Term]], int]:
        pairs = pairs_of(federation.party, 4, 2, torch.bfloat16)
        terms = gather(pairs, RoundContext(federation, SHARES[:2]), parts)
        return terms, federation.bytes_sent

    for party, (terms, sent) in enumerate(run_parties(2, act)):
        for k, of_pair in terms.items():
            anchor = pairs_of(0, 4, 2)[k]
            for other, term in enumerate(of_pair):
                b = factor_b(k, other, torch.bfloat16) if Part.B in parts else anchor.anchor_b
                a = factor_a(k, other, torch.bfloat16) if Part.A in parts else anchor.anchor_a
                assert torch.equal(term.b.float(), b.to(torch.bfloat16).float())
                assert torch.equal(term.a.float(), a.to(torch.bfloat16).float())
        crossing = M if Part.B in parts else N
        ks = range(4) if gather is gathering.to_all else range(1 - party, 4, 2)
        assert sent == 4 * crossing * sum(rank(k, party) for k in ks)


def test_a_party_alone_has_its_own_terms() -> None:
    def act(federation: Federation) -> None:
        pairs = pairs_of(0, 2, 1)
        for gather in (gathering.to_owners, gathering.to_all):
            terms = gather(pairs, RoundContext(federation, [1.0]), EVERYTHING)
            for k in range(2):
                (term,) = terms[k]
                assert (term.share, term.scaling) == (1.0, 1.0)
                assert torch.equal(term.b, pairs[k].b)
                assert torch.equal(term.a, pairs[k].a)
        assert federation.bytes_sent == 0

    run_parties(1, act)


def test_factors_that_lie_across_cross_in_their_logical_order() -> None:
    def act(federation: Federation) -> list[Term]:
        (pair,) = pairs_of(federation.party, 1, 2)
        across = Factors(**{**vars(pair), "b": pair.b.t().contiguous().t(), "a": pair.a.t().contiguous().t()})
        return gathering.to_all([across], RoundContext(federation, [0.25, 0.75]), FACTORS)[0]

    for terms in run_parties(2, act):
        check(terms, 0, 2)


# ---- results


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 7])
def test_all_receive_what_the_owners_found_in_float32(num_pairs: int) -> None:
    # Results have the shape of the anchor's factors, the largest rank of the parties.
    def found(k: int) -> tuple[Tensor, Tensor]:
        pair = pairs_of(0, num_pairs, 3)[k]
        return random(k, *pair.anchor_b.shape).double() / 3, random(k + 9, *pair.anchor_a.shape).double() / 3

    def act(federation: Federation) -> tuple[list[tuple[Tensor, Tensor]], int]:
        pairs = pairs_of(federation.party, num_pairs, 3)
        mine = {k: found(k) for k in gathering.owned(num_pairs, federation)}
        return gathering.from_owners(pairs, mine, federation), federation.bytes_sent

    for party, (results, sent) in enumerate(run_parties(3, act)):
        for k, (b, a) in enumerate(results):
            assert torch.equal(b, found(k)[0].float())
            assert torch.equal(a, found(k)[1].float())
        assert len(results) == num_pairs
        own = range(party, num_pairs, 3)
        assert sent == 4 * sum((M + N) * max(rank(k, other) for other in range(3)) for k in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_are_summed_in_what_crosses(dtype: torch.dtype) -> None:
    # 1 + 2^-40 is one in float32, and not in float64; the sum over three parties follows suit.
    def act(federation: Federation) -> list[Tensor]:
        terms = [
            torch.full((2, 3), 1 + 2.0**-40, dtype=torch.float64),
            torch.tensor(federation.party).double(),
        ]
        return gathering.summed(terms, federation, dtype)

    for first, second in run_parties(3, act):
        assert (first.dtype, first.shape, second.shape) == (torch.float64, (2, 3), ())
        expected = 3.0 if dtype is torch.float32 else 3 + 3 * 2.0**-40
        assert torch.equal(first, torch.full((2, 3), expected, dtype=torch.float64))
        assert second == 0 + 1 + 2


def test_flat_and_split_are_inverse() -> None:
    tensors = [random(0, 2, 3), torch.tensor(4.0), torch.zeros(0, 5), random(1, 4)]
    vector = gathering.flat(tensors)
    assert vector.shape == (11,)
    for part, tensor in zip(gathering.split(vector, [t.shape for t in tensors]), tensors, strict=True):
        assert torch.equal(part, tensor)
    assert gathering.flat([]).shape == (0,)


# ---- agreement to the bit


def agreed(
    monkeypatch: pytest.MonkeyPatch, num_parties: int, make: Callable[[int], list[Tensor]]
) -> tuple[list[list[Tensor]], list[Message]]:
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> list[Tensor]:
        tensors = make(federation.party)
        gathering.synchronize_(tensors, federation)
        return tensors

    return run_parties(num_parties, act), messages


def broadcast(messages: list[Message]) -> list[Any]:
    return [
        message.values.shape for message in messages if message.collective == "broadcast" and message.sent
    ]


def test_parties_that_differ_by_a_bit_take_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where another processor, or number of threads, rounds a sum the other way: here at party 2 alone.
    def make(party: int) -> list[Tensor]:
        off = random(1, 50)
        if party == 2:
            off[17] = torch.nextafter(off[17], torch.tensor(9.0))
        return [random(0, 4, 5), off, random(2, 3)]

    results, messages = agreed(monkeypatch, 4, make)
    for tensors in results:
        for tensor, first in zip(tensors, make(0), strict=True):
            assert bits(tensor) == bits(first)
    assert broadcast(messages) == [(50,)], "only what differs crosses, from party 0"


def test_parties_that_agree_send_digests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(party: int) -> list[Tensor]:
        return [random(0, 1000), random(1, 30, 40)]

    results, messages = agreed(monkeypatch, 3, make)
    for tensors in results:
        assert all(torch.equal(x, y) for x, y in zip(tensors, make(0), strict=True))
    # An int64 of each party for each of the two tensors.
    assert [message.values.shape for message in messages if message.party == 1] == [(6,)]


@pytest.mark.parametrize(
    ("first", "other"),
    [(0.0, -0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, -math.inf)],
)
def test_bits_are_compared_and_not_values(
    first: float, other: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, _ = agreed(monkeypatch, 2, lambda party: [torch.tensor([3.0, first if party == 0 else other])])
    assert bits(results[0][0]) == bits(results[1][0]) == bits(torch.tensor([3.0, first]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_transposed_weight_is_agreed_on_in_place(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A frozen weight may be stored (n, m); what is given is a view of it, and the weight must be written.
    weights = [(random(0, 6, 4) + (party == 1)).to(dtype) for party in range(2)]
    agreed(monkeypatch, 2, lambda party: [weights[party].T])
    assert torch.equal(weights[0], random(0, 6, 4).to(dtype))
    assert torch.equal(weights[1], weights[0])


def test_a_party_alone_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ((tensor,),), messages = agreed(monkeypatch, 1, lambda party: [random(0, 5)])
    assert torch.equal(tensor, random(0, 5))
    assert not messages
