"""Kill, stop and restart the parties of an elastic federation at random; tell whether anything was lost.

Run `make chaos`. Each party is a process with a disk, the rendezvous another. A seed fixes the schedule of
the faults, not what they meet. Afterwards all that the parties have settled is compared, and replayed in
one process.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

_TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(_TESTS / "helpers"), str(_TESTS / "scripts")]

from chaos_party import Task, run  # noqa: E402
from dishonest_party import DISHONEST  # noqa: E402
from round_history import Entry, findings  # noqa: E402

from pellm_lightning.cli import commands  # noqa: E402

# What happens how often.
_FAULTS = {
    "kill": 8,
    "short stop": 4,
    "long stop": 4,
    "rendezvous": 3,
    "kill two": 2,
    "kill all": 1,
    "lost disk": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="of faults, for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parties", type=int, default=4)
    parser.add_argument("--ttl", type=float, default=1.5, help="heartbeat_ttl_s")
    parser.add_argument("--haste", type=float, default=1.0, help="how much sooner fault follows on fault")
    parser.add_argument("--kinds", nargs="+", default=list(_FAULTS), choices=list(_FAULTS))
    parser.add_argument("--dishonest", nargs="*", default=[], choices=list(DISHONEST))
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--keep", help="folder for logs and records")
    arguments = parser.parse_args()
    rows = []
    # One more party that is dishonest, of each kind in turn; or none.
    for seed, dishonest in itertools.product(arguments.seeds, arguments.dishonest or [""]):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(arguments.keep or scratch) / f"seed-{seed}{dishonest}"
            directory.mkdir(parents=True)
            dice = random.Random(seed)
            parties, kinds = arguments.parties + bool(dishonest), arguments.kinds
            chaos = Chaos(directory, parties, arguments.ttl, dice, kinds, arguments.haste, dishonest)
            rows.append({"seed": seed, "dishonest": dishonest} | chaos.run(arguments.seconds))
            show(rows[-1])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    if not all(row["sound"] and row["ended"] for row in rows):
        sys.exit("Something was lost, or a party did not end.")


@dataclass
class Process:
    """A process that is killed and started again at will."""

    act: Callable[[], None]
    log: Path
    pid: int = 0
    begins_at: float = 0.0
    wakes_at: float = 0.0

    @property
    def runs(self) -> bool:
        return self.pid > 0

    @property
    def is_awake(self) -> bool:
        return self.runs and not self.wakes_at

    def start(self) -> None:
        """Fork: all modules are loaded already, so that a restart costs what it does on a host of its own."""
        self.begins_at = 0.0
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                self.act()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def kill(self, begins_at: float) -> None:
        """Kill it; it begins again then."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid, self.wakes_at, self.begins_at = 0, 0.0, begins_at

    def stop(self, wakes_at: float) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        self.wakes_at = wakes_at

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self.wakes_at = 0.0

    def exit_code(self) -> int | None:
        """Return how it has ended by itself, None if it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        self.pid = 0
        return os.waitstatus_to_exitcode(status)


@dataclass
class Chaos:
    """One federation and what happens to it.

    Args:
        directory: For logs, records and the parties' disks.
        parties: How many there are.
        ttl_s: After how long without a sign of life a party counts as dead.
        dice: Whence the schedule comes.
        kinds: Of faults, of those in ``_FAULTS``.
        haste: By how much the pauses between faults are shorter than usual.
        dishonest: How the last party is dishonest; empty if it is not.
    """

    directory: Path
    num_parties: int
    ttl_s: float
    dice: random.Random
    kinds: list[str]
    haste: float = 1.0
    dishonest: str = ""
    faults: Counter[str] = field(default_factory=Counter)
    kills: list[tuple[float, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    rogue_ends: list[str] = field(default_factory=list)
    until: float = 0.0

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.roster = [f"p{i}" for i in range(self.num_parties)]
        words = ["rendezvous", "--listen", address]
        self.rendezvous = Process(lambda: commands.main(words), self.directory / "rendezvous.log")
        self.rogue = self.roster[-1] if self.dishonest else ""
        self.exchange_timeout_s = 2 if self.dishonest else 10
        tasks = [
            Task(
                str(self.directory),
                name,
                self.roster,
                f"tcp://{address}",
                self.ttl_s,
                pace_s=0.03,
                dishonest=self.dishonest if name == self.rogue else "",
                exchange_timeout_s=self.exchange_timeout_s,
            )
            for name in self.roster
        ]
        self.parties = {
            task.name: Process(lambda task=task: run(task), self.directory / f"{task.name}.log")
            for task in tasks
        }
        self.wiped = ""

    # ---- the schedule

    def run(self, seconds: float) -> dict[str, object]:
        """Let faults happen for so long, then let all end; return what came of it."""
        now = time.time()
        self.rendezvous.start()
        for index, process in enumerate(self.parties.values()):
            process.begins_at = now + (2.0 if index == self.num_parties - 1 else 0.1)
        next_fault = now + 4.0 / self.haste
        try:
            while time.time() < now + seconds:
                self._tend()
                if time.time() >= next_fault and (not self.rogue or self._has_begun()):
                    next_fault = time.time() + self._strike()
                time.sleep(0.01)
            self.until = time.time()
            ended = self._end()
        finally:
            for process in [*self.parties.values(), self.rendezvous]:
                if process.runs:
                    process.kill(0.0)
        return self._figures(ended)

    def _has_begun(self) -> bool:
        """Tell whether a round was settled: for the first all parties are waited for, whoever is killed."""
        return any(entry.round and entry.stage == "settled" for entry in self._records())

    def _have_all_taken_part(self, since: float) -> bool:
        """Tell whether all honest parties have settled a round since then."""
        last = {entry.party: entry.time for entry in self._records() if entry.stage == "settled"}
        return len(last) == len(self.roster) - bool(self.rogue) and min(last.values()) > since

    def _tend(self) -> None:
        """Start and wake who is due; note who ended by itself."""
        now = time.time()
        for name, process in [*self.parties.items(), ("rendezvous", self.rendezvous)]:
            if process.runs and process.wakes_at and now >= process.wakes_at:
                process.wake()
                self.times.append(now)
            if process.runs and process.exit_code():
                ends = self.rogue_ends if name == self.rogue else self.errors
                ends.append(f"{name}: {_last_line(process.log)}")
                process.begins_at = now + 0.5
            if not process.runs and name == self.rogue and self.dishonest == "copying":
                self._copy_state(name)
            if not process.runs and process.begins_at and now >= process.begins_at:
                process.start()
                self.times.append(now)

    def _copy_state(self, name: str) -> None:
        """Give a party that does not run the state of another one; every other time it has none."""
        mine, other = (self.directory / f"state-{party}" for party in (name, self.roster[0]))
        copied = (mine / "owner").exists() and (mine / "owner").read_text() != name
        shutil.rmtree(mine, ignore_errors=True)
        if not copied and other.exists():
            # The other one is writing there at this moment.
            shutil.copytree(other, mine, ignore_dangling_symlinks=True, copy_function=_copied)

    def _strike(self) -> float:
        """Do the next fault; return how many seconds to wait before the one after."""
        dice, now = self.dice, time.time()
        kind = dice.choices(self.kinds, [_FAULTS[kind] for kind in self.kinds])[0]
        awake = [name for name, process in self.parties.items() if process.is_awake]
        victims = dice.sample(awake, min(len(awake), {"kill two": 2, "kill all": len(awake)}.get(kind, 1)))
        again = now + dice.uniform(0.05, 2.5) * self.ttl_s
        pause = dice.choice([dice.uniform(0.1, 1.0), dice.uniform(1.0, 2.0) + 1.5 * self.ttl_s])
        if kind == "rendezvous":
            if not self.rendezvous.is_awake:
                return 0.1
            self.rendezvous.kill(again)
        elif kind == "lost disk":
            if not victims or not self._may_lose(victims[0]):
                return 0.1
            self.parties[victims[0]].kill(again)
            shutil.rmtree(self.directory / f"state-{victims[0]}", ignore_errors=True)
            self.wiped = victims[0]
        elif not victims:
            return 0.1
        elif "stop" in kind:
            short, long = dice.uniform(0.1, 0.8), dice.uniform(1.2, 3.0)
            self.parties[victims[0]].stop(now + self.ttl_s * (short if kind == "short stop" else long))
        else:
            for name in victims:
                self.parties[name].kill(again)
            if kind == "kill":
                self.kills.append((now, victims[0]))
        self.faults[kind] += 1
        self.times.append(now)
        return pause / self.haste

    def _may_lose(self, name: str) -> bool:
        """Tell whether another disk may be lost: not before the last one's owner is up to date again.

        Of four parties three have each round. Two disks lost leave one, and a majority without it.
        """
        if self.num_parties != 4:
            return False
        if not self.wiped:
            return True
        entries = _entries(self.directory / f"{self.wiped}.jsonl")
        return bool(entries) and entries[-1].time > max(self.times, default=0.0)

    def _end(self) -> bool:
        """Bring everybody back and let them end; return whether they all did."""
        for process in self.parties.values():
            if process.wakes_at:
                process.wake()
            if not process.runs:
                process.begins_at = time.time()
        if not self.rendezvous.runs:
            self.rendezvous.begins_at = time.time()
        for _ in range(600):
            self._tend()
            honest = [process for name, process in self.parties.items() if name != self.rogue]
            if all(process.runs for process in [*honest, self.rendezvous]):
                break
            time.sleep(0.01)
        # Who is not yet back when the others end has nothing left to take part in.
        deadline, back_since = time.time() + 30, max(self.times, default=0.0)
        while time.time() < deadline and not self._have_all_taken_part(back_since):
            self._tend()
            time.sleep(0.05)
        last = max((entry.round for entry in self._records()), default=0)
        (self.directory / "end").write_text(str(last + 10))
        deadline = time.time() + 60
        while time.time() < deadline and any(process.runs for process in honest):
            for name, process in self.parties.items():
                if process.runs and process.exit_code() and name != self.rogue:
                    self.errors.append(f"{name} at the end: {_last_line(process.log)}")
            time.sleep(0.05)
        return not any(process.runs for name, process in self.parties.items() if name != self.rogue)

    # ---- what came of it

    def _records(self) -> list[Entry]:
        """Return what the honest parties have recorded."""
        honest = [name for name in self.roster if name != self.rogue]
        return [entry for name in honest for entry in _entries(self.directory / f"{name}.jsonl")]

    def _figures(self, ended: bool) -> dict[str, object]:
        entries = self._records()
        # What one that equivocates makes others compute differs, and is not committed. But a result of which
        # nobody has read the decision may stand: then it is all that is known of its round. And who made a
        # result that stands may have been killed before the decision: only that record has the weights.
        known: dict[int, set[str]] = defaultdict(set)
        for entry in entries:
            if self.rogue and entry.stage != "made":
                known[entry.round].add(entry.digest)
        judged = [entry for entry in entries if entry.digest in known.get(entry.round, {entry.digest})]
        found = findings(judged, self.roster)
        recovered = self._recoveries(entries)
        commits = [at for at in _commits(entries) if at < self.until]

        def within(at: float) -> bool:
            return bool(commits) and commits[0] < at < self.until

        return {
            "faults": dict(self.faults),
            "total": sum(self.faults.values()),
            "rounds_in_faults": len(commits),
            "longest_without_round_s": _longest([*commits, self.until]),
            # Each fault and each return may begin a wait anew; between them a round has to come.
            "longest_wait_s": _longest(sorted([*commits, *filter(within, self.times), self.until])),
            "wait_allowed_s": self.ttl_s + self.exchange_timeout_s + 1,
            "ended": ended,
            "sound": found.is_sound,
            **asdict(found),
            "in_doubt": sum(entry.stage == "in doubt" for entry in entries),
            "errors": self.errors,
            "rogue_ends": self.rogue_ends,
            "recoveries": len(recovered),
            "recovery_median_s": statistics.median(recovered) if recovered else None,
            "recovery_worst_s": max(recovered, default=None),
            "allowed_s": self.ttl_s + 1,
        }

    def _recoveries(self, entries: list[Entry]) -> list[float]:
        """Return by how much each kill alone has delayed the next commit of the others."""
        between = [b - a for a, b in pairwise(_commits(entries))]
        usual, delays = statistics.median(between or [0.0]), []
        for killed_at, name in self.kills:
            others = [e.time for e in entries if e.party != name and e.stage != "made" and e.time > killed_at]
            back = min(others, default=float("inf"))
            before = [at for at in self.times if killed_at - 1.0 < at < killed_at]
            if not before and not any(killed_at < at < back for at in self.times):
                delays.append(max(0.0, back - killed_at - usual))
        return delays


def show(row: dict[str, object]) -> None:
    """Print one seed's figures."""
    for name, value in row.items():
        print(f"{name:>20}  {value}")
    print(flush=True)


def _entries(path: Path) -> list[Entry]:
    """Return what a party has recorded; the last line may be half written."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [Entry.from_json(line) for line in lines if line.endswith("}")]


def _commits(entries: list[Entry]) -> list[float]:
    """Return when each round was settled, in order."""
    return sorted({entry.round: entry.time for entry in entries if entry.stage == "settled"}.values())


def _longest(moments: list[float]) -> float | None:
    """Return the longest time between a moment and the next."""
    return max((b - a for a, b in pairwise(moments)), default=None)


def _copied(source: str, target: str) -> None:
    """Copy a file that may be renamed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        shutil.copy2(source, target)


def _last_line(path: Path) -> str:
    lines = path.read_text().strip().splitlines()
    return lines[-1] if lines else "nothing"


if __name__ == "__main__":
    main()
