"""What was found, in a terminal: tables with rich, plain lines without."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from pellm_lightning.cli.doctor.checks import Finding, Seen
from pellm_lightning.cli.doctor.facts import Facts

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
_COLUMNS = ("party", "host", "device", "processes")


def tell(seen: Seen | None, found: Sequence[Finding]) -> None:
    """Show the parties and the findings; ``seen`` is None if the parties could not be reached at all."""
    if sys.stdout.isatty() and find_spec("rich") is not None:
        _tables(seen, found)
    else:
        sys.stdout.write("\n".join(lines(seen, found)) + "\n")
    sys.stdout.flush()


def lines(seen: Seen | None, found: Sequence[Finding]) -> list[str]:
    """Return the findings as plain lines, one each."""
    told = []
    for row in [] if seen is None else _rows(seen):
        told.append("party {}: {}, {}, processes: {}".format(*row))
    told += [f"{finding.level:<7}  {finding.topic}: {finding.says}" for finding in found]
    return [*told, verdict(found)]


def verdict(found: Sequence[Finding]) -> str:
    """Return what is to be made of the findings, in a line."""
    errors = sum(finding.level == "error" for finding in found)
    warnings = sum(finding.level == "warning" for finding in found)
    counted = f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}"
    if errors:
        return f"{counted}: a fit would fail. Fix what is said above, and run it again."
    return f"{counted}: ready to fit."


def _rows(seen: Seen) -> list[tuple[str, str, str, str]]:
    return [(name, *_row(seen.facts.get(name), name in seen.silent)) for name in seen.roster]


def _row(facts: Facts | None, silent: bool) -> tuple[str, str, str]:
    if facts is None:
        return ("came, then silent" if silent else "missing", "-", "-")
    return facts.host, facts.device, str(facts.processes)


def _tables(seen: Seen | None, found: Sequence[Finding], width: int | None = None) -> None:
    from rich.console import Console  # an optional dependency
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=width)
    if seen is not None:
        parties = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for column in _COLUMNS:
            parties.add_column(column, overflow="fold")
        for row in _rows(seen):
            parties.add_row(*map(Text, row))
        console.print(parties)
        console.print()
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for column in ("level", "topic"):
        table.add_column(column, no_wrap=True)
    table.add_column("says", overflow="fold")
    for finding in found:
        style = _STYLES[finding.level]
        table.add_row(Text(finding.level, style=style), Text(finding.topic), Text(finding.says))
    console.print(table)
    console.print()
    worst = next((level for level in ("error", "warning") if any(f.level == level for f in found)), "ok")
    console.print(Text(verdict(found), style=_STYLES[worst]))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
