"""What tests/conftest.py does for all tests."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pellm_lightning.comm.torchrun.gloo import GlooGroup

PARTIES = 10


def threads() -> int:
    """All threads of this process, Gloo's own included."""
    return len([*Path("/proc/self/task").iterdir()])


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of C++ in /proc")
def test_groups_in_a_collective_end_as_soon_as_all_have_aborted() -> None:
    store = dist.HashStore()
    before = threads()
    with ThreadPoolExecutor(PARTIES) as pool:
        groups = [*pool.map(lambda rank: GlooGroup(store, rank, PARTIES, 30), range(PARTIES))]
    for group in groups[:-1]:
        group.all_reduce(torch.ones(1))
    during = threads()
    for group in groups:
        group.abort()
    deadline = time.monotonic() + 5
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= before < during
