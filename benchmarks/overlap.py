"""What an overlap saves: the time of local steps while a round crosses a thin line, and while none does.

Run `make bench`, or this file alone; it takes Linux and root. Two parties are hosts of their own, joined by a
line of 100 Mbit/s and 50 ms there and back, unless told otherwise. One of them trains, the other only
answers, so that it does not compete for cores. All three ways of training take turns in one run.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing import Queue
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from pellm_lightning import Aggregator, Federation, Overlap

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from network_namespaces import Network, NoNetworkError, enter

_PORT = 29556
WAYS = ("no rounds", "blocking", "overlap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--line-mbit", type=float, default=100)
    parser.add_argument("--round-trip-ms", type=float, default=50)
    parser.add_argument("--megabytes", type=float, default=4, help="what federates")
    parser.add_argument("--steps", type=int, default=100, help="of a round")
    parser.add_argument("--delay", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    try:
        network = Network("trains", "answers")
    except NoNetworkError as error:
        print(f"Not measured: {error}")
        return
    network.bits_per_s, network.delay_s = 1e6 * arguments.line_mbit, arguments.round_trip_ms / 2e3
    processes = multiprocessing.get_context("spawn")
    rows: Queue[list[dict[str, float | str]]] = processes.Queue()
    try:
        started = [
            processes.Process(target=party, args=(host.entrance, number, arguments, rows))
            for number, host in enumerate(network.hosts.values())
        ]
        for process in started:
            process.start()
        table = rows.get()
        for process in started:
            process.join()
    finally:
        network.close()
    show(table, arguments)


def party(entrance: str, number: int, arguments: argparse.Namespace, rows: Queue) -> None:
    torch.set_num_threads(1)
    enter(entrance)
    os.environ["GLOO_SOCKET_IFNAME"] = "line"
    store = dist.TCPStore("10.77.0.1", _PORT, is_master=number == 0)
    federation = Federation(store, number, 2)
    ways = {
        way: Training(federation, arguments, Overlap(arguments.delay) if way == "overlap" else None)
        for way in WAYS[1:]
    }
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    stalls: dict[str, list[float]] = {way: [0.0] for way in WAYS}
    for round in range(arguments.rounds + 1):
        for way in WAYS:
            if way == "no rounds":
                took = ways["blocking"].steps(arguments.steps, trains=number == 0)
                stalled = 0.0
            else:
                took, stalled = ways[way].round(trains=number == 0)
            if round:  # the first touches new memory
                steps[way] += took
                stalls[way].append(stalled)
    if number == 0:
        rows.put([row(way, steps, stalls, arguments) for way in WAYS])
    federation.close()


class Training:
    """A small network whose parameters federate, and rounds of it.

    Args:
        federation: The joined parties.
        arguments: Of the command line.
        overlap: None stands still for a round.
    """

    def __init__(
        self, federation: Federation, arguments: argparse.Namespace, overlap: Overlap | None
    ) -> None:
        width = int((arguments.megabytes * 1e6 / 4 / 4) ** 0.5)
        self.arguments, self.overlap = arguments, overlap
        self.module = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(4)])
        self.batch = torch.randn(256, width)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        parameters = dict(self.module.named_parameters())
        self.aggregator = Aggregator(federation, parameters, overlap=overlap)
        self.aggregator.start()

    def steps(self, number: int, *, trains: bool) -> list[float]:
        """Return the seconds of each of some local steps."""
        took = []
        for _ in range(number if trains else 0):
            begun = time.perf_counter()
            self.optimizer.zero_grad()
            self.module(self.batch).square().mean().backward()
            self.optimizer.step()
            took.append(time.perf_counter() - begun)
        return took

    def round(self, *, trains: bool) -> tuple[list[float], float]:
        """Return the seconds of the steps while a round is under way, and those in which training stood."""
        begun = time.perf_counter()
        if self.overlap is None:
            self.aggregator.step(1.0)
            stalled = time.perf_counter() - begun
            return self.steps(self.arguments.steps, trains=trains), stalled
        self.aggregator.begin(1.0)
        stalled = time.perf_counter() - begun
        took = self.steps(self.arguments.delay, trains=trains)
        begun = time.perf_counter()
        self.aggregator.apply()
        stalled += time.perf_counter() - begun
        self.steps(self.arguments.steps - self.arguments.delay, trains=trains)
        return took, stalled


def row(
    way: str, steps: dict[str, list[float]], stalls: dict[str, list[float]], arguments: argparse.Namespace
) -> dict[str, float | str]:
    usual = statistics.median(steps["no rounds"])
    stall = statistics.median(stalls[way][1:])
    return {
        "way": way,
        "step": 1e3 * statistics.median(steps[way]),
        "ratio": statistics.median(steps[way]) / usual,
        "mean": statistics.fmean(steps[way]) / statistics.fmean(steps["no rounds"]),
        "stall": 1e3 * stall,
        "whole": 1 + stall / (arguments.steps * usual),
    }


def show(rows: list[dict[str, float | str]], arguments: argparse.Namespace) -> None:
    line = f"{arguments.megabytes:g} MB, {arguments.line_mbit:g} Mbit/s, {arguments.round_trip_ms:g} ms"
    print(
        f"\n{line}; rounds of {arguments.steps} steps, landing after {arguments.delay}; one interleaved run\n"
    )
    print("| | a step while it is under way | relative, median (mean) | training stands still | a round |")
    print("|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['way']} | {r['step']:.1f} ms | {r['ratio']:.3f} ({r['mean']:.3f}) | {r['stall']:.0f} ms |"
            f" {r['whole']:.2f}x |"
        )


if __name__ == "__main__":
    main()
