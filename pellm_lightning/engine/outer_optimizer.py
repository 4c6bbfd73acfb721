"""The outer optimizer and its schedule: which are as good as none, and which suit an aggregation."""

import hashlib
import json
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

# Rounds of a schedule that are compared between the parties.
_COMPARED = 1000


sgd_one = OptimizerConfig("torch.optim.SGD", {"lr": 1.0})
"""Makes the optimizer that lands on what the aggregation returns: federated averaging."""


def is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a step, with the learning rate of this round, is ``x -= grad`` and nothing else."""
    (group,) = optimizer.param_groups
    return type(optimizer) is torch.optim.SGD and (
        group["lr"], group["momentum"], group["weight_decay"], group["maximize"]
    ) == (1.0, 0, 0, False)  # fmt: skip


def is_plain_averaging(optimizer: torch.optim.Optimizer, *, scheduled: bool) -> bool:
    """Tell whether every round lands on what the aggregation returns.

    Args:
        optimizer: As it was made, before a schedule has changed it.
        scheduled: Whether its learning rate changes from round to round.
    """
    return is_plain_sgd(optimizer) and not scheduled


def check(rule: Aggregation, optimizer: torch.optim.Optimizer, *, scheduled: bool) -> None:
    """Refuse an optimizer that steps through coordinates which the rule changes, or moves what rests.

    Args:
        rule: The rule.
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
            f"{rule!r} lets a factor rest, which the memory of outer_optimizer={describe(optimizer)} would"
            " still move. Use SGD without momentum and weight decay, or another aggregation."
        )


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Return the class and its settings, which must be the same at every party."""
    group = optimizer.param_groups[0]
    settings = ", ".join(f"{key}={group[key]}" for key in sorted(group) if key != "params")
    return f"{type(optimizer).__name__}({settings})"


# ---- what can step a flat vector


def tried(factory: OptimizerFactory) -> torch.optim.Optimizer:
    """Return an optimizer as the factory makes it, of a parameter of its own, once it has been tried.

    Raises:
        ValueError: If it cannot step a flat vector, or not element by element.
    """
    values, gradient = torch.tensor([1.0, -2.0, 0.25]), torch.tensor([0.5, -0.125, 0.03125])
    kinds = (
        "The global vector is flat and knows neither matrices nor layers nor a loss, so outer_optimizer must"
        " be one that moves each element by its own gradients: SGD, Adam, Adagrad, RMSprop, Yogi and their"
        " like; not LBFGS, Muon, Adafactor or LAMB."
    )
    try:
        fresh = factory([nn.Parameter(torch.zeros(1))])
        together = _stepped(factory, values, gradient)
        alone = [_stepped(factory, values[i : i + 1], gradient[i : i + 1]) for i in range(len(values))]
    except Exception as error:
        raise ValueError(f"outer_optimizer cannot be made, or makes no step: {error} {kinds}") from error
    if not torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-7):
        raise ValueError(
            f"outer_optimizer={describe(fresh)} moves three values together not as it moves each alone."
            f" {kinds}"
        )
    return fresh


def _stepped(factory: OptimizerFactory, values: Tensor, gradient: Tensor) -> Tensor:
    parameter = nn.Parameter(values.clone())
    parameter.grad = gradient.clone()
    factory([parameter]).step()
    return parameter.detach()


# ---- the learning rate by round


class Schedule:
    """The outer learning rate by round: a torch scheduler, stepped after each round that moved something.

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
        self._begins = _settings(optimizer)
        self.scheduler: LRScheduler | None = None
        """The scheduler as it is now; None without one."""
        self._steps = 0
        self._ends = ""
        if factory is not None:
            self._begin(factory)

    @property
    def lr(self) -> float | None:
        """The learning rate of the round that comes; None if the optimizer has none."""
        lr = self._optimizer.param_groups[0].get("lr")
        return None if lr is None else float(lr)

    @property
    def state(self) -> int | None:
        """How often the scheduler was stepped; None without one."""
        return None if self._factory is None else self._steps

    @property
    def ends(self) -> bool:
        """Whether the scheduler refused to be stepped, as one of a fixed length does."""
        return bool(self._ends)

    def check(self, round: int) -> None:
        """Refuse a round for which there is no learning rate.

        Raises:
            FederationError: If the scheduler gave none, at all parties alike.
        """
        why = self._ends
        if not why and self.scheduler is not None and not _is_rate(self.lr):
            why = f"lr={self.lr} is not finite and >= 0"
        if why:
            raise FederationError(
                f"Round {round}: outer_scheduler={type(self.scheduler).__name__} gives no learning rate after"
                f" {self._steps} rounds: {why}. No parameter was changed. Give it as many rounds as are run."
            )

    def step(self) -> None:
        """Go on to the learning rate of the next round; if there is none, ``check`` will say so."""
        if self.scheduler is None:
            return
        self._steps += 1
        try:
            self.scheduler.step()
        except Exception as error:  # the scheduler may be the user's
            self._ends = self._ends or f"{type(error).__name__}: {error}"

    def restore(self, steps: int | None, optimizer: Mapping[str, Any]) -> None:
        """Go to where ``state`` was ``steps``, and the optimizer's state what is given.

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
        self._begin(self._factory)
        for _ in range(steps):
            self.step()
        lr = float(optimizer["param_groups"][0]["lr"])
        # The last digit of a cosine depends on the processor; the optimizer goes on with the saved one.
        if self.lr is None or not math.isclose(self.lr, lr, rel_tol=1e-9):
            raise ValueError(
                f"The saved federated state has the outer learning rate {lr} after {steps} rounds, this"
                f" outer_scheduler={type(self.scheduler).__name__} gives {self.lr}. Resume with the"
                " outer_optimizer and outer_scheduler of the checkpoint."
            )

    def _begin(self, factory: SchedulerFactory) -> None:
        (group,) = self._optimizer.param_groups
        for key in group.keys() - {"params"}:
            del group[key]  # a scheduler starts from the settings of an earlier one, if it finds them
        group.update(self._begins)
        scheduler = factory(self._optimizer)
        if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
            raise ValueError(
                f"outer_scheduler makes a {type(scheduler).__name__}, but the learning rate must follow from"
                " the number of rounds alone, to be the same at all parties. Use one of"
                " torch.optim.lr_scheduler that steps without a metric."
            )
        # Without gradients it moves nothing. Torch's schedulers warn if the optimizer has made no step yet,
        # which one that takes over another party's state has not.
        self._optimizer.step()
        self.scheduler, self._steps, self._ends = scheduler, 0, ""


def described_schedule(optimizer: OptimizerFactory, scheduler: SchedulerFactory | None) -> str | None:
    """Return what must be the same at every party: the class, its settings, and the learning rates.

    Those of 1000 rounds are in it, to nine digits, so functions are compared by what they return.

    Raises:
        ValueError: If the schedule changes more than the learning rate, or makes it negative or no number.
    """
    if scheduler is None:
        return None
    tried_on = optimizer([nn.Parameter(torch.zeros(1))])
    begins = {key: value for key, value in _settings(tried_on).items() if key != "lr"}
    schedule = Schedule(scheduler, tried_on)
    name, rates = type(schedule.scheduler).__name__, []
    for round in range(_COMPARED):
        now = _settings(tried_on)
        changed = next((key for key, value in begins.items() if now[key] != value), None)
        if changed is not None:
            raise ValueError(
                f"outer_scheduler={name} changes {changed} from {begins[changed]} to {now[changed]} in round"
                f" {round}; it may change the learning rate only. Torch's OneCycleLR and CyclicLR leave the"
                " rest alone with cycle_momentum=False."
            )
        if round and not _is_rate(schedule.lr):
            break  # training may be over before
        if not _is_rate(schedule.lr):
            raise ValueError(
                f"outer_scheduler={name} gives lr={schedule.lr} in round {round}; it must be finite and >= 0."
            )
        rates.append(f"{schedule.lr:.9g}")
        schedule.step()
        if schedule.ends:
            break
    digest = hashlib.sha256(json.dumps(rates).encode()).hexdigest()[:8]
    settings = ", ".join(f"{key}={value}" for key, value in sorted(_named(schedule.scheduler).items()))
    return f"{name}({settings}): {', '.join(rates[:3])}, ... [{digest}]"


def _is_rate(lr: float | None) -> bool:
    return lr is not None and math.isfinite(lr) and lr >= 0


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    (group,) = optimizer.param_groups
    return {key: value for key, value in group.items() if key != "params"}


def _named(scheduler: LRScheduler | None) -> dict[str, Any]:
    """Return those settings of a scheduler that are numbers or words, and no progress."""
    found = vars(scheduler) if scheduler is not None else {}
    return {
        key: value
        for key, value in found.items()
        if not key.startswith("_") and key != "last_epoch" and isinstance(value, int | float | str)
    }
