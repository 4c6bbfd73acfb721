"""Settings of an overlap, and rounds in the background of a fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import (
    Classifier,
    Rounds,
    ValidatedClassifier,
    data,
    fit_parties,
    quiet_trainer,
)
from torch import Tensor

from pellm_lightning import FederationError, Overlap
from pellm_lightning.aggregation import Alternating, LowRankMean, Mean, ResidualMean, Stacking
from pellm_lightning.callbacks.drift import FedProx


def diloco(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"delay_steps": -1}, r"delay_steps=-1\) must be a whole number"),
        ({"delay_steps": 1.5}, r"delay_steps=1\.5\) must be a whole number"),
        ({"delay_steps": 1, "mix": 1.0}, r"mix=1\.0\) must be at least 0 and below 1"),
        ({"delay_steps": 1, "mix": -0.1}, r"mix=-0\.1\) must be at least 0"),
        ({"fragments": 0}, r"fragments=0\) must be a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(arguments: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Overlap(**arguments)


@pytest.mark.parametrize(
    ("rule", "mix", "words"),
    [
        (ResidualMean(), 0.0, "writes into the frozen weights"),
        (Stacking(), 0.0, "writes into the frozen weights"),
        (Alternating(), 0.0, "trains other factors after each round"),
        (LowRankMean(factorization="balanced"), 0.5, r"other coordinates each round, so mix=0\.5"),
    ],
)
def test_rules_that_cannot_land_later_are_refused(rule: Any, mix: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Overlap(2, mix).check(rule)


def test_rules_that_can_are_not() -> None:
    Overlap(2, 0).check(LowRankMean(factorization="balanced"))
    Overlap(2, 0.5).check(LowRankMean())


# ---- in a fit


def fitted(tmp_path: Path, options: Mapping[str, Any], **trainer: Any) -> tuple[list[Tensor], list[Rounds]]:
    """Two parties, five steps an epoch: their last parameters, and what each round told."""
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> Tensor:
        module = ValidatedClassifier(seed=party)
        callback = federated(outer_optimizer=diloco, **options)
        quiet_trainer(tmp_path, [callback], logger=loggers[party], **trainer).fit(
            module, data(10, seed=party, batch_size=2), data(4, seed=9)
        )
        return module.vector()

    return fit_parties(2, fit), loggers


@pytest.mark.parametrize(
    ("options", "trainer", "landed"),
    [
        # Begun after steps 4 and 8, landed two later; the last round at the end.
        ({"every_n_steps": 4, "overlap": Overlap(2)}, {}, [6, 10, 10]),
        ({"every_n_steps": 5, "overlap": Overlap(0, mix=0)}, {}, [5, 10]),
        # The second begins at the very end, and lands there.
        ({"every_n_steps": 5, "overlap": Overlap(4)}, {}, [9, 10]),
        # An epoch of five is shorter than the delay: what is under way lands when the next begins.
        ({"every_n_epochs": 1, "overlap": Overlap(7)}, {"max_epochs": 3}, [10, 15, 15]),
        ({"every_n_epochs": 1, "overlap": Overlap(2)}, {"max_epochs": 3}, [7, 12, 15]),
        ({"every_n_steps": 4, "overlap": Overlap(3)}, {"max_epochs": -1, "max_steps": 6}, [6, 6]),
    ],
)
def test_rounds_land_after_their_delay(
    tmp_path: Path, options: Mapping[str, Any], trainer: dict[str, Any], landed: list[int]
) -> None:
    (first, second), loggers = fitted(tmp_path, options, **trainer)
    assert torch.equal(first, second), "parties end with the same bits"
    assert [logger.steps for logger in loggers] == [landed, landed]


def test_a_fit_without_delay_and_mixing_is_one_without_overlap(tmp_path: Path) -> None:
    plain, loggers = fitted(tmp_path, {"every_n_steps": 3})
    other, others = fitted(tmp_path, {"every_n_steps": 3, "overlap": Overlap(0, mix=0)})
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    for logger, same in zip(loggers, others, strict=True):
        assert [done["update_norm"] for done in logger.rounds] == [
            done["update_norm"] for done in same.rounds
        ]


def test_settings_of_the_overlap_must_be_the_same(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> None:
        callback = federated(every_n_steps=5, overlap=Overlap(1 + party))
        quiet_trainer(tmp_path, [callback]).fit(Classifier(), data(8, seed=party))

    errors = fit_parties(2, fit, may_fail=True)
    assert all("overlap" in str(error) for error in errors)


def test_what_lands_after_the_next_begins_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Overlap\(delay_steps=10, mix=0.5, fragments=1\) applies a round after the next"
    ):
        next(iter(fit_parties(1, lambda _, federated: federated(every_n_steps=10, overlap=Overlap(10)))))


def test_drift_corrections_are_refused(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> None:
        callbacks = [FedProx(0.1), federated(every_n_steps=5, overlap=Overlap(1))]
        quiet_trainer(tmp_path, callbacks).fit(Classifier(), data(8, seed=party))

    with pytest.raises(MisconfigurationException, match="with an overlap or fragments is not there yet"):
        fit_parties(1, fit)


def test_a_rule_that_cannot_land_later_stops_the_fit_before_it_begins(tmp_path: Path) -> None:
    class Writing(Mean):
        writes_base = True

    def fit(party: int, federated: Any) -> None:
        callback = federated(overlap=Overlap(1), aggregation=Writing())
        quiet_trainer(tmp_path, [callback]).fit(Classifier(), data(8, seed=party))

    with pytest.raises(MisconfigurationException, match="writes into the frozen weights"):
        fit_parties(1, fit)


def test_a_fit_that_fails_while_a_round_is_under_way_can_be_saved(tmp_path: Path) -> None:
    class Saving(Callback):
        def on_exception(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "failed.ckpt")

    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 5:
                raise OSError("the disk is full")
            return super().training_step(batch, batch_idx)

    def fit(party: int, federated: Any) -> Any:
        folder = tmp_path / str(party)
        callback = federated(every_n_steps=4, overlap=Overlap(3))
        trainer = quiet_trainer(folder, [Saving(), callback])
        with pytest.raises((OSError, FederationError)):
            trainer.fit((Classifier if party else Failing)(seed=party), data(40, seed=party))
        return torch.load(folder / "failed.ckpt", weights_only=True)

    for saved in fit_parties(2, fit):
        state = saved["callbacks"]["FederatedAveraging"]
        assert (state["under_way_since"] == 4) == (state["aggregator"]["pending"] is not None)
