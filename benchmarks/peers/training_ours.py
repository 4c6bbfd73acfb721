"""The training in a Lightning Trainer with the callback: one fit over all rounds."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from training_task import Training, trainable

from pellm_lightning import FederatedAveraging
from pellm_lightning.aggregation import LowRankMean, Mean


class Batches(IterableDataset):
    """One round's batches each time it is read."""

    def __init__(self, training: Training, party: int) -> None:
        self.training, self.party, self.round = training, party, 0
        self.data = training.data(f"party-{party}")

    def __iter__(self) -> Any:
        self.round += 1
        return self.training.batches(self.data, self.party, self.round)


class Module(LightningModule):
    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training_of = training
        self.model = training.model().train()  # Lightning leaves the mode as it finds it

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.training_of.make_optimizer(self.model)


class Keep(Callback):
    """Saves what the parties share after each round, and counts the bytes."""

    def __init__(self, training: Training) -> None:
        self.training, self.sent = training, 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.sent += float(trainer.callback_metrics["federated/bytes_sent"])
        self.training.save(trainer.current_epoch + 1, trainable(pl_module.model))
        Path(self.training.out, "bytes").write_text(str(self.sent))


def main() -> None:
    torch.set_num_threads(1)
    training, party = Training.from_env(), int(os.environ["RANK"])
    module = Module(training)
    if party == 0:
        training.save(0, trainable(module.model))
    federated = FederatedAveraging(
        every_n_epochs=1,
        aggregation=LowRankMean() if training.rule == "default" else Mean(),
        inner_optimizer_state="reset" if training.rule == "reset" else "keep",
    )
    callbacks: list[Callback] = [federated]
    trainer = Trainer(
        default_root_dir=training.out,
        accelerator="cpu",
        devices=1,
        max_epochs=training.rounds,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks + ([Keep(training)] if party == 0 else []),
    )
    trainer.fit(module, DataLoader(Batches(training, party), batch_size=None))


if __name__ == "__main__":
    main()
