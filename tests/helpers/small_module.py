"""A module and data that a command line can build."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from party_threads import ValidatedClassifier, data
from torch import nn
from torch.utils.data import DataLoader

from pellm_lightning.trainer.environment import party_of


class LittleModule(ValidatedClassifier):
    """Linear layers.

    Args:
        lr: Learning rate.
        seed: Seeds the head.
    """

    def __init__(self, lr: float = 0.1, seed: int = 0) -> None:
        super().__init__(seed, lr)
        self.save_hyperparameters()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])


class LittleData(LightningDataModule):
    """Other samples at each party.

    Args:
        samples: Training samples of party 0; party k has 4 k more.
    """

    def __init__(self, samples: int = 8) -> None:
        super().__init__()
        self.samples = samples

    def train_dataloader(self) -> DataLoader:
        party = party_of(self.trainer)
        return data(self.samples + 4 * party, seed=party)

    def val_dataloader(self) -> DataLoader:
        return data(4, seed=100 + party_of(self.trainer))

    test_dataloader = predict_dataloader = val_dataloader


class Scene(Callback):
    """What happens to a process of a party, and when.

    Args:
        announce: File to make when the fit starts.
        hold_at: Step before which to wait.
        until: File to wait for there.
        signal_at: Step before which the process sends itself a signal.
        signal: Number of the signal.
        rank: Process of the party to which this happens.
        once: File that says that it has happened already.
        final: File for the parameters at the end.
    """

    def __init__(
        self,
        announce: str | None = None,
        hold_at: int = -1,
        until: str = "",
        signal_at: int = -1,
        signal: int = 9,
        rank: int = 0,
        once: str = "",
        final: str | None = None,
    ) -> None:
        self.announce, self.final = announce, final
        self.hold_at, self.until = hold_at, until
        self.signal_at, self.signal, self.rank, self.once = signal_at, signal, rank, once

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.announce:
            Path(self.announce).touch()

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.hold_at:
            deadline = time.monotonic() + 90
            while not Path(self.until).exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        here = self.rank == int(os.environ.get("RANK", 0))
        if step == self.signal_at and here and not Path(self.once).exists():
            Path(self.once).touch()
            os.kill(os.getpid(), self.signal)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.final and trainer.is_global_zero:
            torch.save(module.vector(), self.final)
