"""How fast parties sum a tensor over direct connections and over the relay, both with TLS from end to end.

Run `python benchmarks/relay.py`. Each party and the relay is a process. The two ways take turns, so that a
busy machine slows both alike; compare ratios, not milliseconds.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pellm_lightning.comm.keys import make_ca, make_certificate
from pellm_lightning.comm.mesh.mesh import Listener, Mesh
from pellm_lightning.comm.relay.client import RelayRoute
from pellm_lightning.comm.relay.server import RelayQuotas
from pellm_lightning.comm.rendezvous.client import RendezvousStore
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.comm.tls import TLS

NOWHERE = "127.0.0.1:9"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.001, 2, 32])
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    print(f"{'parties':>7} {'MB':>8} {'direct, ms':>11} {'relayed, ms':>12} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        make_ca(folder)
        for name in ["rendezvous", *map(_name, range(max(arguments.parties)))]:
            make_certificate(folder, name)
        for parties in arguments.parties:
            for row in measured(folder, parties, arguments.megabytes, arguments.repeats):
                direct, relayed = row["direct"], row["relayed"]
                cells = (parties, row["megabytes"], direct, relayed, direct / relayed)
                print("{:>7} {:>8} {:>11.2f} {:>12.2f} {:>6.2f}".format(*cells), flush=True)


def measured(folder: str, parties: int, megabytes: list[float], repeats: int) -> list[dict[str, Any]]:
    """Return the milliseconds of a sum, for each size and way."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(parties + 1)]
    roster = [*map(_name, range(parties))]
    hub = context.Process(target=serve, args=(folder, roster, pipes[-1][1]), daemon=True)
    hub.start()
    address = pipes[-1][0].recv()
    processes = [
        context.Process(
            target=take_part, args=(folder, roster, rank, address, megabytes, repeats, pipes[rank][1])
        )
        for rank in range(parties)
    ]
    for process in processes:
        process.start()
    addresses = [pipes[rank][0].recv() for rank in range(parties)]
    for rank in range(parties):
        pipes[rank][0].send(addresses)
    rows = json.loads(pipes[0][0].recv())
    for process in processes:
        process.join()
    hub.terminate()
    hub.join()
    return rows


def serve(folder: str, roster: list[str], pipe: Any) -> None:
    """Host rendezvous and relay until ended."""
    tls = _tls(folder, "rendezvous")
    with RendezvousServer("127.0.0.1", 0, roster=roster, tls=tls, relay=RelayQuotas()) as server:
        pipe.send(server.address)
        time.sleep(3600)


def take_part(
    folder: str, roster: list[str], rank: int, hub: str, megabytes: list[float], repeats: int, pipe: Any
) -> None:
    """Sum with the other parties, in turns directly and over the relay."""
    torch.set_num_threads(1)
    name, tls = roster[rank], _tls(folder, roster[rank])
    listener = Listener("127.0.0.1", name=name, roster=roster, tls=tls)
    pipe.send(listener.address)
    addresses = pipe.recv()
    rows = []
    with contextlib.closing(listener), contextlib.closing(RendezvousStore(hub, tls=tls)) as store:
        direct = Mesh(listener, "direct", rank, roster, addresses, timeout_s=60, tls=tls)
        route = RelayRoute(lambda: store.relay_access(name), tls)
        nowhere = [NOWHERE] * len(roster)
        relayed = Mesh(listener, "relayed", rank, roster, nowhere, timeout_s=60, tls=tls, relay=route)
        assert len(relayed.relayed) == len(roster) - 1
        for size in megabytes:
            tensor = torch.zeros(max(1, int(size * 1e6 / 4)))
            taken: dict[str, list[float]] = {"direct": [], "relayed": []}
            for _ in range(repeats):
                for way, mesh in (("direct", direct), ("relayed", relayed)):
                    mesh.all_reduce(torch.zeros(1))  # all begin together
                    began = time.perf_counter()
                    mesh.all_reduce(tensor)
                    taken[way].append(1000 * (time.perf_counter() - began))
            rows.append({"megabytes": size} | {way: statistics.median(all_) for way, all_ in taken.items()})
        direct.abort()
        relayed.abort()
    if rank == 0:
        pipe.send(json.dumps(rows))


def _name(rank: int) -> str:
    return f"party{rank}"


def _tls(folder: str, name: str) -> TLS:
    own = Path(folder, name)
    return TLS(f"{own}.pem", f"{own}.key", str(Path(folder, "ca.pem")))


if __name__ == "__main__":
    main()
