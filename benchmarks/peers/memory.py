"""How much memory the processes of a session hold, by what they are: a party or a server."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

_EVERY_S = 0.1
ROLE = "PEERS_ROLE"
# NVFlare's simulator starts its clients itself, so that they inherit its role.
_SIMULATED = re.compile(rb"--client\0?\s*site-(\d+)")


class Watch(threading.Thread):
    """Samples the resident memory of all processes that carry a mark in their environment.

    ``peaks`` holds, by role, the largest sum over the role's processes at one moment, or, where it is more,
    the largest that the kernel has counted for one of them; both in bytes.
    """

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self._mark = mark.encode()
        self._before = set(_pids())
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._sample()

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _sample(self) -> None:
        now: dict[str, int] = {}
        for pid, role in self._marked():
            with contextlib.suppress(OSError, KeyError):
                status = _status(pid)
                now[role] = now.get(role, 0) + status["VmRSS"]
                self.peaks[role] = max(self.peaks.get(role, 0), status["VmHWM"])
        for role, size in now.items():
            self.peaks[role] = max(self.peaks.get(role, 0), size)

    def _marked(self) -> Iterator[tuple[int, str]]:
        """Yield process and role; nothing is remembered, since a fork gets its environment when it execs."""
        for pid in _pids():
            if pid in self._before:
                continue
            with contextlib.suppress(OSError):
                environment = _read(pid, "environ")
                if self._mark not in environment:
                    continue
                simulated = _SIMULATED.search(_read(pid, "cmdline"))
                if simulated:
                    yield pid, f"party-{int(simulated[1]) - 1}"
                    continue
                found = re.search(rf"{ROLE}=([^\0]*)".encode(), environment)
                yield pid, found[1].decode() if found else "?"

    def end_what_is_left(self) -> None:
        """End the session's processes that still run; each is told to, and killed after five seconds."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = [pid for pid, _ in self._marked()]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            end = time.monotonic() + 5
            while any(self._marked()) and time.monotonic() < end:
                time.sleep(0.1)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def _status(pid: int) -> dict[str, int]:
    """Return the kernel's counts in bytes."""
    lines = (line.split() for line in _read(pid, "status").decode().splitlines())
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[0] in ("VmRSS:", "VmHWM:")}
