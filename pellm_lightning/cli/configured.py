"""Module and data of a configuration of the command line, without training."""

import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from pellm_lightning.cli.federated_cli import FederatedCLI

# The folder is that of the fit, where the data module has kept what it made of the data.
_KEPT = ("default_root_dir", "accelerator", "precision", "limit_test_batches", "limit_val_batches")


class Configured(FederatedCLI):
    """The module, the data and a Trainer that writes nothing, of a configuration of ``fit``.

    Args:
        words: Arguments as of ``fit``: ``--config run.yaml``, ``--data.batch_size 8``, ...
    """

    def __init__(self, words: Sequence[str]) -> None:
        with warnings.catch_warnings():
            # Its words are of one of our commands, and so not those of the process.
            warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
            super().__init__(
                args=list(words), run=False, save_config_callback=None, auto_configure_optimizers=False
            )

    @property
    def module(self) -> LightningModule:
        """What was trained, built but not trained."""
        module: LightningModule = self.model
        return module

    @property
    def data(self) -> LightningDataModule:
        """The data module.

        Raises:
            ValueError: If the configuration has none.
        """
        data: LightningDataModule | None = self.datamodule
        if data is None:
            raise ValueError("The configuration names no data. Add --data, as for `fit`.")
        return data

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        chosen = self.config_init["trainer"]
        return Trainer(
            **{name: chosen[name] for name in _KEPT},
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
