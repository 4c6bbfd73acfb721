"""When a round is due. Pure: the callback tells it the clock, it answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EveryEpochs:
    """A round at the end of every n-th epoch, before that epoch's validation."""

    n: int

    def due(self, *, steps_since_round: int, epoch: int, epoch_ends: bool) -> bool:
        """Whether a round is due now, after a batch; ``epoch`` is 0-based."""
        return epoch_ends and (epoch + 1) % self.n == 0 and steps_since_round > 0


@dataclass(frozen=True)
class EverySteps:
    """A round whenever n optimizer steps were made since the last one."""

    n: int

    def due(self, *, steps_since_round: int, epoch: int, epoch_ends: bool) -> bool:
        """Whether a round is due now, after a batch; several optimizers may move the count by more than 1."""
        return steps_since_round >= self.n


Schedule = EveryEpochs | EverySteps


def schedule(every_n_epochs: int | None, every_n_steps: int | None) -> Schedule:
    """Return the schedule the two arguments ask for; neither given means every epoch.

    Raises:
        ValueError: If both are given or one is below 1.
    """
    if every_n_epochs is not None and every_n_steps is not None:
        raise ValueError(
            f"every_n_epochs={every_n_epochs} and every_n_steps={every_n_steps} are both given; a round has"
            " one schedule. Keep one of them."
        )
    for name, n in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
        if n is not None and n < 1:
            raise ValueError(f"{name}={n} must be at least 1. Use {name}=1 for the shortest round.")
    if every_n_steps is not None:
        return EverySteps(every_n_steps)
    return EveryEpochs(1 if every_n_epochs is None else every_n_epochs)
