"""Checks of arguments, with errors that say what to do."""

import logging
from collections.abc import Sequence

from pellm_lightning.aggregation import Aggregation, Krum
from pellm_lightning.aggregation.robust import RobustRule
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.quorum import Quorum
from pellm_lightning.engine.outer_optimizer import (
    OptimizerFactory,
    SchedulerFactory,
    describe_schedule,
    make_prototype,
)

log = logging.getLogger(__name__)


def privacy(mechanism: object, weighting: object) -> None:
    """Check the argument of that name."""
    if mechanism is not None and weighting != "uniform":
        raise ValueError(
            f"weighting={weighting!r} does not go with differential privacy: a weight would be a factor of"
            " what one party can change. Set weighting='uniform'."
        )


def warn_of_uncapped(rule: Aggregation | None, by: object, max_share: float | None) -> None:
    """Warn that a robust rule respects weights, which are only what parties say."""
    if isinstance(rule, RobustRule) and not isinstance(rule, Krum) and by != "uniform" and max_share is None:
        log.warning(
            "%r respects weights, and a party may claim any: whoever claims most of the weight decides. Cap"
            " shares by weighting=Weighting(max_share=0.4), or use weighting='uniform'.",
            rule,
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


def at_least(least: int, **values: int | None) -> None:
    """Check arguments that are numbers of something, or None."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


def seconds(name: str, value: float) -> None:
    """Check an argument that is a time span."""
    if not value > 0:
        raise ValueError(f"{name}={value} must be positive, in seconds.")


def separate_jobs(given: SeparateJobs | None, timeout_s: float, quorum: Quorum) -> SeparateJobs | None:
    """Return how this party joins separate jobs, by default as the environment says; None in one launch.

    Raises:
        ValueError: If an argument is out of its range, or the quorum does not go with the roster.
    """
    seconds("timeout_s", timeout_s)
    instance_of("jobs", given, SeparateJobs)
    jobs = SeparateJobs.from_env() if given is None else given
    if jobs is not None:
        jobs.membership.quorum(quorum, jobs.roster)
    return jobs
