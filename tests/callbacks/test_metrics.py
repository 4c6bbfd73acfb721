"""Validation metrics over the parties: weighted, equal everywhere, there before other callbacks read them."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from party_threads import Classifier, Rounds, ValidatedClassifier, batches, data, fit_parties, quiet_trainer
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

VALIDATION = ((4, 2), (1,), (5, 5))
"""Batches of the three parties' validation data: 6, 1 and 10 samples."""


class Measured(ValidatedClassifier):
    """Logs in each way Lightning knows: a tensor per step, a metric object, a value at the epoch's end."""

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(seed, **kwargs)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.accuracy_at_end = MulticlassAccuracy(3, average="micro")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        self.accuracy(logits, batch[1])
        self.log("val_accuracy", self.accuracy)
        self.accuracy_at_end.update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("val_accuracy_at_end", self.accuracy_at_end.compute())
        self.accuracy_at_end.reset()


def measure(module: Classifier, loaders: Sequence[Any]) -> tuple[float, float]:
    """Loss and accuracy of the module over all samples of the loaders, in float64."""
    module = copy.deepcopy(module).double()
    x, y = (torch.cat(parts) for parts in zip(*(b for loader in loaders for b in loader), strict=True))
    with torch.no_grad():
        logits = module(x.double())
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(-1) == y).double().mean())


def test_metrics_are_those_of_the_union_of_the_validation_data(tmp_path: Path) -> None:
    loaders = [batches(sizes, seed=100 + party) for party, sizes in enumerate(VALIDATION)]

    def fit(party: int, federated: Any) -> tuple[Measured, dict[str, float]]:
        module = Measured(seed=party)
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=1)
        trainer.fit(module, data(8, seed=party), loaders[party])
        return module, {name: float(value) for name, value in trainer.callback_metrics.items()}

    results = fit_parties(3, fit)
    # The round comes before the validation, so all parties measured the same weights, which have not changed.
    loss, accuracy = measure(results[0][0], loaders)
    for _, metrics in results:
        assert metrics["federated/val_loss"] == pytest.approx(loss, rel=1e-6)
        assert metrics["federated/val_loss_epoch"] == metrics["federated/val_loss"]
        assert metrics["federated/val_accuracy"] == pytest.approx(accuracy, rel=1e-6)
        assert metrics["federated/val_accuracy_at_end"] == pytest.approx(accuracy, rel=1e-6)
    # The parties' own values are others, so an average was needed.
    assert len({metrics["val_loss"] for _, metrics in results}) == 3


def test_each_of_several_dataloaders_has_its_own_weights(tmp_path: Path) -> None:
    sizes = ((4, 1), (2, 6))
    loaders = [[batches([n], seed=10 * party + n) for n in sizes[party]] for party in range(2)]

    def fit(party: int, federated: Any) -> tuple[Measured, dict[str, float]]:
        module = Measured(seed=party)
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=1)
        trainer.fit(module, data(8, seed=party), loaders[party])
        return module, {name: float(value) for name, value in trainer.callback_metrics.items()}

    (module, first), (_, second) = fit_parties(2, fit)
    for index in range(2):
        name = f"federated/val_loss/dataloader_idx_{index}"
        loss, _ = measure(module, [own[index] for own in loaders])
        assert first[name] == second[name] == pytest.approx(loss, rel=1e-6)
    _, accuracy = measure(module, [loader for own in loaders for loader in own])
    assert first["federated/val_accuracy_at_end"] == pytest.approx(accuracy, rel=1e-6)


def test_only_what_this_validation_logged_is_averaged(tmp_path: Path) -> None:
    class Once(ValidatedClassifier):
        def on_validation_epoch_end(self) -> None:
            if self.current_epoch == 0:
                self.log("first_only", 1.0)

    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=3, logger=loggers[party])
        trainer.fit(Once(seed=party), data(8, seed=party), data(4, seed=9))

    fit_parties(2, fit)
    for logger in loggers:
        assert len(logger.metrics["federated/first_only"]) == 1
        assert len(logger.metrics["federated/val_loss"]) == 3
        assert "federated/train_loss" not in logger.metrics


