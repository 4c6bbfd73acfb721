"""Validation metrics of a party, with the number of samples as weights."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from pellm_lightning.comm.party import Party
from pellm_lightning.trainer.samples import SampleCounter


class ValidationMetrics:
    """Metrics that one validation run logs at this party, with their weights.

    ``trainer.callback_metrics`` is never cleared, so the metrics of this run are the entries whose values
    were replaced since its start.
    """

    def __init__(self) -> None:
        self._before: Mapping[str, Any] = {}
        self._samples: dict[int, int] = {}
        self._counter = SampleCounter(warns=False)
        self.names: list[str] | None = None
        """Names of the sanity check's metrics; None without a sanity check."""

    def check(self, trainer: Trainer) -> None:
        """Record the names of the sanity check's metrics."""
        self.names = sorted(name for name in trainer.callback_metrics if not name.startswith("federated/"))

    def start(self, trainer: Trainer) -> None:
        """Begin a validation run: remember earlier metrics."""
        self._before = dict(trainer.callback_metrics)
        self._samples = {}

    def count(self, trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Add a batch's samples to the count of its dataloader."""
        loaders: Any = trainer.val_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
        counted = self._samples.get(dataloader_idx, 0)
        self._samples[dataloader_idx] = counted + self._counter.count(batch, loader, batch_idx)

    def end(self, trainer: Trainer, party: Party, copies: int = 1) -> dict[str, tuple[float, float]]:
        """Return each metric's mean over the party's processes and its number of samples.

        Args:
            trainer: What has validated.
            party: The party's processes.
            copies: Processes of the party that get the same batch.
        """
        values = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if value is not self._before.get(name) and not name.startswith("federated/")
        }
        # The leader's names: metrics logged with rank_zero_only exist in one process only.
        names = party.on_leader(lambda: sorted(values))
        weights = [self._weight(name) if name in values else 0.0 for name in names]
        totals = [
            values[name] * weight if weight else 0.0 for name, weight in zip(names, weights, strict=True)
        ]
        sums = party.sum(totals + weights)
        pairs = zip(names, sums[: len(names)], sums[len(names) :], strict=True)
        return {name: (total / weight, weight / copies) for name, total, weight in pairs if weight}

    def _weight(self, name: str) -> float:
        # With several dataloaders Lightning appends the index of the metric's dataloader.
        _, found, index = name.rpartition("/dataloader_idx_")
        return float(self._samples.get(int(index), 0) if found else sum(self._samples.values()))
