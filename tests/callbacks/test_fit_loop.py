"""When rounds happen: exactly when due, before validation, and once more at the end."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from party_threads import (
    Classifier,
    Rounds,
    ValidatedClassifier,
    batches,
    data,
    dataset,
    fit_parties,
    quiet_trainer,
)
from torch.utils.data import DataLoader, IterableDataset


class Validating(ValidatedClassifier):
    """Tells the Rounds logger when a validation starts, and after how many local steps."""

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.trainer.logger.events.append(("validation", self.trainer.global_step))


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = dataset(samples, seed)

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[index] for index in range(len(self.samples)))


class StopAt(Callback):
    """Asks the Trainer to stop after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left == 0


def events_of(
    tmp_path: Path, schedule: dict[str, Any], train: Any = None, callbacks: Any = (), **trainer: Any
) -> list[tuple[str, int]]:
    """Two parties, 10 samples in batches of 2 unless told otherwise: what happened, the same at both."""
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Validating(seed=party)
        loader = data(10, seed=party, batch_size=2) if train is None else train(party)
        quiet_trainer(
            tmp_path,
            [*(make() for make in callbacks), federated(**schedule)],
            logger=loggers[party],
            **trainer,
        ).fit(module, loader, data(4, seed=9))
        return module.vector()

    first, second = fit_parties(2, fit)
    assert torch.equal(first, second), "parties must end with the same bits"
    assert loggers[0].events == loggers[1].events
    return loggers[0].events


def told(text: str) -> list[tuple[str, int]]:
    """ "r5 v5" is a round and then a validation after five local steps."""
    kinds = {"r": "round", "v": "validation"}
    return [(kinds[word[0]], int(word[1:])) for word in text.split()]


@pytest.mark.parametrize(
    ("schedule", "trainer", "expected"),
    [
        # Five batches an epoch: the round comes before the epoch's validation.
        ({}, {"max_epochs": 2}, "r5 v5 r10 v10"),
        ({"every_n_epochs": 2}, {"max_epochs": 4}, "v5 r10 v10 v15 r20 v20"),
        # Three epochs: the third belongs to no whole round, so one more runs at the end.
        ({"every_n_epochs": 2}, {"max_epochs": 3}, "v5 r10 v10 v15 r15"),
        ({"every_n_steps": 2}, {"max_epochs": 1}, "r2 r4 v5 r5"),
        ({"every_n_steps": 3}, {"max_epochs": 2}, "r3 v5 r6 r9 v10 r10"),
        ({"every_n_steps": 5}, {"max_epochs": 2}, "r5 v5 r10 v10"),
        ({"every_n_steps": 100}, {"max_epochs": 2}, "v5 v10 r10"),
        # Two batches a step, and Lightning steps on the epoch's last batch: 3 steps an epoch.
        ({}, {"max_epochs": 2, "accumulate_grad_batches": 2}, "r3 v3 r6 v6"),
        ({"every_n_steps": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}, "r2 v3 r4 r6 v6"),
        ({}, {"max_epochs": 2, "limit_train_batches": 3}, "r3 v3 r6 v6"),
        ({}, {"max_epochs": 2, "limit_train_batches": 0.4}, "r2 v2 r4 v4"),
        ({"every_n_steps": 2}, {"max_epochs": 2, "limit_train_batches": 3}, "r2 v3 r4 r6 v6"),
        # A validation in the middle of an epoch is not a reason for a round.
        ({}, {"max_epochs": 1, "val_check_interval": 0.4}, "v2 v4 r5"),
        ({}, {"max_epochs": 2, "check_val_every_n_epoch": 2}, "r5 r10 v10"),
        # max_steps ends in the middle of an epoch; an epoch-end hook still runs there.
        ({}, {"max_epochs": -1, "max_steps": 7}, "r5 v5 r7"),
        ({"every_n_steps": 3}, {"max_epochs": -1, "max_steps": 7}, "r3 v5 r6 r7"),
        ({"every_n_epochs": 2}, {"max_epochs": -1, "max_steps": 7}, "v5 r7"),
        # max_steps ends on an epoch's last batch.
        ({}, {"max_epochs": -1, "max_steps": 5}, "r5 v5"),
        ({}, {"max_epochs": 1, "overfit_batches": 2}, "r2 v2"),
    ],
)
def test_rounds_run_exactly_when_due(
    tmp_path: Path, schedule: dict[str, Any], trainer: dict[str, Any], expected: str
) -> None:
    assert events_of(tmp_path, schedule, **trainer) == told(expected)


