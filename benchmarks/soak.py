"""Whether an elastic federation grows: many rounds of a few parties, and a few rounds of many.

Run `make soak`; `--secure` adds TLS, signed rounds and secure aggregation. The parties are threads of this
process, the rendezvous a real one, connections and state directories, too.
"""

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

_TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(_TESTS / "helpers"))

import torch  # noqa: E402
from certificates import tls_of  # noqa: E402
from round_history import SIZE, Entry, findings, noise, recorded  # noqa: E402

from pellm_lightning import Aggregator  # noqa: E402
from pellm_lightning.comm import TLS, ElasticFederation, Membership  # noqa: E402
from pellm_lightning.comm.rendezvous.client import RendezvousStore  # noqa: E402
from pellm_lightning.comm.rendezvous.server import RendezvousServer  # noqa: E402
from pellm_lightning.exchange import SecureAggregation  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000, help="of three parties")
    parser.add_argument("--crowd", type=int, default=24, help="parties that make twenty rounds")
    parser.add_argument("--secure", action="store_true", help="with TLS, signed rounds, secure sums")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    figures = {"long": long(arguments.rounds, arguments.secure), "crowd": crowd(arguments.crowd)}
    print(json.dumps(figures, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures))


def long(rounds: int, secure: bool = False) -> dict[str, object]:
    """Return what there was after a tenth of the rounds, and before the last."""
    found: list[dict[str, float]] = []
    began = time.perf_counter()
    with Parties(3, secure) as parties, closing(parties.client("p0")) as store:

        def look(party: str, aggregator: Aggregator) -> None:
            if party == "p0" and aggregator.round in (rounds // 10, rounds - 1):
                found.append(inventory() | {"keys": store.num_keys()} | parties.disk())

        parties.run(rounds, look)
    return {
        "rounds": parties.reached,
        "seconds": time.perf_counter() - began,
        **{name: [inventory[name] for inventory in found] for name in found[0]},
    }


def crowd(size: int) -> dict[str, object]:
    """Let many parties form, lose one after ten rounds, and go on."""
    formed: list[float] = []
    began = time.perf_counter()

    def look(party: str, aggregator: Aggregator) -> None:
        if aggregator.round == 0:
            formed.append(time.perf_counter() - began)
        if party == "p1" and aggregator.round == 10:
            raise SystemExit  # it vanishes without a word

    with Parties(size) as parties:
        parties.run(20, look)
    found = findings(parties.entries, parties.roster)
    last = {tuple(entry.members) for entry in parties.entries if entry.round == 20}
    return {
        "parties": size,
        "seconds": time.perf_counter() - began,
        "formed_after_s": max(formed),
        "rounds": found.rounds,
        "sound": found.is_sound,
        "lost": size - len(last.pop()),
    }


class Parties:
    """Parties as threads, with all that they need."""

    def __init__(self, size: int, secure: bool = False) -> None:
        self.roster = [f"p{i}" for i in range(size)]
        self.entries: list[Entry] = []
        self.reached = 0
        self._secure = secure
        self._quorum = max(3, size // 2 + 1)  # as few as secure aggregation may have
        self._directory = tempfile.TemporaryDirectory()
        self._server = RendezvousServer("127.0.0.1", 0, roster=self.roster, tls=self._tls("rendezvous"))

    def client(self, name: str) -> RendezvousStore:
        return RendezvousStore(self.address, tls=self._tls(name))

    def disk(self) -> dict[str, int]:
        """Return how many files the parties' state takes, and the bytes of those that are not evidence."""
        files = [file for name in self.roster for file in Path(self._directory.name, name).rglob("*")]
        return {
            "files": len(files),
            "state_bytes": sum(f.stat().st_size for f in files if not f.name.startswith("evidence")),
        }

    def _tls(self, name: str) -> TLS | None:
        return tls_of(name) if self._secure else None

    def __enter__(self) -> "Parties":
        self._server.start()
        self.address = self._server.address
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._directory.cleanup()

    def run(self, rounds: int, look: Callable[[str, Aggregator], None]) -> None:
        """Make so many rounds; each party calls ``look`` before each, and dies if it raises SystemExit."""
        threads = [
            threading.Thread(target=self._live, args=(name, rounds, look), name=name) for name in self.roster
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _live(self, name: str, rounds: int, look: Callable[[str, Aggregator], None]) -> None:
        index = self.roster.index(name)
        federation = ElasticFederation(
            partial(self.client, name),
            name,
            self.roster,
            quorum=self._quorum,
            membership=Membership(heartbeat_ttl_s=3),
            tls=self._tls(name),
        )
        w = torch.zeros(SIZE)
        state_dir = Path(self._directory.name, name)
        exchange = SecureAggregation() if self._secure else None
        aggregator = Aggregator(
            federation, {"w": w}, quorum=self._quorum, state_dir=state_dir, exchange=exchange
        )
        if rounds < 100:
            recorded(aggregator, self.entries.append)
        try:
            aggregator.start()
            while aggregator.round < rounds:
                look(name, aggregator)
                w.copy_(aggregator.global_vector + noise(index, aggregator.round))
                aggregator.step(index + 1.0)
            self.reached = aggregator.round
            for _ in aggregator.drain():
                pass
            federation.close()
        except SystemExit:
            heart = federation._peers
            heart._stopping = True
            heart._wake.set()
            federation._connections.drop()
            federation._listener.close()


def inventory() -> dict[str, float]:
    """Return what this process holds now."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    kilobytes = int(status.partition("VmRSS:")[2].split()[0])
    return {
        "memory_mb": round(kilobytes / 1024, 1),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


if __name__ == "__main__":
    main()
