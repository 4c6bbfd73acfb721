"""Polling: a client that waits inside a store notices nothing else."""

import time
from collections.abc import Iterator


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
