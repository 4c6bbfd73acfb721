"""What a simulation cannot do yet, or what would mean something else in it, refused before it starts."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.callbacks.dp_sgd import DPSGD
from pellm_lightning.callbacks.drift.base import DriftCorrection
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.trainer.isolation import callbacks_of


def unsupported_arguments(factory: AggregatorFactory, *, separate_jobs: bool) -> Iterator[str]:
    """Yield why arguments of the callback do not go with ``simulate``.

    Args:
        factory: The arguments.
        separate_jobs: Whether this launch is one party of several separate jobs.
    """
    if separate_jobs:
        yield "the processes of a simulation are of one launch. Leave out jobs and PELLM_RENDEZVOUS"
    if factory.every_n_seconds is not None:
        yield "parties train one after another, so that every_n_seconds has no meaning. Use every_n_steps"
    if factory.is_staggered:
        yield "nobody trains while a round runs. Leave out overlap"
    if factory.privacy is not None:
        yield "the accountant does not know yet that parties are sampled. Leave out privacy"
    if factory.exchange.is_secure or not factory.exchange.exact:
        yield (
            f"{factory.exchange!r} keeps keys or residuals of each party, which are not swapped yet. Use"
            " Plain()"
        )


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Refuse settings of a Trainer.

    Raises:
        MisconfigurationException: If there is one.
    """
    for reason in _of_trainer(trainer, module):
        raise MisconfigurationException(
            f"A simulation makes one round in each epoch of the Trainer: {reason}."
        )


def check_data(datamodule: Any) -> None:
    """Refuse data that are of no party.

    Raises:
        MisconfigurationException: If they are.
    """
    if not callable(getattr(datamodule, "party_dataloader", None)):
        given = "no data module was given" if datamodule is None else f"{type(datamodule).__name__} has none"
        raise MisconfigurationException(
            "A simulation asks the data module for each party's data by its method"
            f" `party_dataloader(party: int)`, and {given}. Give trainer.fit a LightningDataModule that"
            " has it; train_dataloader is not called."
        )


def check_plan(plan: Plan) -> None:
    """Refuse a rule that writes into the frozen base.

    Raises:
        MisconfigurationException: If it does.
    """
    if plan.rule.writes_base:
        raise MisconfigurationException(
            f"{plan.rule!r} writes into the frozen weights, of which a simulation has one copy for all"
            " parties: each would write there. Use LowRankMean(), or launch the parties by torchrun."
        )


def check_schedulers(trainer: Trainer) -> None:
    """Refuse schedulers that Lightning steps when no party is there.

    Raises:
        MisconfigurationException: If there is one.
    """
    for config in trainer.lr_scheduler_configs:
        if config.interval != "step" or config.reduce_on_plateau or config.frequency != 1:
            raise MisconfigurationException(
                f"{type(config.scheduler).__name__} is stepped after epochs, by a metric or not after each"
                " batch, when no party is there, or another one. In a simulation a scheduler counts the steps"
                ' of its party: return {"scheduler": ..., "interval": "step"} from configure_optimizers, or'
                " none."
            )


def _of_trainer(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        yield f"{type(trainer.strategy).__name__} makes one party of several processes. Set devices=1"
    if not module.automatic_optimization:
        yield "with manual optimization a batch may be any number of steps. Set automatic_optimization=True"
    if trainer.accumulate_grad_batches != 1:
        yield (
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} would add up gradients of different"
            " parties. Set 1, and a larger batch size"
        )
    if trainer.max_steps != -1:
        yield f"max_steps={trainer.max_steps} would end within a round. Give max_epochs, the number of rounds"
    if trainer.limit_train_batches != 1.0 or vars(trainer).get("overfit_batches"):
        yield (
            f"limit_train_batches={trainer.limit_train_batches} (or fast_dev_run, or overfit_batches) would"
            " end within a round. Set every_n_steps, or draw fewer parties"
        )
    if trainer.val_check_interval != 1.0:
        yield (
            f"val_check_interval={trainer.val_check_interval} would validate a single party's parameters. Set"
            " 1.0, with check_val_every_n_epoch if it is to be rarer"
        )
    for other in callbacks_of(trainer):
        if isinstance(other, DriftCorrection | DPSGD | WeightAveraging):
            yield (
                f"{type(other).__name__} keeps a state of each party, which is not swapped yet. Leave it out"
            )
