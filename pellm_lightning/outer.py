"""The outer optimizer: which are as good as none, which suit an aggregation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from pellm_lightning.aggregation import Aggregation

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]


def sgd_one(params: Iterable[Any]) -> torch.optim.Optimizer:
    """Make the optimizer that lands on what the aggregation returns: federated averaging."""
    return torch.optim.SGD(params, lr=1.0)


def is_sgd_one(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a step is ``x -= grad`` and nothing else."""
    (group,) = optimizer.param_groups
    return type(optimizer) is torch.optim.SGD and (
        group["lr"], group["momentum"], group["weight_decay"], group["maximize"]
    ) == (1.0, 0, 0, False)  # fmt: skip


def check(rule: Aggregation, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that steps through coordinates which the rule changes, or moves what rests.

    Raises:
        ValueError: If the rule allows no such optimizer.
    """
    (group,) = optimizer.param_groups
    memoryless = type(optimizer) is torch.optim.SGD and not group["momentum"] and not group["weight_decay"]
    if rule.outer == "mean" and not is_sgd_one(optimizer):
        raise ValueError(
            f"{rule!r} gives the factors other coordinates each round, so a step from the last ones towards"
            f" them has no meaning: outer_optimizer={describe(optimizer)} must be SGD with lr=1 and no"
            " momentum, or the aggregation LowRankMean(gauge='procrustes')."
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
