"""Parties as separate jobs, real processes over TLS: killed, stopped, started again; the rendezvous, too."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from certificates import tls_of
from fork_server import python
from launch import process_environ

pytestmark = [pytest.mark.torchrun, pytest.mark.timeout(240)]
ROSTER = ("a", "b", "c")


class Jobs:
    """The processes of a federation on this host, each with its log."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def start(self, log: str, *words: str, **environ: str) -> subprocess.Popen[bytes]:
        with (self.cwd / f"{log}.log").open("wb") as out:
            process = subprocess.Popen(
                [python(), *words],
                cwd=self.cwd,
                env=process_environ() | environ,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.processes[log] = process
        return process

    def rendezvous(self, log: str) -> None:
        """Start the rendezvous, always on the same port."""
        tls = tls_of("rendezvous")
        own = [f"--tls.{part}={getattr(tls, part)}" for part in ("cert", "key", "ca")]
        words = ("rendezvous", f"--listen={self.address}", "--roster=a,b,c", *own)
        self.start(log, "-m", "pellm_lightning", *words)

    def fit(self, name: str, *words: str, log: str | None = None, torchrun: tuple[str, ...] = ()) -> None:
        """Start a party by the command line, configured by environment variables, as a container would be."""
        environ = {
            "PELLM_RENDEZVOUS": f"tcp://{self.address}",
            "PELLM_PARTY": name,
            "PELLM_ROSTER": ",".join(ROSTER),
        }
        tls = tls_of(name)
        environ |= {"PELLM_TLS_CERT": tls.cert, "PELLM_TLS_KEY": tls.key, "PELLM_TLS_CA": tls.ca}
        self.start(
            log or name,
            *(("-m", "torch.distributed.run", *torchrun) if torchrun else ()),
            *("-m", "pellm_lightning", "fit", "--model=small_module.LittleModule"),
            "--data=small_module.LittleData",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=4",
            "--trainer.enable_progress_bar=false",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={self.cwd / 'runs'}",
            f"--trainer.default_root_dir={self.cwd / 'runs'}",
            "--trainer.callbacks+=small_module.Scene",
            f"--trainer.callbacks.final={self.cwd / f'{name}.pt'}",
            "--data.samples=40",
            "--federated.every_n_steps=5",
            "--federated.jobs.membership.heartbeat_ttl_s=2",
            "--federated.jobs.membership.wait_s=60",
            *words,
            **environ,
        )

    def log(self, name: str) -> str:
        return (self.cwd / f"{name}.log").read_text(errors="replace")

    def until_said(self, words: str, *names: str, timeout_s: float = 60) -> None:
        until = time.monotonic() + timeout_s
        while words not in "".join(map(self.log, names)):
            assert time.monotonic() < until, "\n".join(self.log(name)[-3000:] for name in names)
            time.sleep(0.05)

    def ended(self, name: str, timeout_s: float = 120) -> int:
        try:
            return self.processes[name].wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} goes on and on:\n{self.log(name)[-4000:]}") from None


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path)
    yield jobs
    for process in jobs.processes.values():
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_federation_outlives_its_processes(jobs: Jobs) -> None:
    jobs.rendezvous("rendezvous")
    back = jobs.cwd / "c-is-back"
    # Party a waits in its 13th step until c has come back. Of party b's two processes one is killed in the
    # 8th step, and torchrun starts both anew. Party c gets a SIGTERM in its 8th step.
    jobs.fit("a", "--trainer.callbacks.hold_at=12", f"--trainer.callbacks.until={back}")
    restarting = ("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    killed = (f"--trainer.callbacks.once={jobs.cwd / 'b-was-killed'}", "--trainer.callbacks.rank=1")
    two = ("--trainer.devices=2", "--trainer.strategy=ddp", "--ckpt_path=last")
    jobs.fit("b", "--trainer.callbacks.signal_at=7", *killed, *two, torchrun=restarting)
    terminated = ("--trainer.callbacks.signal_at=7", f"--trainer.callbacks.signal={int(signal.SIGTERM)}")
    jobs.fit("c", *terminated, f"--trainer.callbacks.once={jobs.cwd / 'c-was-terminated'}")
    jobs.ended("c")
    jobs.until_said("continues without party c: it left while", "a", "b")  # which only this rendezvous knows
    jobs.processes["rendezvous"].kill()
    jobs.processes["rendezvous"].wait()
    jobs.rendezvous("rendezvous-2")
    jobs.until_said("Restored all states from the checkpoint", "b")  # else a and c may end without it
    jobs.fit("c", f"--trainer.callbacks.announce={back}", "--ckpt_path=last", log="c-2")
    for name in ("a", "b", "c-2"):
        assert jobs.ended(name) == 0, f"{name}:\n{jobs.log(name)[-6000:]}"
    finals = [torch.load(jobs.cwd / f"{name}.pt") for name in ROSTER]
    assert torch.equal(finals[0], finals[1]), "a and b differ"
    assert torch.equal(finals[0], finals[2]), "a and c differ"
    assert "[party c] resumes an unfinished federation at round" in jobs.log("c-2")
    jobs.processes["rendezvous-2"].send_signal(signal.SIGTERM)
    assert jobs.ended("rendezvous-2") == 0
    for name in ROSTER:
        assert "SIGABRT" not in jobs.log(name)
        assert "terminate called" not in jobs.log(name)
