"""Live view of a federation: lines and a table for a terminal."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.report.formatting import count, number, size
from pellm_lightning.report.run_view import RunView

_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_ROUNDS = 24
_PHASE_WIDTH = 30
UNKNOWN = "-"


def view(run: RunView, phases: Mapping[str, str], seconds_left: float | None) -> RenderableType:
    """Return the federation as lines, and a table with one row per party.

    Args:
        run: The federation.
        phases: What each party is doing, by name.
        seconds_left: Of this fit; None if unknown.
    """
    report = run.rounds[-1] if run.rounds else None
    lines = [_headline(run, report, seconds_left)]
    if report is not None:
        lines += [_loss_line(run.rounds), _cost_line(run.rounds)]
    return Group(*lines, _parties(run, phases, report))


def last_phases(run: RunView, phases: Mapping[str, str]) -> dict[str, str]:
    """Return what each party has come to when the fit of this one is over.

    Args:
        run: The federation.
        phases: What each party was last seen doing, by name.
    """
    last = run.rounds[-1].parties if run.rounds else ()
    return {
        name: "finished" if index in last and not _is_gone(phases.get(name, "")) else phases.get(name, "")
        for index, name in enumerate(run.names)
    }


def _is_gone(phase: str) -> bool:
    return phase.startswith(("left", "silent"))


def spark(values: Sequence[float]) -> str:
    """Return a line of bars, one per value, the lowest the smallest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    height = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _SPARKS[round((value - low) * height)] if math.isfinite(value) else " " for value in values
    )


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _headline(run: RunView, report: RoundReport | None, seconds_left: float | None) -> Text:
    parties = len(run.names)
    parts = [f"federation of {count(parties, 'party')}"]
    if report is None:
        parts.append("no round yet")
    else:
        parts.append(f"{count(report.round + 1, 'round')} done")
        if report.trained_parties < parties:
            below = f", below quorum {report.quorum}" if report.trained_parties < report.quorum else ""
            parts.append(f"{report.trained_parties} of {parties} trained{below}")
    if seconds_left is not None:
        parts.append(f"{clock(seconds_left)} left")
    return Text(" · ".join(parts), style="bold")


def _loss_line(rounds: Sequence[RoundReport]) -> Text:
    """Return the global loss, round by round, and the drift of the parties."""
    report = rounds[-1]
    line = Text("global loss ")
    line.append(_number(report.loss), style="bold")
    losses = [math.nan if r.loss is None else r.loss for r in rounds[-_SPARK_ROUNDS:]]
    if len(losses) > 1:
        line.append(f" {spark(losses)}", style="cyan")
    line.append(f" · own {_number(report.local_loss)} · update norm {_number(report.update_norm)}")
    if report.deviation is not None:
        line.append(f" · deviation {100 * report.deviation.total:.2g} %")
    if report.compression_error is not None:
        line.append(f" · compression error {100 * report.compression_error:.2g} %")
    return line


def _cost_line(rounds: Sequence[RoundReport]) -> Text:
    report = rounds[-1]
    parts = [
        f"last round {size(report.bytes_sent)} in {report.seconds:.2f} s",
        f"waited {report.waited_seconds:.1f} s for the others",
        f"{size(sum(r.bytes_sent for r in rounds))} in all",
    ]
    if report.epsilon is not None:
        parts.append(f"epsilon {report.epsilon:.3g}")
    return Text(" · ".join(parts))


def _parties(run: RunView, phases: Mapping[str, str], report: RoundReport | None) -> Table:
    figures = {} if report is None else _figures(report, len(run.names))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("party", no_wrap=True)
    table.add_column("does", no_wrap=True, max_width=_PHASE_WIDTH)
    for name in figures:
        table.add_column(name, justify="right")
    for index, name in enumerate(run.names):
        mine = index == run.party
        row = [Text(f"{name} (here)" if mine else name), Text(_plain(phases.get(name, "")))]
        table.add_row(*row, *(cells[index] for cells in figures.values()), style="bold" if mine else "")
    return table


def _figures(report: RoundReport, num_parties: int) -> dict[str, list[Text]]:
    """Return the columns of numbers that the exchange does not hide, with a cell for each party."""
    places = [report.parties.index(k) if k in report.parties else None for k in range(num_parties)]
    columns = {}
    if report.weights:
        columns["weight"] = [_weight(report, index, place) for index, place in enumerate(places)]
    if report.losses:
        for name, values in (("loss", report.losses), ("distance", report.distances)):
            columns[name] = [Text(UNKNOWN if k is None else _number(values[k])) for k in places]
    return columns


def _weight(report: RoundReport, index: int, place: int | None) -> Text:
    if place is None:
        return Text("missing", style="red")
    if index in report.excluded:
        return Text("left out", style="red")
    share = report.weights[place] / report.total_weight if report.total_weight else 0.0
    return Text(f"{100 * share:.0f} %")


def _number(value: float | None) -> str:
    return number(value) or UNKNOWN


def _plain(phase: str) -> str:
    """Return the phase that another party sent without characters that would move the cursor."""
    return "".join(letter for letter in phase if letter.isprintable())[:_PHASE_WIDTH]
