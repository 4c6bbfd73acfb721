"""What happened in a fit, line by line in a file: for reports, and for whoever looks later."""

import json
import logging
import math
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pellm_lightning.engine.round_report import RoundReport

log = logging.getLogger(__name__)

NAME = "rounds.jsonl"
"""Name of the file, in the folder that a party writes to."""

PACKAGES = ("pellm-lightning", "lightning", "torch", "transformers", "peft", "numpy")


class RunRecord:
    """Appends what happens in a fit to a file, one JSON object a line.

    Each line has ``event``, ``run`` (drawn by each ``RunRecord``, so that lines of others in the same file are
    told apart), ``time`` (UTC, ISO 8601) and ``elapsed_seconds`` since the fit began. The events are "start"
    (who, where, with which settings and versions), "round" (a ``RoundReport`` with the Trainer's step and
    epoch), "validation" (metrics of this party and of all), and "end" (why). A resumed fit goes on in the
    same file with another "start". NaN and infinities become null.

    What cannot be written, since the disk is full or the folder is not local, is warned about once, and
    training goes on.

    Args:
        path: The file. Its folder is made with the first line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._run = secrets.token_hex(4)
        self._begun = time.monotonic()
        self._failed = "://" in str(path)
        if self._failed:
            log.warning(
                "%s is in no local folder, so that no record is written: a report cannot be made.", path
            )

    def start(self, **facts: Any) -> None:
        """Write who begins: ``facts``, and this process's surroundings."""
        self._write(
            "start",
            facts
            | {
                "versions": versions(),
                "host": socket.gethostname(),
                "platform": platform.platform(),
                "processors": os.cpu_count(),
                "command": sys.argv,
            },
        )

    def round(self, done: RoundReport, *, step: int, epoch: int) -> None:
        """Write what a round did."""
        self._write("round", asdict(done) | {"step": step, "epoch": epoch})

    def validation(
        self, local: Mapping[str, float], mean: Mapping[str, float], *, round: int, step: int, epoch: int
    ) -> None:
        """Write the metrics of a validation.

        Args:
            local: This party's.
            mean: Those of all parties together.
            round: Index of the round that comes.
            step: Optimizer steps so far.
            epoch: The Trainer's epoch.
        """
        self._write(
            "validation",
            {"local": dict(local), "mean": dict(mean), "round": round, "step": step, "epoch": epoch},
        )

    def end(self, why: str | None) -> None:
        """Write that the fit is over; ``why`` it failed, None if it did not."""
        self._write("end", {"failed": why})

    def _write(self, event: str, facts: Mapping[str, Any]) -> None:
        if self._failed:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        # Not "seconds": a round has those of its own.
        line = {
            "event": event,
            "run": self._run,
            "time": now,
            "elapsed_seconds": round(time.monotonic() - self._begun, 3),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                if event == "start" and _is_torn(self.path):
                    file.write("\n")  # or the start would be lost with the line that a crash cut off
                file.write(json.dumps(_plain(line | dict(facts)), allow_nan=False) + "\n")
        except OSError as error:
            self._failed = True
            log.warning(
                "%s: %s. Training goes on without this record; a report will lack what comes.",
                self.path,
                error.strerror or error,
            )


def events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a record, in their order.

    A line that was cut off by a crash is left out: the last one, or one before a start.

    Raises:
        ValueError: If the file is no record.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "event" not in event:
                raise ValueError("no event")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            if number < len(lines) and lines[number].startswith('{"event": "start"'):
                continue
            raise ValueError(
                f"{path}, line {number} is no event of a record ({error}). If the file was edited, restore"
                " it; else move it away."
            ) from error
        yield event


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _is_torn(path: Path) -> bool:
    """Tell whether a file's last line lacks its end."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _plain(value: Any) -> Any:
    """Return what JSON can say of a value."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return repr(value)
