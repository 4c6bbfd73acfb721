"""Free memory of this host, or of the container that a process is in."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

# Files of a control group, of version 2 and 1: limit, use, and statistics.
_FILES = {
    "": ("memory.max", "memory.current", "memory.stat"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}


def free_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that can be reserved before the kernel would have to end a process.

    Args:
        proc: Where the kernel describes the host and this process.
        groups: Where it describes control groups.

    Raises:
        OSError: If it does not.
    """
    free = _field(proc / "meminfo", "MemAvailable:") * 1024
    for group, (limit, use, statistics) in _limiting_groups(proc, groups):
        try:
            within = int((group / limit).read_text()) - int((group / use).read_text())
            free = min(free, within + _field(group / statistics, "inactive_file"))  # which can be dropped
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
    return free


def _limiting_groups(proc: Path, groups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the control groups that this process is in, up to the root, and the names of their files.

    The root is that of the container, which may not see the outer path by which the kernel names its group.
    """
    paths = dict.fromkeys(_FILES, "")
    with contextlib.suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= {name: path.strip("/") for name in controllers.split(",") if name in _FILES}
    for name, path in paths.items():
        group = groups / name / path
        yield from ((at, _FILES[name]) for at in (group, *group.parents) if at.is_relative_to(groups / name))


def _field(path: Path, name: str) -> int:
    """Return the number behind a name in a file of lines, 0 if there is none."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)
