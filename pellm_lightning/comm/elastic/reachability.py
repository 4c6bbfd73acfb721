"""Connections that fail between live parties: whom to leave out, so that the others can continue. Pure."""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

log = logging.getLogger(__name__)

# Failed attempts that a party is involved in before it may be left out.
_ATTEMPTS = 3
_KEPT = 16
# Rounds for which one is left out at most before it is tried again.
_MAX_WAIT = 32
# Times what a failed attempt has cost for which one is left out at most, however short the rounds are.
_MAX_WAIT_COSTS = 8


class ReachabilityTracker:
    """Records failed attempts between live parties, and leaves out those at the end of most failures.

    A party that is cut off blames all the others, and may be the first to report each time. So both ends of a
    failure count alike. One that does not vote in time, or sends what cannot be, is left out at once: all
    have waited for it alone, or have seen it.

    Args:
        roster: All parties.
        clock: Tells the time in seconds.

    Example:
        >>> tracker = ReachabilityTracker(["a", "b", "c"])
        >>> for blamed in ("a", "b", "a"):
        ...     tracker.note({"by": "c", "blamed": [blamed]})
        >>> tracker.reachable_group(["a", "b", "c"])
        ['a', 'b']
    """

    def __init__(self, roster: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._roster = list(roster)
        self._clock = clock
        self._began = math.inf
        self._failed_at = self._cost_s = 0.0
        self._failures: deque[tuple[str, frozenset[str]]] = deque(maxlen=_KEPT)
        self._late: frozenset[str] = frozenset()
        self._unawaited: set[str] = set()
        self.excluded: dict[str, str] = {}
        """Parties that are excluded for the rest of the run, and why."""
        self._rounds_apart = 0
        self._rounds_to_wait = 1

    def begin(self) -> None:
        """Note that an attempt begins."""
        self._began = self._clock()

    def note(self, decision: Any) -> None:
        """Record who blamed whom, by the decision on an attempt; a peer wrote it, it may be anything."""
        if not isinstance(decision, dict) or not isinstance(decision.get("blamed"), list):
            return
        by, reported = decision.get("by"), decision["blamed"]
        blamed = frozenset(name for name in self._roster if name in reported and name != by)
        if blamed:
            self._failed_at = self._clock()
            self._cost_s = max(self._cost_s, self._failed_at - self._began)
        if decision.get("late") is True:
            self.leave_out(blamed)
        elif by in self._roster and blamed:
            self._failures.append((by, blamed))

    def leave_out(self, names: Collection[str]) -> None:
        """Leave parties out at once, and wait for none of them; they are tried again as time goes by."""
        self._late = self._late.union(names)
        self._unawaited |= {*names}

    def exclude(self, name: str, why: str) -> None:
        """Exclude a party for the rest of the run; said once."""
        if name not in self.excluded:
            self.excluded[name] = why
            log.error("party %s is excluded for the rest of this run: %s", name, why)

    def is_awaited(self, name: str) -> bool:
        """Tell whether a party that has not joined yet is waited for: not after a vote that it withheld."""
        return name not in self._unawaited and name not in self.excluded

    def reachable_group(self, names: Collection[str]) -> list[str]:
        """Return those of ``names`` that may well continue together; the same at all that know the same."""
        kept = [name for name in names if name not in self._late]
        while kept:
            within = [(by, blamed.intersection(kept)) for by, blamed in self._failures if by in kept]
            involved, ends = Counter[str](), Counter[str]()
            for by, blamed in within:
                if blamed:
                    involved.update({by, *blamed})
                    ends.update([by] * len(blamed))
                    ends.update(blamed)
            if max(involved.values(), default=0) < _ATTEMPTS:
                break
            kept.remove(max(kept, key=lambda name: (ends[name], self._roster.index(name))))
        return kept

    def connected(self, members: Collection[str]) -> None:
        """Drop the failures between parties that have completed a round.

        A party that was left out gets one more try, not three: in the next round, then after 2, 4 and so on,
        since each try costs the others an attempt; and not before as many times that cost have gone by.
        """
        self._unawaited.difference_update(members)
        self._late = self._late.difference(members)
        open_ = [failure for failure in self._failures if not {failure[0], *failure[1]} <= set(members)]
        self._rounds_apart += 1
        if not open_ and not self._late:
            self._rounds_apart, self._rounds_to_wait, self._cost_s = 0, 1, 0.0
        elif self._rounds_apart >= self._rounds_to_wait and self._clock() >= self._next_try():
            self._rounds_apart, self._rounds_to_wait = 0, min(2 * self._rounds_to_wait, _MAX_WAIT)
            open_, self._late = open_[1 - _ATTEMPTS :], frozenset()
        self._failures = deque(open_, maxlen=_KEPT)

    def _next_try(self) -> float:
        return self._failed_at + min(self._rounds_to_wait, _MAX_WAIT_COSTS) * self._cost_s
