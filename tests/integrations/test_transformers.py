"""Rounds in transformers' Trainer and TRL's: as a loop by hand, resumed exactly, best by common metrics."""

import os
import shutil
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import torchrun
from party_threads import run_parties, session_of
from paths import SCRIPTS
from tiny_language_models import word_tokenizer
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from pellm_lightning.aggregation import ResidualMean, Stacking
from pellm_lightning.comm import FederationError
from pellm_lightning.comm.topology import Topology
from pellm_lightning.integrations.transformers import FederatedCallback, see_own_gpus
from pellm_lightning.integrations.transformers_training import TransformersTraining

pytestmark = pytest.mark.torchrun
HAS_TRL, HAS_BITSANDBYTES = (find_spec(name) is not None for name in ("trl", "bitsandbytes"))
# transformers 4 divides a batch's loss by the labels before they are shifted, 8 instead of 7 in each text
# here. AdamW takes the same steps but for its epsilon.
OLD_TRANSFORMERS = version("transformers").startswith("4.")


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
    scenarios = [
        "equal",
        "seen",
        "resumed",
        "between",
        "short",
        "best",
        *([] if OLD_TRANSFORMERS else ["stopped"]),
        "lost",
    ]
    scenarios += [*(["trl"] if HAS_TRL else []), *(["quantised"] if HAS_BITSANDBYTES else []), "broken"]
    return launched(2, tmp_path_factory.mktemp("parties"), model, *scenarios)


def test_it_trains_as_a_loop_by_hand(results: dict[str, list[Any]]) -> None:
    for of_first, of_second in zip(*results["equal"], strict=True):
        for trainer, loop in (of_first, of_second):
            atol = 1e-3 if OLD_TRANSFORMERS else 0.0
            assert torch.allclose(trainer["vector"], loop["vector"], rtol=0, atol=atol)
            rounds = [round[:2] for round in trainer["rounds"]]
            assert rounds == [round[:2] for round in loop["rounds"]]
            losses = [[loss or 0.0 for *_, loss in said["rounds"]] for said in (trainer, loop)]
            # With accumulated batches the Trainer's losses come divided, and are multiplied again.
            assert losses[0] == pytest.approx(losses[1], rel=0.2 if OLD_TRANSFORMERS else 1e-6)
        assert torch.equal(of_first[0]["vector"], of_second[0]["vector"])


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed: it quantises the base")
def test_on_a_base_of_4_bits_it_trains_as_a_lightning_fit(results: dict[str, list[Any]]) -> None:
    first, second = results["quantised"]
    for party in (first, second):
        assert party["kinds"] == ["Linear4bit"] * 2
        ours, theirs = party["bases"]
        assert ours.keys() == theirs.keys()
        assert any("absmax" in name for name in ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        # transformers 4 divides losses otherwise, see above.
        atol = 1e-3 if OLD_TRANSFORMERS else 0.0
        assert torch.allclose(party["trainer"]["vector"], party["lightning"]["vector"], rtol=0, atol=atol)
        assert [r[:2] for r in party["trainer"]["rounds"]] == [r[:2] for r in party["lightning"]["rounds"]]
    assert torch.equal(first["trainer"]["vector"], second["trainer"]["vector"])


def test_each_process_of_a_launch_is_a_party(results: dict[str, list[Any]]) -> None:
    for party, seen in enumerate(results["seen"]):
        assert seen["world"] == 1, "accelerate would make one world of both"
        assert Path(seen["folder"]).name == f"party-{party}"
        assert seen["logged"] == [(0, 4), (1, 8)]
        assert seen["record"] == 4  # start, two rounds, end
        assert seen["joined"] == 2, "what accelerate must not see is there for who joins later"


def test_a_callback_serves_one_training(results: dict[str, list[Any]]) -> None:
    for seen in results["seen"]:
        assert "Make a FederatedCallback for each train()" in seen["again"]
        assert seen["hooks"] == 0


def test_it_resumes_in_the_middle_of_a_round(results: dict[str, list[Any]]) -> None:
    for resumed in results["resumed"]:
        assert torch.equal(resumed["whole"], resumed["resumed"])
        assert resumed["rounds"] == 2
    for between in results["between"]:
        assert torch.equal(between["whole"]["vector"], between["resumed"]["vector"])
        assert between["whole"]["rounds"] == between["resumed"]["rounds"]


def test_epochs_that_are_cut_short_count(results: dict[str, list[Any]]) -> None:
    assert results["short"] == [[4, 8]] * 2  # rounds every 2 epochs of 2 steps


@pytest.mark.skipif(OLD_TRANSFORMERS, reason="transformers 4 is refused what is tested here")
def test_the_last_round_comes_before_the_best_model(results: dict[str, list[Any]]) -> None:
    first, second = results["stopped"]
    assert [first["rounds"], second["rounds"]] == [3, 3]  # after steps 5 and 10, and of the last 2
    assert torch.equal(first["ended"], second["ended"])
    assert not torch.equal(first["ended"], first["best"])


def test_a_checkpoint_without_the_federated_state_is_refused(results: dict[str, list[Any]]) -> None:
    for without, of_another in results["lost"]:
        assert "resumes at step 8, but " in without
        assert "has no federation.pt" in without
        assert "resumes at step 4 of another run" in of_another


def test_the_best_model_and_the_end_are_by_common_metrics(results: dict[str, list[Any]]) -> None:
    for best, steps in zip(results["best"], [4, 16], strict=True):
        assert best["metric"] == pytest.approx((2.0 + 0.9) / 2)
        assert best["step"] == steps
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
    # What each party's Trainer has found by itself; both count alike.
    expected = [sum(losses) / 2 for losses in zip(parties[0]["losses"], parties[2]["losses"], strict=True)]
    for party in parties:
        assert [loss for *_, loss in party["rounds"]] == pytest.approx(expected, rel=1e-4)


def test_after_the_arguments_it_is_too_late(model: Path, tmp_path: Path) -> None:
    for late in launched(2, tmp_path, model, "late")["late"]:
        assert late["world"] == 2
        assert "Make FederatedCallback before TrainingArguments" in late["error"]


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("world_size", 4, "in a world of 4 processes, but a party has 1: gradients would cross"),
        ("n_gpu", 2, "over 2 GPUs by DataParallel"),
        ("auto_find_batch_size", True, "would begin this party's training anew"),
        ("deepspeed", {"zero_optimization": {}}, r"deepspeed=\.\.\.\) shards or shadows"),
        ("deepspeed_plugin", object(), r"deepspeed=\.\.\.\) shards or shadows"),
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

    with pytest.raises(FederationError, match=words):
        raise refusal_of(args)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_shards_that_accelerates_launcher_has_chosen_are_refused(tmp_path: Path, name: str) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "true")
        error = refusal_of(args)
    assert f"{name} shards or shadows a party's parameters" in str(error)


