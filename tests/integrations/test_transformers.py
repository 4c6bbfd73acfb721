"""Rounds in transformers' Trainer and TRL's: as a loop by hand, resumed exactly, best by common metrics."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import torchrun
from party_threads import run_parties
from paths import SCRIPTS
from tiny_language_models import word_tokenizer
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from pellm_lightning.comm import FederationError
from pellm_lightning.integrations.transformers import FederatedCallback

pytestmark = pytest.mark.torchrun
HAS_TRL = find_spec("trl") is not None


def launched(processes: int, folder: Path, model: Path, *scenarios: str) -> dict[str, list[Any]]:
    words = [str(SCRIPTS / "transformers_parties.py"), str(folder), str(model), *scenarios]
    done = torchrun(processes, words, folder)
    assert done.returncode == 0, done.stdout[-4000:]
    return {
        scenario: [torch.load(folder / f"{scenario}-{rank}.pt") for rank in range(processes)]
        for scenario in scenarios
    }


@pytest.fixture(scope="module")
def model(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has what TRL asks for."""
    folder = tmp_path_factory.mktemp("with-template") / "llama"
    shutil.copytree(llama, folder)
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    scenarios = ["equal", "seen", "resumed", "best", "lost", *(["trl"] if HAS_TRL else []), "broken"]
    return launched(2, tmp_path_factory.mktemp("parties"), model, *scenarios)


def test_it_trains_as_a_loop_by_hand(results: dict[str, list[Any]]) -> None:
    for of_first, of_second in zip(*results["equal"], strict=True):
        for trainer, loop in (of_first, of_second):
            assert torch.equal(trainer["vector"], loop["vector"])
            rounds = [round[:2] for round in trainer["rounds"]]
            assert rounds == [round[:2] for round in loop["rounds"]]
            losses = [[loss or 0.0 for *_, loss in said["rounds"]] for said in (trainer, loop)]
            # With accumulated batches the Trainer's losses come divided, and are multiplied again.
            assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert torch.equal(of_first[0]["vector"], of_second[0]["vector"])


def test_each_process_of_a_launch_is_a_party(results: dict[str, list[Any]]) -> None:
    for party, seen in enumerate(results["seen"]):
        assert seen["world"] == 1, "accelerate would make one world of both"
        assert Path(seen["folder"]).name == f"party-{party}"
        assert seen["logged"] == [(0, 4), (1, 8)]
        assert seen["record"] == 4  # start, two rounds, end


def test_it_resumes_in_the_middle_of_a_round(results: dict[str, list[Any]]) -> None:
    for resumed in results["resumed"]:
        assert torch.equal(resumed["whole"], resumed["resumed"])
        assert resumed["rounds"] == 2


def test_a_checkpoint_without_the_federated_state_is_refused(results: dict[str, list[Any]]) -> None:
    for error in results["lost"]:
        assert "resumes at step 8, but " in error
        assert "has no federation.pt" in error


def test_the_best_model_and_the_end_are_by_common_metrics(results: dict[str, list[Any]]) -> None:
    for best in results["best"]:
        assert best["metric"] == pytest.approx((2.0 + 0.9) / 2)
        assert best["step"] == 4
        assert torch.equal(best["vector"], best["saved"])
    assert torch.equal(*(best["vector"] for best in results["best"]))


@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed: it needs newer packages")
def test_trl_on_its_formats(results: dict[str, list[Any]]) -> None:
    first, second = results["trl"]
    assert len(first) == 3
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["vector"], other["vector"])
        assert [weight for _, weight, _ in one["rounds"]] == [4.0, 4.0]


def test_an_error_of_one_is_told_to_the_other(results: dict[str, list[Any]]) -> None:
    first, second = results["broken"]
    assert second == "ArithmeticError: no more data"
    assert first.startswith("PartyLostError: Party 1 left the federation")
    assert "no more data" in first


def test_several_processes_are_a_party(model: Path, tmp_path: Path) -> None:
    parties = launched(4, tmp_path, model, "several")["several"]
    assert [party["world"] for party in parties] == [2] * 4
    assert [party["party"] for party in parties] == [0, 0, 1, 1]
    assert all(torch.equal(parties[0]["vector"], party["vector"]) for party in parties)
    assert [weight for _, weight, _ in parties[0]["rounds"]] == [8.0, 4.0], "samples of both processes"


def test_after_the_arguments_it_is_too_late(model: Path, tmp_path: Path) -> None:
    for late in launched(2, tmp_path, model, "late")["late"]:
        assert late["world"] == 2
        assert "Make FederatedCallback before TrainingArguments" in late["error"]


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("world_size", 4, "in a world of 4 processes, but a party has 1: gradients would cross"),
        ("n_gpu", 2, "over 2 GPUs by DataParallel"),
        ("deepspeed", {"zero_optimization": {}}, r"deepspeed=\.\.\.\) shards or shadows"),
        ("fsdp", "full_shard", r"fsdp=\.\.\.\) shards or shadows"),
    ],
)
def test_what_spreads_or_shards_a_party_is_refused(
    tmp_path: Path, setting: str, value: Any, words: str
) -> None:
    class Arguments(TrainingArguments):
        pass

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    setattr(Arguments, setting, value)
    args.__class__ = Arguments
    vars(args).pop(setting, None)

    def act(federation: Any) -> None:
        callback = FederatedCallback(communicator=federation)
        callback.on_train_begin(args, TrainerState(), TrainerControl(), model=nn.Linear(2, 2), optimizer=None)

    (error,) = run_parties(1, act, may_fail=True)
    assert isinstance(error, FederationError)
    with pytest.raises(FederationError, match=words):
        raise error
