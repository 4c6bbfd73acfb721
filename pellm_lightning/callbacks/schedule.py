"""When a round is due. Pure: the callback tells it the clocks, it answers."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
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
class EveryEpochs:
    """A round at the end of every n-th epoch, before that epoch's validation."""

    n: int

    def due(self, since: Clock) -> bool:
        """Whether a round is due now."""
        return since.epoch_ends and (since.epoch + 1) % self.n == 0 and since.steps > 0

    def shared_by(self, fragments: int) -> "EveryEpochs":
        """Return the schedule itself: epochs are not divided."""
        return self


@dataclass(frozen=True)
class EverySteps:
    """A round whenever n optimizer steps were made since the last one."""

    n: int

    def due(self, since: Clock) -> bool:
        """Whether a round is due now; several optimizers may move the count by more than 1."""
        return since.steps >= self.n

    def shared_by(self, fragments: int) -> "EverySteps":
        """Return the schedule by which each of so many fragments has its round once in n steps."""
        return EverySteps(self.n // fragments)


@dataclass(frozen=True)
class EverySeconds:
    """A round after the batch in which n seconds are over, at about the same time at all parties."""

    n: float

    def due(self, since: Clock) -> bool:
        """Whether a round is due now."""
        return since.seconds >= self.n and since.steps > 0

    def shared_by(self, fragments: int) -> "EverySeconds":
        """Return the schedule by which each of so many fragments has its round once in n seconds."""
        return EverySeconds(self.n / fragments)


Schedule = EveryEpochs | EverySteps | EverySeconds
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
        return EverySeconds(every_n_seconds)
    for name, n in given.items():
        if n < 1:
            raise ValueError(f"{name}={n} must be at least 1. Use {name}=1 for the shortest round.")
    if every_n_steps is not None:
        return EverySteps(every_n_steps)
    return EveryEpochs(1 if every_n_epochs is None else every_n_epochs)
