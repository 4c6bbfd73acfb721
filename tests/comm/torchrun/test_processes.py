"""How a process of this host has ended, as long as its parent has not asked."""

import os
import signal
import sys
import time

import pytest

from pellm_lightning.comm.torchrun.processes import how_ended, this_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")


@pytest.mark.parametrize(
    ("end", "expected"),
    [("exit", "has ended with exit code 3"), ("kill", "was killed by SIGKILL"), ("reaped", "has ended")],
)
def test_how_a_process_has_ended(end: str, expected: str) -> None:
    child = os.fork()
    if child == 0:
        if end == "exit":
            os._exit(3)
        time.sleep(20)
        os._exit(0)
    process = [this_process()[0], child]
    if end != "exit":
        assert how_ended(process) is None
        os.kill(child, signal.SIGKILL)
    if end == "reaped":
        os.waitpid(child, 0)
    deadline = time.monotonic() + 5
    while how_ended(process) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert how_ended(process) == f"its process {child} {expected}"
    finally:
        if end != "reaped":
            os.waitpid(child, 0)


def test_processes_of_other_hosts_are_not_judged() -> None:
    assert how_ended(["another host", 1]) is None
    assert how_ended(["", 1]) is None
