"""How a data module of many parties gives Lightning the batches of one round after another."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer


def offer(run: Mapping[str, Any], batches: Callable[[], Any]) -> Callable[[], None]:
    """Let a run's data module return ``batches()`` as its training data; return how to end that.

    Lightning looks for ``train_dataloader`` before any hook, so that it must be there when a run begins.

    Args:
        run: Arguments of ``trainer.fit``, by name. Without a data module nothing is done.
        batches: Makes the batches of an epoch.
    """
    given = run.get("datamodule") or run.get("train_dataloaders")
    if not isinstance(given, LightningDataModule):
        return lambda: None
    datamodule = given

    def train_dataloader() -> Any:
        return batches()

    def withdraw() -> None:
        vars(datamodule).pop("train_dataloader", None)

    vars(datamodule)["train_dataloader"] = train_dataloader
    return withdraw


def offered_anew(trainer: Trainer, withdraw: Callable[[], None]) -> Callable[[], None]:
    """Let a Trainer ask for training data at each epoch; return how to end that, after ``withdraw``."""
    connector: Any = trainer
    before = connector.reload_dataloaders_every_n_epochs
    connector.reload_dataloaders_every_n_epochs = 1

    def restore() -> None:
        connector.reload_dataloaders_every_n_epochs = before
        withdraw()

    return restore
