"""Masked sums: right to the fixed point, the same bits everywhere, and nothing but noise on the way."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from message_transcript import Message, tapped
from party_threads import run_parties
from scipy import stats
from secure_exchange import masked
from torch import Tensor

from pellm_lightning import Federation, FederationError
from pellm_lightning.comm import PartyLostError
from pellm_lightning.exchange.secure.fixed_point import KEY_BYTES, KeyStream

SOON_S = 8.0
KEY_WORDS, SIGNATURE_WORDS, MASK_WORDS = 4, 8, KEY_BYTES // 8
"""How many integers of 64 bits a row of keys has, and one of signatures."""
IMPROBABLE = 1e-9
"""What a statistic of fresh random numbers stays above, but for once in 10^9 times."""

Sums = Any


def summed(num_parties: int, act: Callable[[Sums, int], Any], **arguments: Any) -> list[Any]:
    """Return what ``act(sums, party)`` returns at each party."""
    exchange = masked(**arguments)
    return run_parties(num_parties, lambda f: act(exchange.open(f, lambda: None), f.party))


def random(seed: int, size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


# ---- right


@settings(max_examples=30, deadline=None)
@given(
    num_parties=st.integers(3, 8),
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.0, 1.0, 3.0, 0.1, 1.7]), min_size=8, max_size=8),
    setting=st.sampled_from([(64, 24), (64, 40), (32, 16), (32, 22), (64, 8)]),
    seed=st.integers(0, 1000),
)
def test_sums_equal_float64_to_half_a_unit_of_each_summand(
    num_parties: int, sizes: Sequence[int], weights: Sequence[float], setting: tuple[int, int], seed: int
) -> None:
    bits, fractional_bits = setting
    held = [
        [weights[p] * random(31 * seed + p + 7 * i, size) for i, size in enumerate(sizes)] for p in range(8)
    ]

    def act(sums: Sums, party: int) -> list[Tensor]:
        tensors = [tensor.clone() for tensor in held[party]]
        sums.all_reduce_each_(iter(tensors))
        return tensors

    results = summed(num_parties, act, bits=bits, fractional_bits=fractional_bits)
    for index in range(len(sizes)):
        exact = sum(held[party][index].double() for party in range(num_parties))
        assert isinstance(exact, Tensor)
        got = results[0][index].double()
        # Half a unit of each summand, and that the sum is written as float32.
        bound = num_parties / 2 * 2.0**-fractional_bits + got.abs() * 2.0**-24
        assert ((got - exact).abs() <= bound * (1 + 1e-12)).all()
        for other in results[1:]:
            assert torch.equal(other[index], results[0][index])


def test_what_rules_sum_has_forty_digits_behind_the_point() -> None:
    held = [random(party, 1000, 1e-3).double() for party in range(4)]

    def act(sums: Sums, party: int) -> tuple[Tensor, Tensor]:
        square = held[party].clone().view(20, 50)
        across = held[party].clone().view(20, 50).T  # not contiguous
        return sums.all_reduce_(square), sums.all_reduce_(across)

    exact = torch.stack(held).sum(0).view(20, 50)
    for square, across in summed(4, act, fractional_bits=16):
        assert (square - exact).abs().max() <= 4 / 2 * 2.0**-40
        assert torch.equal(across, square.T)


def test_weights_and_metrics_have_32_digits_where_updates_have_as_many() -> None:
    told = [torch.tensor([1000.0 + party, 1e-7 * party], dtype=torch.float64) for party in range(3)]

    def act(sums: Sums, party: int) -> Tensor:
        mine = told[party].clone()
        sums.all_reduce_each_([mine])
        return mine

    for result in summed(3, act, fractional_bits=40):
        assert ((result - sum(told)).abs() <= 3 / 2 * 2.0**-32).all()


def test_integers_are_summed_exactly() -> None:
    for result in summed(3, lambda sums, p: sums.all_reduce_(torch.tensor([2**60 * (p - 1), p, -7]))):
        assert result.tolist() == [0, 3, -21]


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    def act(sums: Sums, party: int) -> Tensor:
        x = random(party, 300_000)
        sums.all_reduce_each_(x.split(100_001))
        return x

    with_one = summed(3, act)
    torch.set_num_threads(3)
    with_three = summed(3, act)
    assert all(torch.equal(x, with_one[0]) for x in with_one + with_three)


def test_a_sum_says_who_meets_as_the_federation_does() -> None:
    def act(federation: Federation) -> None:
        sums = masked().open(federation, lambda: None)
        for name in ("party", "names", "name", "members", "place", "max_parties", "bytes_sent"):
            assert getattr(sums, name) == getattr(federation, name)
        for gather in (lambda: sums.all_gather(torch.ones(1), [1] * 3), lambda: sums.all_to_all([], [])):
            with pytest.raises(
                FederationError, match=r"reveals sums only, no single party's values\. Use Mean"
            ):
                gather()

    run_parties(3, act)


# ---- refused


@pytest.mark.parametrize("value", [1e30, torch.nan, -torch.inf])
def test_what_exceeds_the_limit_is_told_with_the_cure_before_it_is_sent(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = tapped(monkeypatch)
    exchange = masked(bits=32)

    def act(federation: Federation) -> None:
        sums = exchange.open(federation, lambda: pytest.fail("revealed"))
        sums.all_reduce_each_([torch.full((100,), value if federation.party == 1 else 1.0)])

    began = time.monotonic()
    errors = run_parties(3, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    words = str(errors[1])
    assert "Party 1 would add" in words
    # (2^31 - 1) / 3 * 2^-24 = 42.67 are left of 32 bits.
    assert "in a secure sum of 3 parties no value may exceed 42.6667" in words
    assert "smaller fractional_bits" in words
    assert "bits=64" in words
    assert all(isinstance(error, PartyLostError) for error in (errors[0], errors[2]))
    assert "would add" in str(errors[0]), "the others tell why"
    assert not [m for m in messages if m.party == 1 and m.sent and m.values.dtype == torch.int32]


# ---- what leaves a party


def masked_values(messages: Sequence[Message], party: int, size: int) -> Tensor:
    """Return all that a party has sent in sums of ``size`` numbers."""
    return torch.cat([m.values.view(-1) for m in messages if m.party == party and m.values.numel() == size])


def bytes_of(values: Tensor) -> np.ndarray:
    return values.numpy().view(np.uint8)


def looks_random(values: Tensor) -> bool:
    """Chi-square of the bytes, and of each of the eight, or four, places that a byte may have."""
    places = bytes_of(values).reshape(-1, values.itemsize)
    counts = [np.bincount(place, minlength=256) for place in (places.ravel(), *places.T)]
    return all(stats.chisquare(count).pvalue > IMPROBABLE for count in counts)


INPUTS = {
    "zeros": lambda size: torch.zeros(size),
    "ones": lambda size: torch.ones(size),
    "ramp": lambda size: torch.arange(size) / size,
    "extreme": lambda size: torch.full((size,), -20.0),
}


@pytest.mark.parametrize("bits", [32, 64])
def test_all_that_leaves_a_party_is_uniform_whatever_it_holds(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = tapped(monkeypatch)
    size = 40_000

    def act(sums: Sums, party: int) -> None:
        for make in INPUTS.values():
            sums.all_reduce_each_([make(size)])

    summed(3, act, bits=bits)
    sent = [masked_values(messages, party, size).view(len(INPUTS), size) for party in range(3)]
    for of_party in sent:
        for values in of_party:
            assert looks_random(values)
        for one in range(len(INPUTS)):
            for other in range(one):
                # Two inputs' transcripts: two samples of one distribution, and unrelated to each other.
                table = np.stack([np.bincount(bytes_of(of_party[i]), minlength=256) for i in (one, other)])
                assert stats.chi2_contingency(table).pvalue > IMPROBABLE
                assert looks_random(of_party[one] - of_party[other])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert looks_random((sent[first] + sent[second]).view(-1)), (
            "two alone do not cancel each other's masks"
        )
    # And the statistic sees what is there: without masks, or with the same masks twice.
    assert not looks_random(torch.arange(size))
    assert not looks_random((sent[0] - sent[0] + 3).view(-1))


def test_the_same_values_look_different_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> None:
        for _ in range(2):
            sums = masked().open(federation, lambda: None)
            for _ in range(3):
                sums.all_reduce_each_([torch.ones(1000)])

    for _ in range(2):
        run_parties(3, act)
    for party in range(3):
        sent = masked_values(messages, party, 1000).tolist()
        assert len(sent) == 12 * 1000
        assert len(set(sent)) == len(sent)  # of 64 bits, so that a hit by chance takes 10^11 such tests


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[bytes, int]]:
    """How often each stream of masks has been begun, by key and nonce."""
    begun: Counter[tuple[bytes, int]] = Counter()
    begin = KeyStream.__init__

    def noted(self: KeyStream, key: bytes, nonce: int = 0) -> None:
        begun[key, nonce] += 1
        begin(self, key, nonce)

    monkeypatch.setattr(KeyStream, "__init__", noted)
    return begun


def test_no_stream_masks_twice(streams: Counter[tuple[bytes, int]]) -> None:
    federations, attempts, sums_each, parties = 2, 2, 3, 4

    def act(federation: Federation) -> None:
        for _ in range(attempts):
            sums = masked().open(federation, lambda: None)
            for _ in range(sums_each):
                sums.all_reduce_each_([torch.ones(10), torch.ones(5, dtype=torch.float64)])

    for _ in range(federations):
        run_parties(parties, act)
    # A pair's stream is begun by both, at the one to be added and at the other to be subtracted; a party's
    # own by itself, and by all when it is revealed.
    sums = federations * attempts * sums_each
    assert Counter(streams.values()) == {2: sums * 6, 1 + parties: sums * 4}
    of_pairs = {key for (key, _), count in streams.items() if count == 2}
    assert len(of_pairs) == federations * attempts * 6
    assert {nonce for (key, nonce), count in streams.items() if count > 2} == {0}


def steps_of(messages: Sequence[Message], party: int, size: int) -> Iterator[str]:
    """Name what a party has sent, in order."""
    names = {3 * KEY_WORDS: "key", 3 * SIGNATURE_WORDS: "signature", size: "sum", 1: "confirmation"}
    names[3 * MASK_WORDS] = "reveal"
    yield from (names[message.values.numel()] for message in messages if message.party == party)


def test_own_masks_are_revealed_when_all_have_confirmed_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = tapped(monkeypatch)
    revealed: list[tuple[int, int]] = []

    def act(federation: Federation) -> None:
        party = federation.party

        def on_reveal() -> None:
            revealed.append((party, sum(m.party == party for m in messages)))

        masked().open(federation, on_reveal).all_reduce_each_([torch.ones(1000)])

    run_parties(3, act)
    for party in range(3):
        steps = list(steps_of(messages, party, 1000))
        assert steps == ["key", "signature", "sum", "confirmation", "reveal"]
    assert sorted(revealed) == [(0, 4), (1, 4), (2, 4)], "told before the key is sent"


STEPS = ["keys", "signatures", "sum", "confirmation"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("lost", range(3))
def test_nobody_reveals_anything_if_a_party_is_lost_before_all_have_confirmed(
    step: str, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = tapped(monkeypatch)
    revealed: list[int] = []

    def act(federation: Federation) -> None:
        left = STEPS.index(step)
        reduce, each = federation.all_reduce_, federation.all_reduce_each_

        def counted(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def calls(x: Any) -> Any:
                nonlocal left
                if federation.party == lost and left == 0:
                    raise KeyError("lost")
                left -= 1
                return call(x)

            return calls

        federation.all_reduce_, federation.all_reduce_each_ = counted(reduce), counted(each)
        sums = masked().open(federation, lambda: revealed.append(federation.party))
        sums.all_reduce_each_([torch.ones(1000)])

    began = time.monotonic()
    results = run_parties(3, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    assert isinstance(results.pop(lost), KeyError)
    assert all(isinstance(error, PartyLostError) for error in results)
    assert revealed == []
    for party in range(3):
        assert [s for s in steps_of(messages, party, 1000) if s == "key"] in ([], ["key"])


class Lying:
    """A federation of which somebody forges what comes back: ``forge(kind, x)`` changes it in place."""

    def __init__(self, federation: Federation, forge: Callable[[str, Tensor], None]) -> None:
        self._federation, self._forge = federation, forge

    def __getattr__(self, name: str) -> Any:
        return getattr(self._federation, name)

    def all_reduce_(self, x: Tensor) -> Tensor:
        self._federation.all_reduce_(x)
        kinds = {
            1: "confirmation",
            KEY_WORDS: "public",
            MASK_WORDS: "revealed",
            SIGNATURE_WORDS: "signatures",
        }
        self._forge(kinds[x.shape[-1]], x)
        return x


def test_a_confirmation_that_is_missing_stops_all() -> None:
    def forge(kind: str, x: Tensor) -> None:
        if kind == "confirmation":
            x -= 1

    def act(federation: Federation) -> None:
        lying: Any = Lying(federation, forge)
        sums = masked().open(lying, lambda: pytest.fail("revealed"))
        with pytest.raises(FederationError, match="received 2 confirmations of 3 parties"):
            sums.all_reduce_each_([torch.ones(10)])

    run_parties(3, act)


def test_a_revealed_key_that_comes_back_changed_is_noticed_by_its_owner() -> None:
    def act(federation: Federation) -> None:
        def forge(kind: str, x: Tensor) -> None:
            if kind == "revealed":
                x[1] += 1

        lying: Any = Lying(federation, forge)
        sums = masked().open(lying, lambda: None)
        sums.all_reduce_each_([torch.ones(10)])

    results = run_parties(3, act, may_fail=True)
    assert "What party 1 sent to the others came back modified" in str(results[1])
