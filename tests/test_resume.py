"""A party that is started again resumes its own checkpoint, or is refused; nothing begins anew in silence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from little import LittleModule
from parties import data, quiet_trainer
from test_launched import TESTS, torchrun

from pellm_lightning import FederatedAveraging, resume

MIXES = ["dirpath", "no logger", "csv", "tensorboard", "two"]


@pytest.fixture
def as_party_1(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this process look like the second of two that torchrun has started."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    yield
    rank_zero_only.rank = 0


# ---- the checkpoint that "last" names


@pytest.mark.torchrun
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("processes", "devices", "scenes"), [(2, 1, MIXES), (4, 2, ["dirpath", "csv"])])
def test_last_is_each_partys_own(tmp_path: Path, processes: int, devices: int, scenes: list[str]) -> None:
    done = torchrun(
        processes, [str(TESTS / "scripts/restarts.py"), str(tmp_path), str(devices), *scenes], tmp_path
    )
    assert done.returncode == 0, done.stdout[-6000:]
    # 16 samples in batches of 4, which the party's processes share: an epoch's steps are made when it resumes.
    steps = 4 // devices
    for scene in scenes:
        name = scene.replace(" ", "-")
        results = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(processes)]
        assert [first["began"] for first, _ in results] == [0] * processes, scene
        assert [again["began"] for _, again in results] == [steps] * processes, scene
        for rank, (_, again) in enumerate(results):
            assert ("party-1" in again["from"]) == (rank // devices == 1), again["from"]
            assert torch.equal(again["vector"], results[0][1]["vector"])


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_last_is_the_partys_own_without_a_fit_too(tmp_path: Path, as_party_1: None, run: str) -> None:
    modules = [LittleModule(seed=party) for party in range(2)]
    for folder, module in zip(("kept", "kept/party-1"), modules, strict=True):
        trainer = quiet_trainer(tmp_path)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / folder / "last.ckpt")
    trainer = quiet_trainer(
        tmp_path,
        [FederatedAveraging(), ModelCheckpoint(tmp_path / "kept", save_last=True)],
        enable_checkpointing=True,
    )
    fresh = LittleModule(seed=7)
    options = {} if run == "predict" else {"verbose": False}
    getattr(trainer, run)(fresh, data(4, seed=9), ckpt_path="last", **options)
    assert torch.equal(fresh.vector(), modules[1].vector())


def test_a_trainer_without_federation_is_as_it_was(tmp_path: Path, as_party_1: None) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "kept")
    trainer = quiet_trainer(tmp_path, [checkpoint], enable_checkpointing=True)
    trainer.validate(LittleModule(), data(4, seed=9), verbose=False)
    assert checkpoint.dirpath == str(tmp_path / "kept")
    assert Trainer.fit.__doc__
    assert "ckpt_path" in Trainer.fit.__annotations__


# ---- metrics of the first run


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
def test_the_metrics_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    def fit(epochs: int) -> str:
        logger = CSVLogger(tmp_path, version="v")
        trainer = quiet_trainer(
            tmp_path, [FederatedAveraging()], logger=logger, max_epochs=epochs, log_every_n_steps=1
        )
        trainer.fit(LittleModule(), data(8, seed=0), data(4, seed=9))
        trainer.test(LittleModule(), data(4, seed=9), verbose=False)  # goes into the same file
        return Path(logger.log_dir, "metrics.csv").read_text()

    first = fit(1)
    assert "test_loss" in first
    second, third = fit(2), fit(3)
    folder = tmp_path / "lightning_logs/v"
    assert (folder / "metrics-1.csv").read_text() == first
    assert (folder / "metrics-2.csv").read_text() == second
    assert third not in (first, second)
