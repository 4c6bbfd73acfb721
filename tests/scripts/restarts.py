"""What parties of one launch find when they are started again with ``ckpt_path="last"``, one scene a mix.

``restarts.py OUT DEVICES [SCENE...]``: a party has DEVICES processes. Each scene trains for one epoch, then
builds everything anew, as a new process would, and trains to the third.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from party_threads import ValidatedClassifier, data, quiet_trainer

from pellm_lightning import FederatedAveraging, PartyEnvironment

OUT, DEVICES = Path(sys.argv[1]), int(sys.argv[2])
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
PARTY = RANK // DEVICES


class Starting(ValidatedClassifier):
    """Tells where its fit began."""

    began = -1

    def on_train_start(self) -> None:
        self.began = self.global_step


def mixes(root: Path) -> dict[str, Any]:
    """Return loggers and checkpoint callbacks by the name of the scene, made anew at each call."""
    last = {"save_last": True}
    return {
        "dirpath": lambda: (False, [ModelCheckpoint(root / "kept", **last)]),
        "no logger": lambda: (False, [ModelCheckpoint(**last)]),
        "csv": lambda: (CSVLogger(root, version="v"), [ModelCheckpoint(**last)]),
        "tensorboard": lambda: (TensorBoardLogger(root, version=3), [ModelCheckpoint(**last)]),
        "two": lambda: (
            False,
            [
                ModelCheckpoint(root / "best", monitor="federated/val_loss"),
                ModelCheckpoint(root / "all", filename="{step}", **last),
            ],
        ),
    }


def fit(root: Path, scene: str, epochs: int, ckpt_path: str | None) -> dict[str, Any]:
    logger, callbacks = mixes(root)[scene]()
    options: dict[str, Any] = {"plugins": [PartyEnvironment(SIZE // DEVICES)]}
    if DEVICES > 1:
        options |= {"devices": DEVICES, "strategy": "ddp"}
    trainer = quiet_trainer(
        root,
        [FederatedAveraging(), *callbacks],
        logger=logger,
        enable_checkpointing=True,
        max_epochs=epochs,
        **options,
    )
    module = Starting(seed=PARTY)
    trainer.fit(module, data(16, seed=PARTY), data(4, seed=9), ckpt_path=ckpt_path)
    return {"began": module.began, "from": str(trainer.ckpt_path), "vector": module.vector()}


for scene in sys.argv[3:]:
    root = OUT / scene.replace(" ", "-")
    first = fit(root, scene, 1, "last")  # nothing to resume yet
    again = fit(root, scene, 3, "last")
    torch.save([first, again], OUT / f"{root.name}-{RANK}.pt")
