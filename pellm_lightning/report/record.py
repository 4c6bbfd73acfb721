"""The record of a fit, ``rounds.jsonl``: the schema of its events, their writer and their reader."""

import json
import logging
import math
import os
import platform
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from pellm_lightning.engine.round_report import RoundReport

if TYPE_CHECKING:  # to read a record needs no torch
    from torch import Tensor, nn

    from pellm_lightning.aggregation.plan import Plan
    from pellm_lightning.comm.topology import Topology

log = logging.getLogger(__name__)

FILE_NAME = "rounds.jsonl"
"""Name of the file, in the folder that a party writes to."""

# Options that are named as secrets are; a tokenizer's eos_token is none.
_SECRET = re.compile(
    r"--(.*[._-])?(password|passwd|secret|api[_-]?key|(access|secret)[_-]key|(hf|api|auth|access)[_-]token)"
    r"|--(.*\.)?token",
    re.IGNORECASE,
)

PACKAGES = ("pellm-lightning", "lightning", "torch", "transformers", "peft", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, as far as they are installed."""
    packages = ((package, _version(package)) for package in PACKAGES)
    return {"python": platform.python_version()} | {name: found for name, found in packages if found}


@cache  # a sixth of a short fit: each package's whole description is parsed
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def without_secrets(words: Sequence[str]) -> tuple[str, ...]:
    """Return a command line without the values of options that are named as secrets are.

    Example:
        >>> without_secrets(["train.py", "--logger.api_key=abc", "--hf-token", "abc", "--seed", "1"])
        ('train.py', '--logger.api_key=***', '--hf-token', '***', '--seed', '1')
    """
    shown, hides = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_secret = bool(_SECRET.fullmatch(name))
        value = f"{name}=***" if is_secret and equals else word
        shown.append("***" if hides and not word.startswith("--") else value)
        hides = is_secret and not equals
    return tuple(shown)


# ---- the schema: an event is a JSON object with the fields of EventHeader and those of one class below


@dataclass(frozen=True)
class EventHeader:
    """Fields that every event has."""

    event: str
    """Key of ``EVENTS``."""
    run: str
    """Drawn by each ``RunRecord``, so that lines of another process in the same file are recognised."""
    time: str
    """UTC, ISO 8601."""
    elapsed_seconds: float
    """Since this process began the fit."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Event: a party begins or resumes a fit."""

    party: int
    name: str
    parties: tuple[str, ...]
    """Names of all parties, by index."""
    processes: int
    round: int
    """Index of the next round."""
    step: int
    module: str
    device: str
    precision: str
    leaving: int
    """Number of parameters that take part in the rounds."""
    parameters: int
    """Number of all parameters of the module."""
    lora_modules: int
    settings: Mapping[str, Any]
    """What the parties have agreed on."""
    config: str | None
    """YAML of the command line; None for a script."""
    versions: Mapping[str, str] = field(default_factory=versions)
    host: str = field(default_factory=socket.gethostname)
    platform: str = field(default_factory=platform.platform)
    processors: int | None = field(default_factory=os.cpu_count)
    command: tuple[str, ...] = field(default_factory=lambda: without_secrets(sys.argv))

    @classmethod
    def of(
        cls,
        topology: "Topology",
        module: "nn.Module",
        plan: "Plan",
        shared: "Mapping[str, Tensor]",
        **facts: Any,
    ) -> "Start":
        """Return the event of a party that trains a module.

        Args:
            topology: Party and rank of this process.
            module: The module.
            plan: The aggregation applied to its parameters.
            shared: Those that take part in the rounds, by name.
            facts: The other fields.
        """
        return cls(
            party=topology.party,
            name=topology.name,
            processes=topology.party_size,
            module=type(module).__qualname__,
            leaving=sum(p.numel() for p in shared.values()),
            lora_modules=len(plan.pairs),
            **facts,
        )


@dataclass(frozen=True, kw_only=True)
class Round(RoundReport):
    """Event: a round, with the Trainer's progress."""

    step: int
    epoch: int
    training_seconds: float | None
    """Between the previous round and this one, for training and validation; None if this party missed the
    previous round."""


@dataclass(frozen=True)
class Validation:
    """Event: the metrics of a validation."""

    local: Mapping[str, float]
    """This party's."""
    mean: Mapping[str, float]
    """Means over the parties."""
    round: int
    """Index of the last round before it; -1 before the first."""
    step: float
    """Optimizer steps before it; where several parties are combined, their mean."""
    epoch: int


@dataclass(frozen=True)
class End:
    """Event: the fit is over."""

    failed: str | None
    """The error; None if there was none."""


Event = Start | Round | Validation | End
EVENTS: Mapping[str, type[Event]] = {"start": Start, "round": Round, "validation": Validation, "end": End}


class RunRecord:
    """Writer of a party's record, one event a line.

    A resumed fit appends another "start" to the same file. NaN and infinities become null. If the file cannot
    be written (disk full, folder not local), one warning is logged and training continues.

    Example::

        record = RunRecord("runs/rounds.jsonl")
        record.round(report, step=100, epoch=0)
        record.end(None)

    Args:
        path: The file. Its folder is made with the first line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._run = secrets.token_hex(4)
        self._started_at = time.monotonic()
        self._next_round = 0
        self._last_round_end = 0.0
        self._failed = "://" in str(path)
        if self._failed:
            log.warning(
                "%s is in no local folder, so that no record is written: a report cannot be made.", path
            )

    def start(self, start: Start) -> None:
        """Write that a fit begins or resumes."""
        self._next_round, self._last_round_end = start.round, self._elapsed()
        self._write("start", start)

    def round(self, report: RoundReport, *, step: int, epoch: int) -> None:
        """Write a round."""
        now, training = self._elapsed(), None
        if report.round == self._next_round:
            training = round(max(0.0, now - self._last_round_end - report.stalled_seconds), 3)
        self._next_round, self._last_round_end = report.round + 1, now
        self._write("round", Round(**vars(report), step=step, epoch=epoch, training_seconds=training))

    def validation(self, validation: Validation) -> None:
        """Write the metrics of a validation."""
        self._write("validation", validation)

    def end(self, failed: str | None) -> None:
        """Write that the fit is over, and its error if it failed."""
        self._write("end", End(failed))

    def _elapsed(self) -> float:
        return time.monotonic() - self._started_at

    def _write(self, name: str, event: Event) -> None:
        if self._failed:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        header = EventHeader(name, self._run, now, round(self._elapsed(), 3))
        line = json.dumps(_finite(asdict(header) | asdict(event)), allow_nan=False, default=repr)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                if name == "start" and _is_torn(self.path):
                    file.write("\n")  # or the start would be lost with the line that a crash cut off
                file.write(line + "\n")
        except OSError as error:
            self._failed = True
            log.warning(
                "%s: %s. Training continues without this record; a report will lack the rounds to come.",
                self.path,
                error.strerror or error,
            )


def events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a record as JSON objects, in their order.

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


def parse_event(line: Mapping[str, Any]) -> tuple[EventHeader, Event]:
    """Return the header and the event of a line; raise ValueError if it does not fit the schema."""
    header = parse(EventHeader, line)
    if header.event not in EVENTS:
        raise ValueError(f"event is {header.event!r}, expected one of {', '.join(EVENTS)}")
    return header, parse(EVENTS[header.event], line)


_type_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def parse(kind: Any, value: Any, name: str = "event") -> Any:
    """Return a JSON value as the type that an annotation names; the inverse of ``asdict``.

    Where a number is expected, null is NaN. Unknown fields of an object are ignored.

    Example::

        parse(tuple[int, ...], [1, 2])  # (1, 2)

    Args:
        kind: A dataclass, ``X | None``, ``tuple[X, ...]``, a mapping from str, str, int, float, bool or Any.
        value: What ``json.loads`` has returned.
        name: Of the field, for the error.

    Raises:
        ValueError: If the value is of another type, or a field is missing.
    """
    if kind is Any or type(value) is kind:
        return value
    if kind is float and (value is None or type(value) is int):
        return math.nan if value is None else float(value)
    origin, arguments = get_origin(kind), get_args(kind)
    if type(None) in arguments:
        return None if value is None else parse(arguments[0], value, name)
    if is_dataclass(kind) and isinstance(value, Mapping):
        types = _type_hints(kind)
        if missing := [name for name in types if name not in value]:
            raise ValueError(f"{missing[0]!r} is missing")
        return kind(**{name: parse(part, value[name], name) for name, part in types.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(parse(arguments[0], part, name) for part in value)
    if origin in (Mapping, dict) and isinstance(value, Mapping):
        return {key: parse(arguments[1], part, key) for key, part in value.items()}
    raise ValueError(f"{name!r} is {value!r}, expected {getattr(kind, '__name__', kind)}")


def _is_torn(path: Path) -> bool:
    """Tell whether a file's last line lacks its end."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _finite(value: Any) -> Any:
    """Return a value with null in place of NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
