"""Checks of arguments, with errors that say what to do."""

from collections.abc import Sequence

from pellm_lightning.engine.metrics import MAX_WEIGHT
from pellm_lightning.engine.outer_optimizer import (
    OptimizerFactory,
    SchedulerFactory,
    describe_schedule,
    make_prototype,
)


def weighting(value: object) -> None:
    """Check the argument of that name."""
    if isinstance(value, str):
        one_of("weighting", value, ("samples", "uniform"))
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_WEIGHT:
        raise ValueError(
            f"weighting={value!r} must be 'samples', 'uniform' or a number of 0 to {MAX_WEIGHT:g} (2^53)."
        )


def privacy(mechanism: object, weighting: object) -> None:
    """Check the argument of that name."""
    if mechanism is not None and weighting != "uniform":
        raise ValueError(
            f"weighting={weighting!r} does not go with differential privacy: a weight would be a factor of"
            " what one party can change. Set weighting='uniform'."
        )


def outer(optimizer: OptimizerFactory, scheduler: SchedulerFactory | None) -> None:
    """Check the outer optimizer and its schedule."""
    make_prototype(optimizer)
    describe_schedule(optimizer, scheduler)


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Check an argument that has few choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def instance_of(name: str, value: object, kind: type) -> None:
    """Check an argument that is an object of a class, or None."""
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name}={value!r:.200} must be of the class {kind.__name__}, or left out.")


def seconds(name: str, value: float) -> None:
    """Check an argument that is a time span."""
    if not value > 0:
        raise ValueError(f"{name}={value} must be positive, in seconds.")
