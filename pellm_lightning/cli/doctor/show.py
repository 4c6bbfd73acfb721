"""Display of the findings in a terminal: tables with rich, plain lines without."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from pellm_lightning.cli.doctor.checks import Finding, Seen
from pellm_lightning.report.formatting import count

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
_COLUMNS = ("party", "host", "device", "processes")


def show(seen: Seen | None, found: Sequence[Finding]) -> None:
    """Show the parties and the findings; ``seen`` is None if the parties could not be reached at all."""
    if sys.stdout.isatty() and find_spec("rich") is not None:
        _tables(seen, found)
    else:
        sys.stdout.write("\n".join(lines(seen, found)) + "\n")
    sys.stdout.flush()


def lines(seen: Seen | None, found: Sequence[Finding]) -> list[str]:
    """Return the findings as plain lines, one each."""
    parties = ["party {}: {}, {}, processes: {}".format(*row) for row in (_rows(seen) if seen else [])]
    return [*parties, *(f"{f.level:<7}  {f.topic}: {f.says}" for f in found), verdict(found)]


def verdict(found: Sequence[Finding]) -> str:
    """Return the conclusion from the findings, in a line."""
    errors, warnings = (sum(f.level == level for f in found) for level in ("error", "warning"))
    ready = "a fit would fail. Fix what is said above, and run it again." if errors else "ready to fit."
    return f"{count(errors, 'error')}, {count(warnings, 'warning')}: {ready}"


def _rows(seen: Seen) -> list[tuple[str, str, str, str]]:
    rows = []
    for name in seen.roster:
        if (facts := seen.facts.get(name)) is None:
            rows.append((name, "came, then silent" if name in seen.silent else "missing", "-", "-"))
        else:
            rows.append((name, facts.host, facts.device, str(facts.processes)))
    return rows


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
        console.print(parties, "")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for column in ("level", "topic"):
        table.add_column(column, no_wrap=True)
    table.add_column("says", overflow="fold")
    for finding in found:
        table.add_row(Text(finding.level, _STYLES[finding.level]), Text(finding.topic), Text(finding.says))
    levels = {finding.level for finding in found}
    worst = next((level for level in ("error", "warning") if level in levels), "ok")
    console.print(table, "", Text(verdict(found), _STYLES[worst]), sep="\n")
