"""Averages of weights over time: of global parameters they are right, of a party's own they are refused."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fedavg_oracle import fedavg
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lora_module import Tuned
from party_threads import Classifier, ValidatedClassifier, batches, data, fit_parties, quiet_trainer

from pellm_lightning import FederationError, Overlap, Parameters
from pellm_lightning.aggregation import LowRankMean, Mean


class EachEpoch(WeightAveraging):
    """The mean over epochs with equal weights, as of SWA."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


def ema(decay: float = 0.5, **arguments: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=decay, update_every_n_steps=0, update_starting_at_epoch=0, **arguments)


SIZES = ((4, 2), (1, 2))


def expected_average(decay: float | None, epochs: int) -> torch.Tensor:
    """Average the global parameters of each round by hand, in float64; None weighs all alike."""
    average = torch.empty(0)
    for epoch in range(epochs):
        vector = fedavg(
            Classifier(seed=0),
            [list(batches(own, seed=party)) for party, own in enumerate(SIZES)],
            rounds=epoch + 1,
            steps=2,
            weights=[[6, 3]] * epochs,
        )
        share = 1 / (epoch + 1) if decay is None or not epoch else 1 - decay
        average = vector if not epoch else (1 - share) * average + share * vector
    return average


AVERAGES: dict[str, tuple[Any, float | None]] = {"ema": (ema, 0.5), "mean": (EachEpoch, None)}


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize(("make", "decay"), AVERAGES.values(), ids=AVERAGES)
def test_the_average_is_that_of_the_global_parameters(
    tmp_path: Path, make: Any, decay: float | None, first: bool
) -> None:
    def fit(party: int, federated: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        module = Classifier(seed=party)
        callbacks = [make(), federated()] if first else [federated(), make()]
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=3)
        trainer.fit(module, batches(SIZES[party], seed=party))
        trainer.save_checkpoint(tmp_path / f"{party}.ckpt")
        return module.vector(), torch.load(tmp_path / f"{party}.ckpt")["state_dict"]

    (vector, saved), (other, other_saved) = fit_parties(2, fit)
    assert torch.equal(vector, other)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(saved[name], other_saved[name])
    # Six steps and three averages of about ten roundings (2^-24) of numbers below 2.
    torch.testing.assert_close(vector.double(), expected_average(decay, 3), rtol=0, atol=1e-5)


