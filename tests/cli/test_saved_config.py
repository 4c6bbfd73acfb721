"""A command can be given again: it starts, and what the first run has written is as it was."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import QUIET
from lightning.pytorch.cli import SaveConfigCallback
from small_module import LittleData, LittleModule

from pellm_lightning import FederatedCLI

pytestmark = [
    # Lightning calls jsonargparse in a way that has gone out of use.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.* exists and is not empty:UserWarning"),
]

LOGGERS = {
    "none": ["--trainer.logger=false"],
    "csv": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.version=v"],
    "tensorboard": [
        "--trainer.logger=TensorBoardLogger",
        "--trainer.logger.save_dir=logs",
        "--trainer.logger.version=v",
    ],
    "remote": ["--trainer.logger=forwarding_logger.Forwarding"],
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the command line with the given words, in a new folder, with nothing on the terminal."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, **kwargs: Any) -> FederatedCLI:
        monkeypatch.setattr(sys, "argv", ["federate", *words[:1], *QUIET, *words[1:]])
        return FederatedCLI(LittleModule, LittleData, **kwargs)

    return run


def written(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def configurations(root: Path) -> list[Path]:
    return sorted(root.rglob("config*.yaml"))


@pytest.mark.parametrize("logger", LOGGERS)
def test_the_same_command_starts_again(command: Any, tmp_path: Path, logger: str) -> None:
    words = ["fit", "--trainer.log_every_n_steps=1", *LOGGERS[logger]]
    command(*words)
    first = written(tmp_path)
    (config,) = configurations(tmp_path)
    command(*words)
    second = written(tmp_path)
    assert [path.name for path in configurations(tmp_path)] == ["config.yaml"]
    for name, content in first.items():
        if name.endswith("rounds.jsonl"):
            assert second[name].startswith(content), "the record is gone on with"
        elif name.endswith("metrics.csv"):
            assert second[name.replace("metrics.csv", "metrics-1.csv")] == content
        else:
            assert second[name] == content, name
    assert yaml.safe_load(config.read_text())["trainer"]["max_epochs"] == 2


def test_another_configuration_gets_a_number(command: Any, tmp_path: Path) -> None:
    for epochs in (1, 2, 1, 3):
        command("fit", "--trainer.logger=false", f"--trainer.max_epochs={epochs}")
    found = {path.name: yaml.safe_load(path.read_text()) for path in configurations(tmp_path)}
    assert {name: config["trainer"]["max_epochs"] for name, config in found.items()} == {
        "config.yaml": 1,
        "config-1.yaml": 2,
        "config-2.yaml": 3,
    }


def test_a_test_after_a_fit_starts(command: Any, tmp_path: Path) -> None:
    command("fit", "--trainer.logger=false")
    before = (tmp_path / "config.yaml").read_bytes()
    command("test", "--trainer.logger=false")
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert (tmp_path / "config-1.yaml").exists()


def test_what_the_user_chose_is_respected(command: Any, tmp_path: Path) -> None:
    class Own(SaveConfigCallback):
        pass

    command("fit", "--trainer.logger=false", save_config_callback=None)
    assert not configurations(tmp_path)
    command("fit", "--trainer.logger=false", save_config_callback=Own)
    with pytest.raises(RuntimeError, match="to NOT exist"):
        command("fit", "--trainer.logger=false", save_config_callback=Own)
    overwrite = {"overwrite": True}
    command("fit", "--trainer.logger=false", "--trainer.max_epochs=1", save_config_kwargs=overwrite)
    assert [path.name for path in configurations(tmp_path)] == ["config.yaml"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_epochs"] == 1


@pytest.mark.parametrize("party", [0, 1])
def test_parties_with_one_log_directory_save_below_it(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, party: int
) -> None:
    launch = {"RANK": party, "WORLD_SIZE": 2, "LOCAL_RANK": party, "LOCAL_WORLD_SIZE": 2}
    with monkeypatch.context() as patch:
        for name, value in (launch | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}).items():
            patch.setenv(name, str(value))
        command("test", *LOGGERS["remote"], f"--trainer.logger.save_dir={tmp_path}/shared")
    assert configurations(tmp_path) == [tmp_path / f"shared/party-{party}/config.yaml"]
