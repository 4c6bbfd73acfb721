"""Real processes started by torchrun: one launch answers many tests. See tests/scripts/scenarios.py."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fedavg_oracle import fedavg
from fork_server import python
from launch import process_environ, torchrun
from lora_module import Tuned, assert_same
from party_threads import Classifier, data, fit_parties, quiet_trainer
from paths import EXAMPLES, SCRIPTS

from pellm_lightning import Overlap

sys.path.insert(0, str(SCRIPTS))

pytestmark = [pytest.mark.torchrun, pytest.mark.timeout(180)]


class Launch:
    """The answers of all processes to the scenarios of one launch."""

    def __init__(self, processes: int, scenarios: Sequence[str], out: Path) -> None:
        self.out, self.processes = out, processes
        words = [str(SCRIPTS / "scenarios.py"), str(out), *scenarios]
        done = torchrun(processes, words, out)
        self.returncode, self.output, self.ended = done.returncode, done.stdout, time.time()

    def __getitem__(self, scenario: str) -> list[Any]:
        paths = [self.out / f"{scenario}-{rank}.pt" for rank in range(self.processes)]
        missing = [path.name for path in paths if not path.exists()]
        assert not missing, f"{missing} missing:\n{self.output[-6000:]}"
        return [torch.load(path) for path in paths]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    scenarios = ("bits", "twice", "alone", "files", "unknown_logger", "commands")
    return Launch(2, scenarios, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(3, ("indivisible", "ddp_over_parties", "failure"), tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(4, ("ddp", "ddp_overlap", "ddp_products", "ddp_drift"), tmp_path_factory.mktemp("four"))


@pytest.fixture
def scenarios(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script as a module of this process, for what threads do as its processes did."""
    monkeypatch.setattr(sys, "argv", ["scenarios", str(tmp_path)])
    os.environ["RANK"] = "0"
    import scenarios

    del os.environ["RANK"]
    return scenarios


# ---- without a launcher

