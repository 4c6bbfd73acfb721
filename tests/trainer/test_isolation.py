"""No two parties write the same file, and one terminal stays readable."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from party_threads import Classifier, ValidatedClassifier, data, fit_parties, quiet_trainer

from pellm_lightning import FederationError
from pellm_lightning.trainer import isolation


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("runs", "runs/party-1"),
        ("runs/party-1", "runs/party-1"),
        ("runs/party-1/logs", "runs/party-1/logs"),
        ("runs/party-0", "runs/party-0/party-1"),
        ("runs/party-12", "runs/party-12/party-1"),
        (".", "./party-1"),
    ],
)
def test_below(path: str, expected: str) -> None:
    assert isolation.below(path, 1) == expected


class Remote(Logger):
    """A logger of somebody else, with a folder or without."""

    def __init__(self, log_dir: str | None = None) -> None:
        super().__init__()
        self.folder = log_dir

    @property
    def name(self) -> str:
        return "remote"

    @property
    def version(self) -> int:
        return 0

    @property
    def log_dir(self) -> str | None:
        return self.folder

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_loggers_are_moved_and_keep_their_settings(tmp_path: Path) -> None:
    remote = Remote()
    loggers = [
        CSVLogger(tmp_path / "csv", "name", "first", prefix="p", flush_logs_every_n_steps=7),
        TensorBoardLogger(
            tmp_path / "tb", "name", "second", default_hp_metric=False, prefix="q", sub_dir="s", max_queue=3
        ),
        CSVLogger(tmp_path / "party-2", "already"),
        remote,
    ]  # fmt: skip
    trainer = quiet_trainer(tmp_path, logger=loggers)
    isolation.separate_files(trainer, 2)
    csv, tensorboard, already, other = trainer.loggers
    assert csv.log_dir == str(tmp_path / "csv/party-2/name/first")
    assert (csv._prefix, csv._flush_logs_every_n_steps) == ("p", 7)
    assert tensorboard.log_dir == str(tmp_path / "tb/party-2/name/second/s")
    assert (tensorboard._prefix, tensorboard._default_hp_metric) == ("q", False)
    assert tensorboard._kwargs["max_queue"] == 3
    assert already is loggers[2]
    assert other is remote


def test_a_version_is_counted_in_the_partys_own_folder(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs/version_4").mkdir(parents=True)
    (tmp_path / "party-1/lightning_logs/version_1").mkdir(parents=True)
    trainer = quiet_trainer(tmp_path, logger=[CSVLogger(tmp_path), TensorBoardLogger(tmp_path)])
    assert [logger.version for logger in trainer.loggers] == [5, 5]
    isolation.separate_files(trainer, 1)
    expected = str(tmp_path / "party-1/lightning_logs/version_2")
    assert [logger.log_dir for logger in trainer.loggers] == [expected, expected]


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "remote", "none"])
@pytest.mark.parametrize("dirpath", [None, "given", "party-1"])
def test_checkpoints_are_moved(tmp_path: Path, logger: str, dirpath: str | None) -> None:
    made: Any = {
        "csv": lambda: CSVLogger(tmp_path, version="v"),
        "tensorboard": lambda: TensorBoardLogger(tmp_path, version="v"),
        "remote": Remote,
        "none": lambda: False,
    }
    checkpoint = ModelCheckpoint(None if dirpath is None else tmp_path / dirpath)
    trainer = quiet_trainer(tmp_path, [checkpoint], logger=made[logger](), enable_checkpointing=True)
    isolation.separate_files(trainer, 1)
    checkpoint.setup(trainer, Classifier(), "fit")  # where ModelCheckpoint resolves its folder
    if dirpath is not None:
        expected = tmp_path / "given/party-1" if dirpath == "given" else tmp_path / "party-1"
    elif logger in ("csv", "tensorboard"):
        expected = tmp_path / "party-1/lightning_logs/v/checkpoints"
    else:
        expected = tmp_path / "party-1/checkpoints"
    assert Path(checkpoint.dirpath) == expected


def test_the_profiler_is_moved(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, profiler=SimpleProfiler(dirpath=tmp_path, filename="times"))
    isolation.separate_files(trainer, 3)
    assert trainer.profiler.dirpath == str(tmp_path / "party-3")
    trainer = quiet_trainer(tmp_path, profiler=PassThroughProfiler())
    isolation.separate_files(trainer, 3)
    assert trainer.profiler.dirpath is None


def test_what_a_party_writes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    checkpoint = ModelCheckpoint(tmp_path / "kept")
    loggers = [CSVLogger(tmp_path, version="v"), Remote(), Remote("s3://bucket/run")]
    trainer = quiet_trainer(tmp_path, [checkpoint], logger=loggers, enable_checkpointing=True)
    assert isolation.written_paths(trainer) == [
        f"host:{tmp_path}/kept",
        f"host:{tmp_path}/lightning_logs/v",
        "host:s3://bucket/run",
    ]
    relative = quiet_trainer(tmp_path, logger=[Remote("here")])
    assert isolation.written_paths(relative) == [f"host:{os.getcwd()}/here"]
    assert isolation.written_paths(quiet_trainer(tmp_path)) == []


def test_put_first_leaves_the_old_list_alone(tmp_path: Path) -> None:
    ours, other = Callback(), Callback()
    trainer = quiet_trainer(tmp_path, [other, ours])
    walked = isolation.callbacks_of(trainer)
    before = list(walked)
    isolation.put_first(trainer, ours)
    assert walked == before
    assert isolation.callbacks_of(trainer)[0] is ours
    assert sorted(map(id, isolation.callbacks_of(trainer))) == sorted(map(id, before))


def test_hush_leaves_the_terminal_to_party_0(tmp_path: Path) -> None:
    bar = TQDMProgressBar()
    trainer = quiet_trainer(
        tmp_path, [bar, ModelSummary()], enable_progress_bar=True, enable_model_summary=True
    )
    isolation.silence(trainer)
    assert bar.is_disabled
    assert not any(isinstance(c, ModelSummary) for c in isolation.callbacks_of(trainer))
    assert logging.getLogger("lightning.pytorch").level == logging.WARNING
    isolation.silence(quiet_trainer(tmp_path))


# ---- whole fits


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "mix", ["default", "csv", "tensorboard", "both", "none", "csv and dirpath", "none and dirpath"]
)
def test_no_mix_makes_two_parties_write_one_file(tmp_path: Path, mix: str) -> None:
    loggers: dict[str, Any] = {
        "default": lambda: True,
        "csv": lambda: CSVLogger(tmp_path, version="v"),
        "tensorboard": lambda: TensorBoardLogger(tmp_path, version="v"),
        "both": lambda: [TensorBoardLogger(tmp_path, version="v"), CSVLogger(tmp_path, version="w")],
        "none": lambda: False,
    }

    def fit(party: int, federated: Any) -> list[str]:
        checkpoint = ModelCheckpoint(
            tmp_path / "kept" if "dirpath" in mix else None, filename="last", monitor="federated/val_loss"
        )
        trainer = quiet_trainer(
            tmp_path,
            [checkpoint, federated()],
            logger=loggers[mix.split()[0]](),
            enable_checkpointing=True,
            max_epochs=1,
            log_every_n_steps=1,
        )
        module = ValidatedClassifier(seed=party)
        trainer.fit(module, data(8, seed=party), data(4, seed=9))
        assert Path(checkpoint.best_model_path).is_file()
        saved = torch.load(checkpoint.best_model_path)["state_dict"]
        assert torch.equal(saved["head.weight"], module.head.weight)
        return [checkpoint.best_model_path, *(str(logger.log_dir) for logger in trainer.loggers)]

    first, second = fit_parties(2, fit)
    assert set(first).isdisjoint(second)
    assert all("party-1" in path for path in second)
    assert not any("party-1" in path for path in first)
    for party, paths in enumerate((first, second)):
        for path in map(Path, paths[1:]):
            written = {file.name.partition(".")[0] for file in path.iterdir() if file.is_file()}
            assert written & {"events", "metrics"}, f"party {party}'s logger wrote nothing into {path}"
    # Nothing of party 1 is left where party 0 writes.
    own = {file for file in files_below(tmp_path) if "party-1" not in file}
    assert len([file for file in own if "tfevents" in file]) == (mix in ("default", "tensorboard", "both"))


def test_a_logger_that_cannot_be_moved_is_refused_with_the_cure(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated()], logger=[Remote(str(tmp_path / "shared"))])
        trainer.fit(Classifier(seed=party), data(4, seed=party))

    for error in fit_parties(3, fit, may_fail=True):
        assert isinstance(error, FederationError)
        assert "Parties 0 and 1 would both write to" in str(error)
        assert str(tmp_path / "shared") in str(error)
        assert (
            "\n    party = os.environ['RANK']\n    logger = MyLogger(save_dir=f'logs/party-{party}')"
            in str(error)
        )


def test_such_a_logger_with_a_folder_per_party_is_welcome(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(
            tmp_path, [federated()], logger=[Remote(str(tmp_path / f"party-{party}"))], max_epochs=1
        )
        trainer.fit(Classifier(seed=party), data(4, seed=party))

    fit_parties(2, fit)
