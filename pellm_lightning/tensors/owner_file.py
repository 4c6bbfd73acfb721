"""Owner file: to which party a directory belongs, locked by the one process that uses it."""

import logging
import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

# A lock of this kind is the process's, and none that it forks inherits it; it ends with the last descriptor.
_held: dict[Path, int] = {}


def claimed(path: Path, owner: str) -> str:
    """Claim a file for an owner; return whose it is, "" if another process of the same owner has it.

    Raises:
        OSError: If the file cannot be written.
    """
    path = path.resolve()
    is_new = path not in _held
    if is_new:
        _held[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    descriptor = _held[path]
    if is_new and not _locked(descriptor):
        found = _owner(descriptor)
        released(path)
        return found if found != owner else ""
    found = _owner(descriptor)
    if found and found != owner:
        if is_new:
            released(path)
        return found
    if not found:
        os.write(descriptor, owner.encode())
        os.fsync(descriptor)
    return owner


def _owner(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 1024).decode(errors="replace")


def released(path: Path) -> None:
    """Give up a claim; the file stays."""
    descriptor = _held.pop(path.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Lock a file; return whether no other process has. Some network file systems know no locks."""
    if sys.platform == "win32":  # only the name is checked
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        log.debug("a state directory cannot be locked: %s", error)
    return True
