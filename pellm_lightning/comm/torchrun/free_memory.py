"""Free memory of this host, or of the container that a process is in."""

from pathlib import Path

# Where a container finds its own limit, by version 2 and 1 of control groups: limit, use, and statistics.
_GROUPS = [
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
]


def free_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that can be reserved before the kernel would have to end a process.

    Args:
        proc: Where the kernel tells of the host.
        groups: Where it tells of control groups.

    Raises:
        OSError: If it does not tell.
    """
    free = _field(proc / "meminfo", "MemAvailable:") * 1024
    for limit, use, statistics in _GROUPS:
        try:
            within = int((groups / limit).read_text()) - int((groups / use).read_text())
            free = min(free, within + _field(groups / statistics, "inactive_file"))  # which can be dropped
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
    return free


def _field(path: Path, name: str) -> int:
    """Return the number behind a name in a file of lines, 0 if there is none."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)
