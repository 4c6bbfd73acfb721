"""Prediction writer callback."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from pellm_lightning.tasks.earlier import keep_earlier_file
from pellm_lightning.trainer.pickling import own_state


class SavePredictions(BasePredictionWriter):
    """Prediction writer: JSON lines in the order of the samples, at the end of ``predict``.

    Args:
        filename: Path relative to the Trainer's ``default_root_dir``. In a party of several processes each
            writes its share, with its rank before the suffix. An existing file with other predictions is
            renamed, with a number.

    Example:
        >>> trainer = Trainer(callbacks=[SavePredictions()], accelerator="cpu", logger=False)
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="epoch")
        self.filename = filename

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the callback without the module."""
        return own_state(self)

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the predictions of all batches."""
        path = Path(trainer.default_root_dir) / self.filename
        if trainer.world_size > 1:
            path = path.with_suffix(f".{trainer.global_rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        values = (value for batch in predictions for value in _plain(batch))
        content = "".join(f"{json.dumps(value)}\n" for value in values)
        keep_earlier_file(path, content)
        path.write_text(content, encoding="utf-8")


def _plain(batch: Any) -> list[Any]:
    return batch.tolist() if isinstance(batch, Tensor) else list(batch)
