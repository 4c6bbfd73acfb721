"""Bytes that a party holds, and that it needs at its peak, phase by phase, on top of its model.

    $ python benchmarks/big_states.py --params 50e6
    $ python benchmarks/big_states.py --params 1e9 --ways jobs --outer sgd_one --dtype bfloat16

Two parties, each a process: of one launch, in shared memory ("memory") or over Gloo ("gloo"), or separate
jobs ("jobs"), of which the second comes late and is given the state. Numbers are bytes for each trainable
parameter, by what the kernel counts as resident: of pages that N parties share, an N-th. Then a frozen base
of `--base` bytes is digested, and what that takes is shown in megabytes.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pellm_lightning import Aggregator, Federation
from pellm_lightning.comm.elastic.membership import Membership
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.engine.compatibility import base_digests
from pellm_lightning.tensors.snapshot import SnapshotDir

OUTER: dict[str, Callable] = {
    "sgd_one": lambda p: torch.optim.SGD(p, lr=1.0),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
}
WAYS = ("memory", "gloo", "jobs")
NAMES = ("first", "late")
PORT = 29720
TENSORS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--params", type=float, default=50e6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--outer", nargs="+", default=[*OUTER], choices=[*OUTER])
    parser.add_argument("--base", type=float, default=4e8, help="bytes of the frozen base; 0 for none")
    parser.add_argument("--folder", help="where snapshots are written; a temporary folder if not given")
    parser.add_argument("--party", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.party is not None:
        run_party(arguments)
        Path(arguments.folder, f"{arguments.party} is through").touch()
        return
    rows: list[dict] = []
    for way in arguments.ways:
        for outer in arguments.outer:
            rows += rows_of(way, outer, arguments)
    show(rows)
    if arguments.base:
        show_base(int(arguments.base))


# ---- two processes


def rows_of(way: str, outer: str, arguments: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, rendezvous(way):
        command = [sys.executable, __file__, f"--params={arguments.params}", f"--dtype={arguments.dtype}"]
        command += [f"--ways={way}", f"--outer={outer}", f"--folder={folder}"]
        parties = [
            subprocess.Popen([*command, f"--party={party}"], stdout=subprocess.PIPE, text=True)
            for party in range(2)
        ]
        if not all_succeed(parties):
            raise SystemExit(f"A party of {way!r} has failed.")
        lines = [line for party in parties for line in party.communicate()[0].splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def all_succeed(processes: Sequence[subprocess.Popen[str]]) -> bool:
    """Wait for processes; end the others if one fails, since they would wait for it. They print little."""
    while None in (codes := [process.poll() for process in processes]):
        if any(codes):
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return not any(codes)


@contextmanager
def rendezvous(way: str) -> Iterator[None]:
    if way != "jobs":
        yield
        return
    listen, roster = f"--listen=127.0.0.1:{PORT}", f"--roster={','.join(NAMES)}"
    process = subprocess.Popen([sys.executable, "-m", "pellm_lightning", "rendezvous", listen, roster])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def joined(way: str, party: int) -> tuple[object, dict]:
    """Return the federation, and further arguments of the aggregator."""
    if way == "jobs":
        membership = Membership(wait_s=5, heartbeat_ttl_s=30, accept_split_brain=True)
        jobs = SeparateJobs(f"tcp://127.0.0.1:{PORT}", NAMES[party], NAMES, membership=membership)
        return jobs.join(quorum=1), {"quorum": 1}
    store = dist.TCPStore("127.0.0.1", PORT, is_master=party == 0)
    return Federation(store, party, 2, timeout_s=600, shared_memory=way == "memory"), {}


# ---- one of them


def run_party(arguments: argparse.Namespace) -> None:
    (way,), (outer,) = arguments.ways, arguments.outer
    party, folder = arguments.party, Path(arguments.folder)
    each = int(arguments.params) // TENSORS
    dtype = getattr(torch, arguments.dtype)
    parameters = {f"layer{i:02}": torch.full((each,), 1.0 + i, dtype=dtype) for i in range(TENSORS)}
    if way == "jobs" and party == 1:
        wait_for(folder / "two rounds are over")
    federation, more = joined(way, party)
    warm_up(outer, folder / f"warm-{party}")
    gauge = Gauge(f"{way}, {outer}, {NAMES[party] if way == 'jobs' else party}", each * TENSORS)
    if way == "jobs":
        more |= {"state_dir": folder / str(party)}
    aggregator = Aggregator(federation, parameters, outer_optimizer=OUTER[outer], **more)
    if way == "jobs":
        (act_late if party else act_first)(aggregator, parameters, gauge, folder)
    else:
        act_launched(aggregator, parameters, gauge, folder)


def act_launched(aggregator: Aggregator, parameters: dict, gauge: "Gauge", folder: Path) -> None:
    with gauge.phase("starts"):
        aggregator.start()
    rounds(aggregator, parameters, gauge)
    save(aggregator, gauge, folder)
    leave(aggregator, parameters)


def act_first(aggregator: Aggregator, parameters: dict, gauge: "Gauge", folder: Path) -> None:
    with gauge.phase("starts"):
        aggregator.start()
    rounds(aggregator, parameters, gauge, ", alone")
    save(aggregator, gauge, folder)
    (folder / "two rounds are over").touch()
    met = 1
    while met == 1:  # of these rounds the last counts
        with gauge.phase("a round that gives the state"):
            met = step(aggregator, parameters)
    rounds(aggregator, parameters, gauge)
    leave(aggregator, parameters)


def act_late(aggregator: Aggregator, parameters: dict, gauge: "Gauge", folder: Path) -> None:
    with gauge.phase("joins and loads the state"):
        aggregator.start()
    rounds(aggregator, parameters, gauge)
    leave(aggregator, parameters)
    wait_for(folder / "0 is through")  # both would not fit, where memory is just enough for rounds
    save(aggregator, gauge, folder)
    snapshots = SnapshotDir(folder / "kept")
    with gauge.phase("writes a snapshot"):
        snapshots.keep(0, aggregator.state_dict())
    with gauge.phase("reads a snapshot"):
        snapshots.newest()


def step(aggregator: Aggregator, parameters: dict) -> int:
    """Run a round; return how many parties met."""
    for parameter in parameters.values():
        parameter += 1 + aggregator.federation.party
    return len(aggregator.step(1.0).parties)


def rounds(aggregator: Aggregator, parameters: dict, gauge: "Gauge", where: str = "") -> None:
    for number in range(2):
        with gauge.phase(f"round {number}{where}"):
            step(aggregator, parameters)


def save(aggregator: Aggregator, gauge: "Gauge", folder: Path) -> None:
    path = folder / f"checkpoint-{os.getpid()}"
    with gauge.phase("saves a checkpoint"):
        torch.save(aggregator.state_dict(), path)
    path.unlink()


def leave(aggregator: Aggregator, parameters: dict) -> None:
    for _ in aggregator.drain():
        pass
    aggregator.federation.close()
    check(parameters)


def check(parameters: dict) -> None:
    """A state that is small because it is wrong is none."""
    values = {float(p.float().mean()) - i for i, p in enumerate(parameters.values())}
    assert max(values) - min(values) < 0.5, values
    assert all(bool((p == p[0]).all()) for p in parameters.values())


def warm_up(outer: str, path: Path) -> None:
    """Load what is loaded when it is first needed, which would count as memory of the first phases."""
    federation, parameters = Federation(dist.HashStore(), 0, 1), {"w": torch.ones(8)}
    aggregator = Aggregator(federation, parameters, outer_optimizer=OUTER[outer])
    aggregator.start()
    aggregator.step(1.0)
    torch.save(aggregator.state_dict(), path)
    SnapshotDir(path.with_suffix(".d")).keep(0, aggregator.state_dict())
    federation.close()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.1)


class Gauge:
    """Gauge of this process's memory: what a phase leaves behind, and its peak.

    Args:
        who: What the lines that are printed are about.
        scalars: Number of trainable parameters.
    """

    def __init__(self, who: str, scalars: int) -> None:
        self._who, self._scalars = who, scalars
        self._before = 0
        self._before = self._held()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        resident, shared = _status("VmRSS"), _status("RssShmem")
        held = self._held()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        # Two processes have mapped what is shared, which the kernel counts in each.
        peak = held + _status("VmHWM") - resident - (_status("RssShmem") - shared) // 2
        row = {"who": self._who, "phase": name, "seconds": round(seconds, 2)}
        after = self._held()
        figures = {"held": after, "peak": max(peak, after)}
        print(json.dumps(row | {k: round(v / self._scalars, 2) for k, v in figures.items()}), flush=True)

    def _held(self) -> int:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/smaps_rollup") as file:
            pss = 1024 * next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        return pss - self._before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(f"{field}:"))


# ---- the frozen base


def show_base(size_bytes: int) -> None:
    """Digest a frozen base of bfloat16, a twentieth of it transposed and another of odd alignment."""
    part = size_bytes // 40
    base = {f"layer{i}": torch.full((part // 4096, 4096), 0.5, dtype=torch.bfloat16) for i in range(18)}
    base["transposed"] = torch.full((4096, part // 4096), 0.5, dtype=torch.bfloat16).T
    base["unaligned"] = torch.full((part + 1,), 0.5, dtype=torch.bfloat16)[1:]
    resident = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.perf_counter()
    base_digests(base)
    seconds = time.perf_counter() - begun
    took = (_status("VmHWM") - resident) / 1e6
    print(
        f"\nA frozen base of {size_bytes / 1e9:.1f} GB is digested in {seconds:.1f} s, with {took:.0f} MB"
        " more."
    )


def show(rows: list[dict]) -> None:
    print("\nbytes per trainable parameter, on top of the model\n")
    print("| party | phase | held after it | peak in it | seconds |")
    print("|---|---|--:|--:|--:|")
    last: dict[tuple[str, str], dict] = {(row["who"], row["phase"]): row for row in rows}
    for row in last.values():
        print(f"| {row['who']} | {row['phase']} | {row['held']} | {row['peak']} | {row['seconds']} |")


if __name__ == "__main__":
    main()
