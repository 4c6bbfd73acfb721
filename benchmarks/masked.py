"""What masking costs: a round over the masked exchange, in units of a round over the plain one.

Run `make bench`. It starts N processes by torchrun and prints a table. All timings of a table come from one
interleaved run, so that a busy machine slows all of them alike; compare ratios, not milliseconds. With
`--line-mbit 50` the parties are hosts of their own, each of which sends so many megabits per second; that
takes Linux and root.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import Queue
from pathlib import Path

import torch
import torch.distributed as dist
from processes import rows_of, timed
from round import peak_memory_bytes, reset_peak_memory, resident_bytes
from shapes import CASES

from pellm_lightning import Aggregator, Federation
from pellm_lightning.comm.keys import make_key
from pellm_lightning.exchange import Exchange, Plain, SecureAggregation

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from network_namespaces import Network, enter

# 16 MB: a tenth of the large case, since the lines are simulated packet by packet.
THIN = {"a tenth": CASES["large"][:44]}
_PORT = 29555


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--line-mbit", type=float, help="what each party's line carries")
    parser.add_argument("--keys", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        measure(Federation.from_env(), CASES, arguments.keys, arguments.repeats)
        return
    rows = []
    for parties in arguments.parties:
        with tempfile.TemporaryDirectory() as keys:
            for party in range(parties):
                make_key(keys, str(party))
            if arguments.line_mbit:
                rows += over_lines(parties, arguments.line_mbit, keys, arguments.repeats)
            else:
                rows += rows_of(__file__, parties, ["--repeats", str(arguments.repeats), "--keys", keys])
    show(rows)


def over_lines(parties: int, line_mbit: float, keys: str, repeats: int) -> list[dict]:
    """Return the rows of parties that are hosts of their own."""
    network = Network(*map(str, range(parties)))
    network.bits_per_s = 1e6 * line_mbit
    processes = multiprocessing.get_context("spawn")
    rows = processes.Queue()
    try:
        started = [
            processes.Process(target=on_host, args=(host.entrance, party, parties, keys, repeats, rows))
            for party, host in enumerate(network.hosts.values())
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
    finally:
        network.close()
    return [rows.get() for _ in range(3 * len(THIN))]


def on_host(entrance: str, party: int, parties: int, keys: str, repeats: int, rows: Queue) -> None:
    enter(entrance)
    os.environ["GLOO_SOCKET_IFNAME"] = "line"
    store = dist.TCPStore("10.77.0.1", _PORT, is_master=party == 0)
    dist.init_process_group("gloo", store=dist.PrefixStore("timing", store), rank=party, world_size=parties)
    measure(Federation(store, party, parties), THIN, keys, repeats, rows.put)


def measure(
    federation: Federation,
    cases: Mapping[str, list[tuple[int, int]]],
    keys: str,
    repeats: int,
    tell: Callable[[dict], object] = lambda row: print(json.dumps(row), flush=True),
) -> None:
    for case, shapes in cases.items():
        rounds = {
            "plain": Round(federation, shapes, Plain()),
            "64 bits": Round(federation, shapes, SecureAggregation(f"{keys}/{{party}}.key", keys)),
            "32 bits": Round(federation, shapes, SecureAggregation(f"{keys}/{{party}}.key", keys, bits=32)),
        }
        times: dict[str, list[float]] = {name: [] for name in rounds}
        for repeat in range(repeats + 1):
            for name, round in rounds.items():
                seconds = round.run(federation.party)
                if repeat:  # the first touches new memory
                    times[name].append(seconds)
        if federation.party == 0:
            for name, round in rounds.items():
                tell(row(case, name, federation, round, rounds["plain"], times))
    federation.close()
    dist.destroy_process_group()


class Round:
    """One federation's parameters, and an aggregator over an exchange."""

    def __init__(self, federation: Federation, shapes: list[tuple[int, int]], exchange: Exchange) -> None:
        self.parameters = {f"layer{i:03}": torch.zeros(shape) for i, shape in enumerate(shapes)}
        self.aggregator = Aggregator(federation, self.parameters, exchange=exchange)
        self.aggregator.start()
        self.memory = 0

    def run(self, party: int) -> float:
        """Return the seconds of one round, which must give the mean."""
        for parameter in self.parameters.values():
            parameter.fill_(1.0 + party)
        reset_peak_memory()
        before = resident_bytes()
        seconds = timed(lambda: self.aggregator.step(1.0))
        self.memory = peak_memory_bytes() - before
        mean = 1 + (self.aggregator.federation.num_parties - 1) / 2
        assert all(torch.allclose(p, torch.tensor(mean), rtol=1e-6) for p in self.parameters.values())
        return seconds


def row(
    case: str, name: str, federation: Federation, round: Round, plain: Round, times: dict[str, list[float]]
) -> dict:
    median = statistics.median(times[name])
    return {
        "case": case,
        "megabytes": round.aggregator.size_bytes / 1e6,
        "parties": federation.num_parties,
        "exchange": name,
        "ms": 1e3 * median,
        "ratio": median / statistics.median(times["plain"]),
        "memory": (round.memory - plain.memory) / round.aggregator.size_bytes,
    }


def show(rows: list[dict]) -> None:
    print("\nmedian of one interleaved run; ratios in units of a round with exchange.Plain()\n")
    print("| case | parties | exchange | ms | ratio | extra memory in the round |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['case']}, {r['megabytes']:.1f} MB | {r['parties']} | {r['exchange']} | {r['ms']:.1f} |"
            f" {r['ratio']:.2f}x | {r['memory']:.2f} x trainable |"
        )


if __name__ == "__main__":
    main()
