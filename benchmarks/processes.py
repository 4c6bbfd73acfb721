"""Run a benchmark script in N processes and collect the JSON lines that it prints."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist


def rows_of(script: str, parties: int, arguments: Sequence[str]) -> list[dict]:
    """Start `script` by torchrun, one thread per process unless OMP_NUM_THREADS says otherwise."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(parties),
        script,
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def timed(act: Callable[[], object]) -> float:
    """Seconds that `act` takes from the moment when all processes are there."""
    dist.barrier()
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
