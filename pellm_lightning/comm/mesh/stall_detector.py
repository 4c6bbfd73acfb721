"""Stall detector: which members make no progress, and who is blamed."""

import time
from collections.abc import Iterable, Mapping
from selectors import EVENT_READ

from pellm_lightning.comm.mesh.frames import Kind, Link

MIN_BYTES_PER_S = 4096
"""Fewer bytes per second over a connection are no progress; 24 parties behind 1 Mbit/s have more."""

# A member that waits for a sum waits a little longer: one that waits for the culprit itself fails first.
_INDIRECT_S = 0.5
# Time that passes at once beyond this, this process itself was suspended or busy: nobody else is late.
_MAX_STEP_S = 0.5


class StallDetector:
    """Time that each peer has left, which bytes buy back: ``MIN_BYTES_PER_S`` of them a second.

    A single byte now and then is no progress, else one member could hold up a round for hours.

    Args:
        timeout_s: Seconds that a member may be late, or slower than that.
        links: The connections to watch.
    """

    def __init__(self, timeout_s: float, links: Iterable[Link]) -> None:
        self._timeout_s = timeout_s
        self._left_s = dict.fromkeys(links, timeout_s)
        self._left_together_s = timeout_s + _INDIRECT_S
        self._owing: list[Link] = []
        self._seen = time.monotonic()

    def moved(self, moved_bytes: Mapping[Link, int]) -> None:
        """Note how many bytes have moved on some links."""
        for link, count in moved_bytes.items():
            self._left_s[link] = min(self._left_s[link] + count / MIN_BYTES_PER_S, self._timeout_s)
        more_s = sum(moved_bytes.values()) / MIN_BYTES_PER_S
        self._left_together_s = min(self._left_together_s + more_s, self._timeout_s + _INDIRECT_S)

    def stalled(self, undone: Iterable[Link], now: float) -> list[int]:
        """Return the ranks that have stalled, if any; none as long as it is not clear which is at fault.

        A sum may be missing because of a third member, and a member that does not read may be waiting for a
        third. So they are blamed only when nobody is left that owes a part of its own. Time counts against
        those who owed one since the last call.
        """
        undone = list(undone)
        passed_s, self._seen = min(now - self._seen, _MAX_STEP_S), now
        for link in self._owing:
            self._left_s[link] -= passed_s
        if not self._owing:
            self._left_together_s -= passed_s
        self._owing = [
            link for link in undone if link.events & EVENT_READ and link.inbox[0].label.kind != Kind.SUM
        ]
        if self._owing:
            return [link.rank for link in self._owing if self._left_s[link] < 0]
        return [link.rank for link in undone] if self._left_together_s < 0 else []

    def missing(self, undone: Iterable[Link]) -> dict[str, list[int]]:
        """Return the ranks whose parts have long been missing; if none owes one, those whose sums have been.

        It is what this member can say for itself, whoever has noticed the failure first. Who waits for a sum
        says so later: by then whoever owes the sum can say which part it misses.
        """
        if self._owing:
            late = [link.rank for link in self._owing if self._left_s[link] < self._timeout_s / 2]
            return {"missing_parts": late}
        is_long = self._left_together_s < self._timeout_s / 4
        return {"missing_sums": [link.rank for link in undone if is_long]}
