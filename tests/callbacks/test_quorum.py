"""Who decides the result of a fit: a quorum of parties, not the one that trains longest."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from party_threads import Rounds, fit_parties, quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from pellm_lightning import FederatedAveraging
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.exchange import Cast

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric"),
]

# Parties 0 and 1 want 4 and have 16 batches, party 2 wants 9 and has 64.
OPTIMA, BATCHES = (4.0, 4.0, 9.0), (16, 16, 64)


class Scalar(LightningModule):
    """Goes half of the way to the optimum in each step, so that after some steps it is there."""

    def __init__(self, optimum: float = 0.0, validates: bool = True, scheduler: bool = False) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(1))
        self.b = torch.nn.Parameter(torch.zeros(1))
        self.optimum, self.validates, self.scheduler = optimum, validates, scheduler

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return 0.25 * ((self.a - batch[0].mean()) ** 2 + (self.b - batch[0].mean()) ** 2).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.validates:
            self.log("val_loss", (self.a - self.optimum).abs().sum())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        if not self.scheduler:
            return optimizer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "federated/val_loss", "strict": False},
        }


def loader(batches: int, value: float, samples: int = 10) -> DataLoader:
    return DataLoader(TensorDataset(torch.full((batches * samples, 1), value)), batch_size=samples)


Fitted = tuple[float, float, FederatedAveraging, Trainer]


def fit_all(
    tmp_path: Path,
    optima: tuple[float, ...] = OPTIMA,
    batches: tuple[int, ...] = BATCHES,
    validation: tuple[int, ...] = (0, 0, 0),
    callbacks: Callable[[int], list[Callback]] = lambda party: [],
    trainer: Callable[[int], dict[str, Any]] = lambda party: {},
    scheduler: bool = False,
    **federated: Any,
) -> list[Fitted]:
    def fit(party: int, make: Callable[..., FederatedAveraging]) -> Fitted:
        callback, module = make(**federated), Scalar(optima[party], scheduler=scheduler)
        options = {"max_epochs": 1, "logger": Rounds()} | trainer(party)
        run = quiet_trainer(tmp_path, [callback, *callbacks(party)], **options)
        val = [loader(validation[party], optima[party])] if validation[party] else None
        run.fit(module, loader(batches[party], optima[party]), val)
        return float(module.a.detach()), float(module.b.detach()), callback, run

    return fit_parties(len(optima), fit)


def test_more_data_do_not_make_one_party_the_winner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """160, 160 and 640 samples, rounds every 8 steps: two common rounds, then one party would go on alone."""
    fitted = fit_all(tmp_path, every_n_steps=8)
    # After 8 steps a party is 2^-8 of the way from its optimum. Weights are 80 each: the mean is 17/3.
    assert len({a for a, *_ in fitted}) == 1
    for a, b, federated, trainer in fitted:
        assert a == b == pytest.approx(17 / 3, abs=0.01)
        assert [r.trained_parties for r in federated.rounds] == [3, 3, 1]
        assert [r.last for r in federated.rounds] == [False, False, True]
        assert trainer.global_step == (24 if federated is fitted[2][2] else 16)
    assert "party 2 stops with about 40 steps left" in caplog.text


def test_with_a_quorum_of_one_it_is(tmp_path: Path) -> None:
    for a, _, federated, _ in fit_all(tmp_path, every_n_steps=8, quorum=1):
        assert a == pytest.approx(9.0, abs=0.1)
        assert [r.trained_parties for r in federated.rounds] == [3, 3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "how",
    [
        {"overlap": Overlap(delay_steps=2)},
        {"overlap": Overlap(delay_steps=0, mix=0)},
        {"overlap": Overlap(fragments=2)},
        {"overlap": Overlap(delay_steps=1, fragments=2)},
        {"exchange": Cast("bfloat16")},
    ],
    ids=str,
)
def test_in_the_background_in_fragments_and_in_fewer_bytes(tmp_path: Path, how: dict[str, Any]) -> None:
    fitted = fit_all(tmp_path, every_n_steps=8, **how)
    assert len({(a, b) for a, b, *_ in fitted}) == 1, "the parties end with different parameters"
    for a, b, federated, trainer in fitted:
        # A fragment's last, incomplete round with all three weighs 40, 40 and 80: 6.5.
        assert {round(a, 1), round(b, 1)} <= {5.6, 5.7, 6.5}
        assert federated.rounds[-1].last
        assert trainer.global_step < 64


def test_early_stopping_at_the_others(tmp_path: Path) -> None:
    """Parties 0 and 1 stop on a metric of their own after 2 of 8 epochs; party 2 has no validation."""
    fitted = fit_all(
        tmp_path,
        batches=(8, 8, 8),
        validation=(1, 1, 0),
        callbacks=lambda party: [EarlyStopping("val_loss", patience=1, mode="max")] if party < 2 else [],
        trainer=lambda party: {"max_epochs": 8},
    )
    for a, _, federated, trainer in fitted:
        assert a == pytest.approx(17 / 3, abs=0.1)
        assert trainer.current_epoch < 8
        assert [r.trained_parties for r in federated.rounds][-2:] == [3, 1]


def test_max_time_at_the_others(tmp_path: Path) -> None:
    class Slow(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            time.sleep(0.05)

    stopped = {"max_time": {"seconds": 0.2}}
    fitted = fit_all(
        tmp_path,
        batches=(8, 8, 8),
        callbacks=lambda party: [Slow()],
        trainer=lambda party: {"max_epochs": 8} | (stopped if party < 2 else {}),
    )
    assert len({a for a, *_ in fitted}) == 1
    for a, _, federated, trainer in fitted:
        assert a < 8, "party 2 alone has decided"
        assert federated.rounds[-1].last
        assert trainer.current_epoch < 8


def test_what_stops_has_a_checkpoint_of_the_result(tmp_path: Path) -> None:
    kept = [ModelCheckpoint(dirpath=tmp_path / f"party-{k}", save_last=True, monitor=None) for k in range(3)]
    fitted = fit_all(
        tmp_path,
        every_n_steps=8,
        callbacks=lambda party: [kept[party]],
        trainer=lambda party: {"enable_checkpointing": True},
    )
    for party, (a, *_) in enumerate(fitted):
        saved = torch.load(kept[party].last_model_path, weights_only=True)
        assert float(saved["state_dict"]["a"]) == a


def test_a_quorum_is_the_same_everywhere_and_no_more_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quorum=0 must be 'majority'"):
        FederatedAveraging(quorum=0)
    with pytest.raises(ValueError, match="quorum=4 is more than the 3 parties"):
        fit_all(tmp_path, quorum=4)


# ---- warnings at the start


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "pellm_lightning.callbacks.fit_facts"]


@pytest.mark.parametrize("tells", [True, False])
def test_parties_that_will_not_train_equally_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tells: bool
) -> None:
    limits = {} if tells else {"max_steps": 16, "max_epochs": 9}
    fit_all(tmp_path, every_n_steps=8, trainer=lambda party: limits)
    found = [text for text in warnings_of(caplog) if "equally long" in text]
    assert len(found) == tells
    if found:
        assert found[0].startswith("[party 0]")
        assert "16 (party 0), 16 (party 1), 64 (party 2)" in found[0]
        assert "2 (party 0), 2 (party 1), 8 (party 2)" in found[0]
        assert "quorum=2" in found[0]


def test_epochs_of_different_lengths_validate_at_different_rounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit_all(
        tmp_path, validation=(1, 1, 1), every_n_steps=8, trainer=lambda _: {"max_steps": 16, "max_epochs": 9}
    )
    assert [text for text in warnings_of(caplog) if "validate after different rounds" in text]


def test_no_warning_without_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stops = lambda party: [EarlyStopping("federated/val_loss", patience=9)]  # noqa: E731
    fit_all(tmp_path, batches=(8, 8, 8), validation=(1, 1, 1), callbacks=stops, every_n_steps=8)
    fit_all(tmp_path, batches=(8, 8, 9), every_n_epochs=1)  # by epochs the number of steps does not matter
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    "monitor", ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau", "federated/loss"]
)
def test_a_monitored_metric_that_a_party_will_not_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monitor: str
) -> None:
    def callbacks(party: int) -> list[Callback]:
        if monitor == "ModelCheckpoint":
            return [ModelCheckpoint(tmp_path / str(party), monitor="federated/val_loss")] if party < 2 else []
        if monitor == "ReduceLROnPlateau":
            return []
        metric = monitor if "/" in monitor else "federated/val_loss"
        return [EarlyStopping(metric, patience=9, strict=False)]

    trainer = {"enable_checkpointing": monitor == "ModelCheckpoint"}
    fit_all(
        tmp_path,
        batches=(8, 8, 8),
        validation=(1, 1, 0),
        callbacks=callbacks,
        trainer=lambda party: trainer,
        scheduler=monitor == "ReduceLROnPlateau",
    )
    found = warnings_of(caplog)
    if "/" in monitor:
        assert found == []
        return
    assert len(found) == 1
    assert "'federated/val_loss' is monitored by" in found[0]
    assert f"{monitor} of party 0" in found[0]
    assert "party 2 runs no validation" in found[0]


def test_a_metric_that_one_does_not_log_is_known_from_the_sanity_check(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(party: int, make: Callable[..., FederatedAveraging]) -> None:
        stop = EarlyStopping("federated/val_loss", patience=9, strict=False)
        trainer = quiet_trainer(tmp_path, [make(), stop], max_epochs=1, num_sanity_val_steps=1)
        trainer.fit(Scalar(validates=party == 0), loader(4, 1.0), loader(1, 1.0))

    fit_parties(2, fit)
    (found,) = warnings_of(caplog)
    assert "party 1 logs no such metric" in found


def test_a_hidden_number_of_samples_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps per epoch tell how many samples a party has; whoever hides weights does not want that."""
    from secure_exchange import masked

    fit_all(tmp_path, every_n_steps=8, exchange=masked(), quorum=3)
    assert not [text for text in warnings_of(caplog) if "equally long" in text]
    assert "summary" not in "".join(
        r.getMessage() for r in caplog.records if "quorum" in r.getMessage() and "party 0]" in r.getMessage()
    )


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
