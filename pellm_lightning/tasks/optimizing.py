"""What `configure_optimizers` returns, from an optimizer and a scheduler given as callables."""

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import (
    LRSchedulerConfigType,
    OptimizerLRScheduler,
    OptimizerLRSchedulerConfig,
)
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pellm_lightning.engine.optim import OptimizerConfig

ADAMW = OptimizerConfig("torch.optim.AdamW", {"lr": 1e-3})
"""Makes the optimizer of the ready tasks, unless another is given."""


def optimize_trainable(
    module: LightningModule, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
) -> OptimizerLRScheduler:
    """Give the optimizer the parameters that require gradients, and step the scheduler with it.

    A ``ReduceLROnPlateau`` steps once an epoch, on ``val_loss``; every other scheduler after each local step.
    """
    inner = optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    if scheduler is None:
        return inner
    schedule = scheduler(inner)
    plateau = isinstance(schedule, ReduceLROnPlateau)
    config = LRSchedulerConfigType(
        scheduler=schedule, interval="epoch" if plateau else "step", monitor="val_loss" if plateau else None
    )
    return OptimizerLRSchedulerConfig(optimizer=inner, lr_scheduler=config)
