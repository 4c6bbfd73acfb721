"""Errors of the command line: printed once, in a few lines, by the party that knows."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

MAX_LINES = 12
USAGE, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit statuses: what was asked for cannot be read or is no value of its option; all else; Ctrl-C."""

_FILE_NAME = "error.log"
_WIDTH = 110
_BUILDING = "instantiate_classes"
# Their ValueErrors and the like are about what the user has asked for; those of torch are about the code.
_OURS = "pellm_lightning"
_CHECK_ARGUMENTS = (
    *(_OURS, "lightning", "transformers", "peft", "datasets", "huggingface_hub"),
    *("torch.optim", "torch.utils.data"),
)

_FIXES = {
    errno.ENOSPC: "Free space there, or choose another folder.",
    errno.EDQUOT: "Free space there, or choose another folder.",
    errno.EACCES: "Change the permissions of the path, or choose another one.",
    errno.EPERM: "Change the permissions of the path, or choose another one.",
    errno.EROFS: "Choose a folder on a disk that can be written to.",
    errno.ENOTDIR: "A part of the path is a file: choose another one.",
    errno.EISDIR: "It is a folder: name a file.",
    errno.EEXIST: "Move it away, or choose another path.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n.",
}
"""What to do about errors of the operating system, which say only what has failed."""

_OF_ONE_PARTY = re.compile(r"(?i)\b(?:party|rank)[- ]\w+|\S*/\S*|\S*\d\S*\.[a-z]\S*|0x[0-9a-f]+")
"""The party, its files and addresses in memory, by which alike errors of several parties differ."""


class UsageError(ValueError):
    """Error in the value of an option, found before anything has been done."""


class _Process:
    """Identity of this process in errors; known better as a command proceeds."""

    party: str | None = None
    """What party this is, as errors name it."""
    folder: Path | None = None
    """Folder of this party's run."""
    debug: bool = False


def set_place(party: str | None, folder: str) -> None:
    """Set which party this process belongs to, None if there is one only, and where its run writes."""
    _Process.party, _Process.folder = party, Path(folder)


@contextlib.contextmanager
def checking_options() -> Iterator[None]:
    """Check values of options: a ValueError becomes one of usage."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Run a command; what it raises is printed for the user and becomes the exit status.

    An expected error is a message of at most ``MAX_LINES`` lines. Its traceback is in ``error.log`` in the
    party's run folder, or shown with ``--debug``, which is taken out of ``sys.argv``. Of the processes of a
    launch that share a terminal, one prints it: the first whose own error it is.

    Raises:
        SystemExit: If the command failed.
    """
    _Process.debug = "--debug" in sys.argv
    if _Process.debug:
        sys.argv.remove("--debug")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        sys.exit(report(error))


def report(error: Exception) -> int:
    """Print an error for the user, and for torchrun if it launched this process; return the status."""
    status = USAGE if _is_usage(error) else FAILURE
    words = str(error) or type(error).__name__
    if not _is_a(error, "FederationError", "MisconfigurationException", "ValueError") and (
        _raiser(error).partition(".")[0] != _OURS
    ):
        words = f"{type(error).__name__}: {words}"
    if isinstance(error, FileNotFoundError):
        is_absolute = os.path.isabs(str(error.filename or ""))
        where = "Check the path." if is_absolute else f"A relative path is seen from {os.getcwd()}."
        words = f"{words.rstrip('.')}. {where}"
    elif words == "No supported gpu backend found!":  # of Lightning
        words += " Set --trainer.accelerator=cpu, or start it where torch finds a GPU."
    elif isinstance(error, OSError) and error.errno in _FIXES:
        words = f"{words.rstrip('.')}. {_FIXES[error.errno]}"
    lost = _is_a(error, "PartyLostError") and not getattr(error, "parties", ())
    if not _claim(words, second_hand=lost or getattr(error, "by", None) is not None):
        return status
    if not is_expected(error) or _Process.debug:
        traceback.print_exception(error)
        _record(words)
    elif status == USAGE:
        _print(words)
    else:
        kept = _keep_traceback(error)
        more = "To see the traceback, add --debug." if kept is None else f"The traceback is in {kept}."
        _print(words, more)
    return status


