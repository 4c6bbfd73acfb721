"""How long the others are waited for, and who is blamed then."""

import time
from collections.abc import Iterable
from selectors import EVENT_READ

from pellm_lightning.comm.mesh.frames import Kind, Link

# Whoever waits for a sum waits a little longer, so that whoever waits for the culprit itself speaks first.
_SECOND_HAND_S = 0.5


class StallDetector:
    """How long each peer has not moved.

    Args:
        timeout_s: Seconds that a member may be late.
        links: The connections that are waited for.
    """

    def __init__(self, timeout_s: float, links: Iterable[Link]) -> None:
        self._timeout_s = timeout_s
        self._last = time.monotonic()
        self._moved = dict.fromkeys(links, self._last)

    def moved(self, links: Iterable[Link]) -> None:
        """Note that something went through."""
        for link in links:
            self._last = self._moved[link] = time.monotonic()

    def over(self, undone: Iterable[Link], now: float) -> list[int]:
        """Return the ranks that are late, if any; as long as it is not clear whose fault it is, none.

        A sum may not come because of a third member, and whoever does not read may be waiting for a third.
        So they are blamed only when nobody is left who owes something of its own.
        """
        owing = [link for link in undone if link.events & EVENT_READ and link.inbox[0].label.kind != Kind.SUM]
        if owing:
            return [link.rank for link in owing if now - self._moved[link] > self._timeout_s]
        if now - self._last > self._timeout_s + _SECOND_HAND_S:
            return [link.rank for link in undone]
        return []
