"""Kill and stop the parties of a launch that share memory, at random; see whether many rounds leave anything.

    $ python benchmarks/launch_faults.py --launches 40 --rounds 20000

A launch ends when a party dies: the others are to notice at once, to name it, to keep their parameters as
they were before the round that failed, and to hold what all others hold of the rounds before.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from chaos import Process
from soak import inventory

from pellm_lightning import Aggregator, Federation, FederationError

SIZE, TIMEOUT_S = 300_000, 4.0
_FAULTS = {"kill": 5, "kill two": 2, "short stop": 3, "long stop": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--launches", type=int, default=40)
    parser.add_argument("--parties", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20_000, help="of the launch that nothing happens to")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    figures = faults(arguments.launches, arguments.parties, dice)
    figures["undisturbed"] = undisturbed(arguments.parties, arguments.rounds)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures))
    if figures["wrong"]:
        sys.exit("A launch did not end as promised.")


def faults(launches: int, parties: int, dice: random.Random) -> dict[str, Any]:
    counted: Counter[str] = Counter()
    noticed: dict[str, list[float]] = {kind: [] for kind in _FAULTS}
    wrong, rounds = [], 0
    for number in range(launches):
        with tempfile.TemporaryDirectory() as folder:
            launch = Launch(Path(folder), parties, dice)
            kinds = launch.strike()
            counted.update(kinds)
            wrong += [f"launch {number} ({', '.join(kinds)}): {what}" for what in launch.judged()]
            noticed[kinds[-1]] += launch.noticed
            rounds += launch.rounds
    return {
        "launches": launches,
        "faults": dict(counted),
        "rounds": rounds,
        "noticed_worst_s": {kind: round(max(times), 3) for kind, times in noticed.items() if times},
        "wrong": wrong,
    }


class Launch:
    """A launch that goes on until a fault ends it."""

    def __init__(self, folder: Path, parties: int, dice: random.Random) -> None:
        self.folder, self.parties, self.dice = folder, parties, dice
        self.victims: list[int] = []
        self.noticed: list[float] = []
        self.rounds = 0
        self._processes = [
            Process(partial(party, folder, index, parties), folder / f"{index}.log")
            for index in range(parties)
        ]

    def strike(self) -> list[str]:
        """Let stops happen that are too short to matter, then one fault that ends it; return their kinds."""
        for process in self._processes:
            process.start()
        kinds, dice = [], self.dice
        while True:
            self._await_rounds(3)
            time.sleep(dice.uniform(0, 0.3))
            kinds.append(dice.choices(list(_FAULTS), list(_FAULTS.values()))[0])
            if kinds[-1] != "short stop":
                break
            stopped = dice.choice(self._processes)
            stopped.stop(0)
            time.sleep(dice.uniform(0.05, TIMEOUT_S / 4))
            stopped.wake()
        self.victims = dice.sample(range(self.parties), 2 if kinds[-1] == "kill two" else 1)
        began = time.monotonic()
        for victim in self.victims:
            if kinds[-1] == "long stop":
                self._processes[victim].stop(0)
            else:
                self._processes[victim].kill(0)
        self._await_end(kinds[-1], began)
        return kinds

    def judged(self) -> list[str]:
        """Return what was not as promised."""
        found = []
        digests: dict[int, set[str]] = {}
        for index in range(self.parties):
            lines = [json.loads(line) for line in self._lines(index)]
            for line in lines:
                if "digest" in line:
                    digests.setdefault(line["round"], set()).add(line["digest"])
            if index in self.victims:
                continue
            if not lines or "error" not in lines[-1]:
                log = (self.folder / f"{index}.log").read_text()
                found.append(f"party {index} did not end with an error of ours: {log[-300:]}")
            elif not lines[-1]["as_before"]:
                found.append(f"party {index} has lost what it had before the round that failed")
            elif not any(f"party {victim}" in lines[-1]["error"] for victim in self.victims):
                found.append(f"party {index} blames another: {lines[-1]['error']}")
        self.rounds = max(digests, default=0)
        return found + [f"results of round {at} differ" for at, kinds in digests.items() if len(kinds) > 1]

    def _await_rounds(self, more: int) -> None:
        goals = [len(self._lines(index)) + more for index in range(self.parties)]
        deadline = time.monotonic() + 60
        while any(len(self._lines(index)) < goal for index, goal in enumerate(goals)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no round in 60 s: see {self.folder}")
            time.sleep(0.01)

    def _await_end(self, kind: str, began: float) -> None:
        others = [self._processes[index] for index in range(self.parties) if index not in self.victims]
        deadline = began + TIMEOUT_S + 20
        while others and time.monotonic() < deadline:
            for process in [process for process in others if process.exit_code() is not None]:
                others.remove(process)
            time.sleep(0.005)
        for process in others:  # judged by what they have not written
            process.kill(0)
        for index in set(range(self.parties)) - set(self.victims):
            at = [json.loads(line)["at"] for line in self._lines(index)[-1:] if "error" in line]
            self.noticed += [max(0.0, noticed - began) for noticed in at]
        if kind == "long stop":
            self._processes[self.victims[0]].wake()
            self._processes[self.victims[0]].kill(0)

    def _lines(self, index: int) -> list[str]:
        path = self.folder / f"{index}.jsonl"
        return path.read_text().splitlines() if path.exists() else []


def party(folder: Path, index: int, parties: int, rounds: int = 10**9) -> None:
    """Make rounds; write down each, or the error that ends them."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), parties)
    federation = Federation(store, index, parties, timeout_s=TIMEOUT_S)
    w = torch.zeros(SIZE)
    aggregator = Aggregator(federation, {"w": w})
    aggregator.start()
    if federation.share_memory(8) is None:
        raise SystemExit("The parties cannot share memory here, so there is nothing to try.")
    generator = torch.Generator().manual_seed(index)
    with (folder / f"{index}.jsonl").open("a", buffering=1) as file:
        while aggregator.round < rounds:
            w += torch.randn(SIZE, generator=generator)
            before = w.clone()
            try:
                aggregator.step(index + 1.0)
            except FederationError as error:
                same = torch.equal(w, before)
                file.write(
                    json.dumps({"error": str(error), "at": time.monotonic(), "as_before": same}) + "\n"
                )
                federation.abort(str(error))
                return
            if rounds < 10**9:
                if index == 0 and aggregator.round in (rounds // 10, rounds):
                    file.write(json.dumps(inventory()) + "\n")
            else:
                digest = hashlib.sha256(w.numpy()).hexdigest()
                file.write(json.dumps({"round": aggregator.round, "digest": digest}) + "\n")
    federation.close()


def undisturbed(parties: int, rounds: int) -> dict[str, list[float]]:
    """Return what party 0 holds after a tenth of the rounds, and after the last."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            Process(partial(party, Path(folder), index, parties, rounds), Path(folder, f"{index}.log"))
            for index in range(parties)
        ]
        for process in processes:
            process.start()
        for process in processes:
            os.waitpid(process.pid, 0)
        found = [json.loads(line) for line in Path(folder, "0.jsonl").read_text().splitlines()]
    return {"rounds": rounds, **{name: [line[name] for line in found] for name in found[0]}}


if __name__ == "__main__":
    main()
