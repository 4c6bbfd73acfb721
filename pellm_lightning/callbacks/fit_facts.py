"""What a fit can know of itself before it trains, and what follows for the parties together."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lightning.pytorch import Trainer

from pellm_lightning.aggregation.influence import capped
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop.schedule import Schedule
from pellm_lightning.loop.weighting import Measure
from pellm_lightning.trainer.isolation import callbacks_of
from pellm_lightning.trainer.samples import samples_from

_PREFIX = "federated/"
# What each round gives, and no validation.
_OF_ROUNDS = {part.name for part in fields(RoundReport)} | {"worst_deviation"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitFacts:
    """What a party says of its fit at the start, for warnings; nothing of it must be equal.

    Args:
        steps_per_epoch: Optimizer steps of an epoch; None if unknown, or not to be shown.
        steps: Optimizer steps of the whole fit; None as above.
        weight: Weight that the party will have in a round; None as above.
        validates: Whether the fit validates at all.
        metrics: Names of what its validation logs, as the sanity check has shown; None if that is unknown.
        monitors: Class name and metric of what monitors a federated metric of its validation.
    """

    steps_per_epoch: int | None = None
    steps: int | None = None
    weight: float | None = None
    validates: bool = True
    metrics: list[str] | None = None
    monitors: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(
        cls, trainer: Trainer, metrics: Sequence[str] | None, weight: float, *, shares_steps: bool
    ) -> "FitFacts":
        """Return the facts of a fit that is about to train.

        Args:
            trainer: What the fit is run by.
            metrics: What the sanity check has logged; None if there was none.
            weight: As from ``expected_weight``.
            shares_steps: Whether the others may know how many steps there are, which tells how many samples.
        """
        per_epoch, steps = steps_per_epoch(trainer), planned_steps(trainer)
        return cls(
            steps_per_epoch=int(per_epoch) if shares_steps and math.isfinite(per_epoch) else None,
            steps=int(steps) if shares_steps and math.isfinite(steps) else None,
            weight=weight if shares_steps and math.isfinite(weight) else None,
            validates=trainer.enable_validation and sum(trainer.num_val_batches) > 0,
            metrics=None if metrics is None else list(metrics),
            monitors=[list(pair) for pair in _monitors(trainer)],
        )

    @classmethod
    def from_json(cls, value: Any) -> "FitFacts":
        """Return what another party said; of what cannot be read, nothing."""
        if not isinstance(value, Mapping) or set(value) != {part.name for part in fields(cls)}:
            return cls()
        numbers = [value["steps_per_epoch"], value["steps"]]
        metrics, monitors = value["metrics"], value["monitors"]
        readable = (
            all(number is None or (type(number) is int and number >= 0) for number in numbers)
            and (value["weight"] is None or (_is_number(value["weight"]) and value["weight"] >= 0))
            and isinstance(value["validates"], bool)
            and (metrics is None or (isinstance(metrics, list) and _are_texts(metrics)))
            and isinstance(monitors, list)
            and all(isinstance(pair, list) and len(pair) == 2 and _are_texts(pair) for pair in monitors)
        )
        return cls(**value) if readable else cls()


def steps_per_epoch(trainer: Trainer) -> float:
    """Return the optimizer steps of an epoch; NaN if nobody knows, as with a loader without a length."""
    batches = trainer.num_training_batches
    if not math.isfinite(batches) or not trainer.lightning_module.automatic_optimization:
        return math.nan
    return float(math.ceil(batches / trainer.accumulate_grad_batches))


def planned_steps(trainer: Trainer) -> float:
    """Return the optimizer steps after which a fit is through, if nothing stops it before; NaN if unknown."""
    max_steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    max_epochs = trainer.max_epochs
    if max_epochs is None or max_epochs < 0:
        planned = max_steps
    else:
        by_epochs = max_epochs * steps_per_epoch(trainer)
        planned = max_steps if math.isnan(by_epochs) else min(max_steps, by_epochs)
    return planned if math.isfinite(planned) else math.nan


def expected_weight(trainer: Trainer, by: Measure, schedule: Schedule, processes: int) -> float:
    """Return a party's weight in a round, before the first; NaN if nobody knows.

    Args:
        trainer: What the fit is run by.
        by: What the parties count by.
        schedule: When a round is due.
        processes: Processes of the party.
    """
    if by != "samples":
        return 1.0 if isinstance(by, str) else float(by)
    batches, per_epoch = trainer.num_training_batches, steps_per_epoch(trainer)
    first = samples_from(trainer.train_dataloader, 0)
    if not (math.isfinite(per_epoch) and per_epoch) or first is None or schedule.unit == "seconds":
        return math.nan
    last = samples_from(trainer.train_dataloader, int(batches) - 1) or first
    samples = processes * (first * (batches - 1) + last)
    return samples * schedule.n / (per_epoch if schedule.unit == "steps" else 1)


def expected_shares(facts: Mapping[str, Any], max_share: float | None) -> dict[str, float]:
    """Return each party's share of the weights, by its name; empty if one is unknown.

    Args:
        facts: As in ``warn_of_unequal_fits``.
        max_share: Cap on the shares; None for none.
    """
    weights = [FitFacts.from_json(fit).weight for fit in facts.values()]
    known = [weight for weight in weights if weight is not None]
    if len(known) < len(weights) or not sum(known):
        return {}
    known = known if max_share is None else capped(known, max_share)
    return {name: weight / sum(known) for name, weight in zip(facts, known, strict=True)}


def warn_of_unequal_fits(
    party: str, facts: Mapping[str, Any], every_n_steps: int | None, quorum: int
) -> None:
    """Log what the parties' fits will run into together, for whoever can still change them.

    Args:
        party: Name of this party.
        facts: Facts of each party's fit, by its name; ``asdict`` of ``FitFacts``.
        every_n_steps: The schedule of rounds, None if rounds do not go by steps.
        quorum: Parties that a round needs.
    """
    read = {name: FitFacts.from_json(fit) for name, fit in facts.items()}
    unequal = () if every_n_steps is None else _unequal_steps(read, every_n_steps, quorum)
    for warning in (*unequal, *_missing_metrics(read)):
        log.warning("[party %s] %s", party, warning)


def _unequal_steps(facts: Mapping[str, FitFacts], every_n_steps: int, quorum: int) -> Iterator[str]:
    per_epoch = {name: fit.steps_per_epoch for name, fit in facts.items() if fit.steps_per_epoch}
    steps = {name: fit.steps for name, fit in facts.items() if fit.steps}
    if len(set(steps.values())) > 1:
        rounds = {name: math.ceil(of_party / every_n_steps) for name, of_party in steps.items()}
        enough = sorted(rounds.values(), reverse=True)[quorum - 1 :]
        end = (
            f" Once fewer than quorum={quorum} still train, the federation ends, and what the others would"
            " have trained after that is not used."
            if enough and enough[0] < max(rounds.values())
            else ""
        )
        yield (
            f"The parties will not train equally long: optimizer steps {_by_party(steps)}, which with"
            f" every_n_steps={every_n_steps} are rounds {_by_party(rounds)}.{end} Give all the"
            " same max_steps, or rounds by every_n_epochs."
        )
    elif len(set(per_epoch.values())) > 1 and any(fit.validates for fit in facts.values()):
        yield (
            f"The parties' epochs differ in length: optimizer steps per epoch {_by_party(per_epoch)}. With"
            f" every_n_steps={every_n_steps} they validate after different rounds, so each federated/ metric"
            " is of those only that validate at that moment. Set val_check_interval to the same number of"
            " batches and check_val_every_n_epoch=None at all, or rounds by every_n_epochs."
        )


def _missing_metrics(facts: Mapping[str, FitFacts]) -> Iterator[str]:
    wanted: dict[str, list[str]] = {}
    for name, fit in facts.items():
        for who, metric in fit.monitors:
            wanted.setdefault(metric, []).append(f"{who} of party {name}")
    for metric, by in sorted(wanted.items()):
        bare = metric.removeprefix(_PREFIX)
        without = [name for name, fit in facts.items() if not fit.validates]
        unlogged = [
            name
            for name, fit in facts.items()
            if fit.validates and fit.metrics is not None and bare not in fit.metrics
        ]
        for parties, why, cure in (
            (without, "runs no validation", "Give it validation data"),
            (unlogged, "logs no such metric in its validation", f"Log {bare!r} in its validation_step"),
        ):
            if parties:
                yield (
                    f"{metric!r} is monitored by {', '.join(by)}, but party {', '.join(parties)} {why}: it"
                    f" will not have this metric, and not stop or save by it as the others do. {cure}, or"
                    " monitor what all have, such as 'federated/loss'."
                )


def _monitors(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yield who monitors which federated metric that only a validation gives."""
    named: list[tuple[object, object]] = [
        (callback, getattr(callback, "monitor", None)) for callback in callbacks_of(trainer)
    ]
    named += [(config.scheduler, config.monitor) for config in trainer.lr_scheduler_configs]
    for by, metric in named:
        if not isinstance(metric, str) or not metric.startswith(_PREFIX):
            continue
        if metric.removeprefix(_PREFIX) not in _OF_ROUNDS:
            yield type(by).__name__, metric


def _by_party(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value} (party {name})" for name, value in values.items())


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
