"""A federation as a table in a terminal."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.report.run_view import RunView
from pellm_lightning.report.words import size

_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_ROUNDS = 24
_PHASE_WIDTH = 30
UNKNOWN = "-"


def view(watched: RunView, phases: Mapping[str, str], seconds_left: float | None) -> RenderableType:
    """Return what to show: the federation in lines, and a table with one row per party.

    Args:
        watched: The federation.
        phases: What each party does, by name.
        seconds_left: Of this fit; None if nobody knows.
    """
    done = watched.rounds[-1] if watched.rounds else None
    lines = [_headline(watched, done, seconds_left)]
    if done is not None:
        lines += [_loss_line(watched.rounds), _cost_line(watched.rounds)]
    return Group(*lines, _parties(watched, phases, done))


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


def _headline(watched: RunView, done: RoundReport | None, seconds_left: float | None) -> Text:
    parties = len(watched.names)
    words = [f"federation of {parties} {'party' if parties == 1 else 'parties'}"]
    if done is None:
        words.append("no round yet")
    else:
        words.append(f"{done.round + 1} {'round' if done.round == 0 else 'rounds'} done")
        if done.trained_parties < parties:
            below = f", below quorum {done.quorum}" if done.trained_parties < done.quorum else ""
            words.append(f"{done.trained_parties} of {parties} trained{below}")
    if seconds_left is not None:
        words.append(f"{clock(seconds_left)} left")
    return Text(" · ".join(words), style="bold")


def _loss_line(rounds: Sequence[RoundReport]) -> Text:
    """Tell the global loss, round by round, and how far the parties went."""
    done = rounds[-1]
    line = Text("global loss ")
    line.append(_number(done.loss), style="bold")
    losses = [math.nan if report.loss is None else report.loss for report in rounds[-_SPARK_ROUNDS:]]
    if len(losses) > 1:
        line.append(f" {spark(losses)}", style="cyan")
    line.append(f" · own {_number(done.local_loss)} · update norm {_number(done.update_norm)}")
    if done.deviation is not None:
        line.append(f" · deviation {100 * done.deviation.total:.2g} %")
    if done.compression_error is not None:
        line.append(f" · compression error {100 * done.compression_error:.2g} %")
    return line


def _cost_line(rounds: Sequence[RoundReport]) -> Text:
    done = rounds[-1]
    words = [
        f"last round {size(done.bytes_sent)} in {done.seconds:.2f} s",
        f"waited {done.waited_seconds:.1f} s for the others",
        f"{size(sum(report.bytes_sent for report in rounds))} in all",
    ]
    if done.epsilon is not None:
        words.append(f"epsilon {done.epsilon:.3g}")
    return Text(" · ".join(words))


def _parties(watched: RunView, phases: Mapping[str, str], done: RoundReport | None) -> Table:
    told = done is not None and len(done.losses) > 0
    weighed = done is not None and len(done.weights) > 0
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("party", no_wrap=True)
    table.add_column("does", no_wrap=True, max_width=_PHASE_WIDTH)
    if weighed:
        table.add_column("weight", justify="right")
    if told:
        table.add_column("loss", justify="right")
        table.add_column("distance", justify="right")
    for index, name in enumerate(watched.names):
        mine = index == watched.party
        row = [Text(f"{name} (here)" if mine else name), Text(_plain(phases.get(name, "")))]
        if done is not None:
            place = done.parties.index(index) if index in done.parties else None
            if weighed:
                row.append(_weight(done, index, place))
            if told:
                row.append(Text(UNKNOWN if place is None else _number(done.losses[place])))
                row.append(Text(UNKNOWN if place is None else _number(done.distances[place])))
        table.add_row(*row, style="bold" if mine else "")
    return table


def _weight(done: RoundReport, index: int, place: int | None) -> Text:
    if place is None:
        return Text("missing", style="red")
    if index in done.excluded:
        return Text("NaN, left out", style="red")
    share = done.weights[place] / done.total_weight if done.total_weight else 0.0
    return Text(f"{100 * share:.0f} %")


def _number(value: float | None) -> str:
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.4g}"


def _plain(phase: str) -> str:
    """Return what another party said without what would move the cursor."""
    return "".join(letter for letter in phase if letter.isprintable())[:_PHASE_WIDTH]
