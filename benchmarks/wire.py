"""How fast parties sum a tensor over Gloo, over our own connections, and over these with TLS.

Run `python benchmarks/wire.py`. It starts N processes by torchrun for N = 2 and 4 and prints a table. The
three take turns within one run, so that a busy machine slows all of them alike; compare ratios, not
milliseconds.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from processes import rows_of, timed

from pellm_lightning.comm.keys import make_ca, make_certificate
from pellm_lightning.comm.mesh.mesh import Listener, Mesh
from pellm_lightning.comm.tls import TLS
from pellm_lightning.comm.torchrun.gloo import GlooGroup

WAYS = ("gloo", "mesh", "mesh, TLS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--certificates", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(Path(arguments.certificates), arguments.megabytes, arguments.repeats)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_ca(folder)
        for party in range(max(arguments.parties)):
            make_certificate(folder, f"party{party}")
        options = ["--repeats", str(arguments.repeats), "--certificates", folder]
        options += ["--megabytes", *map(str, arguments.megabytes)]
        for parties in arguments.parties:
            rows += rows_of(__file__, parties, options)
    show(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


def measure(certificates: Path, megabytes: list[float], repeats: int) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("gloo", dist.distributed_c10d._get_default_store())
    gloo = GlooGroup(store, rank, size, timeout_s=60)
    ca, own = certificates / "ca.pem", certificates / f"party{rank}"
    tls = TLS(f"{own}.pem", f"{own}.key", str(ca))
    meshes = [joined(rank, size, None), joined(rank, size, tls)]
    ways = dict(
        zip(WAYS, [lambda x: gloo.all_reduce(x).wait(), *(m.all_reduce for m, _ in meshes)], strict=True)
    )
    for of_size in megabytes:
        row = measure_size(ways, of_size, repeats)
        if rank == 0:
            print(json.dumps(row | {"parties": size, "megabytes": of_size}), flush=True)
    dist.barrier()
    for mesh, listener in meshes:
        mesh.abort()
        listener.close()
    gloo.abort()
    dist.destroy_process_group()


def joined(rank: int, size: int, tls: TLS | None) -> tuple[Mesh, Listener]:
    names = [f"party{party}" for party in range(size)]
    listener = Listener("127.0.0.1", name=names[rank], roster=names, tls=tls)
    addresses: list[str] = [""] * size
    dist.all_gather_object(addresses, listener.address)
    return Mesh(listener, "bench", rank, names, addresses, timeout_s=60, tls=tls), listener


def measure_size(ways: dict[str, Callable], megabytes: float, repeats: int) -> dict:
    x = torch.randn(int(megabytes * 1e6 / 4))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 2):
        for way, act in ways.items():
            y = x.clone()
            taken = timed(lambda act=act, y=y: act(y))
            if repeat >= 2:
                seconds[way].append(taken)
    return {"seconds": {way: statistics.median(values) for way, values in seconds.items()}}


def show(rows: list[dict]) -> None:
    print(
        f"{'parties':>8}{'MB':>6}" + "".join(f"{way + ', MB/s':>18}" for way in WAYS) + "   of Gloo's speed"
    )
    for row in rows:
        seconds = row["seconds"]
        rates = "".join(f"{row['megabytes'] / seconds[way]:18.0f}" for way in WAYS)
        ratios = " ".join(f"{seconds['gloo'] / seconds[way]:8.2f}" for way in WAYS[1:])
        print(f"{row['parties']:>8}{row['megabytes']:>6g}{rates}   {ratios}")


if __name__ == "__main__":
    main()
