"""Stall detector: which members make no progress, and who is blamed."""

import time
from collections.abc import Iterable
from selectors import EVENT_READ

from pellm_lightning.comm.mesh.frames import Kind, Link

# A member that waits for a sum waits a little longer: one that waits for the culprit itself fails first.
_INDIRECT_S = 0.5


class StallDetector:
    """Time since each peer's last progress.

    Args:
        timeout_s: Seconds that a member may be late.
        links: The connections to watch.
    """

    def __init__(self, timeout_s: float, links: Iterable[Link]) -> None:
        self._timeout_s = timeout_s
        self._last = time.monotonic()
        self._moved = dict.fromkeys(links, self._last)

    def moved(self, links: Iterable[Link]) -> None:
        """Note progress on some links."""
        for link in links:
            self._last = self._moved[link] = time.monotonic()

    def stalled(self, undone: Iterable[Link], now: float) -> list[int]:
        """Return the ranks that have stalled, if any; none as long as it is not clear which is at fault.

        A sum may be missing because of a third member, and a member that does not read may be waiting for a
        third. So they are blamed only when nobody is left that owes a part of its own.
        """
        owing = [link for link in undone if link.events & EVENT_READ and link.inbox[0].label.kind != Kind.SUM]
        if owing:
            return [link.rank for link in owing if now - self._moved[link] > self._timeout_s]
        if now - self._last > self._timeout_s + _INDIRECT_S:
            return [link.rank for link in undone]
        return []
