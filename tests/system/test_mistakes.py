"""Mistakes of users, by the real command line with two parties: told once, in a few lines, with the cure."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist
from certificates import authority, tls_of
from fork_server import python
from launch import process_environ, torchrun
from ports import free_port
from tiny_language_models import word_tokenizer

pytestmark = [pytest.mark.torchrun, pytest.mark.timeout(120)]

MAX_LINES = 12
UNUSED = free_port()
LITTLE = [
    "--model=small_module.LittleModule",
    "--data=small_module.LittleData",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=false",
]
JOBS = ["--federated.jobs.rendezvous=tcp://127.0.0.1:PORT", "--federated.jobs.roster=[clinic-a, clinic-b]"]

# Blocks an optional package, as if it were not installed.
WITHOUT = """
import sys

for name in [name for name in sys.modules if name.split(".")[0] == {package!r}]:
    del sys.modules[name]
sys.modules[{package!r}] = None
for name in [name for name in sys.modules if name.startswith("pellm_lightning.exchange.secure")]:
    del sys.modules[name]

import runpy

runpy.run_module("pellm_lightning", run_name="__main__", alter_sys=True)
"""

# Tries for half a second to reach the rendezvous, instead of ten.
IMPATIENT = """
import functools
import runpy

from pellm_lightning.comm.rendezvous import client

client.connect = functools.partial(client.connect, retry_s=0.5)
runpy.run_module("pellm_lightning", run_name="__main__", alter_sys=True)
"""

FAILING = """
from small_module import LittleModule


class DiskFull(LittleModule):
    def training_step(self, batch, batch_idx):
        if self.trainer.default_root_dir.endswith("party-1"):
            raise OSError(28, "No space left on device", "samples.bin")
        return super().training_step(batch, batch_idx)


class Bug(LittleModule):
    def training_step(self, batch, batch_idx):
        return batch.nonsense


