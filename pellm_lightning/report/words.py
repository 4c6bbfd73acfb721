"""Numbers, sizes and times as people read them."""

from collections.abc import Mapping
from typing import Any


def number(value: float | None) -> str:
    """Return a number in four digits; nothing for None."""
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def size(size_bytes: float) -> str:
    """Return a number of bytes in words."""
    unit, scale = unit_of(size_bytes)
    return f"{size_bytes / scale:.3g} {unit}"


def duration(seconds: float) -> str:
    """Return seconds in words."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{days:.1f} days"


def unit_of(size_bytes: float) -> tuple[str, float]:
    """Return the unit to tell a number of bytes in, and how many bytes it has."""
    units: list[tuple[str, float]] = [("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)]
    return next((unit for unit in units if size_bytes < 999.5 * unit[1]), units[-1])


def schedule(settings: Mapping[str, Any]) -> str:
    """Return how often the settings of a federation let it have a round: "epoch", "10 optimizer steps"."""
    units = {"every_n_steps": "optimizer step", "every_n_seconds": "second", "every_n_epochs": "epoch"}
    n, unit = next(
        ((settings[name], unit) for name, unit in units.items() if settings.get(name)), (1, "epoch")
    )
    words = unit if n == 1 else f"{n:g} {unit}s"
    turns = int(settings.get("fragments") or 1)
    return words if turns == 1 else f"{words} for each of {turns} fragments"
