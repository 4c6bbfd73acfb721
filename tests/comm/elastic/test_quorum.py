"""The quorum computation by itself: who continues together, as which attempt, and who is waited for."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.comm import (
    FederationError,
    Membership,
    MismatchError,
    TooFewPartiesError,
    Version,
    polling,
)
from pellm_lightning.comm.elastic import join_quorum
from pellm_lightning.comm.elastic.handshake import SpecExchange
from pellm_lightning.comm.elastic.join_quorum import QuorumProtocol, VoidViewError
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.quorum_view import QuorumMember, QuorumView, blocker, check_fits, stage
from pellm_lightning.comm.elastic.reachability import ReachabilityTracker
from pellm_lightning.comm.elastic.register import KEPT_TERMS, Register

ROSTER = ["a", "b", "c"]
NEW = QuorumMember(1, "now", "host:1", "d", None, 0, "", "exchange", "", False, {})
OLD = replace(NEW, version=Version("run", 3, 7), attempt=7, run_id="run", member=True)


# ---- the view


def test_a_view_continues_the_newest_run_as_a_later_attempt() -> None:
    newer = replace(OLD, version=Version("run", 4, 9), attempt=12)
    view = QuorumView.of(5, "unused", {"a": OLD, "b": newer, "c": NEW})
    assert (view.term, view.attempt, view.run_id) == (5, 13, "run")
    assert view.newest == ("run", 4, 9)
    assert view.result.behind == {"a", "c"}
    assert QuorumView.of(5, "unused", {"a": OLD}, attempt_before=40).attempt == 41


def test_a_first_view_begins_a_run_and_a_repeated_one_keeps_its_name() -> None:
    first = QuorumView.of(1, "unused", {"a": NEW, "b": NEW})
    assert (first.attempt, first.run_id, first.newest) == (1, "unused", None)
    assert first.result.behind == frozenset()
    again = replace(NEW, attempt=first.attempt, run_id=first.run_id)
    assert QuorumView.of(2, "other", {"a": again, "b": NEW}).run_id == "unused"


def test_connections_are_kept_by_those_who_all_have_them() -> None:
    group = QuorumView.of(1, "first", {"a": NEW, "b": NEW}).group
    has = replace(OLD, group=group)
    assert QuorumView.of(2, "second", {"a": has, "b": has}).group == group
    for entries in ({"a": has, "b": OLD}, {"a": has, "b": has, "c": has}, {"a": has}, {"a": has, "c": has}):
        assert QuorumView.of(2, "second", entries).group.startswith("second/")


@pytest.mark.parametrize(
    ("parts", "sums", "blocking"),
    [
        ({}, {}, ""),
        ({"a": "b", "b": "a"}, {}, ""),  # a link between two: either may be at fault
        ({"a": "e"}, {"e": "a"}, ""),
        ({"a": "e", "b": "e"}, {"e": "abcd"}, "e"),
        ({"a": "bcde"}, {}, ""),  # one word is none
        # Who misses a part cannot send sums.
        ({"a": "e"}, {"b": "a", "c": "a", "d": "a", "e": "a"}, ""),
        ({"a": "e", "b": "e"}, {"c": "ab", "d": "ab", "e": "ab"}, "e"),
        ({}, {"a": "e", "b": "e", "c": "e", "d": "e", "e": "abcd"}, "e"),
        # The others have gone on, and miss parts of those whom one holds up.
        ({"c": "abe", "d": "abe"}, {"a": "e", "b": "e"}, "e"),
        ({"a": "de", "b": "de"}, {}, ""),
        ({"a": "a", "b": "a"}, {}, ""),
        ({"a": "z", "b": "z"}, {}, "z"),  # it has not come again
    ],
)
def test_who_has_held_up_the_others_is_told_by_two_at_least(
    parts: dict[str, str], sums: dict[str, str], blocking: str
) -> None:
    entries = {
        name: replace(NEW, missing_parts=[*parts.get(name, "")], missing_sums=[*sums.get(name, "")])
        for name in "abcde"
    }
    assert blocker(entries) == blocking


@pytest.mark.parametrize(
    ("intents", "exchanges"),
    [
        (["exchange", "exchange"], True),
        (["exchange", "rest"], True),
        (["exchange", "metadata"], False),
        (["rest", "rest"], False),
    ],
)
def test_tensors_are_exchanged_unless_metadata_come_first(intents: list[Any], exchanges: bool) -> None:
    entries = {name: replace(NEW, intent=intent) for name, intent in zip("ab", intents, strict=True)}
    view = QuorumView.of(1, "new", entries)
    assert view.exchanges == view.result.exchanges == exchanges


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([NEW, NEW, NEW], "beginning"),
        ([replace(OLD, member=False), NEW, NEW], "beginning"),
        ([replace(OLD, member=False), replace(OLD, member=False), NEW], "resuming"),
        ([OLD, NEW, NEW], "running"),
    ],
)
def test_a_federation_has_begun_if_a_quorum_says_so(entries: list[QuorumMember], expected: str) -> None:
    assert stage(dict(zip(ROSTER, entries, strict=True)), 2) == expected


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def test_a_view_is_read_as_it_was_written() -> None:
    view = QuorumView.of(5, "new", {"a": OLD, "b": replace(NEW, metadata={"round": 3})})
    assert QuorumView.from_json(5, view.to_json()) == view


@given(
    JSON, st.sampled_from(sorted(NEW.to_json())), st.sampled_from(["attempt", "group", "run_id", "members"])
)
def test_a_malformed_view_is_none(new: Any, of_member: str, of_view: str) -> None:
    """Or else it is one: each field has its type."""
    written = QuorumView.of(1, "new", {"a": OLD}).to_json()
    member = dict(written["members"][0][1])
    for value in (new, written | {of_view: new}, written | {"members": [["a", member | {of_member: new}]]}):
        view = QuorumView.from_json(1, value)
        assert view is None or QuorumView.from_json(1, view.to_json()) == view


def test_metadata_that_leave_no_room_for_those_of_others_are_named() -> None:
    check_fits("a", {"metrics": "x" * 30_000}, 64)
    with pytest.raises(FederationError, match=r"Party a would tell the others \d+ bytes \(metrics\)"):
        check_fits("a", {"metrics": "x" * 40_000}, 64)


# ---- joining


class Peers:
    """Who is alive, and has been in a quorum before, as a test says."""

    def __init__(self, alive: Collection[str], members: Collection[str]) -> None:
        self.living, self.members = set(alive), set(members)

    def note_incarnations(self, entries: Any) -> None:
        pass

    def alive(self, name: str) -> bool:
        return name in self.living

    def runs(self, name: str, incarnation: str) -> bool:
        return name in self.living and incarnation == "now"

    def is_member(self, name: str) -> bool:
        return self.alive(name) and name in self.members

    def fate(self, name: str) -> str:
        return "late" if self.alive(name) else "dead"


class Joining:
    """Party a joins term 1 of three parties; the others are what a test writes for them."""

    def __init__(self, alive: Collection[str] = "abc", members: Collection[str] = "", **waits: Any) -> None:
        self.peers: Any = Peers(alive, members)
        self.register = Register(dist.HashStore())
        self.register.renew()
        self.register.claim("term", 1)
        self.reachability = ReachabilityTracker(ROSTER)
        given = {"wait_s": 9, "round_timeout_s": 9, "heartbeat_ttl_s": 0.02} | waits
        me = LocalParty("a", ROSTER, 2, Membership(**given), "now")
        specs = SpecExchange(self.register, me)
        specs.set({}, lambda specs, names: f"{names[0]} is not {names[1]}")
        self.protocol = QuorumProtocol(self.register, self.peers, specs, self.reachability, me)
        self.protocol.partners = members

    def write(self, **entries: QuorumMember) -> None:
        for name, entry in entries.items():
            self.register.write(f"member/@{name}", entry.to_json())

    def join(self, mine: QuorumMember, *then: Callable[[], None]) -> QuorumView | None:
        """Join; each of ``then`` happens at one poll, in turn."""
        events = list(then)
        self.protocol.interrupt = lambda: events.pop(0)() if events else None
        view = self.protocol.join(mine, self.protocol.deadline())
        assert not events, "it did not wait"
        return view


def members_of(view: QuorumView | None) -> list[str]:
    return [] if view is None else view.members


def nothing() -> None:
    pass


def test_all_who_are_there_begin_together() -> None:
    joining = Joining()
    joining.write(b=NEW)
    assert members_of(joining.join(NEW, nothing, nothing, lambda: joining.write(c=NEW))) == ROSTER
    assert members_of(joining.join(NEW)) == ROSTER, "the first view that is written stands"


def test_the_beginning_waits_for_the_dead_and_no_longer_than_told() -> None:
    joining = Joining(alive="ab", wait_s=0.05)
    joining.write(b=NEW)
    assert members_of(joining.join(NEW, nothing, nothing)) == ["a", "b"]


def test_a_running_federation_continues_without_the_dead() -> None:
    joining = Joining(alive="ab", members="abc")
    joining.write(b=OLD, c=OLD)
    assert members_of(joining.join(OLD)) == ["a", "b"]


def test_a_running_federation_waits_for_a_live_member_until_it_dies_or_is_late() -> None:
    joining = Joining(members="abc")
    joining.write(b=OLD)
    died: Callable[[], None] = lambda: joining.peers.living.discard("c")  # noqa: E731
    assert members_of(joining.join(OLD, nothing, nothing, died)) == ["a", "b"]
    joining = Joining(members="abc", round_timeout_s=0.05)
    joining.write(b=OLD)
    assert members_of(joining.join(OLD, nothing, nothing)) == ["a", "b"]


def test_a_running_federation_does_not_wait_for_one_that_starts_up() -> None:
    joining = Joining(members="ab")
    joining.write(b=OLD)
    assert members_of(joining.join(OLD)) == ["a", "b"]


def test_new_processes_wait_for_a_live_one_with_the_state() -> None:
    joining = Joining(members="c", wait_s=0.02)
    joining.write(b=NEW)
    late = [nothing] * 12 + [lambda: joining.write(c=OLD)]  # longer than wait_s
    assert members_of(joining.join(NEW, *late)) == ROSTER


def test_an_entry_of_another_term_or_process_is_none() -> None:
    for stale in (replace(OLD, term=2), replace(OLD, incarnation="before")):
        joining = Joining(members="abc")
        joining.write(b=OLD, c=stale)
        assert members_of(joining.join(OLD, nothing, lambda: joining.write(c=OLD))) == ROSTER  # noqa: B023


def test_one_whose_metadata_fill_a_view_is_left_out() -> None:
    """Written again as JSON it is larger than a rendezvous takes, so nobody could write the view."""
    joining = Joining(members="abc", round_timeout_s=0.05)
    joining.write(b=OLD, c=replace(OLD, metadata={"x": "\xe9" * 1_000_000}))
    assert members_of(joining.join(OLD)) == ["a", "b"]


def test_a_view_does_not_repeat_what_each_has_of_the_revocation_list() -> None:
    joining = Joining(members="abc")
    joining.write(b=replace(OLD, revoked="x" * 60_000), c=OLD)
    view = joining.join(replace(OLD, revoked="x" * 60_000))
    assert view is not None
    assert {entry.revoked for entry in view.entries.values()} == {""}, "this party has found none that holds"


def test_too_few_are_told_of_the_missing() -> None:
    joining = Joining(alive="ac", members="abc", wait_s=0.03, round_timeout_s=0.01)
    with pytest.raises(TooFewPartiesError, match=r"for 2 of the 3 parties; missing: b \(dead\), c \(late\)"):
        joining.join(OLD)
    assert joining.register.read("view/1") == [None]


def test_who_waits_says_for_whom(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "FIRST_S", 0.0)
    joining = Joining(alive="ac")
    joining.write(c=NEW)

    def comes() -> None:
        joining.peers.living.add("b")
        joining.write(b=NEW)

    assert members_of(joining.join(NEW, nothing, nothing, comes)) == ROSTER
    assert caplog.messages == ["[party a] waits for b: 2 of 3 are here, up to 9 s"], "once a minute"


def test_below_a_quorum_a_party_says_for_whom_it_waits(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_quorum, "ROUND_S", 0.0)
    joining = Joining(alive="a", members="abc", wait_s=0.03, round_timeout_s=9)
    with pytest.raises(TooFewPartiesError, match=r"missing: b \(dead\), c \(dead\)"):
        joining.join(OLD)
    assert caplog.messages == ["[party a] waits for b, c: 1 of 3 are here, up to 0.03 s"]


def test_who_begins_where_a_federation_has_ended_learns_where_the_result_is() -> None:
    joining = Joining(alive="a", wait_s=0.03, round_timeout_s=0.01)
    joining.register.claim("ended/", 7)
    with pytest.raises(TooFewPartiesError, match=r"A federation has ended here; if it was this party's, the"):
        joining.join(NEW)


def test_one_that_differs_is_told_and_not_taken() -> None:
    joining = Joining(members="abc")
    joining.write(b=OLD, c=OLD)
    with pytest.raises(MismatchError, match="Parties b and a are configured differently"):
        joining.join(replace(OLD, digest="other"))
    joining.register.claim("view/1", QuorumView.of(1, "new", {"b": OLD, "c": OLD}).to_json())
    joining.register.write("party_spec/@b", {"incarnation": "now", "party_spec": {"shape": 1}})
    with pytest.raises(MismatchError, match="b is not a"):
        joining.join(replace(OLD, digest="other"))


def test_the_others_continue_without_one_that_differs() -> None:
    joining = Joining(members="abc")
    joining.write(b=OLD, c=replace(OLD, digest="other"))
    assert members_of(joining.join(OLD)) == ["a", "b"]


def test_states_of_two_runs_are_not_mixed() -> None:
    joining = Joining(members="abc")
    other = replace(OLD, version=Version("another run", 3, 7))
    joining.write(b=other, c=other)
    with pytest.raises(MismatchError, match="hold the state of different federations"):
        joining.join(OLD)


def test_the_state_of_one_alone_is_not_resumed() -> None:
    joining = Joining(wait_s=0.5)
    joining.write(b=NEW, c=NEW)
    with pytest.raises(FederationError, match="Party a has the state of an unfinished federation"):
        joining.join(replace(OLD, member=False))


def test_a_live_member_that_cannot_be_reached_is_left_out() -> None:
    joining = Joining(members="abc")
    joining.write(b=OLD, c=OLD)
    for by, blamed in (("a", "c"), ("c", "b"), ("b", "c")):
        joining.reachability.note({"by": by, "blamed": [blamed]})
    assert members_of(joining.join(OLD)) == ["a", "b"]


def test_a_term_that_is_over_is_not_joined() -> None:
    joining = Joining(members="abc")
    joining.register.write("term", 2)
    assert joining.join(OLD) is None
    joining.register.write("term", 2 + KEPT_TERMS)
    joining.register.claim("view/1", QuorumView.of(1, "new", {"b": OLD}).to_json())
    assert joining.join(OLD) is None, "what a suspended process reads may be of another term"


def test_an_attempt_counts_from_the_last_view() -> None:
    joining = Joining(members="abc")
    joining.register.write("view/0", {"attempt": 30})
    joining.write(b=OLD, c=OLD)
    view = joining.join(OLD)
    assert view is not None
    assert view.attempt == 31


def test_who_is_late_for_the_end_is_told() -> None:
    joining = Joining(alive="a", members="abc")
    joining.register.claim("ended/run", 5)
    with pytest.raises(FederationError, match="ended after 5 rounds while party a was away, which knows 3"):
        joining.join(OLD)
    with pytest.raises(FederationError, match="the other parties have its result: the adapter and the last"):
        joining.join(OLD)
    complete = replace(OLD, version=Version("run", 5, 9), intent="rest")
    assert members_of(joining.join(complete)) == ["a"]


def test_a_view_that_cannot_be_read_ends_the_waiting() -> None:
    joining = Joining()
    joining.write(b=NEW, c=NEW)
    joining.register.claim("view/1", None)
    with pytest.raises(VoidViewError, match="has written as the view of term 1"):
        joining.join(NEW)


def test_who_was_suspended_before_it_wrote_the_view_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    joining = Joining()
    joining.write(b=NEW, c=NEW)

    def sleep(term: int) -> int:
        joining.register.write("term", term + KEPT_TERMS + 1)
        return 0

    monkeypatch.setattr(joining.protocol, "_last_attempt", sleep)
    assert joining.join(NEW) is None
