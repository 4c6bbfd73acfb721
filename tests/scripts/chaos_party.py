"""One party of the chaos benchmark: a process that trains until it is told to end, whatever becomes of it.

It appends what it takes for settled to ``<directory>/<name>.jsonl``, synced to the disk line by line.
"""

import json
import logging
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dishonest_party import DISHONEST
from round_history import SIZE, Entry, noise, recorded

from pellm_lightning import Aggregator
from pellm_lightning.comm import ElasticFederation, Membership
from pellm_lightning.comm.rendezvous.client import connect


@dataclass(frozen=True)
class Task:
    """What a party is told."""

    directory: str
    name: str
    roster: list[str]
    rendezvous: str
    ttl_s: float
    pace_s: float
    durable: bool = True
    accelerated: bool = False
    dishonest: str = ""
    """How it is dishonest, by its name in ``DISHONEST``; empty if it is not."""
    exchange_timeout_s: float = 10

    @property
    def index(self) -> int:
        return self.roster.index(self.name)

    @property
    def end(self) -> float:
        """Round after which to end: what the file ``end`` says, if it is there."""
        try:
            return int(Path(self.directory, "end").read_text())
        except (FileNotFoundError, ValueError):
            return float("inf")


def run(task: Task) -> None:
    """Take part until the end."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%M:%S")
    federation = ElasticFederation(
        partial(connect, task.rendezvous),  # type: ignore[arg-type]
        task.name,
        task.roster,
        membership=Membership(
            heartbeat_ttl_s=task.ttl_s, wait_s=120, exchange_timeout_s=task.exchange_timeout_s
        ),
    )
    w = torch.randn(SIZE, generator=torch.Generator().manual_seed(task.index))
    state_dir = Path(task.directory, f"state-{task.name}") if task.durable else None
    aggregator = Aggregator(federation, {"w": w}, state_dir=state_dir)
    with Path(task.directory, f"{task.name}.jsonl").open("a") as file:
        recorded(aggregator, partial(append, file))
        if task.dishonest:
            DISHONEST[task.dishonest](aggregator, random.Random(time.time_ns()))
        aggregator.start()
        while aggregator.round < task.end:
            w.copy_(aggregator.global_vector + noise(task.index, aggregator.round))
            time.sleep(task.pace_s * (1 + task.index % 3))
            aggregator.step(task.index % 4 + 1.0)
        for _ in aggregator.drain():
            pass
        federation.close()


def append(file: Any, entry: Entry) -> None:
    """Write a line that survives this process."""
    file.write(replace(entry, time=time.time()).to_json() + "\n")
    file.flush()
    os.fsync(file.fileno())


if __name__ == "__main__":
    run(Task(**json.loads(sys.argv[1])))
