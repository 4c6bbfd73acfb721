"""A module and data that a command line can build."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from parties import ValidatedClassifier, data
from torch import nn
from torch.utils.data import DataLoader

from pellm_lightning.environment import party_of


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
