"""Outer optimizers and learning-rate schedules: which are refused, how they are compared and stepped."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pellm_lightning.aggregation import Aggregation
from pellm_lightning.comm import FederationError
from pellm_lightning.engine.optim import OptimizerConfig

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], object]

# Why an optimizer cannot step a flat vector, by the name of its class.
_UNSUPPORTED = {
    "Adafactor": "scales a step by the root mean square of all values of a parameter",
    "LAMB": "scales a step by the norms of whole layers",
    "LARS": "scales a step by the norms of whole layers",
    "LBFGS": "needs a closure that computes the loss",
    "Lamb": "scales a step by the norms of whole layers",
    "Muon": "orthogonalises matrices",
    "SOAP": "preconditions matrices",
    "Shampoo": "preconditions matrices",
    "SparseAdam": "does not take dense gradients",
}
# Rounds at which functions of a schedule are compared between the parties.
_COMPARED_ROUNDS = (0, 1, 2, 3, 10, 100, 1000)
# Public attributes of a scheduler that change as it is stepped.
_PROGRESS = ("last_epoch", "verbose")

sgd_one = OptimizerConfig("torch.optim.SGD", {"lr": 1.0})
"""Factory of the optimizer whose step gives the aggregation's result itself: federated averaging."""


def is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a step, with the learning rate of this round, is ``x -= grad`` and nothing else."""
    (group,) = optimizer.param_groups
    return type(optimizer) is torch.optim.SGD and (
        group["lr"], group["momentum"], group["weight_decay"], group["maximize"]
    ) == (1.0, 0, 0, False)  # fmt: skip


def is_plain_averaging(optimizer: torch.optim.Optimizer, *, scheduled: bool) -> bool:
    """Tell whether every round gives the aggregation's result itself.

    Args:
        optimizer: As it was made, before a schedule has changed it.
        scheduled: Whether its learning rate changes from round to round.
    """
    return is_plain_sgd(optimizer) and not scheduled


def check(rule: Aggregation, optimizer: torch.optim.Optimizer, *, scheduled: bool) -> None:
    """Refuse an optimizer that steps through coordinates which the rule changes, or moves frozen factors.

    Args:
        rule: The aggregation rule.
        optimizer: As it was made, before a schedule has changed it.
        scheduled: Whether its learning rate changes from round to round.

    Raises:
        ValueError: If the rule allows no such optimizer.
    """
    (group,) = optimizer.param_groups
    memoryless = type(optimizer) is torch.optim.SGD and not group["momentum"] and not group["weight_decay"]
    if rule.outer == "mean" and not is_plain_averaging(optimizer, scheduled=scheduled):
        raise ValueError(
            f"{rule!r} gives the factors other coordinates each round, so a step from the last ones towards"
            f" them has no meaning: outer_optimizer={describe(optimizer)} must be SGD with lr=1 and no"
            f" momentum{', without an outer_scheduler' if scheduled else ''}, or the aggregation"
            " LowRankMean(factorization='procrustes')."
        )
    if rule.outer == "memoryless" and not memoryless:
        raise ValueError(
            f"{rule!r} freezes a factor, which the momentum of outer_optimizer={describe(optimizer)} would"
            " still move. Use SGD without momentum and weight decay, or another aggregation."
        )


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Return the class and its settings, which must be the same at every party."""
    settings = ", ".join(f"{key}={value}" for key, value in sorted(_settings(optimizer).items()))
    return f"{type(optimizer).__name__}({settings})"


