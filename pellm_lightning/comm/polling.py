"""Polling: a client that waits inside a store notices nothing else, and says nothing."""

import time
from collections.abc import Iterator

FIRST_S, EVERY_S, ROUND_S = 5.0, 60.0, 60.0
"""Seconds after which a party says for whom it waits, then again; and first within a round, where parties
are late as a rule, since each makes its own local steps."""


class Reminder:
    """Clock of a party that waits: due after ``first_s``, by default five seconds, and then each minute.

    Example:
        >>> reminder = Reminder(first_s=0)
        >>> reminder.due(), reminder.due()
        (True, False)
    """

    def __init__(self, first_s: float | None = None) -> None:
        self._next = time.monotonic() + (FIRST_S if first_s is None else first_s)

    def hasten(self) -> None:
        """Be due after ``FIRST_S`` at the latest: what is waited for now is not there as a rule."""
        self._next = min(self._next, time.monotonic() + FIRST_S)

    def due(self) -> bool:
        """Whether it is time to say again for whom this party waits."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + EVERY_S
        return True


def polls(seconds: float = float("inf")) -> Iterator[None]:
    """Yield at once and then after ever longer pauses, of 50 ms at most, until the time is over.

    Example:
        >>> [1 for _ in polls(0)]
        [1]
    """
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while True:
        yield
        if time.monotonic() >= deadline:
            return
        time.sleep(min(pause, max(deadline - time.monotonic(), 0.0)))
        pause = min(2 * pause, 0.05)
