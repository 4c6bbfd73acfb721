"""Optimizer configuration of the ready-made modules."""

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import (
    LRSchedulerConfigType,
    OptimizerLRScheduler,
    OptimizerLRSchedulerConfig,
)
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pellm_lightning.engine.optim import OptimizerConfig

ADAMW = OptimizerConfig("torch.optim.AdamW", {"lr": 1e-3})
"""Default optimizer of the ready-made modules."""


def optimize_trainable(
    module: LightningModule, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
) -> OptimizerLRScheduler:
    """Return the optimizer of the trainable parameters, and the scheduler's configuration.

    A ``ReduceLROnPlateau`` steps once an epoch, on ``val_loss``; every other scheduler after each local step.

    Raises:
        MisconfigurationException: If there is no trainable parameter.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise MisconfigurationException(
            "There is nothing to train: all parameters are frozen. The weights of a quantised base model"
            " (quantization=nf4, or a checkpoint that is quantised already) are integers, which cannot be"
            " fine-tuned themselves: add an adapter (--model.peft peft.LoraConfig), or load the base without"
            " quantization. A saved prompt (--model.adapter) can be evaluated only."
        )
    inner = optimizer(trainable)
    if scheduler is None:
        return inner
    schedule = scheduler(inner)
    plateau = isinstance(schedule, ReduceLROnPlateau)
    config = LRSchedulerConfigType(
        scheduler=schedule, interval="epoch" if plateau else "step", monitor="val_loss" if plateau else None
    )
    return OptimizerLRSchedulerConfig(optimizer=inner, lr_scheduler=config)