def print_error(words: str, more: str = "") -> None:
    """Print an error on the terminal, unless another process of this launch prints it there.

    Args:
        words: What was wrong, where, and what to do.
        more: A last line, such as where to read more.
    """
    if _claim(words, second_hand=False):
        _print(words, more)


def is_expected(error: BaseException) -> bool:
    """Whether an error tells the user all that is needed: what is wrong and what to do."""
    if _is_a(error, "FederationError", "MisconfigurationException", "OSError", "ImportError"):
        return True
    return _is_usage(error) or (_is_a(error, "ValueError", "RuntimeError") and _checks_arguments(error))


# ---- what an error is


def _is_usage(error: BaseException) -> bool:
    """Whether it is about the value of an option, not a file: raised as the configured objects were built."""
    if isinstance(error, UsageError):
        return True
    building = any(frame.name == _BUILDING for frame in traceback.extract_tb(error.__traceback__))
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if not building or any(isinstance(cause, ImportError | OSError) for cause in causes):
        return False
    return _is_a(error, "ValueError", "TypeError", "MisconfigurationException")


def _is_a(error: BaseException, *names: str) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _checks_arguments(error: BaseException) -> bool:
    """Whether a package raised it that checks what users ask for, not one that computes."""
    return f"{_raiser(error)}.".startswith(tuple(f"{name}." for name in _CHECK_ARGUMENTS))


def _raiser(error: BaseException) -> str:
    """Return the module whose code raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


# ---- where it is printed


def _party() -> str | None:
    if _Process.party is not None or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return _Process.party
    return f"party of rank {os.environ.get('RANK', 0)}"  # how many processes a party has is not known yet


def _wrapped(text: str) -> list[str]:
    """Return lines no wider than the terminal, with words and paths whole."""
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    wrapper = textwrap.TextWrapper(
        width, break_long_words=False, break_on_hyphens=False, subsequent_indent="  "
    )
    return [wrapped for line in text.splitlines() for wrapped in wrapper.wrap(line)]


def _keep_traceback(error: Exception) -> Path | None:
    """Write the traceback into the folder of the party's run; return the file, None if there is none."""
    if _Process.folder is None or _Process.debug:
        return None
    path = _Process.folder / _FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:  # a full disk, perhaps what is to be printed
        return None
    return path


def _print(words: str, more: str = "") -> None:
    party = _party()
    text = f"[{party}] error: {words}" if party else f"error: {words}"
    lines, last = _wrapped(text), _wrapped(more)
    most = MAX_LINES - len(last)
    shown = lines if len(lines) <= most else [*lines[: most - 1], "  ..."]
    sys.stderr.write("\n".join([*shown, *last]) + "\n")
    sys.stderr.flush()
    _record(text)


def _record(text: str) -> None:
    """Write the error where torchrun looks for it, so that its summary shows it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # torchrun shows the earliest, in whole seconds: before those that end with it and record nothing.
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()) - 1)}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _claim(words: str, *, second_hand: bool) -> bool:
    """Return whether this process is to print an error; one of those that share a terminal is.

    Words that differ in the party, in its files, or in the order of a set, are the same error.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    if not second_hand and threading.current_thread() is threading.main_thread():
        # Others that fail alike end at once, and torchrun then terminates who has yet to print and to exit.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from pellm_lightning.comm.torchrun.store import claim_error

    same = sorted(re.findall(r"\w+", _OF_ONE_PARTY.sub("", words)))
    return claim_error(hashlib.sha256(" ".join(same).encode()).hexdigest(), second_hand=second_hand)
