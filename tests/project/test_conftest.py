"""What tests/conftest.py does for all tests."""

import fcntl
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from paths import ROOT

from pellm_lightning.comm.torchrun.gloo import GlooGroup

PARTIES = 10


@pytest.fixture
def conftest(request: pytest.FixtureRequest) -> Any:
    """The module that pytest has loaded."""
    return request.config.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py"))


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


def test_who_waits_for_a_lock_names_the_test_that_holds_it(conftest: Any, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    held = f"test_that_hangs (process {os.getpid()})"
    refused = pytest.raises(TimeoutError, match=rf"^{path} was locked for 0\.1 s, by .*{re.escape(held)}")
    with conftest._locked(path, fcntl.LOCK_SH), conftest._noted("test_that_hangs"):
        with conftest._locked(path, fcntl.LOCK_SH, 0):  # which both may hold
            pass
        with refused, conftest._locked(path, fcntl.LOCK_EX, 0.1):
            pass
    with conftest._locked(path, fcntl.LOCK_EX, 0):
        pass
    assert held not in conftest._noted_tests()
