"""The command line, in this process; system/test_launched.py runs it under torchrun."""

import pickle
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import QUIET
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from small_module import LittleData, LittleModule

from pellm_lightning import FederatedAveraging, FederatedCLI, PartyEnvironment, SeparateJobs
from pellm_lightning.comm import PartyLostError
from pellm_lightning.comm.rendezvous import client

# Lightning calls jsonargparse in a way that has gone out of use.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the command line with the given words, in a new folder, with nothing on the terminal."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, model: Any = LittleModule, quiet_after: int = 1, **kwargs: Any) -> FederatedCLI:
        monkeypatch.setattr(sys, "argv", ["federate", *words[:quiet_after], *QUIET, *words[quiet_after:]])
        return FederatedCLI(model, LittleData, **kwargs)

    return run


@pytest.fixture
def launched() -> Iterator[Any]:
    """Make this process look like one that torchrun has started."""
    patch = pytest.MonkeyPatch()

    def launch(rank: int, world_size: int) -> None:
        for name, value in {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 1,
        }.items():
            patch.setenv(name, str(value))

    yield launch
    patch.undo()
    rank_zero_only.rank = 0


def test_fit_with_a_yaml(command: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        """
        model: {lr: 0.5}
        data: {samples: 12}
        federated:
          every_n_steps: 2
          weighting: uniform
          parameters: {exclude: ["*.bias"]}
          outer_optimizer:
            class_path: torch.optim.SGD
            init_args: {lr: 0.7, momentum: 0.9, nesterov: true}
        """
    )
    cli = command("fit", "--config=run.yaml", "--federated.outer_optimizer.lr=0.6")
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, FederatedAveraging)]
    assert callback.every_n_steps == 2
    assert callback.weighting == "uniform"
    group = callback.state_dict()["aggregator"]["fragments"][0]["outer_optimizer"]["param_groups"][0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.6, 0.9, True)
    assert list(callback.state_dict()["aggregator"]["shapes"]) == ["head.weight"]
    # Two epochs of three steps, a round after every two.
    assert callback.state_dict()["aggregator"]["round"] == 3
    assert cli.model.lr == 0.5


# What is set of the default SGD(lr=1), and what the optimizer's group holds then.
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "nothing": ({}, {"lr": 1.0, "momentum": 0}),
    "lr": ({"lr": 0.3}, {"lr": 0.3, "momentum": 0}),
    "momentum": ({"momentum": 0.9}, {"lr": 1.0, "momentum": 0.9}),
    "both": ({"lr": 0.7, "momentum": 0.9}, {"lr": 0.7, "momentum": 0.9}),
}


@pytest.mark.parametrize("where", ["words", "yaml"])
@pytest.mark.parametrize(("given", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_a_default_optimizer_is_configured_setting_by_setting(
    command: Any, given: dict[str, Any], expected: dict[str, Any], where: str
) -> None:
    if where == "yaml":
        federated = {"outer_optimizer": {"init_args": given}} if given else {}
        Path("run.yaml").write_text(yaml.safe_dump({"federated": federated}))
        words = ["--config=run.yaml"]
    else:
        words = [f"--federated.outer_optimizer.{name}={value}" for name, value in given.items()]
    cli = command("fit", *words)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, FederatedAveraging)]
    optimizer = callback.outer_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.SGD
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected
    again = pickle.loads(pickle.dumps(callback))
    assert again.outer_optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults == optimizer.defaults


@pytest.mark.parametrize("where", ["one", "list"])
def test_the_callback_of_a_plain_lightning_cli(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    callbacks: dict[str, Any] = {
        "one": ["--trainer.callbacks=FederatedAveraging"],
        "list": ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=FederatedAveraging"],
    }
    words = [*callbacks[where], "--trainer.callbacks.outer_optimizer.lr=0.3"]
    monkeypatch.setattr(sys, "argv", ["plain"])
    cli = LightningCLI(LittleModule, LittleData, seed_everything_default=False, args=words, run=False)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, FederatedAveraging)]
    assert callback.outer_optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.3


@pytest.mark.parametrize("task", ["CausalLM", "TextClassification"])
def test_the_optimizer_of_a_ready_task(command: Any, capsys: pytest.CaptureFixture[str], task: str) -> None:
    words = ["--model.model=folder", "--model.optimizer.lr=0.25", "--print_config"]
    words += ["--model.num_labels=3"] if task == "TextClassification" else []
    with pytest.raises(SystemExit) as stopped:
        command("fit", f"--model=pellm_lightning.tasks.{task}", *words, subclass_mode_model=True, model=None)
    assert stopped.value.code == 0
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    settings = optimizer["init_args"]
    assert (settings["lr"], settings["weight_decay"]) == (0.25, 0.01)


