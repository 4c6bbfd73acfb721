"""A party that is started again resumes its own checkpoint, or is refused; nothing begins anew in silence."""

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from document_blocks import blocks
from fork_server import python
from launch import process_environ, torchrun
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import ValidatedClassifier, data, in_threads, quiet_trainer
from paths import SCRIPTS
from small_module import LittleModule
from trainer_jobs import At, Jobs, crash

from pellm_lightning import FederatedAveraging, SeparateJobs
from pellm_lightning.tensors.snapshot import SnapshotDir
from pellm_lightning.trainer import resume

MIXES = ["dirpath", "no logger", "csv", "tensorboard", "two"]


@pytest.fixture
def as_party_1() -> Iterator[None]:
    """Make this process look like the second of two that torchrun has started."""
    launch = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launch.items():
            patch.setenv(name, value)
        yield


# ---- the checkpoint that "last" names


@pytest.mark.torchrun
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("processes", "devices", "scenes"), [(2, 1, MIXES), (4, 2, ["dirpath", "csv"])])
def test_last_is_each_partys_own(tmp_path: Path, processes: int, devices: int, scenes: list[str]) -> None:
    done = torchrun(processes, [str(SCRIPTS / "restarts.py"), str(tmp_path), str(devices), *scenes], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    # 16 samples in batches of 4, which the party's processes share: so many steps has the first epoch.
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


# ---- the documented scripts, killed and started again

AT_HAND = """
import os, signal, time
from pathlib import Path
from small_module import LittleModule
from party_threads import data as batches

party = {party!r}
rank = int(os.environ.get("RANK", 0))


class Killed(LittleModule):
    def on_fit_start(self):  # before it meets the others, who wait for this
        with Path(f"{{party or rank}}.starts").open("a") as file:
            file.write("again ")

    def on_train_start(self):
        with Path(f"{{party or rank}}.begins").open("a") as file:
            file.write(f"{{self.global_step}}\\n")

    def on_train_batch_start(self, batch, batch_idx):
        step, killed = self.global_step, Path(f"{{party or rank}}.killed")
        if step == {killed_at} and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while step == {waits_at} and len(Path({waits_for!r}).read_text().split()) < 2:
            time.sleep(0.05)

    def on_train_end(self):
        import torch
        torch.save(self.vector(), f"{{party or rank}}.pt")


module, data = Killed(), batches({samples}, seed=3)
"""


def documented(page: str, *starts: str) -> str:
    """Return the blocks of a page that begin so, word for word, one after the other."""
    found = {
        start: [block.text for block in blocks(page) if block.text.startswith(start)] for start in starts
    }
    assert all(len(texts) == 1 for texts in found.values()), found
    return "\n".join(text for (text,) in found.values())


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Start a program in the test's folder; whatever is left of it ends with the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(
                [python(), *words],
                cwd=tmp_path,
                env=process_environ(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.torchrun
@pytest.mark.timeout(600)
def test_the_documented_job_resumes_when_it_was_killed(tmp_path: Path, started: Any) -> None:
    page = "docs/separate_jobs.md"
    script = documented(page, "from lightning.pytorch import Trainer\n", "trainer.fit(")
    meeting = free_address()
    names = ["clinic-a", "clinic-b", "clinic-c"]

    def start(name: str) -> subprocess.Popen[bytes]:
        # What is left of the page: whose script it is, and addresses of this host.
        own = script.replace("10.8.0.1:29400", meeting).replace("10.8.0.2:29401", free_address())
        own = own.replace('name="clinic-a"', f'name="{name}"')
        # clinic-b is killed in its 151st step of 360; the others wait in their 181st until it is back.
        killed_at, waits_at = (150, -1) if name == "clinic-b" else (-1, 180)
        at_hand = AT_HAND.format(
            party=name, killed_at=killed_at, waits_at=waits_at, waits_for="clinic-b.starts", samples=480
        )
        folder = tmp_path / "jobs"  # one for all: their files are kept apart
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(at_hand + own)
        return started(str(folder / f"{name}.py"))

    def log() -> str:
        return (tmp_path / "log").read_text(errors="replace")[-6000:]

    started("-m", "pellm_lightning", "rendezvous", f"--listen={meeting}", f"--roster={','.join(names)}")
    jobs = {name: start(name) for name in names}
    assert jobs["clinic-b"].wait(240) == -signal.SIGKILL, log()
    assert (tmp_path / "checkpoints/party-1/last.ckpt").exists()
    jobs["clinic-b"] = start("clinic-b")
    for job in jobs.values():
        assert job.wait(240) == 0, log()
    # Its last checkpoint is that of its 100th step, after the first round.
    assert (tmp_path / "clinic-b.begins").read_text().split() == ["0", "100"], log()
    finals = [torch.load(tmp_path / f"{name}.pt") for name in names]
    assert all(torch.equal(finals[0], final) for final in finals)


@pytest.mark.torchrun
@pytest.mark.timeout(600)
def test_the_documented_launch_resumes_when_it_was_killed(tmp_path: Path, started: Any) -> None:
    script = documented("docs/howto/resume.md", "from lightning.pytorch import Trainer\n")
    # Rank 1 is killed in its fourth step of six; torchrun then ends rank 0, too.
    at_hand = AT_HAND.format(party="", killed_at=3, waits_at=-1, waits_for="", samples=8)
    at_hand = at_hand.replace("if step ==", "if rank == 1 and step ==")
    (tmp_path / "train.py").write_text(at_hand + script)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py")
    assert started(*launch).wait(240) != 0
    again = started(*launch).wait(240)
    assert again == 0, (tmp_path / "log").read_text(errors="replace")[-6000:]
    for rank in range(2):
        # Two steps an epoch, and a checkpoint after each.
        assert (tmp_path / f"{rank}.begins").read_text().split() == ["0", "2"]
    assert torch.equal(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"))


# ---- separate jobs


class Starting(ValidatedClassifier):
    """Tells when its fit begins."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.starts = threading.Event()

    def on_fit_start(self) -> None:
        self.starts.set()


def lose_and_restart(
    jobs: Jobs, saving: Callback | None, more: Sequence[Callback] = (), **restarted: Any
) -> None:
    """Let party c fail in its fourth step and start it again, while the others wait for that and train on."""
    module = Starting(seed=5)
    again = threading.Thread(target=lambda: jobs.fit("c", *more, module=module, samples=64, **restarted))

    def start_again() -> None:
        again.start()
        assert module.starts.wait(20)

    class Slowly(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step > 5:
                time.sleep(0.2)

    callbacks = [At(3, crash), *([saving] if saving else [])]
    in_threads(
        [
            lambda: jobs.fit("a", At(5, start_again), Slowly(), samples=64),
            lambda: jobs.fit("b", samples=64),
            lambda: jobs.fit("c", *callbacks, samples=64, enable_checkpointing=saving is not None),
        ]
    )
    again.join()
    assert not isinstance(jobs.results["a"], BaseException), jobs.results
    assert jobs.same("a", "b"), jobs.results


def saves_each_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set, but there is no last checkpoint')
@pytest.mark.parametrize("ckpt_path", [None, "last"])
def test_a_job_that_does_not_resume_its_checkpoint_is_refused(tmp_path: Path, ckpt_path: str | None) -> None:
    # Who is given a joined federation learns its party only then: Lightning has looked in `kept` already.
    jobs, kept = Jobs(tmp_path), tmp_path / "kept"
    lose_and_restart(
        jobs,
        saves_each_step(kept),
        [saves_each_step(kept)],
        enable_checkpointing=True,
        ckpt_path=ckpt_path,
    )
    error = jobs.results["c"]
    assert isinstance(error, MisconfigurationException), error
    assert "Party c starts at step 0 in a federation that is in round" in str(error)
    # It has saved after each of its three steps; two files may be of the same time.
    assert f"has the checkpoint {kept}/party-2/" in str(error)
    assert "ckpt_path='last'" in str(error)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_job_that_resumes_its_checkpoint_goes_on(tmp_path: Path) -> None:
    jobs, kept = Jobs(tmp_path), tmp_path / "kept/party-2"
    lose_and_restart(
        jobs,
        saves_each_step(kept),
        [saves_each_step(kept)],
        enable_checkpointing=True,
        ckpt_path="last",
    )
    assert jobs.same("a", "b", "c"), jobs.results
    # It goes on after its third step of 16, with a round after each second one, until the others are through.
    steps = jobs.logs["c"].steps
    assert steps[0] == 5
    assert 5 < steps[-1] <= 16


def test_a_job_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    lose_and_restart(jobs, None)
    assert jobs.same("a", "b", "c"), jobs.results


def test_checkpoints_of_another_federation_or_party_are_none(tmp_path: Path) -> None:
    of = resume.signature("one/3/ab", 1)
    assert of is not None
    others = [
        resume.signature("two/3/ab", 1),
        resume.signature("one/3/ab", 11),
        resume.signature("one/3/ab", 0),
    ]
    for number, signature in enumerate([*others, None]):
        torch.save({"callbacks": {"F": {"signature": signature}}}, tmp_path / f"{number}.ckpt")
    (tmp_path / "torn.ckpt").write_bytes(b"PK" + of.encode())
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = quiet_trainer(tmp_path, [checkpoint], enable_checkpointing=True)
    stopped = str(tmp_path / "stop/stopped.ckpt")
    assert resume.newest_signed(trainer, of, stopped) is None
    torch.save({"callbacks": {"F": {"signature": of}}}, tmp_path / "own.ckpt")
    assert resume.newest_signed(trainer, of, stopped) == str(tmp_path / "own.ckpt")


@pytest.mark.parametrize(
    "path", ["logs/lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt", "stop/stopped-1.ckpt"]
)
def test_checkpoints_of_earlier_versions_and_of_a_stop_are_found(tmp_path: Path, path: str) -> None:
    of = resume.signature("one/3/ab", 1)
    assert of is not None
    (tmp_path / path).parent.mkdir(parents=True)
    torch.save({"signature": of}, tmp_path / path)
    trainer = quiet_trainer(tmp_path, logger=CSVLogger(tmp_path / "logs"))
    found = resume.newest_signed(trainer, of, str(tmp_path / "stop/stopped.ckpt"))
    assert found == str(tmp_path / path)


def test_the_checkpoint_of_an_earlier_stop_is_kept(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, wait_s=1.0)
    (tmp_path / "stopped.ckpt").write_bytes(b"of an earlier run")
    in_threads([lambda: jobs.fit("a"), *(lambda n=name: jobs.fit(n, At(3, crash)) for name in ("b", "c"))])
    assert f"Its own steps since the last round are in {tmp_path}/stopped-1.ckpt" in str(jobs.results["a"])
    assert torch.load(tmp_path / "stopped-1.ckpt", weights_only=True)["global_step"] == 4
    assert (tmp_path / "stopped.ckpt").read_bytes() == b"of an earlier run"


@pytest.mark.parametrize("logger", [True, False])
@pytest.mark.parametrize("party", [0, 1])
def test_last_of_an_unfinished_federation_is_found_in_any_folder(
    tmp_path: Path, party: int, logger: bool
) -> None:
    """The default ModelCheckpoint saves no last.ckpt, and into another version at each start."""

    def trainer() -> Trainer:
        federated = FederatedAveraging(jobs=SeparateJobs("tcp://127.0.0.1:1", f"p{party}", ["p0", "p1"]))
        arguments = {"logger": CSVLogger(tmp_path) if logger else False, "enable_checkpointing": True}
        return quiet_trainer(tmp_path, [federated], **arguments)

    (federated,) = (c for c in trainer().callbacks if isinstance(c, FederatedAveraging))
    assert federated.before_run(trainer(), "last") == "last", "nothing is unfinished"
    own = tmp_path / (f"party-{party}" if party else "")
    saved = (
        own / ("lightning_logs/version_0/checkpoints" if logger else "checkpoints") / "epoch=0-step=2.ckpt"
    )
    saved.parent.mkdir(parents=True)
    torch.save({"signature": resume.signature("one/3/ab", party)}, saved)
    assert federated.before_run(trainer(), "last") == "last", "it may be of a federation that has ended"
    SnapshotDir(tmp_path / f"party-{party}/federation").keep(4, {"version": ["one/3/ab", 4, 7]})
    assert federated.before_run(trainer(), "last") == str(saved)
    assert federated.before_run(trainer(), None) is None
    assert federated.before_run(trainer(), "some.ckpt") == "some.ckpt"


def test_the_path_that_is_chosen_is_used() -> None:
    def fit(trainer: Any, model: Any, data: Any = None, ckpt_path: Any = None) -> Any:
        return trainer, model, data, ckpt_path

    def choose(trainer: Any, run: Any) -> Any:
        asked = run.get("ckpt_path")
        return "own.ckpt" if asked == "last" else asked

    run = resume._preceded(fit, choose)
    assert run("t", "m", "d", "last") == ("t", "m", "d", "own.ckpt")
    assert run("t", "m", ckpt_path="last") == ("t", "m", None, "own.ckpt")
    assert run("t", model="m") == ("t", "m", None, None)


def test_a_launch_signs_nothing() -> None:
    assert resume.signature(None, 0) is None
    assert resume.signature("", 0) is None
