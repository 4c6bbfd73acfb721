"""One party of three in shared memory; the last one kills itself at a point of its third round.

Arguments: a folder for all, the party, and the point. What a party has seen is in ``<party>.json`` there.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pellm_lightning import Aggregator, Federation
from pellm_lightning.comm import PartyLostError
from pellm_lightning.comm.torchrun.host_sockets import HostSockets
from pellm_lightning.engine.shared_updates import SharedUpdates

PARTIES, VICTIM, ROUND, SIZE = 3, 2, 2, 300_000
armed, entered = False, 0.0
folder, party, point = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


def die(*_: Any, **__: Any) -> None:
    if armed:
        (folder / "died").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)


def around(owner: type, name: str, *, before: Any = None, after: Any = None) -> None:
    method = getattr(owner, name)

    def replaced(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if before:
            before(self, *arguments)
        result = method(self, *arguments, **keywords)
        if after:
            after(self)
        return result

    setattr(owner, name, replaced)


def tell_one_and_die(kind: bytes) -> Any:
    """Die in a barrier, when one of the others has the message of this party and one has not."""

    def act(sockets: HostSockets, message: bytes, *_: Any) -> None:
        if armed and message.startswith(kind):
            sockets._peers[0].send(message)
            die()

    return act


def note_entry(sockets: HostSockets, message: bytes, *_: Any) -> None:
    global entered
    entered = time.monotonic()


def fork_and_die(*_: Any, **__: Any) -> None:
    """Leave a child that holds all sockets open, as a loader of data that is a process may.

    It ends when the others have noticed: whoever reads this process's output waits for it, too.
    """
    if armed:
        if os.fork() == 0:
            noticed = [folder / f"{other}.json" for other in range(PARTIES) if other != VICTIM]
            deadline = time.monotonic() + 20
            while not all(path.exists() for path in noticed) and time.monotonic() < deadline:
                time.sleep(0.05)
            os._exit(0)
        die()


if party == VICTIM:
    {
        "before packing": lambda: around(SharedUpdates, "pack", before=die),
        "half packed": lambda: around(SharedUpdates, "_subtract", after=die),
        "packed": lambda: around(SharedUpdates, "pack", after=die),
        "header half sent": lambda: around(HostSockets, "exchange", before=tell_one_and_die(b"all_gather")),
        "half combined": lambda: around(SharedUpdates, "_step", after=die),
        "combined": lambda: around(SharedUpdates, "combine", after=die),
        "in the barrier": lambda: around(HostSockets, "exchange", before=tell_one_and_die(b"barrier")),
        "writing": lambda: around(SharedUpdates, "write_", before=die),
        "with a child": lambda: around(SharedUpdates, "combine", after=fork_and_die),
    }[point]()
else:
    around(HostSockets, "exchange", before=note_entry)

torch.set_num_threads(1)
store = dist.FileStore(str(folder / "store"), PARTIES)
federation = Federation(store, party, PARTIES, timeout_s=60)
w = torch.arange(SIZE, dtype=torch.float32)
aggregator = Aggregator(federation, {"w": w})
aggregator.start()
maps = Path("/proc/self/maps").read_text()
for number in range(ROUND + 2):
    w += party + 1
    before = w.clone()
    armed = number == ROUND
    try:
        aggregator.step(1.0)
    except PartyLostError as error:
        failed = time.monotonic()
        died = float((folder / "died").read_text())
        seen = {
            "round": number,
            "noticed_s": failed - max(died, entered),
            "as_before": torch.equal(w, before),
            "global": aggregator.global_vector[:3].tolist(),
            "message": str(error),
            "mapped": [line.split(maxsplit=5)[5] for line in maps.splitlines() if "pellm" in line],
        }
        (folder / f"{party}.json").write_text(json.dumps(seen))
        federation.abort(str(error))
        break