def refusal_of(args: TrainingArguments) -> FederationError:
    """Return the error with which training with these arguments does not begin."""

    def act(federation: Any) -> None:
        callback = FederatedCallback(session=session_of(federation))
        callback.on_train_begin(args, TrainerState(), TrainerControl(), model=nn.Linear(2, 2), optimizer=None)

    (error,) = run_parties(1, act, may_fail=True)
    assert isinstance(error, FederationError)
    return error


def test_the_best_model_of_transformers_4_is_not_changed_by_the_last_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    saving = {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "epoch"}
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], load_best_model_at_end=True, **saving
    )
    with pytest.raises(FederationError, match=r"needs transformers 5: version 4\.57\.1 loads the best model"):
        raise refusal_of(args)


def test_rules_that_write_the_base_are_refused() -> None:
    for rule in (ResidualMean(), Stacking()):
        with pytest.raises(ValueError, match="writes into the frozen base, which the Trainer's checkpoints"):
            FederatedCallback(aggregation=rule)


@pytest.mark.parametrize(
    ("visible", "rank", "num_parties", "seen"),
    [
        ("0,1,2,3", 2, 4, "2"),
        ("GPU-a,GPU-b", 3, 4, "GPU-b"),  # shared, as there are fewer than processes
        ("4,5,6,7", 3, 2, "6,7"),
        ("3", 2, 4, "3"),
        (None, 2, 4, "2"),
    ],
)
def test_a_party_sees_its_own_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, rank: int, num_parties: int, seen: str
) -> None:
    launched = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 4}
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is put back
        del os.environ["CUDA_VISIBLE_DEVICES"]
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        patch.setattr(torch.cuda, "is_initialized", lambda: False)
        for name, value in launched.items() | {("CUDA_VISIBLE_DEVICES", visible)}:
            if value is not None:
                patch.setenv(name, str(value))
        for _ in range(2):
            see_own_gpus(Topology.from_env(num_parties))
            assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_a_failed_event_and_a_training_that_never_begins_are_told(tmp_path: Path) -> None:
    def act(federation: Any, event: str) -> None:
        callback = FederatedCallback(session=session_of(federation), record=False, every_n_steps=1)
        args = TrainingArguments(output_dir=str(tmp_path / event), use_cpu=True, report_to=[])
        state, control, model = TrainerState(max_steps=9, global_step=0), TrainerControl(), nn.Linear(2, 2)
        if event == "none" and federation.party == 1:
            with callback:
                return
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        callback.on_train_begin(args, state, control, model=model, optimizer=optimizer)
        if federation.party == 1:
            callback.on_save(args, state, control)  # into a folder that is not there
        state.global_step = 1
        callback.on_step_end(args, state, control)

    for event, words in (("none", "its training never began"), ("save", "RuntimeError: Parent directory")):
        before = time.monotonic()
        first, _ = run_parties(2, lambda f, event=event: act(f, event), may_fail=True)
        assert isinstance(first, FederationError)
        assert words in str(first)
        assert time.monotonic() - before < 15, "not after the timeout"


@pytest.mark.parametrize("leads", [True, False])
def test_what_is_kept_below_a_quorum(tmp_path: Path, leads: bool) -> None:
    """A module that knows no save_pretrained() must not hide why its party stops."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    training = TransformersTraining(
        args, TrainerState(global_step=3), TrainerControl(), nn.Linear(2, 1), None
    )
    path = tmp_path / "stopped.ckpt"
    assert "without the optimizer" in training.save(str(path), leads=leads)
    assert path.exists() == leads
    if leads:
        saved = torch.load(path, weights_only=True)
        assert saved["step"] == 3
        assert saved["parameters"].keys() == {"weight", "bias"}