@pytest.mark.parametrize(
    ("schedule", "trainer", "expected"),
    [
        ({}, {"max_epochs": 2}, "r5 v5 r10 v10"),
        ({"every_n_steps": 3}, {"max_epochs": 2}, "r3 v5 r6 r9 v10 r10"),
        ({}, {"max_epochs": 2, "limit_train_batches": 3}, "r3 v3 r6 v6"),
        ({}, {"max_epochs": 2, "accumulate_grad_batches": 3}, "r2 v2 r4 v4"),
        ({}, {"max_epochs": -1, "max_steps": 7}, "r5 v5 r7"),
    ],
)
def test_rounds_of_an_iterable_dataset_without_length(
    tmp_path: Path, schedule: dict[str, Any], trainer: dict[str, Any], expected: str
) -> None:
    def stream(party: int) -> DataLoader:
        return DataLoader(Stream(10, seed=party), batch_size=2)

    assert events_of(tmp_path, schedule, stream, **trainer) == told(expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Told to stop after the third batch, Lightning validates at once: the round must come first.
        ({}, "r3 v3"),
        ({"every_n_steps": 2}, "r2 r3 v3"),
        ({"every_n_steps": 3}, "r3 v3"),
        ({"every_n_epochs": 2}, "r3 v3"),
    ],
)
def test_should_stop_in_the_middle_of_an_epoch(
    tmp_path: Path, schedule: dict[str, Any], expected: str
) -> None:
    assert events_of(tmp_path, schedule, callbacks=[lambda: StopAt(3)]) == told(expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, "r5 v5 r10 v10"),
        ({"every_n_epochs": 2}, "v5 r10 v10"),
        ({"every_n_epochs": 3}, "v5 v10 r10"),
        ({"every_n_steps": 4}, "r4 v5 r8 v10 r10"),
    ],
)
def test_a_stop_that_must_wait_for_min_epochs_changes_no_round(
    tmp_path: Path, schedule: dict[str, Any], expected: str
) -> None:
    # Told to stop in epoch 0, free to do so after epoch 1.
    events = events_of(tmp_path, schedule, callbacks=[lambda: StopAt(3)], min_epochs=2, max_epochs=4)
    assert events == told(expected)


def test_a_skipped_epoch_still_ends_its_round(tmp_path: Path) -> None:
    class Skipping(Validating):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    logger = Rounds()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Skipping(seed=party)
        trainer = quiet_trainer(
            tmp_path, [federated()], logger=logger if party == 0 else Rounds(), max_epochs=2
        )
        trainer.fit(module, data(10, seed=party, batch_size=2), data(4, seed=9))
        return module.vector()

    first, second = fit_parties(2, fit)
    assert torch.equal(first, second)
    assert logger.steps == [3, 6]


def test_max_time_stops_each_party_by_its_own_clock(tmp_path: Path) -> None:
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        timer = Timer(timedelta(seconds=0.2 + 0.2 * party), verbose=False)
        trainer = quiet_trainer(
            tmp_path,
            [timer, federated(every_n_steps=7)],
            logger=loggers[party],
            max_epochs=-1,
        )
        trainer.fit(module, data(40, seed=party, batch_size=1))
        return module.vector()

    first, second = fit_parties(2, fit)
    assert torch.equal(first, second)
    # The last round of the party that stopped first came early; all others at their multiple of 7.
    own = [step for step in loggers[0].steps if step % 7]
    assert len(set(own)) <= 1
    assert len(loggers[0].rounds) == len(loggers[1].rounds) >= 1


def test_gradient_accumulation_scheduler(tmp_path: Path) -> None:
    # Epoch 0 steps on each of 5 batches, epoch 1 on batches 2, 4 and the last.
    events = events_of(
        tmp_path,
        {"every_n_steps": 4},
        callbacks=[lambda: GradientAccumulationScheduler({0: 1, 1: 2})],
        max_epochs=2,
    )
    assert events == told("r4 v5 r8 v8")


def test_uneven_parties_meet_round_by_round(tmp_path: Path) -> None:
    """Party 0 makes 2 epochs of 4 batches, party 1 three of 1, party 2 one of 6; one round per epoch."""
    sizes, epochs = ((2, 2, 2, 2), (3,), (1, 1, 1, 1, 1, 1)), (2, 3, 1)
    loggers = [Rounds() for _ in sizes]

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Validating(seed=party)
        trainer = quiet_trainer(
            tmp_path, [federated(quorum=1)], logger=loggers[party], max_epochs=epochs[party]
        )
        trainer.fit(module, batches(sizes[party], seed=party), data(4, seed=9))
        return module.vector()

    first, *others = fit_parties(3, fit)
    assert all(torch.equal(first, other) for other in others)
    # Round 0 has all three, in round 1 party 2 is through, in round 2 party 0 is, too.
    for logger in loggers:
        assert [done["active_parties"] for done in logger.rounds] == [3, 2, 1]
        assert [done["total_weight"] for done in logger.rounds] == [8 + 3 + 6, 8 + 3, 3]
    assert [done["weight"] for done in loggers[0].rounds] == [8, 8, 0]
    assert [done["weight"] for done in loggers[2].rounds] == [6, 0, 0]


def test_a_finished_party_takes_over_each_later_round(tmp_path: Path) -> None:
    """What it holds at the end is the last round of the others, not its own last one."""

    def fit(party: int, federated: Any) -> tuple[torch.Tensor, torch.Tensor]:
        module = Validating(seed=party, lr=1.0)
        own: list[torch.Tensor] = []

        class Remember(Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                own.append(module.vector())

        trainer = quiet_trainer(
            tmp_path, [federated(quorum=1), Remember()], max_epochs=1 + 3 * party, logger=Rounds()
        )
        trainer.fit(module, data(4, seed=party), data(4, seed=9))
        return own[-1], module.vector()

    (at_its_end, end), (_, last) = fit_parties(2, fit)
    assert torch.equal(end, last)
    assert not torch.equal(at_its_end, end)
