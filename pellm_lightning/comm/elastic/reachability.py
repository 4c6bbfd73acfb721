"""Who cannot reach whom, although all live: whom to leave out, so that the others can go on. Pure."""

from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import Any

# Failed attempts that a party is involved in before it may be left out.
_ATTEMPTS = 3
_KEPT = 16
# Rounds for which one is left out at most before it is tried again.
_MAX_WAIT = 32


class ReachabilityTracker:
    """Attempts that failed between parties that live.

    Whom a party accuses is its own word: one that is cut off accuses all the others, and may be the first to
    speak each time. So both ends of a failure count alike, and who is at the end of most is left out.

    Args:
        roster: All parties.
    """

    def __init__(self, roster: Sequence[str]) -> None:
        self._roster = list(roster)
        self._failures: deque[tuple[str, frozenset[str]]] = deque(maxlen=_KEPT)
        self._rounds_apart = 0
        self._rounds_to_wait = 1

    def note(self, decision: Any) -> None:
        """Remember who accused whom, by the decision on an attempt; a peer wrote it, it may be anything."""
        if not isinstance(decision, dict) or not isinstance(decision.get("blamed"), list):
            return
        by, blamed = decision.get("by"), decision["blamed"]
        accused = frozenset(name for name in self._roster if name in blamed and name != by)
        if by in self._roster and accused:
            self._failures.append((by, accused))

    def reachable_group(self, names: Collection[str]) -> list[str]:
        """Return those of ``names`` that may well go on together; the same at all that know the same."""
        kept = list(names)
        while kept:
            within = [(by, accused.intersection(kept)) for by, accused in self._failures if by in kept]
            involved, ends = Counter[str](), Counter[str]()
            for by, accused in within:
                if accused:
                    involved.update({by, *accused})
                    ends.update([by] * len(accused))
                    ends.update(accused)
            if max(involved.values(), default=0) < _ATTEMPTS:
                break
            kept.remove(max(kept, key=lambda name: (ends[name], self._roster.index(name))))
        return kept

    def connected(self, members: Collection[str]) -> None:
        """Forget what was between parties that have completed a round.

        Who was left out gets one more try, not three: in the next round, then after 2, 4 and so on, since
        each costs the others an attempt.
        """
        open_ = [failure for failure in self._failures if not {failure[0], *failure[1]} <= set(members)]
        self._rounds_apart += 1
        if not open_:
            self._rounds_apart, self._rounds_to_wait = 0, 1
        elif self._rounds_apart >= self._rounds_to_wait:
            self._rounds_apart, self._rounds_to_wait = 0, min(2 * self._rounds_to_wait, _MAX_WAIT)
            open_ = open_[1 - _ATTEMPTS :]
        self._failures = deque(open_, maxlen=_KEPT)