ALONE = """
import os
import sys
from pathlib import Path

import torch
from party_threads import Classifier, dataset, quiet_trainer
from torch.utils.data import DataLoader

from pellm_lightning import FederatedAveraging

sys.executable = os.environ["PYTHON_EXEC"]  # what DDPStrategy starts

if __name__ == "__main__":
    module = Classifier(seed=0)
    callback = FederatedAveraging()
    trainer = quiet_trainer(".", [callback], devices=2, strategy=sys.argv[1], max_epochs=1)
    # A generator of its own is not sent to a process that is spawned.
    trainer.fit(module, DataLoader(dataset(16, seed=1), batch_size=8))
    if trainer.is_global_zero:
        weights = [done.weight for done in callback.rounds]  # empty where the processes have ended
        torch.save({"vector": module.vector(), "weights": weights}, "answer.pt")
"""


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork"])
def test_processes_that_lightning_starts_are_one_party(tmp_path: Path, strategy: str) -> None:
    """Two processes with half of 16 samples each make the step of one with all of them."""
    (tmp_path / "alone.py").write_text(ALONE)
    # A fork of a fork is refused by a CUDA build of torch, of which an import has counted the devices.
    program = sys.executable if strategy == "ddp_fork" else python()
    done = subprocess.run(
        [program, "alone.py", strategy],
        cwd=tmp_path,
        env=process_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "the 2 processes of this Trainer are that one party" in done.stdout
    answer = torch.load(tmp_path / "answer.pt")
    assert answer["weights"] == ([16.0] if strategy == "ddp" else [])
    central = fedavg(
        Classifier(seed=0), [list(data(16, seed=1, batch_size=16))], rounds=1, steps=1, weights=[[1]]
    )
    # One step of about ten roundings (2^-24) of numbers below 2.
    torch.testing.assert_close(answer["vector"].double(), central, rtol=0, atol=1.2e-6)


# ---- two processes


def test_threads_equal_torchrun_to_the_bit(two: Launch, scenarios: Any, tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> dict[str, Any]:
        return scenarios.fit_uneven(tmp_path, party, federated(**scenarios.DILOCO))

    for thread, process in zip(fit_parties(2, fit), two["bits"], strict=True):
        assert torch.equal(thread["vector"], process["vector"])
        assert thread["rounds"] == process["rounds"]
        # Party 0 makes 12 steps, party 1 only 5, and then answers.
        assert [done["active_parties"] for done in thread["rounds"]] == [2, 2, 1, 1]
        assert thread["val_loss"] == process["val_loss"]


def test_a_second_and_third_fit_in_the_same_processes(two: Launch) -> None:
    for first, again in zip(two["bits"], two["twice"], strict=True):
        for fit in again:
            assert torch.equal(fit["vector"], first["vector"])
            assert fit["rounds"] == first["rounds"]


def test_a_party_validates_alone(two: Launch) -> None:
    assert two["alone"][1] < 10


@pytest.mark.parametrize("mix", ["default", "csv", "tensorboard", "both", "none", "none and dirpath"])
def test_no_two_parties_open_the_same_file(two: Launch, mix: str) -> None:
    first, second = (answer[mix] for answer in two["files"])
    assert set(first["opened"]).isdisjoint(second["opened"])
    # What is left of party 1 is its own. (In a second fit of a process a logger of Lightning has opened its
    # event file before a callback can move it; that file is withdrawn.)
    assert all("party-1" in path for path in second["opened"] if Path(path).exists())
    assert not any("party-1" in path for path in first["opened"])
    for answer in (first, second):
        assert answer["checkpoint"] in answer["opened"]
        kinds = {Path(path).name.partition(".")[0] for path in answer["opened"]}
        wanted = {"csv": {"metrics"}, "both": {"metrics", "events"}}.get(mix, set())
        wanted |= {"events"} if mix in ("default", "tensorboard") else set()
        assert wanted <= kinds, "every party's logger writes"
        assert all(Path(path).is_dir() for path in answer["logs"])


def test_an_unknown_logger_in_a_shared_folder_is_refused(two: Launch) -> None:
    for error in two["unknown_logger"]:
        assert error.startswith("MismatchError: Parties 0 and 1 would both write to")
        assert "logger = MyLogger(save_dir=f'logs/party-{party}')" in error


def test_the_command_line_fits_and_evaluates(two: Launch) -> None:
    first, second = two["commands"]
    assert torch.equal(first["vector"], second["vector"])
    for party, answer in enumerate((first, second)):
        assert answer["parties"] == 2
        assert f"command/party-{party}/lightning_logs" in answer["checkpoint"]
        assert (two.out / answer["log_dir"] / "config.yaml").is_file()
        assert answer["validate"]["val_loss"] == answer["test"]["test_loss"]
        assert not any(name.startswith("federated/") for name in answer["validate"])
    # Each evaluated on its own data.
    assert first["validate"]["val_loss"] != second["validate"]["val_loss"]


def test_the_launch_of_two_succeeded(two: Launch) -> None:
    assert two.returncode == 0, two.output[-6000:]


# ---- three processes


def test_processes_that_do_not_divide_into_parties(three: Launch) -> None:
    for rank, error in enumerate(three["indivisible"]):
        assert error.startswith(
            f"ValueError: num_parties=2 does not divide the 3 launched process(es) (rank {rank})"
        )


def test_ddp_over_parties_is_refused_by_all(three: Launch) -> None:
    for error in three["ddp_over_parties"]:
        assert "DDPStrategy spans 3 processes, but a party has 1 (3 parties)" in error
        assert "plugins=[PartyEnvironment(num_parties=...)]" in error


def test_a_failing_party_ends_the_job_in_seconds_with_a_reason(three: Launch) -> None:
    assert three.returncode != 0
    assert three.ended - min(three["failing"]) < 30, "timeout_s is 120"
    first, failed, last = three["failure"]
    assert failed == "OSError: disk full at party 1"
    for error in (first, last):
        assert error.startswith("PartyLostError: Party 1 left the federation")
        assert "OSError: disk full at party 1" in error
    assert "Party 1 left the federation" in three.output
    assert "disk full at party 1" in three.output


# ---- four processes, two parties


def test_parties_of_two_processes_equal_parties_of_one(four: Launch, scenarios: Any, tmp_path: Path) -> None:
    """DDP(2) with batches of 2 a process, against one process with batches of 4: the same global batches."""
    assert four.returncode == 0, four.output[-6000:]
    answers = [whole for whole, _ in four["ddp"]]
    assert all(torch.equal(answers[0]["vector"], other["vector"]) for other in answers)

    def fit(party: int, federated: Any) -> dict[str, Any]:
        callback = federated(**scenarios.DILOCO)
        return scenarios.fit_pairs(tmp_path / str(party), party, quiet_trainer, callback, 4)

    for party, expected in enumerate(fit_parties(2, fit)):
        answer = answers[2 * party]
        # Eight steps of lr 0.1; a mean of two means has one more float32 rounding of gradients below 1.
        torch.testing.assert_close(answer["vector"], expected["vector"], rtol=0, atol=2e-6)
        assert answer["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        assert answer["first_only"] == 0.25
        for done, wanted in zip(answer["rounds"], expected["rounds"], strict=True):
            assert {k: done[k] for k in ("round", "step", "weight", "total_weight")} == {
                k: wanted[k] for k in ("round", "step", "weight", "total_weight")
            }
            assert done["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_only_a_partys_first_process_writes(four: Launch) -> None:
    first, _, second, _ = (whole for whole, _ in four["ddp"])
    assert [Path(answer["dirpath"]).name for answer in (first, second)] == ["whole", "party-1"]
    for answer in (first, second):
        checkpoints = [name for name in answer["files"] if name != "rounds.jsonl"]
        assert checkpoints == [f"step={step}.ckpt" for step in range(1, 9)]
    logs = four.out / "logs"
    assert not any("party-" in path for path in first["logs"])
    assert all(path.startswith(str(logs / "party-1")) for path in second["logs"])
    for answer in (first, second):
        names = [file.name.partition(".")[0] for path in set(answer["logs"]) for file in Path(path).iterdir()]
        assert {"events", "metrics"} <= set(names)
    assert len(list(logs.rglob("events.*"))) == 2, "what party 1 began where party 0 writes was withdrawn"
    assert len(list(logs.rglob("metrics.csv"))) == 2


def test_parties_of_two_processes_resume_to_the_bit(four: Launch) -> None:
    for whole, resumed in four["ddp"]:
        assert torch.equal(whole["vector"], resumed["vector"])
        # Rounds after steps 3, 6 and 8; resumed after step 4, with the samples of that step.
        assert [done["step"] for done in resumed["rounds"]] == [6, 8]
        for done, again in zip(whole["rounds"][1:], resumed["rounds"], strict=True):
            assert done["weight"] == again["weight"]
            assert done["update_norm"] == again["update_norm"]


def test_rounds_land_alike_in_all_processes_of_a_party(four: Launch, scenarios: Any, tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> torch.Tensor:
        callback = federated(**scenarios.DILOCO, overlap=Overlap(2))
        return scenarios.fit_pairs(tmp_path / str(party), party, quiet_trainer, callback, 4)

    expected = fit_parties(2, fit)
    for rank, (whole, resumed, by_clock) in enumerate(four["ddp_overlap"]):
        assert torch.equal(whole["vector"], four["ddp_overlap"][0][0]["vector"])
        assert torch.equal(whole["vector"], resumed["vector"])
        assert torch.equal(by_clock["vector"], four["ddp_overlap"][0][2]["vector"])
        torch.testing.assert_close(whole["vector"], expected[rank // 2]["vector"], rtol=0, atol=2e-6)
        # Begun after steps 3 and 6; the last at the end. Resumed after step 4.
        assert [done["step"] for done in whole["rounds"]] == [5, 8, 8]


@pytest.mark.parametrize("name", ["FedProx", "SCAFFOLD", "FedNova", "FedDyn"])
def test_drift_is_corrected_alike_in_all_processes_of_a_party(
    four: Launch, scenarios: Any, tmp_path: Path, name: str
) -> None:
    answers = [answer[name] for answer in four["ddp_drift"]]
    for vector in (vector for both in answers for vector in both):
        assert torch.equal(vector, answers[0][0])

    def fit(party: int, federated: Any) -> torch.Tensor:
        root = tmp_path / str(party)
        return scenarios.fit_corrected(root, party, quiet_trainer, federated(every_n_steps=3), name, 4)

    # Some twenty steps of lr 0.1, each with one more rounding of a mean; FedDyn divides by alpha = 0.5.
    torch.testing.assert_close(answers[0][0], fit_parties(2, fit)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["low rank", "residual", "alternating"])
def test_lora_parties_of_two_processes_equal_parties_of_one(
    four: Launch, scenarios: Any, tmp_path: Path, name: str
) -> None:
    """The rule's result reaches a party's second process, base weights included."""
    answers = [answer[name] for answer in four["ddp_products"]]
    for other in answers[1:]:
        assert_same(answers[0]["trained"], other["trained"])
        assert_same(answers[0]["bases"], other["bases"])
    written = [
        key for key, base in Tuned(0).bases().items() if not torch.equal(base, answers[1]["bases"][key])
    ]
    assert bool(written) == (name == "residual")

    def fit(party: int, federated: Any) -> dict[str, Any]:
        callback = federated(every_n_steps=2, aggregation=scenarios.RULES[name])
        return scenarios.fit_products(tmp_path, party, quiet_trainer, callback, 4)

    for expected in fit_parties(2, fit):
        # Four steps of lr 0.1; a mean of two means has one more float32 rounding of gradients below 1.
        for weight, wanted in zip(answers[3]["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(weight, wanted, rtol=0, atol=2e-6)
        assert len(expected["deviation"]) == 2
        # Differences of products are only as good as the rounding of what is subtracted.
        assert answers[0]["deviation"] == pytest.approx(expected["deviation"], rel=1e-2, abs=1e-5)


# ---- the terminal


def test_one_terminal_stays_readable(tmp_path: Path) -> None:
    words = [
        "-m", "pellm_lightning", "fit", "--model=small_module.LittleModule", "--data=small_module.LittleData",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=2", "--seed_everything=1",
        "--federated.every_n_steps=2",
    ]  # fmt: skip
    done = torchrun(2, words, tmp_path, ["--tee=3"])
    assert done.returncode == 0, done.stdout[-6000:]
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split("[\n\r]", done.stdout)]
    own = [
        [line.partition("]:")[2] for line in lines if line.startswith(f"[default{rank}]:")]
        for rank in range(2)
    ]
    count = partial(_count, own)
    assert count("Trainable params") == [1, 0], "one model summary"
    assert count("GPU available") == [1, 0]
    assert count("Epoch ") == [0, 0], "no bar where there is no terminal"
    assert count("] round ") == [3, 0], "but a line a round"
    assert count("federation of 2 parties") == [1, 0]
    assert count("[party 0] parties 0 and 1 write to") == [1, 0]
    assert count("Tip") == count("TPU") == [0, 0]
    # What party 1 says, such as a warning, is marked as its own.
    said = [line for line in own[1] if line.strip() and ".py:" not in line]
    assert all(line.startswith(("[party 1]", "[rank: 1]")) for line in said), said
    for party in range(2):
        below = tmp_path / f"party-{party}" / "lightning_logs" / "version_0"
        assert (below / "config.yaml").is_file()
        assert list(below.glob("events.*"))
        assert list(below.glob("checkpoints/*.ckpt"))


def test_an_example_says_little_before_its_first_round(tmp_path: Path, bert: str) -> None:
    rows = [f"w{k} w{k % 7},{('1790-1860', '1861-1945', '1946-2026')[k % 3]},p" for k in range(90)]
    (tmp_path / "table.csv").write_text("\n".join(["text,era,president", *rows]))
    words = [
        "-m", "pellm_lightning", "fit", f"--config={EXAMPLES / 'classification.yaml'}",
        f"--model.model={bert}",
        f"--data.tokenizer={bert}", "--data.files=table.csv", "--data.max_length=1", "--data.alpha=100",
        "--trainer.max_epochs=1",
    ]  # fmt: skip
    # Of processes that have imported nothing: packages read at import how much they print.
    done = torchrun(3, words, tmp_path, program=sys.executable)
    assert done.returncode == 0, done.stdout[-6000:]
    before, _, after = done.stdout.partition("[party 0] round 0: 3 of 3 parties trained")
    assert len(before.splitlines()) <= 15, before
    assert after.count("] round ") == 0, "one line, not one for each party"
    # Who takes part, what leaves, how much a round sends, by which rule, and where each party writes.
    summary = re.compile(
        r"\[party 0\] federation of 3 parties: [\d,]+ of [\d,]+ parameters leave a party \(.* %\),"
        r" .*B per round\n"
        r"(?:.*\n)*.*aggregated by LowRankMean.*\n"
        r"\[party 0\] parties 0, 1 and 2 write to .*/party-<k>/lightning_logs/version_0\n"
    )
    assert summary.search(before), before


def _count(own: list[list[str]], text: str) -> list[int]:
    return [sum(text in line for line in lines) for lines in own]


def test_data_of_the_launches_is_what_the_tests_think() -> None:
    assert len(data(32, seed=1, batch_size=8)) == len(data(16, seed=0, batch_size=4)) == 4
