"""The participant filter by itself: whose update is summed in a round, by what the parties' headers say."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import Collectives, FaultyPartyError, FederationError, MismatchError
from pellm_lightning.engine.context import EngineContext
from pellm_lightning.engine.coordination import Header, Purpose
from pellm_lightning.engine.participants import ParticipantFilter, Participants, Shortage
from pellm_lightning.exchange import Plain
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.privacy.accountant import PrivacyAccountant
from pellm_lightning.privacy.processor import DPProcessor


class Present:
    """The parties that meet, as far as the filter looks at them."""

    def __init__(self, num_parties: int, party: int = 0, max_parties: int | None = None) -> None:
        self.party = party
        self.names = [f"p{index}" for index in range(num_parties)]
        self.name = self.names[party]
        self.num_parties = num_parties
        self.max_parties = max_parties or num_parties
        self.may_lose_parties = False

    def called(self, parties: Sequence[int]) -> str:
        return ", ".join(self.names[party] for party in parties)


def filter_of(
    num_parties: int, party: int = 0, max_parties: int | None = None, **changes: Any
) -> ParticipantFilter:
    exchange = SimpleNamespace(
        is_secure=changes.pop("is_secure", False), min_participants=changes.pop("min_participants", 1)
    )
    federation = cast(Collectives, Present(num_parties, party, max_parties))
    context = EngineContext(federation, Plan(None, ["w"]), cast(Any, exchange))
    return ParticipantFilter(replace(context, **changes))


def trains(weight: float = 1.0, **changes: Any) -> Header:
    return replace(Header(Purpose.ROUND, 3, weight, tag="now"), **changes)


DONE = Header(Purpose.DONE, 3, 0.0)
JOINS = Header(Purpose.JOIN, 3, 0.0)


def no_name() -> None:
    return None


def select(filter: ParticipantFilter, headers: Sequence[Header], failed: int = 0) -> Participants:
    return filter.select(headers, 3, failed, no_name)


# ---- by their headers


def test_everybody_counts_by_its_weight() -> None:
    selected = select(filter_of(3), [trains(8.0), trains(0.5), DONE])
    assert selected == Participants([8.0, 0.5, 0.0], trained=[0, 1], excluded=[])


def test_a_party_of_weight_0_has_trained_all_the_same() -> None:
    assert select(filter_of(3, quorum=2), [trains(8.0), trains(0.0), DONE]) == Participants(
        [8.0, 0, 0], [0, 1], []
    )


def test_a_party_that_is_behind_counts_0_and_its_round_does_not_matter() -> None:
    behind = trains(5.0, round=1, behind=True)
    assert select(filter_of(3), [trains(), behind, JOINS]) == Participants([1.0, 0.0, 0.0], [0], [])


def test_parties_in_different_rounds_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"party 0: 3, party 1: 4"):
        select(filter_of(2), [trains(), trains(round=4)])


def test_where_parties_come_and_go_most_continue_without_one_in_another_round() -> None:
    filter = filter_of(3)
    filter._federation.may_lose_parties = True
    with pytest.raises(FaultyPartyError, match="party 2: 4") as caught:
        select(filter, [trains(), trains(), trains(round=4)])
    assert caught.value.parties == ("p2",)
    with pytest.raises(MismatchError):
        select(filter, [trains(round=2), trains(), trains(round=4)])


def test_nobody_counts_though_all_train() -> None:
    with pytest.raises(FederationError, match="No party has weight above 0 in round 3"):
        select(filter_of(2), [trains(0.0), trains(0.0)])
    # Where others are done, the last one that is active may come with nothing: then nothing moves.
    assert select(filter_of(2), [trains(0.0), DONE]).weights == [0.0, 0.0]


@pytest.mark.parametrize(("quorum", "weights"), [(2, [1.0, 1.0, 0.0]), (3, [0.0, 0.0, 0.0])])
def test_fewer_than_a_quorum_move_nothing(quorum: int, weights: list[float]) -> None:
    selected = select(filter_of(3, quorum=quorum), [trains(), trains(), DONE])
    assert (selected.weights, selected.trained) == (weights, [0, 1])


def test_too_few_to_hide_in_a_sum_send_nothing(caplog: pytest.LogCaptureFixture) -> None:
    headers = [trains(), trains(), DONE]
    assert select(filter_of(3, min_participants=2), headers).weights == [1.0, 1.0, 0.0]
    assert select(filter_of(3, min_participants=3), headers).weights == [0.0, 0.0, 0.0]
    assert "only 2 parties count, and each would see what the others sent" in caplog.text


def test_a_spent_budget_sends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"max_norm": 1.0, "noise_multiplier": 1.0, "distributed": False}
    once = PrivacyAccountant()
    once.release(1.0)
    budget = 1.01 * GaussianMechanism(**settings).epsilon(once)
    mechanism = GaussianMechanism(**settings, max_epsilon=budget)
    filter = filter_of(2, privacy=DPProcessor(mechanism), exchange=Plain())
    assert select(filter, [trains(), trains()]).weights == [1.0, 1.0]
    # An attempt at this round that failed has released a noisy update already.
    assert select(filter, [trains(), trains()], failed=1).weights == [0.0, 0.0]
    assert "one more would exceed max_epsilon" in caplog.text


# ---- values that are not finite


@pytest.mark.parametrize("party", [0, 1])
def test_a_party_whose_values_are_not_finite_is_left_out(
    party: int, caplog: pytest.LogCaptureFixture
) -> None:
    headers = [trains(2.0), trains(3.0, fine=False), trains(4.0)]
    selected = filter_of(3, party, quorum=2).select(headers, 3, 0, lambda: "head.weight")
    assert selected == Participants([2.0, 0.0, 4.0], trained=[0, 2], excluded=[1])
    assert ("Here the first such parameter is 'head.weight'" in caplog.text) == (party == 1)


def test_what_turns_out_later_is_left_out_too() -> None:
    filter = filter_of(3, quorum=2)
    selected = select(filter, [trains(2.0), trains(3.0), trains(4.0)])
    assert filter.exclude(selected, [True] * 3, 3, no_name) is selected
    assert filter.exclude(selected, [True, False, True], 3, no_name) == Participants([2, 0, 4], [0, 2], [1])
    # With two of three left out, fewer than a quorum have trained.
    assert filter.exclude(selected, [True, False, False], 3, no_name) == Participants([0, 0, 0], [0], [1, 2])


def test_a_party_of_weight_0_may_hold_anything() -> None:
    filter = filter_of(2)
    selected = select(filter, [trains(), trains(0.0)])
    assert filter.exclude(selected, [True, False], 3, no_name) is selected


def test_raise_stops_all_and_so_does_nobody_left() -> None:
    raising = filter_of(2, on_nonfinite="raise")
    with pytest.raises(FederationError, match=r"party p1 hold NaN or infinity\..*No parameter was changed"):
        select(raising, [trains(), trains(fine=False)])
    with pytest.raises(FederationError, match="No parameter was changed"):
        select(filter_of(2), [trains(fine=False), trains(0.0)])


def test_in_a_secure_sum_it_is_too_late_to_leave_a_party_out() -> None:
    filter = filter_of(3, is_secure=True)
    selected = select(filter, [trains()] * 3)
    with pytest.raises(FederationError, match="an update of party p2 exceeds float32"):
        filter.exclude(selected, [True, True, False], 3, no_name)


# ---- sums that were revealed


def test_values_are_sent_again_only_in_the_same_sum() -> None:
    together = ("p0/now", "p1/now")
    same = [trains(exposed=together), trains(exposed=together), DONE]
    assert select(filter_of(3), same).weights == [1.0, 1.0, 0.0]
    with_another = [trains(exposed=together), trains(exposed=together), trains()]
    assert select(filter_of(3), with_another) == Participants([0.0, 0.0, 1.0], trained=[2], excluded=[])


@st.composite
def rounds(draw: st.DrawFn) -> list[Header]:
    """Headers of a round in which some values were revealed in earlier sums."""
    size = draw(st.integers(1, 5))
    names = [f"p{party}/now" for party in range(size)]
    exposed = st.lists(st.sampled_from([*names, "gone/then"]), unique=True).map(tuple)
    purposes = st.sampled_from([Purpose.ROUND, Purpose.DONE, Purpose.JOIN])
    headers = []
    for _ in range(size):
        purpose = draw(purposes)
        weight = draw(st.sampled_from([0.0, 0.5, 3.0])) if purpose is Purpose.ROUND else 0.0
        header = Header(purpose, 3, weight, tag="now", exposed=draw(exposed), behind=draw(st.booleans()))
        headers.append(header)
    return headers


def every(filters: Sequence[ParticipantFilter], headers: Sequence[Header]) -> list[Participants | str]:
    found: list[Participants | str] = []
    for filter in filters:
        try:
            found.append(select(filter, headers))
        except FederationError as error:
            found.append(str(error))
    return found


@given(headers=rounds(), quorum=st.integers(1, 3), min_participants=st.integers(1, 3))
def test_all_parties_come_to_the_same_and_to_what_is_promised(
    headers: list[Header], quorum: int, min_participants: int
) -> None:
    size = len(headers)
    settings = {"quorum": quorum, "min_participants": min_participants}
    found, *others = every([filter_of(size, party, **settings) for party in range(size)], headers)
    assert all(other == found for other in others)
    if isinstance(found, str):
        assert "No party has weight above 0" in found
        return
    counting = {party for party, weight in enumerate(found.weights) if weight > 0}
    assert all(found.weights[party] in (0.0, header.weight) for party, header in enumerate(headers))
    assert not counting or len(counting) >= min_participants
    assert not counting or len(found.trained) >= quorum
    assert counting <= set(found.trained)
    sum_ = {headers[party].values_of(f"p{party}") for party in counting}
    for party in counting:
        assert not headers[party].behind
        assert not headers[party].exposed or {*headers[party].exposed} == sum_


# ---- shares


@given(st.lists(st.floats(0, 2.0**53), min_size=1, max_size=6))
def test_shares_add_up_to_one(weights: list[float]) -> None:
    sums = cast(Collectives, Present(len(weights)))
    context = filter_of(len(weights)).round_context(sums, weights, weights[0], 3)
    if sum(weights) == 0:
        assert context.num_participants == 0
        return
    assert math.isclose(sum(context.shares), 1.0)
    assert all((share > 0) <= (weight > 0) for share, weight in zip(context.shares, weights, strict=True))


def test_hidden_weights_are_known_once_they_are_summed() -> None:
    sums = cast(Collectives, Present(3, party=1))
    filter = filter_of(3, party=1, is_secure=True)
    context = filter.round_context(sums, [1.0, 1.0, 0.0], own_weight=6.0, round=3)
    assert math.isnan(context.shares[0])
    assert (context.share, context.shares[2], context.num_participants) == (6.0, 0.0, 2)
    assert filter.normalized(context, total_weight=8.0).share == 0.75
    with pytest.raises(FederationError, match="weights of round 3 are too small"):
        filter.normalized(context, total_weight=0.0)


# ---- the end


def shortage(rounds: int, trained: Sequence[int], parties: int) -> Shortage:
    return Shortage(rounds, trained, excluded=[], steps_left=[4.0] * parties)


@pytest.mark.parametrize(
    ("headers", "quorum", "rounds", "last"),
    [
        ([trains(), trains(), trains()], 2, 0, False),
        ([trains(), DONE, trains()], 3, 0, False),  # enough trained in this one; the next will tell
        ([trains(), trains(fine=False), trains()], 3, 1, False),  # healed, it may train in the next
        ([trains(), trains(fine=False), trains()], 3, 2, True),  # twice is no accident
        ([trains(), DONE, DONE], 2, 1, True),  # fewer than a quorum are left
    ],
)
def test_which_round_is_the_last(headers: list[Header], quorum: int, rounds: int, last: bool) -> None:
    filter = filter_of(3, quorum=quorum)
    trained = [
        party for party, header in enumerate(headers) if header.purpose is Purpose.ROUND and header.fine
    ]
    assert filter.is_last(headers, 3, shortage(rounds, trained, 3)) == last


def test_absent_parties_may_still_make_a_quorum() -> None:
    headers = [trains(), DONE]
    assert filter_of(2, quorum=2).is_last(headers, 3, shortage(1, [0], 2))
    assert not filter_of(2, quorum=2, max_parties=3).is_last(headers, 3, shortage(1, [0], 2))


def test_too_few_left_to_hide_is_the_end(caplog: pytest.LogCaptureFixture) -> None:
    headers = [trains(), trains(), DONE]
    assert not filter_of(3, min_participants=2).is_last(headers, 3, shortage(0, [0, 1], 3))
    assert filter_of(3, min_participants=3).is_last(headers, 3, shortage(0, [0, 1], 3))
    assert "too few to hide in a sum" in caplog.text


@pytest.mark.parametrize(
    ("fragments", "rounds", "words"),
    [
        (1, 1, "all go back to the result of round 2"),
        (2, 1, "all go back to the result of round 1"),  # of the same fragment
        (2, 2, "all go back to the parameters of the start"),
    ],
)
def test_a_short_round_tells_which_result_stands(
    fragments: int, rounds: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    filter = filter_of(2, quorum=2, fragments=fragments)
    filter.is_last([trains(), DONE], 3, shortage(rounds, [0], 2))
    assert words in caplog.text
    assert "party p1 has made all its steps" in caplog.text


def test_the_filter_looks_at_no_tensor() -> None:
    """It is pure: the same headers give the same result, and nothing crosses."""
    before = torch.random.get_rng_state()
    select(filter_of(2), [trains(), trains()])
    assert torch.equal(before, torch.random.get_rng_state())
