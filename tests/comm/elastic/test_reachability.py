"""Who is left out when parties that live cannot reach each other."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.comm.elastic.reachability import ReachabilityTracker

ROSTER = ["a", "b", "c", "d"]


def after(*failures: tuple[str, str]) -> ReachabilityTracker:
    reachability = ReachabilityTracker(ROSTER)
    for by, blamed in failures:
        reachability.note({"abort": "", "by": by, "blamed": list(blamed)})
    return reachability


@pytest.mark.parametrize(
    ("failures", "reachable_group"),
    [
        ([], "abcd"),
        ([("d", "abc")] * 2, "abcd"),
        # Who is cut off and always speaks first accuses all; who is silent is accused by all.
        ([("d", "abc")] * 3, "abc"),
        ([("a", "bcd")] * 3, "bcd"),
        ([("a", "d"), ("b", "d"), ("c", "d")], "abc"),
        ([("d", "abc"), ("a", "d"), ("d", "abc"), ("b", "d")], "abc"),
        # Between two either may stay away: all must choose the same.
        ([("a", "c"), ("c", "a"), ("a", "c")], "abd"),
        ([("a", "b")] * 3 + [("c", "d")] * 3, "ac"),
    ],
)
def test_who_is_at_the_end_of_most_failures_is_left_out(
    failures: list[tuple[str, str]], reachable_group: str
) -> None:
    assert "".join(after(*failures).reachable_group(ROSTER)) == reachable_group


def test_only_what_is_between_those_who_are_there_counts() -> None:
    assert after(*[("a", "c")] * 3).reachable_group(["a", "b", "d"]) == ["a", "b", "d"]


def test_a_round_without_a_party_leaves_it_one_try() -> None:
    reachability = after(*[("d", "abc")] * 3)
    reachability.connected("abc")
    assert reachability.reachable_group(ROSTER) == ROSTER
    reachability.note({"by": "b", "blamed": ["d"]})
    assert reachability.reachable_group(ROSTER) == ["a", "b", "c"]
    reachability.connected("abcd")
    reachability.note({"by": "b", "blamed": ["d"]})
    assert reachability.reachable_group(ROSTER) == ROSTER


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=5,
)


@given(anything | st.fixed_dictionaries({"by": anything, "blamed": anything}))
def test_what_a_peer_writes_breaks_nothing(decision: Any) -> None:
    reachability = ReachabilityTracker(ROSTER)
    for _ in range(3):
        reachability.note(decision)
    assert reachability.reachable_group(ROSTER) == ROSTER


names = st.sampled_from(ROSTER)


@given(st.lists(st.tuples(names, st.lists(names, max_size=4)), max_size=30), st.sets(names))
def test_those_who_are_left_have_no_rift(failures: list[tuple[str, list[str]]], there: set[str]) -> None:
    reachability = ReachabilityTracker(ROSTER)
    for by, blamed in failures:
        reachability.note({"by": by, "blamed": blamed})
    kept = reachability.reachable_group(there)
    assert set(kept) <= there
    assert reachability.reachable_group(kept) == kept
    assert len(kept) >= min(1, len(there))  # alone nobody fails


def test_who_stays_apart_is_tried_less_and_less_often() -> None:
    reachability = ReachabilityTracker("abcd")
    for _ in range(3):
        reachability.note({"blamed": ["d"], "by": "a"})
    tried = []
    for round in range(16):
        if "d" in reachability.reachable_group("abcd"):
            tried.append(round)
            reachability.note({"blamed": ["d"], "by": "a"})
        assert reachability.reachable_group("abcd") == ["a", "b", "c"]
        reachability.connected("abc")
    # After one round without it, then two, four and eight.
    assert tried == [1, 3, 7, 15]
    reachability.connected("abcd")
    assert reachability.reachable_group("abcd") == ["a", "b", "c", "d"]


def test_short_rounds_do_not_make_one_that_holds_up_the_others_cost_most_of_the_time() -> None:
    """Each try costs a timeout: what lies between two tries grows with it, up to eight times as long."""
    now = [0.0]
    reachability = ReachabilityTracker("abcd", lambda: now[0])
    lost_s, gaps, last = 0.0, [], 0.0
    while now[0] < 2000:
        reachability.begin()
        if "d" in reachability.reachable_group("abcd"):
            gaps.append(now[0] - last)
            now[0] += 10
            lost_s, last = lost_s + 10, now[0]
            reachability.note({"blamed": ["d"], "by": "a"})
            reachability.leave_out({"d"})
        else:
            now[0] += 0.1
            reachability.connected("abc")
    assert gaps[1:5] == pytest.approx([10, 20, 40, 80], abs=0.3)
    assert max(gaps) < 80.3
    assert lost_s < 2000 / 7
    reachability.connected("abcd")
    assert reachability.reachable_group("abcd") == ["a", "b", "c", "d"]
