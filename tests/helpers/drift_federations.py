"""Federations of two parties with each drift correction."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lora_module import Tuned
from party_threads import Classifier, data, fit_parties, quiet_trainer
from stateful_loader import StatefulLoader
from torch import Tensor

from pellm_lightning.callbacks.drift import SCAFFOLD, DriftCorrection, FedDyn, FedNova, FedProx

ALL: dict[str, Callable[[], DriftCorrection]] = {
    "FedProx": partial(FedProx, 0.3),
    "SCAFFOLD": SCAFFOLD,
    "FedNova": FedNova,
    "FedDyn": partial(FedDyn, 0.5),
}
each = pytest.mark.parametrize("name", ALL)
summing = pytest.mark.parametrize("name", ["SCAFFOLD", "FedNova", "FedDyn"])


class Saved:
    """A federation of two parties that saves after every step below ``root``."""

    def __init__(self, root: Path, name: str, **options: Any) -> None:
        self.root, self.name, self.options = root, name, options

    def fit(self, step: int | None = None, *, name: str | None = None) -> list[Tensor]:
        return fit_parties(2, partial(self._fit, step, name or self.name))

    def _fit(self, step: int | None, name: str, party: int, federated: Any) -> Tensor:
        folder = self.root / f"party-{party}"
        saving = ModelCheckpoint(
            folder, filename="{step}", save_top_k=-1, enable_version_counter=False, every_n_train_steps=1
        )
        optimizer = "SGD" if name == "FedNova" else "Adam"
        module = Classifier(seed=party if step is None else 77, optimizer=optimizer, lr=0.05)
        callbacks = [saving, federated(every_n_steps=3, **self.options)]
        callbacks += [] if name == "none" else [ALL[name]()]
        trainer = quiet_trainer(self.root, callbacks, enable_checkpointing=True, max_epochs=2)
        path = None if step is None else folder / f"step={step}.ckpt"
        trainer.fit(module, StatefulLoader(party), ckpt_path=path)
        return module.vector()


def tuned(
    root: Path, rule: Any, correction: DriftCorrection, party: int, federated: Any, **options: Any
) -> dict[str, dict[str, Tensor]]:
    module = Tuned(party, optimizer="SGD", lr=0.1)
    before = module.of("")
    callbacks = [federated(every_n_steps=2, aggregation=rule, **options), correction]
    quiet_trainer(root, callbacks, max_steps=options.get("steps", 6)).fit(module, data(24, seed=party))
    return {"before": before, "after": module.of("")}