def make_prototype(factory: OptimizerFactory) -> torch.optim.Optimizer:
    """Return an optimizer of a single number, from which to read its class and settings.

    Raises:
        ValueError: If the factory makes none, or one that cannot step a flat vector element by element.
    """
    supported = (
        "The global vector is flat and has neither matrices nor layers nor a loss, so outer_optimizer must"
        " be one that moves each element by its own gradients: SGD, Adam, Adagrad, RMSprop, Yogi and their"
        " like; not LBFGS, Muon, Adafactor or LAMB."
    )
    try:
        optimizer = factory([nn.Parameter(torch.zeros(1))])
    except Exception as error:
        raise ValueError(f"outer_optimizer cannot be made: {error} {supported}") from error
    for base in type(optimizer).__mro__:
        if base.__name__ in _UNSUPPORTED:
            raise ValueError(
                f"outer_optimizer={describe(optimizer)} {_UNSUPPORTED[base.__name__]}. {supported}"
            )
    return optimizer


def load_(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state by copying it, into the buffers that are there already: none is held twice.

    Args:
        optimizer: The optimizer.
        state: As returned by ``state_dict``; it may come from a peer.
    """
    held = optimizer.state_dict()["state"]
    of_parameters = {
        index: {key: _copied(value, held.get(index, {}).get(key)) for key, value in entries.items()}
        for index, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_parameters})


def _copied(value: Any, into: Any) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if isinstance(into, Tensor) and (into.shape, into.dtype) == (value.shape, value.dtype):
        return into.copy_(value)
    return value.clone()


class OuterSchedule:
    """Learning-rate schedule of the outer optimizer: a torch scheduler, stepped once a round.

    Its state is how often it was stepped. To restore it the scheduler is made anew and stepped as often,
    which is exact, and needs nothing that a checkpoint or a peer could not be given.

    Args:
        factory: Makes the scheduler of an optimizer; None leaves the learning rate as it is.
        optimizer: The optimizer, with one group of parameters, none of which has a gradient.

    Raises:
        ValueError: If what the factory makes cannot schedule rounds.
    """

    def __init__(self, factory: SchedulerFactory | None, optimizer: torch.optim.Optimizer) -> None:
        self._factory = factory
        self._optimizer = optimizer
        self._initial = _settings(optimizer)
        self.scheduler: LRScheduler | None = None
        """The scheduler as it is now; None without one."""
        self._steps = 0
        self._failure = ""
        if factory is not None:
            self._restart(factory)

    @property
    def lr(self) -> float | None:
        """The learning rate of the next round; None if the optimizer has none."""
        lr = self._optimizer.param_groups[0].get("lr")
        return None if lr is None else float(lr)

    @property
    def state(self) -> int | None:
        """How often the scheduler was stepped; None without one."""
        return None if self._factory is None else self._steps

    def check(self, round: int) -> None:
        """Refuse a round for which there is no learning rate.

        Raises:
            FederationError: If the scheduler gave none, at all parties alike.
        """
        why = self._failure
        if not why and self.scheduler is not None and not _is_rate(self.lr):
            why = f"lr={self.lr} is not finite and >= 0"
        if why:
            raise FederationError(
                f"Round {round}: outer_scheduler={type(self.scheduler).__name__} gives no learning rate after"
                f" {self._steps} rounds: {why}. No parameter was changed. Give it as many rounds as are run."
            )

    def step(self) -> None:
        """Advance to the learning rate of the next round; if there is none, ``check`` will say so."""
        if self.scheduler is None:
            return
        self._steps += 1
        try:
            self.scheduler.step()
        except Exception as error:  # the scheduler may be the user's
            self._failure = self._failure or f"{type(error).__name__}: {error}"

    def restore(self, steps: int | None, optimizer: Mapping[str, Any]) -> None:
        """Set the schedule to a state that was saved.

        Args:
            steps: What ``state`` was.
            optimizer: The state of the optimizer, saved with it.

        Raises:
            ValueError: If this schedule has no such state; it may come from a peer.
        """
        saved = "no outer_scheduler" if steps is None else "an outer_scheduler"
        if (steps is None) != (self._factory is None):
            raise ValueError(
                f"The saved federated state has {saved}, this party has {'one' if steps is None else 'none'}."
                " Resume with the outer_scheduler of the checkpoint, or without, as it was."
            )
        if steps is None or self._factory is None:
            return
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"The state of the outer scheduler must be a number of rounds, not {steps!r:.100}."
            )
        self._restart(self._factory)
        for _ in range(steps):
            self.step()
        lr = float(optimizer["param_groups"][0]["lr"])
        # The last digit of a cosine depends on the processor; the optimizer continues with the saved one.
        if self.lr is None or not math.isclose(self.lr, lr, rel_tol=1e-9):
            raise ValueError(
                f"The saved federated state has the outer learning rate {lr} after {steps} rounds, this"
                f" outer_scheduler={type(self.scheduler).__name__} gives {self.lr}. Resume with the"
                " outer_optimizer and outer_scheduler of the checkpoint."
            )

    def _restart(self, factory: SchedulerFactory) -> None:
        (group,) = self._optimizer.param_groups
        for key in group.keys() - {"params"}:
            del group[key]  # a scheduler starts from the settings of an earlier one, if it finds them
        group.update(self._initial)
        scheduler = factory(self._optimizer)
        if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
            raise ValueError(
                f"outer_scheduler makes a {type(scheduler).__name__}, but the learning rate must follow from"
                " the number of rounds alone, to be the same at all parties. Use one of"
                " torch.optim.lr_scheduler that steps without a metric."
            )
        # Without gradients it moves nothing. Torch's schedulers warn if the optimizer has made no step yet,
        # which one that loads another party's state has not.
        self._optimizer.step()
        self.scheduler, self._steps, self._failure = scheduler, 0, ""


def describe_schedule(optimizer: OptimizerFactory, scheduler: SchedulerFactory | None) -> str | None:
    """Return what must be the same at every party: the scheduler's class and settings; None without one.

    Raises:
        ValueError: If the schedule changes more than the learning rate, or begins with none.
    """
    if scheduler is None:
        return None
    scheduled = make_prototype(optimizer)
    before = _settings(scheduled)
    schedule = OuterSchedule(scheduler, scheduled)
    name, after = type(schedule.scheduler).__name__, _settings(scheduled)
    changed = next((key for key in before if key != "lr" and after[key] != before[key]), None)
    if changed is not None:
        raise ValueError(
            f"outer_scheduler={name} changes {changed} from {before[changed]} to {after[changed]} in round 0;"
            " it may change the learning rate only. Torch's OneCycleLR and CyclicLR leave the rest alone with"
            " cycle_momentum=False."
        )
    if not _is_rate(schedule.lr):
        raise ValueError(
            f"outer_scheduler={name} gives lr={schedule.lr} in round 0; it must be finite and >= 0."
        )
    return _described(schedule.scheduler)


def _described(value: Any) -> str:
    """Return a setting of a scheduler, or a scheduler; of a function what it returns."""
    if isinstance(value, LRScheduler):
        settings = [f"{k}={_described(v)}" for k, v in sorted(vars(value).items()) if _is_setting(k, v)]
        return f"{type(value).__name__}({', '.join(settings)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_described(k)}: {_described(v)}' for k, v in sorted(value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    if callable(value):
        return _described([_returned(value, round) for round in _COMPARED_ROUNDS])
    return f"{value:.9g}" if isinstance(value, float) else repr(value)


def _is_setting(key: str, value: object) -> bool:
    # The parts of a SequentialLR, and when they begin, have no public name.
    if key in ("_schedulers", "_milestones"):
        return True
    public = not key.startswith("_") and key not in _PROGRESS
    return public and (isinstance(value, int | float | str | list | tuple | Mapping))


def _returned(function: Callable[[int], object], round: int) -> object:
    try:
        return function(round)
    except Exception as error:  # such as a list of learning rates that is shorter
        return type(error).__name__


def _is_rate(lr: float | None) -> bool:
    return lr is not None and math.isfinite(lr) and lr >= 0


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    (group,) = optimizer.param_groups
    return {key: value for key, value in group.items() if key != "params"}
