"""What compression costs and saves: a round over each exchange, in units of a round over the plain one.

Run `make bench`. It starts N processes by torchrun and prints a table. All timings of a table come from one
interleaved run, so that a busy machine slows all of them alike; compare ratios, not milliseconds. With
`--line-mbit 50` the parties are hosts of their own, each of which sends so many megabits per second; that
takes Linux and root. Before it all, the speed of the codes on one core.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import Queue
from pathlib import Path

import torch
import torch.distributed as dist
from processes import rows_of, timed
from shapes import CASES

from pellm_lightning import Aggregator, Federation
from pellm_lightning.exchange import Cast, Exchange, Plain, Quantized, TopK
from pellm_lightning.exchange.compressed.codecs import Bfloat16Codec, Codec, QuantizationCodec, TopKCodec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from network_namespaces import Network, enter

# 16 MB: a tenth of the large case, since the lines are simulated packet by packet.
THIN = {"a tenth": CASES["large"][:44]}
IN_MEMORY = {"large": CASES["large"]}
_PORT = 29556


def exchanges() -> list[Exchange]:
    return [
        Plain(),
        Cast("bfloat16"),
        Quantized(bits=8),
        Quantized(bits=4),
        Quantized(bits=4, error_feedback=True),
        TopK(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--line-mbit", type=float, help="what each party's line carries")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        measure(Federation.from_env(), IN_MEMORY, arguments.repeats)
        return
    show_codes()
    rows = []
    for parties in arguments.parties:
        if arguments.line_mbit:
            rows += over_lines(parties, arguments.line_mbit, arguments.repeats)
        else:
            rows += rows_of(__file__, parties, ["--repeats", str(arguments.repeats)])
    show(rows)


def over_lines(parties: int, line_mbit: float, repeats: int) -> list[dict]:
    """Return the rows of parties that are hosts of their own."""
    network = Network(*map(str, range(parties)))
    network.bits_per_s = 1e6 * line_mbit
    processes = multiprocessing.get_context("spawn")
    rows = processes.Queue()
    try:
        started = [
            processes.Process(target=on_host, args=(host.entrance, party, parties, repeats, rows))
            for party, host in enumerate(network.hosts.values())
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
    finally:
        network.close()
    return [rows.get() for _ in range(len(exchanges()) * len(THIN))]


def on_host(entrance: str, party: int, parties: int, repeats: int, rows: Queue) -> None:
    enter(entrance)
    os.environ["GLOO_SOCKET_IFNAME"] = "line"
    torch.set_num_threads(1)
    store = dist.TCPStore("10.77.0.1", _PORT, is_master=party == 0)
    dist.init_process_group("gloo", store=dist.PrefixStore("timing", store), rank=party, world_size=parties)
    measure(Federation(store, party, parties), THIN, repeats, rows.put)


def measure(
    federation: Federation,
    cases: Mapping[str, list[tuple[int, int]]],
    repeats: int,
    tell: Callable[[dict], object] = lambda row: print(json.dumps(row), flush=True),
) -> None:
    for case, shapes in cases.items():
        rounds = [Round(federation, shapes, exchange) for exchange in exchanges()]
        for repeat in range(repeats + 1):
            for round in rounds:
                round.run(keep=repeat > 0)  # the first touches new memory
        if federation.party == 0:
            plain = rounds[0]
            for round in rounds:
                tell(
                    {
                        "case": case,
                        "megabytes": round.aggregator.size_bytes / 1e6,
                        "parties": federation.num_parties,
                        "exchange": repr(round.exchange),
                        "ms": 1e3 * statistics.median(round.seconds),
                        "ratio": statistics.median(round.seconds) / statistics.median(plain.seconds),
                        "bytes": round.sent / plain.sent,
                        "error": round.error,
                    }
                )
    federation.close()
    dist.destroy_process_group()


class Round:
    """One federation's parameters, and an aggregator over an exchange."""

    def __init__(self, federation: Federation, shapes: list[tuple[int, int]], exchange: Exchange) -> None:
        self.exchange = exchange
        self.parameters = {f"layer{i:03}": torch.zeros(shape) for i, shape in enumerate(shapes)}
        self.aggregator = Aggregator(federation, self.parameters, exchange=exchange)
        self.aggregator.start()
        self.generator = torch.Generator().manual_seed(federation.party)
        self.seconds: list[float] = []
        self.sent = 0
        self.error: float | None = None

    def run(self, *, keep: bool) -> None:
        """Train, which is noise, and time one round."""
        for parameter in self.parameters.values():
            parameter += torch.randn(parameter.shape, generator=self.generator)
        reports = []
        seconds = timed(lambda: reports.append(self.aggregator.step(1.0)))
        if keep:
            self.seconds.append(seconds)
            self.sent, self.error = reports[0].bytes_sent, reports[0].compression_error


def show_codes() -> None:
    torch.set_num_threads(1)
    codecs: dict[str, Codec] = {
        "bfloat16": Bfloat16Codec(),
        "8 bits": QuantizationCodec(8, 128),
        "4 bits": QuantizationCodec(4, 128),
        "top 64 of 4096": TopKCodec(4096, 64, 8),
    }
    print("\n| code | encodes, MB/s of float32 | decodes, MB/s |\n|---|---|---|")
    for name, codec in codecs.items():
        encodes, decodes = speeds(codec)
        print(f"| {name} | {encodes:.0f} | {decodes:.0f} |")


def speeds(codec: Codec) -> tuple[float, float]:
    """Return how fast a code is written and read, in MB/s of float32."""
    x = torch.randn(codec.piece, generator=torch.Generator().manual_seed(0))
    data, generator, out = (
        torch.zeros(codec.size_bytes(len(x)), dtype=torch.uint8),
        torch.Generator(),
        x.clone(),
    )
    encodes = speed(x.nbytes, lambda: codec.encode_(x, data, generator))
    return encodes, speed(x.nbytes, lambda: codec.decode_(data, out))


def speed(size_bytes: int, act: Callable[[], object]) -> float:
    times = []
    for _ in range(200):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return size_bytes / statistics.median(times) / 1e6


def show(rows: list[dict]) -> None:
    print("\nmedian of one interleaved run; ratios in units of a round with exchange.Plain()\n")
    print("| case | parties | exchange | ms | time | bytes | error |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        error = "" if r["error"] is None else f"{r['error']:.3f}"
        print(
            f"| {r['case']}, {r['megabytes']:.1f} MB | {r['parties']} | {r['exchange']} | {r['ms']:.1f} |"
            f" {r['ratio']:.2f}x | {r['bytes']:.4f}x | {error} |"
        )


if __name__ == "__main__":
    main()