def test_a_party_without_validation_data_neither_hangs_nor_counts(tmp_path: Path) -> None:
    validation = data(6, seed=50)

    def fit(party: int, federated: Any) -> tuple[Classifier, dict[str, Any]]:
        module = (ValidatedClassifier if party == 1 else Classifier)(seed=party)
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=3)
        trainer.fit(module, data(8, seed=party), validation if party == 1 else None)
        return module, dict(trainer.callback_metrics)

    (first, without), (second, metrics) = fit_parties(2, fit)
    assert torch.equal(first.vector(), second.vector())
    assert float(metrics["federated/val_loss"]) == pytest.approx(measure(second, [validation])[0], rel=1e-6)
    assert "federated/val_loss" not in without


def test_parties_may_validate_at_different_times(tmp_path: Path) -> None:
    """Two, one and no validation per epoch, and epochs of 8, 3 and 5 batches: all meet somewhere."""
    interval, samples = (0.5, 1.0, 1.0), (16, 6, 10)

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = ValidatedClassifier(seed=party)
        trainer = quiet_trainer(
            tmp_path,
            [federated(every_n_steps=3)],
            max_epochs=3,
            val_check_interval=interval[party],
            limit_val_batches=0 if party == 2 else 1.0,
        )
        trainer.fit(module, data(samples[party], seed=party, batch_size=2), data(4, seed=9))
        return module.vector()

    first, *others = fit_parties(3, fit)
    assert all(torch.equal(first, other) for other in others)


def test_parties_with_different_metric_names_share_what_they_have(tmp_path: Path) -> None:
    class Also(ValidatedClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("own", 0.25)

    def fit(party: int, federated: Any) -> dict[str, Any]:
        module = (Also if party == 0 else ValidatedClassifier)(seed=party)
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=1)
        trainer.fit(module, data(8, seed=party), data(4, seed=9))
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    first, second = fit_parties(2, fit)
    assert first["federated/val_loss"] == second["federated/val_loss"]
    assert first["federated/own"] == second["federated/own"] == 0.25


def test_the_sanity_check_is_not_a_validation(tmp_path: Path) -> None:
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> None:
        # Different numbers of sanity steps, none at party 1: an exchange there would hang or be counted.
        trainer = quiet_trainer(
            tmp_path, [federated()], max_epochs=2, num_sanity_val_steps=2 - 2 * party, logger=loggers[party]
        )
        trainer.fit(ValidatedClassifier(seed=party), data(8, seed=party), data(8, seed=9))

    fit_parties(2, fit)
    assert [len(logger.metrics["federated/val_loss"]) for logger in loggers] == [2, 2]


class Scripted(ValidatedClassifier):
    """Reports validation losses given in advance; the samples behind each are those of its batches."""

    def __init__(self, seed: int, losses: Sequence[float]) -> None:
        super().__init__(seed)
        self.losses = list(losses)

    def on_validation_epoch_start(self) -> None:
        self.now = math.nan if self.trainer.sanity_checking else self.losses.pop(0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.now)


# Weighted by 1 and 3 samples: 1.0, 0.8, 0.975, ... so patience=1 stops after the third validation. Alone,
# party 0 would go on for all six and party 1 would stop after the second.
LOSSES = ((1.0, 0.5, 0.3, 0.2, 0.1, 0.0), (1.0, 0.9, 1.2, 1.3, 1.4, 1.5))


