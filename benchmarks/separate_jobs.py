"""How long a whole round of separate jobs takes, against a round of parties from one launch over Gloo.

Run `python benchmarks/separate_jobs.py`. It starts N processes by torchrun for N = 2 and 4, and a rendezvous,
and prints a table. All take turns within one run, so that a busy machine slows all of them alike; compare
ratios, not milliseconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from processes import rows_of, timed
from shapes import CASES

from pellm_lightning import Aggregator, Federation
from pellm_lightning.comm import TLS
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.keys import make_ca, make_certificate

# A rendezvous serves one federation.
PLAIN, WITH_TLS = (29710, 29711), (29712, 29713)
WAYS = ("one launch", "jobs", "jobs, on disk", "jobs, TLS", "jobs, TLS, on disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(Path(arguments.folder), arguments.repeats)
        return
    os.environ["PELLM_SHARED_MEMORY"] = "0"  # jobs on hosts of their own share none either
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_ca(folder)
        for name in ("rendezvous", *names(max(arguments.parties))):
            make_certificate(folder, name)
        for parties in arguments.parties:
            with ExitStack() as stack:
                for port in (*PLAIN, *WITH_TLS):
                    stack.enter_context(rendezvous(folder, parties, port))
                rows += rows_of(__file__, parties, ["--repeats", str(arguments.repeats), "--folder", folder])
    show(rows)


def names(parties: int) -> list[str]:
    return [f"party{party}" for party in range(parties)]


def tls_of(folder: Path | str, name: str) -> TLS:
    return TLS(*(f"{folder}/{file}" for file in (f"{name}.pem", f"{name}.key", "ca.pem")))


@contextmanager
def rendezvous(folder: str, parties: int, port: int):
    command = [sys.executable, "-m", "pellm_lightning", "rendezvous", f"--listen=127.0.0.1:{port}"]
    command.append(f"--roster={','.join(names(parties))}")
    if port in WITH_TLS:
        tls = tls_of(folder, "rendezvous")
        command += [f"--tls.cert={tls.cert}", f"--tls.key={tls.key}", f"--tls.ca={tls.ca}"]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def measure(folder: Path, repeats: int) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    roster = tuple(names(size))
    fixed = Federation.from_env()
    plain = [SeparateJobs(f"tcp://127.0.0.1:{port}", roster[rank], roster) for port in PLAIN]
    own = tls_of(folder, roster[rank])
    secure = [SeparateJobs(f"tcp://127.0.0.1:{port}", roster[rank], roster, tls=own) for port in WITH_TLS]
    jobs = [*plain, *secure]
    for case, shapes in CASES.items():
        parameters = {f"layer{i:03}": torch.randn(shape) for i, shape in enumerate(shapes)}
        joined = [job.join() for job in jobs]
        places = [
            None,
            *(folder / f"{case}-{rank}-of-{size}-{way}" if "disk" in way else None for way in WAYS[1:]),
        ]
        aggregators = [
            Aggregator(federation, parameters, state_dir=place)
            for federation, place in zip([fixed, *joined], places, strict=True)
        ]
        for aggregator in aggregators:
            aggregator.start()
        row = {"parties": size, "megabytes": aggregators[0].size_bytes / 1e6}
        row["seconds"] = taken(dict(zip(WAYS, aggregators, strict=True)), repeats)
        for federation in joined:
            dist.barrier()
            federation.close()
        if rank == 0:
            print(json.dumps(row), flush=True)
    fixed.close()
    dist.destroy_process_group()


def taken(aggregators: dict[str, Aggregator], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {way: [] for way in aggregators}
    for repeat in range(repeats + 1):
        for way, aggregator in aggregators.items():
            spent = timed(lambda aggregator=aggregator: aggregator.step(1.0))
            if repeat:
                seconds[way].append(spent)
    return {way: statistics.median(values) for way, values in seconds.items()}


def show(rows: list[dict]) -> None:
    for row in rows:
        one = row["seconds"]["one launch"]
        print(f"{row['parties']} parties, {row['megabytes']:.1f} MB:")
        for way, seconds in row["seconds"].items():
            print(f"  {way:20}{1e3 * seconds:9.1f} ms{seconds / one:8.2f} x")


if __name__ == "__main__":
    main()
