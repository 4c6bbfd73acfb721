"""When a round is due. Pure: the callback tells it the clocks, it answers."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Clock(NamedTuple):
    """What a party has done since the last round, at the end of a batch."""

    steps: int
    """Optimizer steps."""
    seconds: float
    """Seconds since the last exchange was through."""
    epoch: int
    """The epoch under way, 0-based."""
    epoch_ends: bool
    """Whether the batch was its last."""


@dataclass(frozen=True)
class Schedule:
    """Schedule of rounds: one after every ``n`` epochs, optimizer steps or seconds.

    That of epochs comes before the validation, that of seconds after the batch in which they are over.

    Example:
        >>> Schedule("steps", 100).shared_by(fragments=4)
        Schedule(unit='steps', n=25.0)
    """

    unit: Literal["epochs", "steps", "seconds"]
    n: float

    def due(self, since: Clock) -> bool:
        """Whether a round is due now."""
        if self.unit == "steps":  # several optimizers may move the count by more than 1
            return since.steps >= self.n
        if self.unit == "seconds":
            return since.seconds >= self.n and since.steps > 0
        return since.epoch_ends and (since.epoch + 1) % self.n == 0 and since.steps > 0

    def shared_by(self, fragments: int) -> "Schedule":
        """Return the schedule by which each fragment has a round once in n."""
        return Schedule(self.unit, self.n / fragments)


ARGUMENTS = ("every_n_epochs", "every_n_steps", "every_n_seconds")
"""Names of the arguments of ``schedule``."""


def schedule(
    every_n_epochs: int | None, every_n_steps: int | None, every_n_seconds: float | None = None
) -> Schedule:
    """Return the schedule that the arguments ask for; none given means every epoch.

    Raises:
        ValueError: If two are given, or one is below its least.
    """
    asked = dict(zip(ARGUMENTS, (every_n_epochs, every_n_steps, every_n_seconds), strict=True))
    given = {name: n for name, n in asked.items() if n is not None}
    if len(given) > 1:
        words = " and ".join(f"{name}={n}" for name, n in given.items())
        raise ValueError(f"{words} are both given; a round has one schedule. Keep one of them.")
    if every_n_seconds is not None:
        if not (math.isfinite(every_n_seconds) and every_n_seconds > 0):
            raise ValueError(f"every_n_seconds={every_n_seconds} must be a number of seconds above 0.")
        return Schedule("seconds", every_n_seconds)
    for name, n in given.items():
        if n < 1:
            raise ValueError(f"{name}={n} must be at least 1. Use {name}=1 for the shortest round.")
    if every_n_steps is not None:
        return Schedule("steps", every_n_steps)
    return Schedule("epochs", 1 if every_n_epochs is None else every_n_epochs)
