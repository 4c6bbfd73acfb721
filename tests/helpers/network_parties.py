"""Parties as processes on the hosts of ``network_namespaces``, each killed by its own id at the end."""

import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from network_namespaces import Network, enter
from round_history import SIZE, Entry, noise, recorded

from pellm_lightning import Aggregator
from pellm_lightning.comm import TLS, Membership
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.relay.server import RelayQuotas
from pellm_lightning.comm.rendezvous.server import RendezvousServer

log = logging.getLogger(__name__)
RENDEZVOUS = "rendezvous"
_PORT = 29400
# Forks from a process that has imported torch already: five imports at once would take half a minute.
_processes = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Task:
    """What a party is told."""

    entrance: str
    folder: str
    name: str
    roster: Sequence[str]
    rendezvous: str
    listen: str
    membership: dict[str, Any]
    tls: TLS | None = None
    size: int = SIZE
    pace_s: float = 0.05

    @property
    def index(self) -> int:
        return self.roster.index(self.name)

    @property
    def end(self) -> float:
        """Round after which to end: what the file ``end`` says, if it is there."""
        try:
            return int(Path(self.folder, "end").read_text())
        except (FileNotFoundError, ValueError):
            return float("inf")


def serve(
    entrance: str,
    log: str,
    address: str,
    roster: Sequence[str],
    tls: TLS | None,
    relay: RelayQuotas | None = None,
) -> None:
    """Host the rendezvous until killed."""
    _settle(entrance, log)
    host, port = address.split(":")
    RendezvousServer(host, int(port), roster=roster, tls=tls, relay=relay).serve_forever()


def take_part(task: Task) -> None:
    """Train until the end; what is settled goes to ``<name>.jsonl``, how rounds go to ``<name>.rounds``."""
    _settle(task.entrance, f"{task.folder}/{task.name}.log")
    torch.set_num_threads(1)
    try:
        _train(task)
    except BaseException:
        log.exception("failed")
        raise


def _train(task: Task) -> None:
    membership = Membership(**task.membership)
    federation = SeparateJobs(
        task.rendezvous,
        task.name,
        tuple(task.roster),
        listen=task.listen,
        tls=task.tls,
        membership=membership,
    ).join()
    w = torch.randn(task.size, generator=torch.Generator().manual_seed(task.index))
    aggregator = Aggregator(federation, {"w": w}, state_dir=f"{task.folder}/state-{task.name}")
    own = Path(task.folder, task.name)
    with own.with_suffix(".jsonl").open("a") as entries, own.with_suffix(".rounds").open("a") as rounds:
        recorded(aggregator, partial(_append, entries))
        aggregator.start()
        while aggregator.round < task.end:
            w.copy_(aggregator.global_vector + noise(task.index, aggregator.round, task.size))
            time.sleep(task.pace_s)
            done = aggregator.step(task.index + 1.0)
            rounds.write(
                json.dumps([done.round, len(done.parties), done.waited_seconds, done.seconds]) + "\n"
            )
            rounds.flush()
        for _ in aggregator.drain():
            pass
    federation.close()


def _preload() -> None:
    """Let the process that all are forked from import this module; it is not told where to look (3.11)."""
    _processes.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def _append(file: Any, entry: Entry) -> None:
    file.write(replace(entry, time=time.time()).to_json() + "\n")
    file.flush()


def _settle(entrance: str, log: str) -> None:
    enter(entrance)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(
        level=logging.DEBUG, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%M:%S", force=True
    )


@dataclass
class Parties:
    """A rendezvous and parties, each on a host of its own."""

    network: Network
    folder: Path
    roster: Sequence[str]
    tls: Callable[[str], TLS] | None = None
    size: int = SIZE
    membership: dict[str, Any] = field(default_factory=dict)
    relay: RelayQuotas | None = None
    """Given, no party listens, and all meet at the relay."""
    processes: dict[str, Any] = field(default_factory=dict)

    def start(self) -> "Parties":
        _preload()
        tls = self.tls or (lambda name: None)
        hosts = self.network.hosts
        self.start_rendezvous()
        for name in self.roster:
            task = Task(
                entrance=hosts[name].entrance,
                folder=str(self.folder),
                name=name,
                roster=list(self.roster),
                rendezvous=f"tcp://{self.address}",
                listen="127.0.0.1:0" if self.relay else f"{hosts[name].address}:29401",
                membership=self.membership,
                tls=tls(name),
                size=self.size,
            )
            self._start(name, take_part, task)
        return self

    @property
    def address(self) -> str:
        """Where the rendezvous is."""
        return f"{self.network.hosts[RENDEZVOUS].address}:{_PORT}"

    def start_rendezvous(self) -> None:
        """Start the rendezvous; kill the one before, if there is one."""
        before = self.processes.pop(RENDEZVOUS, None)
        if before is not None:
            before.kill()
            before.join()
        entrance, log = self.network.hosts[RENDEZVOUS].entrance, str(self.folder / "rendezvous.log")
        tls = self.tls(RENDEZVOUS) if self.tls else None
        self._start(RENDEZVOUS, serve, entrance, log, self.address, list(self.roster), tls, self.relay)

    def _start(self, name: str, act: Callable[..., None], *arguments: Any) -> None:
        process = _processes.Process(target=act, args=arguments, name=name, daemon=True)
        process.start()
        self.processes[name] = process

    def entries(self) -> list[Entry]:
        """What the parties have recorded so far."""
        lines = [line for name in self.roster for line in self._lines(f"{name}.jsonl")]
        return [Entry.from_json(line) for line in lines]

    def rounds(self, name: str) -> list[list[float]]:
        """Round, parties, seconds waited and seconds taken of each of a party's rounds."""
        return [json.loads(line) for line in self._lines(f"{name}.rounds")]

    def reached(self, name: str) -> int:
        """The last round of which a party has read that it stands."""
        settled = (e.round for e in self.entries() if e.party == name and e.stage == "settled")
        return max(settled, default=0)

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 30) -> float:
        """Return after how many seconds something holds."""
        started = time.monotonic()
        while not holds():
            ended = [name for name, p in self.processes.items() if not p.is_alive()]
            waited = time.monotonic() - started
            if ended or waited > timeout_s:
                raise AssertionError(f"{waited:.0f} s, ended: {ended}\n{self.told()}")
            time.sleep(0.05)
        return time.monotonic() - started

    def end(self, timeout_s: float = 30) -> None:
        """Let the federation end two rounds from now."""
        last = 2 + max(self.reached(name) for name in self.roster)
        partial_path = self.folder / "end.partial"
        partial_path.write_text(str(last))
        partial_path.rename(self.folder / "end")
        deadline = time.monotonic() + timeout_s
        for name in self.roster:
            self.processes[name].join(max(deadline - time.monotonic(), 0.1))
            assert self.processes[name].exitcode == 0, f"{name} has not ended:\n{self.told()}"

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes.values():
            process.kill()
            process.join()
            process.close()

    def told(self) -> str:
        """The end of each party's log."""
        names = [RENDEZVOUS, *self.roster]
        logs = {name: (self.folder / f"{name}.log").read_text(errors="replace")[-2500:] for name in names}
        return "\n".join(f"---- {name}\n{text}" for name, text in logs.items())

    def _lines(self, file: str) -> list[str]:
        path = self.folder / file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [line for line in lines if line.endswith("\n")]
