"""Processes of the parties that share a host: whether one has ended, and how."""

import os
import signal
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_process() -> list[str | int]:
    """Return what another process of this host can find this one by; the host is "" where none can."""
    try:
        host = f"{_BOOT_ID.read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        host = ""
    return [host, os.getpid()]


def how_ended(process: list[str | int]) -> str | None:
    """Return how a process has ended; None if it runs, or cannot be seen from here.

    Its exit code can be read until its parent has asked for it, which takes a launcher a moment.

    Example:
        >>> how_ended(this_process()) is None
        True
    """
    host, number = process
    if not host or host != this_process()[0]:
        return None
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return f"its process {number} has ended"
    except OSError:
        return None
    if fields[0] not in "ZX":
        return None
    code = os.waitstatus_to_exitcode(int(fields[-1]))
    if code == 0:  # also for whom the system does not tell it
        return f"its process {number} has ended"
    if code > 0:
        return f"its process {number} has ended with exit code {code}"
    return f"its process {number} was killed by {signal.Signals(-code).name}"
