"""The metrics of one validation run, and what is behind each: pure."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from pellm_lightning.comm.party import Party
from pellm_lightning.comm.topology import Topology
from pellm_lightning.trainer.metrics import ValidationMetrics

ALONE = Party(Topology())


class TwoProcesses:
    """A party whose other process says the given numbers, and whose speaker has the given names."""

    def __init__(self, others: list[float], names: list[str] | None = None) -> None:
        self.others, self.names = others, names

    def on_leader(self, act: Callable[[], list[str]]) -> list[str]:
        return act() if self.names is None else self.names

    def sum(self, values: list[float]) -> list[float]:
        return [mine + other for mine, other in zip(values, self.others, strict=True)]


def batch(samples: int) -> torch.Tensor:
    return torch.zeros(samples, 2)


def test_a_metric_weighs_as_many_samples_as_were_seen() -> None:
    trainer: Any = SimpleNamespace(val_dataloaders=None, callback_metrics={})
    metrics = ValidationMetrics()
    metrics.start(trainer)
    metrics.count(trainer, batch(4), 0, 0)
    metrics.count(trainer, batch(3), 0, 0)
    trainer.callback_metrics["val_loss"] = torch.tensor(0.5)
    assert metrics.end(trainer, ALONE) == {"val_loss": (0.5, 7.0)}


def test_what_was_there_before_is_left_out() -> None:
    old, again = torch.tensor(1.0), torch.tensor(2.0)
    trainer: Any = SimpleNamespace(
        val_dataloaders=None, callback_metrics={"train_loss": old, "val_loss": again}
    )
    metrics = ValidationMetrics()
    metrics.start(trainer)
    metrics.count(trainer, batch(1), 0, 0)
    # The same value again is a new tensor all the same.
    trainer.callback_metrics["val_loss"] = torch.tensor(2.0)
    assert metrics.end(trainer, ALONE) == {"val_loss": (2.0, 1.0)}


def test_our_own_metrics_are_not_averaged_again() -> None:
    trainer: Any = SimpleNamespace(val_dataloaders=None, callback_metrics={})
    metrics = ValidationMetrics()
    metrics.start(trainer)
    metrics.count(trainer, batch(1), 0, 0)
    trainer.callback_metrics["federated/round"] = torch.tensor(3.0)
    assert metrics.end(trainer, ALONE) == {}


def test_each_dataloader_has_its_samples() -> None:
    trainer: Any = SimpleNamespace(val_dataloaders=None, callback_metrics={})
    metrics = ValidationMetrics()
    metrics.start(trainer)
    metrics.count(trainer, batch(2), 0, 0)
    metrics.count(trainer, batch(5), 0, 1)
    for name in ("loss/dataloader_idx_0", "loss/dataloader_idx_1", "loss/dataloader_idx_2", "accuracy"):
        trainer.callback_metrics[name] = torch.tensor(0.25)
    assert metrics.end(trainer, ALONE) == {
        "loss/dataloader_idx_0": (0.25, 2.0),
        "loss/dataloader_idx_1": (0.25, 5.0),
        "accuracy": (0.25, 7.0),
    }


def test_batches_without_a_tensor_count_one() -> None:
    trainer: Any = SimpleNamespace(val_dataloaders=None, callback_metrics={})
    metrics = ValidationMetrics()
    metrics.start(trainer)
    metrics.count(trainer, "a", 0, 0)
    metrics.count(trainer, "b", 0, 0)
    trainer.callback_metrics["val_loss"] = torch.tensor(1.0)
    assert metrics.end(trainer, ALONE) == {"val_loss": (1.0, 2.0)}


def test_batches_without_a_tensor_count_what_their_dataloader_says() -> None:
    loaders = [DataLoader(range(9), batch_size=4), DataLoader(range(2), batch_size=2)]
    trainer: Any = SimpleNamespace(val_dataloaders=loaders, callback_metrics={})
    metrics = ValidationMetrics()
    metrics.start(trainer)
    for index in range(3):
        metrics.count(trainer, ["a"], index, 0)
    metrics.count(trainer, ["a"], 0, 1)
    for name in ("loss/dataloader_idx_0", "loss/dataloader_idx_1"):
        trainer.callback_metrics[name] = torch.tensor(1.0)
    found = metrics.end(trainer, ALONE)
    assert [weight for _, weight in found.values()] == [9.0, 2.0]


def test_each_validation_counts_anew() -> None:
    trainer: Any = SimpleNamespace(val_dataloaders=None, callback_metrics={})
    metrics = ValidationMetrics()
    for samples in (9, 2):
        metrics.start(trainer)
        metrics.count(trainer, batch(samples), 0, 0)
        trainer.callback_metrics["val_loss"] = torch.tensor(1.0)
        assert metrics.end(trainer, ALONE) == {"val_loss": (1.0, float(samples))}


def test_the_processes_of_a_party_are_one() -> None:
    trainer: Any = SimpleNamespace(val_dataloaders=None, callback_metrics={})
    metrics = ValidationMetrics()
    metrics.start(trainer)
    metrics.count(trainer, batch(3), 0, 0)
    trainer.callback_metrics["val_loss"] = torch.tensor(2.0)
    # The other process has 1 sample with loss 4: (3 * 2 + 1 * 4) / 4.
    other: Any = TwoProcesses([4.0, 1.0])
    assert metrics.end(trainer, other) == {"val_loss": (pytest.approx(2.5), 4.0)}


def test_what_only_the_speaker_logged_is_the_partys() -> None:
    """With self.log(..., rank_zero_only=True) the processes' names differ; their sums must not."""
    trainer: Any = SimpleNamespace(val_dataloaders=None, callback_metrics={})
    metrics = ValidationMetrics()
    metrics.start(trainer)
    metrics.count(trainer, batch(3), 0, 0)
    trainer.callback_metrics["val_loss"] = torch.tensor(2.0)
    # The speaker also has "own", 0.5 over its 1 sample: totals 4 and 0.5, weights 1 and 1.
    other: Any = TwoProcesses([0.5, 4.0, 1.0, 1.0], ["own", "val_loss"])
    assert metrics.end(trainer, other) == {"own": (0.5, 1.0), "val_loss": (pytest.approx(2.5), 4.0)}
