"""The metrics of one validation and how many samples are behind each."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from pellm_lightning.trainer.environment import Party
from pellm_lightning.trainer.samples import SampleCounter


class ValidationMetrics:
    """Collects what one validation run logs at this party, with its weight.

    ``trainer.callback_metrics`` keeps everything ever logged, so what this validation has logged are the
    entries whose values were replaced since its start.
    """

    def __init__(self) -> None:
        self._before: Mapping[str, Any] = {}
        self._samples: dict[int, int] = {}
        self._counter = SampleCounter(says=False)
        self.names: list[str] | None = None
        """What the sanity check has logged; None if there was none."""

    def check(self, trainer: Trainer) -> None:
        """Take note of what the sanity check has logged."""
        self.names = sorted(name for name in trainer.callback_metrics if not name.startswith("federated/"))

    def start(self, trainer: Trainer) -> None:
        """Remember what is there already."""
        self._before = dict(trainer.callback_metrics)
        self._samples = {}

    def count(self, trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Add a batch's samples to those of its dataloader."""
        loaders: Any = trainer.val_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
        counted = self._samples.get(dataloader_idx, 0)
        self._samples[dataloader_idx] = counted + self._counter.count(batch, loader, batch_idx)

    def end(self, trainer: Trainer, party: Party) -> dict[str, tuple[float, float]]:
        """Return each metric's mean over the party's processes and the samples behind it."""
        values = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if value is not self._before.get(name) and not name.startswith("federated/")
        }
        # The speaker's names: what is logged with rank_zero_only is known to one process only.
        names = party.on_leader(lambda: sorted(values))
        weights = [self._weight(name) if name in values else 0.0 for name in names]
        totals = [
            values[name] * weight if weight else 0.0 for name, weight in zip(names, weights, strict=True)
        ]
        sums = party.sum(totals + weights)
        pairs = zip(names, sums[: len(names)], sums[len(names) :], strict=True)
        return {name: (total / weight, weight) for name, total, weight in pairs if weight}

    def _weight(self, name: str) -> float:
        # With several dataloaders Lightning appends the index of the one that a metric belongs to.
        _, found, index = name.rpartition("/dataloader_idx_")
        return float(self._samples.get(int(index), 0) if found else sum(self._samples.values()))
