"""Numbers, sizes, times and lists as text for people."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any


def number(value: float | None) -> str:
    """Return a number in four digits; nothing if it is None, NaN or infinite."""
    if value is None or not math.isfinite(value):
        return ""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def size(size_bytes: float) -> str:
    """Return a number of bytes with its unit: "1.84 MB"."""
    unit, scale = unit_of(size_bytes)
    return f"{size_bytes / scale:.3g} {unit}"


def unit_of(size_bytes: float) -> tuple[str, float]:
    """Return the unit that suits a number of bytes, and how many bytes it has."""
    units: list[tuple[str, float]] = [("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)]
    return next((unit for unit in units if size_bytes < 999.5 * unit[1]), units[-1])


def duration(seconds: float) -> str:
    """Return seconds with the unit that suits: "10 min"."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{days:.1f} days"


def moment(time: str) -> str:
    """Return a time in ISO 8601 as "2026-11-30 09:11 UTC"."""
    try:
        return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return time


def count(n: int, noun: str) -> str:
    """Return a count with its noun: "1 round", "2 parties"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def enumeration(names: Sequence[str], most: int = 8) -> str:
    """Return names as "a, b and c"."""
    if len(names) == 1:
        return names[0]
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def parties(names: Sequence[str]) -> str:
    """Return names of parties as "party a", "parties a and b"."""
    return f"{'party' if len(names) == 1 else 'parties'} {enumeration(names)}"


def capital(text: str) -> str:
    """Return text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the names that have each text, of pairs of name and text."""
    found: dict[str, list[str]] = {}
    for name, text in pairs:
        found.setdefault(text, []).append(name)
    return found


def schedule(settings: Mapping[str, Any]) -> str:
    """Return the interval of rounds that the settings of a federation name: "epoch", "10 optimizer steps"."""
    units = {"every_n_steps": "optimizer step", "every_n_seconds": "second", "every_n_epochs": "epoch"}
    n, unit = next(
        ((settings[name], unit) for name, unit in units.items() if settings.get(name)), (1, "epoch")
    )
    interval = unit if n == 1 else f"{n:g} {unit}s"
    turns = int(settings.get("fragments") or 1)
    return interval if turns == 1 else f"{interval} for each of {turns} fragments"
