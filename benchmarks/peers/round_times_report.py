"""What came out of `round_times.py`: tables in Markdown and a picture."""

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]


def report(rows: Rows, reference: str, image: Path | None) -> None:
    """Print the tables, and draw them if asked; each row is one session."""
    print(
        f"\n{machine()}. Median of rounds (lower to upper quartile); {turns(rows)} sessions each, in turns."
    )
    print(f"The ratio is to the {reference} of the same bytes.\n")
    print(times(rows, reference))
    print("\nPeak of resident memory, MB: of a party's processes, and of the server's.\n")
    print(memories(rows))
    for row in rows:
        if row["failure"]:
            print(f"\n{row['contender']}, {row['case']}, {row['parties']} parties: {row['failure']}")
    if image:
        image.parent.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(image, dpi=100)


def times(rows: Rows, reference: str) -> str:
    settings = settings_of(rows)
    head = [f"{megabytes:.1f} MB, {parties} parties" for megabytes, parties in settings]
    lines = [f"| | mean | {' | '.join(head)} | off by |", f"|---|---|{'---|' * len(settings)}---:|"]
    for name in names_of(rows):
        cells = [time_of(seconds_of(rows, name, s), seconds_of(rows, reference, s)) for s in settings]
        own = [row for row in rows if row["contender"] == name]
        errors = [row["error"] for row in own if row["error"] is not None]
        mean = "weighted" if own[0]["weighted"] else "plain"
        off = f"{max(errors):.0e}" if errors else ""
        lines.append(f"| {name} | {mean} | {' | '.join(cells)} | {off} |")
    return "\n".join(lines)


def time_of(seconds: list[float], reference: list[float]) -> str:
    """Return the cell for some rounds: median, quartiles and ratio."""
    if not seconds:
        return ""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 2 else (min(seconds), 0, max(seconds))
    unit, name = (1.0, "s") if median >= 1 else (1e3, "ms")
    ratio = f", {short(median / statistics.median(reference))}x" if reference else ""
    return f"{short(unit * median)} {name} ({short(unit * low)} to {short(unit * high)}){ratio}"


def memories(rows: Rows) -> str:
    """Return a table of the peaks; the last column leaves out what the programs take by themselves."""
    settings = settings_of(rows)
    head = [f"{megabytes:.1f} MB, {parties} parties" for megabytes, parties in settings]
    lines = [f"| | {' | '.join(head)} | party, in adapters |", f"|---|{'---|' * len(settings)}---:|"]
    for name in names_of(rows):
        cells = [memory_of(rows, name, setting) for setting in settings]
        lines.append(f"| {name} | {' | '.join(cells)} | {in_adapters(rows, name)} |")
    return "\n".join(lines)


def memory_of(rows: Rows, name: str, setting: tuple[float, int]) -> str:
    party, server = (peak(rows, name, setting, key) for key in ("party_bytes", "server_bytes"))
    if not party:
        return ""
    return f"{party / 1e6:.0f} + {server / 1e6:.0f}" if server else f"{party / 1e6:.0f}"


def in_adapters(rows: Rows, name: str) -> str:
    """Return how much more a party takes for the larger adapter, in units of how much larger that is."""
    settings = settings_of(rows)
    (small, parties), (large, _) = settings[0], settings[-1]
    if small == large:
        return ""
    found = []
    for parties in sorted({parties for _, parties in settings}):
        sizes = [peak(rows, name, (megabytes, parties), "party_bytes") for megabytes in (small, large)]
        if all(sizes):
            found.append((sizes[1] - sizes[0]) / (large - small) / 1e6)
    return " and ".join(f"{each:.1f}" for each in found)


def peak(rows: Rows, name: str, setting: tuple[float, int], key: str) -> int:
    return max((row[key] for row in of(rows, name, setting)), default=0)


def seconds_of(rows: Rows, name: str, setting: tuple[float, int]) -> list[float]:
    return [seconds for row in of(rows, name, setting) for seconds in row["seconds"]]


def of(rows: Rows, name: str, setting: tuple[float, int]) -> list[dict[str, Any]]:
    return [
        row
        for row in rows
        if row["contender"] == name and (row["megabytes"], row["parties"]) == setting and not row["failure"]
    ]


def settings_of(rows: Rows) -> list[tuple[float, int]]:
    return sorted({(row["megabytes"], row["parties"]) for row in rows})


def names_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def turns(rows: Rows) -> int:
    keys = [(row["contender"], row["megabytes"], row["parties"]) for row in rows]
    return max(keys.count(key) for key in keys)


def machine() -> str:
    """Return what the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = models[0] if models else platform.machine()
    return f"{len(models)} cores ({cores}), Python {platform.python_version()}"


def short(value: float) -> str:
    """Return three digits, or all of the whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw(rows: Rows) -> Figure:
    settings, names = settings_of(rows), names_of(rows)
    figure = Figure(figsize=(9, 0.5 + 2.3 * ((len(settings) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(settings) + 1) // 2, 2, sharey=True, squeeze=False)
    for setting, axis in zip(settings, axes.flat, strict=False):
        for place, name in enumerate(names):
            seconds = seconds_of(rows, name, setting)
            if seconds:
                color = "tab:orange" if name.startswith("ours") else "tab:blue"
                axis.barh(place, statistics.median(seconds), color=color)
                axis.plot([min(seconds), max(seconds)], [place, place], color="black", linewidth=1)
        axis.set_yticks(range(len(names)), names)
        axis.set_xscale("log")
        axis.set_title(f"{setting[0]:.1f} MB, {setting[1]} parties", fontsize=10)
        axis.set_xlabel("seconds of a round (line: all rounds)", fontsize=8)
    axes[0][0].invert_yaxis()
    return figure