class Wide(LittleModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.extra = __import__("torch").nn.Linear(width, 2)
"""


class Ended(NamedTuple):
    """How the processes of a launch have ended."""

    output: str
    statuses: list[int]
    recorded: list[str | None]
    """What torchrun's summary would show of each."""

    @property
    def lines(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.strip()]

    @property
    def text(self) -> str:
        return " ".join(self.output.split())


class Mistake(NamedTuple):
    """Command lines of the parties, what they say, and the exit status."""

    words: Sequence[str] | Callable[[int], Sequence[str]]
    says: Sequence[str]
    status: int = 1
    parties: int = 2
    """Processes of a launch of two; 0 for one of separate jobs."""
    told_by: str | None = None
    kept: bool = True
    """Whether it is known where the party writes, so that the traceback is there."""
    start: Sequence[str] = ("-m", "pellm_lightning")
    command: str = "fit"


def party(first: Sequence[str], second: Sequence[str]) -> Callable[[int], Sequence[str]]:
    return lambda rank: (first, second)[rank]


def tls(cert: str, key: str, ca: str) -> list[str]:
    return [
        f"--federated.jobs.tls.cert={cert}",
        f"--federated.jobs.tls.key={key}",
        f"--federated.jobs.tls.ca={ca}",
    ]


TEXTS = ["--data=pellm_lightning.tasks.ClassificationDataModule", "--data.tokenizer=tokenizer"]
TEXTS += ["--data.labels=[old, new]"]
KEYS = "--federated.exchange=SecureAggregation"

MISTAKES = {
    # ---- usage: nothing has been built
    "option": Mistake(
        ["--federated.evry_n_steps=2"],
        ["recognized arguments: --federated.evry_n_steps=2", "Did you mean '--federated.every_n_steps'?"],
        status=2,
    ),
    "yaml key": Mistake(
        ["--config=key.yaml"], ["'federated.evry_n_steps'", "Did you mean 'federated.every_n_steps'?"], 2
    ),
    "yaml section": Mistake(
        ["--config=section.yaml"], ["'federate.every_n_steps'", "Did you mean 'federated.every_n_steps'?"], 2
    ),
    "yaml syntax": Mistake(["--config=syntax.yaml"], ["Problems parsing config", "line 2"], 2),
    "yaml file": Mistake(["--config=run.yml"], ["File does not exist", "run.yml"], 2),
    "no number": Mistake(
        ["--federated.every_n_steps=two"], ["federated.every_n_steps: expected int, got 'two'"], 2
    ),
    "choice": Mistake(
        ["--federated.weighting=sample"],
        [
            "federated.weighting: expected 'samples', 'uniform' or float, got 'sample'",
            "Did you mean 'samples'",
        ],
        2,
    ),
    "model class": Mistake(
        ["--model=small_module.LittelModule"], ["'LittelModule'", "Did you mean 'LittleModule'?"], 2
    ),
    "module": Mistake(
        ["--model=smal_module.LittleModule"], ["smal_module", "Did you mean 'small_module'?"], 2
    ),
    "class name": Mistake(
        ["--federated.exchange=Quantised"], ["no class Quantised", "Did you mean 'Quantized'?"], 2
    ),
    "class path": Mistake(
        ["--federated.aggregation=pellm_lightning.aggregation.LowRangMean"],
        ["'LowRangMean'", "Did you mean 'LowRankMean'?"],
        2,
    ),
    "callback": Mistake(["--trainer.callbacks+=EarlyStoping"], ["Did you mean 'EarlyStopping'?"], 2),
    "argument of a class": Mistake(["--data.sample=3"], ["sample", "Did you mean 'samples'?"], 2),
    "required argument": Mistake(
        ["--federated.privacy=GaussianMechanism"], ["GaussianMechanism", "required", "max_norm"], 2
    ),
    "range": Mistake(["--federated.every_n_steps=0"], ["every_n_steps=0 must be at least 1"], 2),
    "indivisible": Mistake(["--num_parties=3"], ["num_parties=3 does not divide the 2 launched process"], 2),
    "accelerator": Mistake(["--trainer.accelerator=gpuu"], ["invalid accelerator", "gpuu"], 2),
    "privacy": Mistake(
        [
            "--federated.privacy=GaussianMechanism",
            "--federated.privacy.max_norm=1",
            "--federated.privacy.noise_multiplier=1",
        ],
        ["weighting='samples' does not go with differential privacy", "Set weighting='uniform'"],
        2,
    ),
    "command": Mistake([], ["fitt", "Did you mean"], 2, command="fitt"),
    "one party only": Mistake(
        party([], ["--federated.every_n_steps=two"]), ["of rank 1", "federated.every_n_steps"], 2
    ),
    # ---- files and packages
    "no data": Mistake([*TEXTS, "--data.files=nowhere.csv"], ["nowhere.csv"]),
    "no data of one": Mistake(
        [*TEXTS, "--data.files=table-{party}.csv", "--data.label_column=age"], ["table-1.csv"], told_by="1"
    ),
    "column": Mistake(
        [*TEXTS, "--data.files=table-0.csv", "--data.label_column=aeg"], ["table-0.csv", "aeg", "age"]
    ),
    "label": Mistake([*TEXTS, "--data.files=label.csv", "--data.label_column=age"], ["label.csv", "newer"]),
    "model folder": Mistake(
        [
            "--model=pellm_lightning.tasks.TextClassification",
            "--model.model=nowhere/model",
            "--model.num_labels=2",
            *TEXTS,
            "--data.files=table-0.csv",
            "--data.label_column=age",
        ],
        ["nowhere/model"],
    ),
    "checkpoint": Mistake(["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt"]),
    "extra": Mistake(
        [KEYS, "--federated.exchange.signing_key=a.key", "--federated.exchange.trusted_keys=keys"],
        ["pip install 'pellm-lightning[keys]'"],
        start=("without.py",),
        kept=False,
    ),
    "no key": Mistake(
        [KEYS, "--federated.exchange.signing_key=a.key", "--federated.exchange.trusted_keys=keys"],
        ["trusted_keys='keys' holds no public keys", "the folder with <name>.csr or <name>.pem"],
        2,
    ),
    # ---- the parties
    "nothing trains": Mistake(["--federated.parameters.exclude=['*']"], ["exclude"]),
    "pattern": Mistake(
        ["--federated.parameters.include=[hed.*]"],
        ["The include pattern 'hed.*' matches none", "'head.weight'"],
    ),
    "strategy": Mistake(["--trainer.devices=2"], ["A party has 1 process", "devices=2"], status=2),
    "schedules differ": Mistake(
        party(["--federated.every_n_steps=2"], ["--federated.every_n_steps=3"]), ["every_n_steps"]
    ),
    "models differ": Mistake(
        party(["--model=failing.Wide", "--model.width=4"], ["--model=failing.Wide", "--model.width=5"]),
        ["extra.weight"],
    ),
    "nobody comes": Mistake(
        ["--federated.timeout_s=1"], ["waited 1 s for party 1 to join", "raise timeout_s"], parties=1
    ),
    "full disk": Mistake(["--model=failing.DiskFull"], ["No space left on device", "party 1"], told_by="1"),
    # ---- separate jobs
    "roster": Mistake(
        [*JOBS, "--federated.jobs.name=clinic-aa"],
        ["Party 'clinic-aa' is not in the roster (clinic-a, clinic-b)", "Did you mean 'clinic-a'?"],
        2,
        parties=0,
    ),
    "rendezvous": Mistake(
        [*JOBS, "--federated.jobs.name=clinic-a", "--federated.jobs.membership.wait_s=0.2"],
        ["Party clinic-a could not join", "127.0.0.1:PORT is out of reach", "Check that it runs"],
        parties=0,
        told_by="clinic-a",
        start=("impatient.py",),
    ),
    "no certificate": Mistake(
        [*JOBS, "--federated.jobs.name=clinic-a", *tls("nowhere.pem", "nowhere.key", "ca.pem")],
        ["nowhere.pem"],
        parties=0,
        kept=False,
    ),
    "another's certificate": Mistake(
        [*JOBS, "--federated.jobs.name=clinic-a", *tls("clinic-b.pem", "clinic-b.key", "ca.pem")],
        ["clinic-b.pem is of 'clinic-b', but this party is 'clinic-a'", "Pass the party's own certificate"],
        2,
        parties=0,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the command lines."""
    folder = tmp_path_factory.mktemp("mistakes")
    files = {
        "key.yaml": "federated: {evry_n_steps: 2}\n",
        "section.yaml": "federate: {every_n_steps: 2}\n",
        "syntax.yaml": "federated: {every_n_steps: 2\nmodel: x\n",
        "table-0.csv": "text,age\nw1 w2,old\nw3,new\n",
        "label.csv": "text,age\nw1 w2,old\nw3,newer\n",
        "failing.py": FAILING,
        "impatient.py": IMPATIENT,
        "without.py": WITHOUT.format(package="cryptography"),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    word_tokenizer().save_pretrained(folder / "tokenizer")
    tls_of("clinic-b")
    for path in authority().iterdir():
        shutil.copy(path, folder)
    return folder


def run(mistake: Mistake, folder: Path, root: Path) -> Ended:
    """Start processes as torchrun does, with one terminal, and end them when one has failed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    read, write = os.pipe()
    processes = []
    for rank in range(max(1, mistake.parties)):
        words = mistake.words(rank) if callable(mistake.words) else mistake.words
        little = [*LITTLE, f"--trainer.default_root_dir={root}"] if mistake.command == "fit" else []
        own = process_environ()
        own["PYTHONPATH"] += os.pathsep + str(folder)
        if mistake.parties:
            own |= launched(rank, store.port, root)
        command = [python(), *mistake.start, mistake.command, *little, *words]
        processes.append(
            subprocess.Popen(
                [word.replace("PORT", str(UNUSED)) for word in command],
                cwd=folder,
                env=own,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
            )
        )
    os.close(write)
    statuses = wait(processes)
    with os.fdopen(read) as output:
        return Ended(output.read(), statuses, [recorded(root / f"{rank}.json") for rank in (0, 1)])


def launched(rank: int, port: int, root: Path) -> dict[str, str]:
    """Return what torchrun adds to the environment."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_ERROR_FILE": str(root / f"{rank}.json"),
    }


def wait(processes: "list[subprocess.Popen[bytes]]") -> list[int]:
    until = time.monotonic() + 90
    while not any(process.poll() for process in processes) and time.monotonic() < until:
        if all(process.poll() == 0 for process in processes):
            break
        time.sleep(0.05)
    time.sleep(0.2)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    return [process.wait(30) for process in processes]


def recorded(path: Path) -> str | None:
    """Return what torchrun's summary would show."""
    return json.loads(path.read_text())["message"]["message"] if path.exists() else None


def judge(ended: Ended, mistake: Mistake) -> None:
    assert len(ended.lines) <= MAX_LINES, ended.output
    assert "Traceback" not in ended.output
    assert ended.output.count("error:") == 1, ended.output
    for words in mistake.says:
        words = words.replace("PORT", str(UNUSED))
        assert words in ended.text, ended.output
    if mistake.parties:
        (told,) = [text for text in ended.recorded if text is not None]
        assert " ".join(told.split()) in ended.text
    assert mistake.status in ended.statuses
    assert set(ended.statuses) <= {mistake.status, -signal.SIGTERM}
    if mistake.told_by is not None:
        assert f"[party {mistake.told_by}] error:" in ended.output
    if mistake.status == 1 and mistake.kept:
        assert re.search(r"The traceback is in \S+error\.log", ended.text), ended.output


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_once(name: str, folder: Path, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    ended = run(mistake, folder, tmp_path)
    judge(ended, mistake)


def test_a_bug_shows_its_traceback_once(folder: Path, tmp_path: Path) -> None:
    ended = run(Mistake(["--model=failing.Bug"], []), folder, tmp_path)
    assert ended.output.count("Traceback (most recent call last)") == 1
    assert ended.output.count("AttributeError: 'list' object has no attribute 'nonsense'") == 1
    assert sum(text is not None for text in ended.recorded) == 1
    assert set(ended.statuses) <= {1, -signal.SIGTERM}


def test_debug_shows_the_traceback(folder: Path, tmp_path: Path) -> None:
    ended = run(Mistake(["--debug", "--ckpt_path=nowhere.ckpt"], []), folder, tmp_path)
    assert ended.output.count("Traceback (most recent call last)") == 1
    assert "FileNotFoundError: Checkpoint file not found: nowhere.ckpt" in ended.output
    assert 1 in ended.statuses


def test_the_summary_of_torchrun_shows_the_message(folder: Path, tmp_path: Path) -> None:
    words = ["-m", "pellm_lightning", "fit", *LITTLE, "--federated.every_n_steps=0"]
    done = torchrun(2, words, tmp_path)
    assert done.returncode == 1
    told, _, summary = done.stdout.partition("Root Cause")
    message = "every_n_steps=0 must be at least 1. Use every_n_steps=1 for the shortest round."
    assert re.search(r"exitcode  : 2 ", summary)
    assert message in " ".join(told.split())
    assert message in summary
    ours = told.partition("torch/distributed/elastic")[0]
    assert "Traceback" not in ours
    assert len([line for line in ours.splitlines() if line.strip()]) <= MAX_LINES