@pytest.mark.parametrize("position", ["before", "behind"])
@pytest.mark.parametrize(
    ("stopping", "trainer"),
    [({}, {}), ({"check_on_train_epoch_end": False}, {}), ({}, {"val_check_interval": 0.5})],
    ids=["epoch end", "validation end", "twice an epoch"],
)
def test_early_stopping_stops_all_parties_in_the_same_round(
    tmp_path: Path, position: str, stopping: dict[str, Any], trainer: dict[str, Any]
) -> None:
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> tuple[torch.Tensor, int]:
        module = Scripted(party, LOSSES[party])
        stop = EarlyStopping("federated/val_loss", patience=1, **stopping)
        callbacks = [stop, federated()] if position == "before" else [federated(), stop]
        fitter = quiet_trainer(tmp_path, callbacks, max_epochs=6, logger=loggers[party], **trainer)
        fitter.fit(module, data(16, seed=party), batches([1] if party == 0 else [2, 1], seed=9))
        return module.vector(), fitter.global_step

    (first, steps), (second, other_steps) = fit_parties(2, fit)
    assert [loggers[0].metrics["federated/val_loss"][i] for i in range(3)] == pytest.approx([1.0, 0.8, 0.975])
    # Four batches an epoch; the third validation is after three epochs, or in the middle of the second.
    assert steps == other_steps == (6 if trainer else 12)
    assert torch.equal(first, second)
    assert [logger.rounds[-1]["active_parties"] for logger in loggers] == [2, 2]
    assert len(loggers[0].rounds) == len(loggers[1].rounds)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoints_score_is_that_of_the_weights_in_it(tmp_path: Path, weights_only: bool) -> None:
    loaders = [batches(sizes, seed=100 + party) for party, sizes in enumerate(VALIDATION)]

    def fit(party: int, federated: Any) -> ModelCheckpoint:
        module = Measured(seed=party, lr=3.0)
        checkpoint = ModelCheckpoint(
            tmp_path / f"party-{party}",
            filename="{epoch}",
            monitor="federated/val_loss",
            save_top_k=-1,
            save_weights_only=weights_only,
        )
        # The checkpoint stands before our callback in the list.
        trainer = quiet_trainer(tmp_path, [checkpoint, federated()], max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, data(12, seed=party, batch_size=3), loaders[party])
        return checkpoint

    checkpoints = fit_parties(3, fit)
    scores = [float(score) for score in checkpoints[0].best_k_models.values()]
    assert len(set(scores)) == 4, "the weights must differ from epoch to epoch for this test to tell"
    for checkpoint in checkpoints:
        assert [float(score) for score in checkpoint.best_k_models.values()] == scores
        for path, score in checkpoint.best_k_models.items():
            module = Measured()
            module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
            assert float(score) == pytest.approx(measure(module, loaders)[0], rel=1e-6)


def test_a_plateau_scheduler_follows_the_federation(tmp_path: Path) -> None:
    class Plateau(Scripted):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "federated/val_loss"},
            }

    def fit(party: int, federated: Any) -> float:
        module = Plateau(party, LOSSES[party])
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=4)
        trainer.fit(module, data(8, seed=party), batches([1] if party == 0 else [2, 1], seed=9))
        return module.optimizers().param_groups[0]["lr"]

    # 1.0, 0.8, 0.975, 1.025: worse twice, so 0.1 is halved twice.
    assert fit_parties(2, fit) == [0.025, 0.025]


def test_a_metric_that_is_nan_at_one_party_is_that_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named; where it is NaN at all, EarlyStopping(check_finite=True) stops all of them."""

    def fit(party: int, federated: Any) -> tuple[list[float], int]:
        module = Scripted(party, (1.0, math.nan if party else 0.9, math.nan))
        seen: list[float] = []

        class See(Callback):
            def on_validation_end(self, trainer: Any, *args: Any) -> None:
                seen.append(float(trainer.callback_metrics["federated/val_loss"]))

        callbacks = [EarlyStopping("federated/val_loss"), federated(), See()]
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=9)
        trainer.fit(module, data(8, seed=party), data(4, seed=9))
        return seen, trainer.current_epoch

    for seen, epochs in fit_parties(2, fit):
        assert seen[:2] == pytest.approx([1.0, 0.9])
        assert math.isnan(seen[2])
        assert epochs == 3
    assert caplog.text.count("val_loss is no finite number (or its weight none) at party 1, so") == 2
    assert caplog.text.count("val_loss is no finite number (or its weight none) at party 0, 1, so") == 2