def test_checkpoints_after_each_round_hold_the_same_average(tmp_path: Path) -> None:
    """And the first validation, before anything was averaged, is of what the parties have agreed on."""

    class Saving(Callback):
        def __init__(self, party: int) -> None:
            self.party = party

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{self.party}-{trainer.current_epoch}.ckpt")

    seen: list[list[torch.Tensor]] = [[], []]

    class RunView(ValidatedClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen[self.party].append(self.vector())

    def fit(party: int, federated: Any) -> None:
        module = RunView(seed=party)
        module.party = party
        trainer = quiet_trainer(tmp_path, [federated(), ema(), Saving(party)], max_epochs=3)
        trainer.fit(module, batches(SIZES[party], seed=party), data(4, seed=9))

    fit_parties(2, fit)
    assert torch.equal(seen[0][0], Classifier(seed=0).vector()), "party 0's, which all take over"
    assert all(map(torch.equal, *seen))
    for epoch in range(3):
        first, second = (torch.load(tmp_path / f"{party}-{epoch}.ckpt")["state_dict"] for party in range(2))
        assert torch.equal(first["head.weight"], second["head.weight"])
        if epoch:
            vector = torch.cat([first[f"head.{name}"].flatten() for name in ("weight", "bias")])
            torch.testing.assert_close(vector.double(), expected_average(0.5, epoch), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_average_goes_on(tmp_path: Path) -> None:
    def fit(resumed: bool, party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party + (7 if resumed else 0))
        saving = ModelCheckpoint(
            tmp_path / str(party), "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        path = next((tmp_path / str(party)).rglob("epoch=1.ckpt")) if resumed else None
        callbacks = [federated(), ema(), saving]
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, batches(SIZES[party], seed=party), ckpt_path=path)
        return module.vector()

    whole = fit_parties(2, partial(fit, False))
    resumed = fit_parties(2, partial(fit, True))
    assert all(torch.equal(vector, whole[0]) for vector in whole + resumed)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "swa": (partial(StochasticWeightAveraging, swa_lrs=0.1), {}, "WeightAveraging, which averages alike"),
    "mean of steps": (WeightAveraging, {}, "WeightAveraging is updated after single steps"),
    "ema of steps": (EMAWeightAveraging, {}, "EMAWeightAveraging is updated after single steps"),
    "rounds by steps": (ema, {"every_n_steps": 2}, "rounds here do not end with epochs"),
    "rounds by seconds": (ema, {"every_n_seconds": 9.0}, "rounds here do not end with epochs"),
    "fewer rounds": (ema, {"every_n_epochs": 2}, "after epoch 0, which has no round with every_n_epochs=2"),
    "overlap": (ema, {"overlap": Overlap(1)}, "an overlap or fragments leave the parties with unlike"),
    "small checkpoints": (
        ema,
        {"parameters": Parameters(save_frozen=False)},
        "save_frozen=False cannot be kept",
    ),
}


@pytest.mark.parametrize(("make", "arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_other_averages_are_refused_everywhere(
    tmp_path: Path, make: Any, arguments: dict[str, Any], words: str
) -> None:
    def fit(party: int, federated: Any) -> None:
        callbacks = [federated(**arguments)] + ([make()] if party else [])
        quiet_trainer(tmp_path, callbacks).fit(Classifier(seed=party), data(8, seed=party))

    told, own = fit_parties(2, fit, may_fail=True)
    assert isinstance(own, MisconfigurationException)
    assert words in str(own)
    assert "EMAWeightAveraging(decay=0.9, update_every_n_steps=0, update_starting_at_epoch=0)" in str(own)
    assert "the outer optimizer average: SGD with lr=0.1" in str(own)
    assert isinstance(told, FederationError)
    assert "Party 1 left the federation while joining: MisconfigurationException" in str(told)


def test_the_averages_that_the_words_name_are_taken(tmp_path: Path) -> None:
    """Word for word; and SGD with lr=0.1 is an average of the rounds' means."""

    def fit(party: int, federated: Any) -> None:
        named = EMAWeightAveraging(decay=0.9, update_every_n_steps=0, update_starting_at_epoch=0)
        quiet_trainer(tmp_path, [federated(), named]).fit(Classifier(seed=party), data(8, seed=party))

    fit_parties(2, fit)

    def outer(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        callback = federated(outer_optimizer=partial(torch.optim.SGD, lr=0.1))
        quiet_trainer(tmp_path, [callback], max_epochs=1).fit(module, batches(SIZES[party], seed=party))
        return module.vector()

    first, second = fit_parties(2, outer)
    start, mean = Classifier(seed=0).vector().double(), expected_average(None, 1)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), 0.9 * start + 0.1 * mean, rtol=0, atol=2e-6)


@pytest.mark.parametrize("other", [None, partial(ema, 0.9), EachEpoch], ids=["none", "decay", "kind"])
def test_parties_that_average_otherwise_are_found(tmp_path: Path, other: Any) -> None:
    def fit(party: int, federated: Any) -> None:
        callbacks = [federated(), *([ema()] if party == 0 else [other()] if other else [])]
        quiet_trainer(tmp_path, callbacks).fit(Classifier(seed=party), data(8, seed=party))

    for error in fit_parties(2, fit, may_fail=True):
        assert isinstance(error, FederationError)
        assert "weight averaging" in str(error)


def test_a_party_that_ends_early_is_told_that_its_average_is_another(tmp_path: Path) -> None:
    class Stopping(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    def fit(party: int, federated: Any) -> None:
        callbacks = [federated(quorum=1), ema(), *([Stopping()] if party else [])]
        quiet_trainer(tmp_path, callbacks, max_epochs=3).fit(Classifier(seed=party), data(8, seed=party))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit_parties(2, fit)
    told = [str(one.message) for one in said if "EMAWeightAveraging has not averaged" in str(one.message)]
    assert [message.partition(" after")[0] for message in told] == ["Other parties have made 2 more round(s)"]


def test_factors_in_new_coordinates_each_round_are_not_averaged(tmp_path: Path) -> None:
    def fit(aggregation: Any, party: int, federated: Any) -> dict[str, Any]:
        module = Tuned(party)
        callbacks = [federated(aggregation=aggregation), ema()]
        quiet_trainer(tmp_path, callbacks).fit(module, data(8, seed=party))
        return module.of("")

    for error in fit_parties(2, partial(fit, LowRankMean(factorization="svd")), may_fail=True):
        assert isinstance(error, MisconfigurationException)
        assert "EMAWeightAveraging's mean of them over rounds has no meaning. Use aggregation=Mean()" in str(
            error
        )
    for rule in (Mean(), None):
        first, second = fit_parties(2, partial(fit, rule))
        assert all(torch.equal(first[name], second[name]) for name in first)