def test_a_compressed_exchange_by_yaml(command: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        """
        federated:
          exchange: {class_path: pellm_lightning.exchange.Quantized, init_args: {bits: 4}}
        """
    )
    cli = command("fit", "--config=run.yaml", "--federated.exchange.error_feedback=true")
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, FederatedAveraging)]
    assert repr(callback.exchange) == "Quantized(bits=4, block_size=128, error_feedback=True, seed=0)"
    assert len(callback.state_dict()["aggregator"]["error_feedback"][0]["residuals"])
    with pytest.raises(SystemExit):
        command("fit", "--federated.exchange=Quantized", "--federated.exchange.bits=2")
    command("fit", "--federated.exchange=TopK", "--federated.exchange.k=8")
    command("fit", "--federated.exchange=Cast")


def test_a_cap_on_shares_is_set_on_the_command_line(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("fit", "--federated.weighting.max_share=0.3", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["federated"]["weighting"] == {
        "by": "samples",
        "max_share": 0.3,
    }
    with pytest.raises(ValueError, match=r"max_share=3\.0 must be above 0 and at most 1"):
        command("fit", "--federated.weighting.max_share=3")


def test_the_printed_configuration_runs_again(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("fit", "--federated.weighting=2.5", "--print_config")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["num_parties"] is None
    assert config["federated"] == {
        "every_n_epochs": None,
        "every_n_steps": None,
        "every_n_seconds": None,
        "weighting": 2.5,
        "aggregation": None,
        "exchange": None,
        "privacy": None,
        "overlap": None,
        "parameters": None,
        "outer_optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": config["federated"]["outer_optimizer"]["init_args"],
        },
        "outer_scheduler": None,
        "inner_optimizer_state": "keep",
        "on_nonfinite": "exclude",
        "quorum": "majority",
        "timeout_s": 1800,
        "record": True,
        "jobs": None,
        "simulate": None,
    }
    assert config["federated"]["outer_optimizer"]["init_args"]["lr"] == 1.0
    (tmp_path / "printed.yaml").write_text(printed)
    cli = command("fit", "--config=printed.yaml")
    assert float(cli.trainer.callback_metrics["federated/weight"]) == 2.5


def test_each_institution_keeps_its_own_file(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"rendezvous": "tcp://h:1", "name": "a", "roster": ["a", "b"], "membership": {"wait_s": 2.0}}
    (tmp_path / "clinic-a.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(SystemExit) as stopped:
        command("fit", "--federated.jobs=clinic-a.yaml", "--federated.jobs.name=b", "--print_config")
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["federated"]["jobs"]
    jobs = SeparateJobs.from_config(printed)
    assert jobs is not None
    assert (jobs.name, list(jobs.roster), jobs.membership.wait_s) == ("b", ["a", "b"], 2.0)


def test_a_fit_joins_as_its_institutions_file_says(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "connect", partial(client.connect, retry_s=0.2))  # instead of 10 s
    own = {
        "rendezvous": "tcp://127.0.0.1:1",
        "name": "a",
        "roster": ["a", "b"],
        "membership": {"wait_s": 0.1},
    }
    (tmp_path / "clinic-a.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(PartyLostError, match="Party a could not join"):  # nobody listens there
        command("fit", "--federated.jobs=clinic-a.yaml")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_validate_test_and_predict(command: Any, tmp_path: Path) -> None:
    fitted = command("fit")
    path = str(tmp_path / "end.ckpt")
    fitted.trainer.save_checkpoint(path)
    for verb, metric in (("validate", "val_loss"), ("test", "test_loss")):
        cli = command(verb, f"--ckpt_path={path}")
        expected = torch.nn.functional.cross_entropy(*_logits(fitted.model))
        assert float(cli.trainer.callback_metrics[metric]) == pytest.approx(float(expected), rel=1e-6)
    cli = command("predict", f"--ckpt_path={path}")
    assert torch.equal(cli.model.vector(), fitted.model.vector())


def _logits(module: LittleModule) -> tuple[torch.Tensor, torch.Tensor]:
    (batch,) = LittleData().val_dataloader()
    with torch.no_grad():
        return module(batch[0]), batch[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--federated.evry_n_steps=2"], "--federated.evry_n_steps=2"),
        (["--federated.weighting=sample"], "federated.weighting: "),
        (["--federated.every_n_steps=two"], "federated.every_n_steps: "),
        (["--federated.inner_optimizer_state=clear"], "federated.inner_optimizer_state: "),
        (["--federated.outer_optimizer=Adm"], "federated.outer_optimizer: "),
        (["--num_parties=two"], "num_parties: "),
    ],
)
def test_a_typo_names_the_option(
    command: Any, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("fit", *words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert message in error
    assert len(error.splitlines()) < 12, "the message must not be buried"


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("federated: {evry_n_steps: 2}", "federated.evry_n_steps"),
        ("federate: {include: []}", "federate.include"),
    ],
)
def test_a_typo_in_a_yaml_names_the_option(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, option: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command("fit", "--config=run.yaml")
    assert stopped.value.code == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert f"does not accept option '{option}'" in error


def test_a_bad_value_is_told_as_by_the_callback(command: Any) -> None:
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        command("fit", "--federated.every_n_steps=0")


def test_more_parties_than_processes(command: Any) -> None:
    with pytest.raises(ValueError, match=r"num_parties=2 does not divide the 1 launched process.*torchrun"):
        command("fit", "--num_parties=2")


def test_the_help_tells_every_option(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("fit", "--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--federated.every_n_steps" in text
    assert "Instead, a round after every n optimizer steps" in text
    assert "Number of parties among the launched processes" in text


def test_the_help_begins_with_what_is_ours(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("fit", "--help")
    text = capsys.readouterr().out
    usage, _, rest = text.partition("\n\n")
    assert len(usage.splitlines()) < 3
    options = [line.split()[0] for line in rest.splitlines() if line.startswith("  --")]
    ours = [option for option in options if option.startswith("--federated.")]
    assert len(ours) > 15
    assert options.index(ours[-1]) < options.index("--trainer")


@pytest.mark.parametrize("verb", ["fit", "validate", "doctor"])
def test_only_the_parser_of_the_command_that_runs_is_built(
    command: Any, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    built: list[Any] = []
    add = FederatedCLI.add_default_arguments_to_parser
    monkeypatch.setattr(
        FederatedCLI,
        "add_default_arguments_to_parser",
        lambda cli, parser: (built.append(parser), add(cli, parser)),
    )
    with pytest.raises(SystemExit):
        command(verb, "--print_config")
    assert len(built) == 1


def test_a_configuration_before_the_command_has_a_section_for_each(command: Any, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text("fit: {model: {lr: 0.5}}\ntest: {model: {lr: 0.3}}\n")
    for verb, lr in (("fit", 0.5), ("test", 0.3)):
        assert command("--config=all.yaml", verb, quiet_after=2).model.lr == lr


def test_each_party_has_its_own_world_and_folder(command: Any, launched: Any, tmp_path: Path) -> None:
    launched(1, 2)
    cli = command("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}/logs", run=False)
    assert cli.trainer.default_root_dir == str(tmp_path / "party-1")
    (logger,) = cli.trainer.loggers
    assert isinstance(logger, CSVLogger)
    assert logger.save_dir == f"{tmp_path}/logs/party-1"
    assert rank_zero_only.rank == 0
    environment = cli.trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, PartyEnvironment)
    assert (environment.topology.party, environment.topology.num_parties) == (1, 2)
    assert environment.timeout_s == 1800


def test_two_parties_of_two(command: Any, launched: Any, tmp_path: Path) -> None:
    launched(3, 4)
    cli = command(
        "--num_parties=2",
        "--federated.timeout_s=77",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.logger=false",
        f"--trainer.default_root_dir={tmp_path}/runs",
        run=False,
    )
    assert cli.trainer.default_root_dir == f"{tmp_path}/runs/party-1"
    environment = cli.trainer._accelerator_connector.cluster_environment
    assert (environment.topology.party, environment.topology.rank_in_party) == (1, 1)
    assert environment.timeout_s == 77
    assert rank_zero_only.rank == 1


def test_a_party_environment_of_the_users_own_is_kept(command: Any, launched: Any, tmp_path: Path) -> None:
    launched(2, 4)
    (tmp_path / "run.yaml").write_text(
        """
        trainer:
          devices: 2
          strategy: ddp
          logger: false
          plugins:
            - class_path: pellm_lightning.PartyEnvironment
              init_args: {num_parties: 2, timeout_s: 55}
        """
    )
    cli = command("--config=run.yaml", "--trainer.devices=2", run=False)
    environment = cli.trainer._accelerator_connector.cluster_environment
    assert environment.timeout_s == 55
    assert cli.trainer.default_root_dir == str(tmp_path / "party-1")
    assert rank_zero_only.rank == 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_checkpoint_path_names_the_party(command: Any, launched: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved-by-party-1.ckpt"
    fitted = command("fit")
    fitted.trainer.save_checkpoint(saved)
    launched(1, 2)
    cli = command("validate", f"--ckpt_path={tmp_path}/saved-by-party-{{party}}.ckpt")
    assert cli.config["validate"]["ckpt_path"] == str(saved)
    assert torch.equal(cli.model.vector(), fitted.model.vector())
