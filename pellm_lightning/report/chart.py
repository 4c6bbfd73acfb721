"""Charts as SVG elements of a page, drawn by matplotlib."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError(
        "A report draws with the package matplotlib: pip install 'pellm-lightning[plots]'."
    ) from error

MAX_POINTS = 400
"""A line or area of more rounds is downsampled to about as many points."""
WIDTH = 5.4
"""Of a chart, in inches."""
PALETTE = {
    "ink": ("#1b1f24", "#e6eaee"), "soft": ("#8b949e", "#77828e"), "grid": ("#dfe3e8", "#343c46"),
    "c0": ("#0072b2", "#58a6e8"), "c1": ("#d55e00", "#ff8c42"), "c2": ("#009e73", "#3ecf9c"),
    "c3": ("#b5477f", "#f08cc0"), "c4": ("#a98600", "#d8bb3c"), "c5": ("#35a5dd", "#9bdcff"),
    "c6": ("#7a4fbf", "#b79cff"), "c7": ("#7b4a2d", "#c99a7b"),
}  # fmt: skip
"""Colours by name: as drawn, and as the style sheet of the page replaces them in dark mode."""
INK, SOFT, GRID = (PALETTE[name][0] for name in ("ink", "soft", "grid"))
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": SOFT, "axes.facecolor": "none",
    "axes.formatter.useoffset": False, "axes.labelcolor": INK, "axes.labelsize": 10,
    "axes.spines.right": False, "axes.spines.top": False, "figure.facecolor": "none",
    "font.sans-serif": ["DejaVu Sans"], "grid.color": GRID, "svg.fonttype": "none",
    "xtick.color": SOFT, "xtick.labelcolor": INK, "ytick.color": SOFT, "ytick.labelcolor": INK,
}  # fmt: skip

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Label and style of what a chart draws; an entry of its legend.

    Example::

        Series("party 9", "c1", "5 2")
    """

    label: str
    colour: str
    """Key of ``PALETTE``."""
    dash: str = ""
    """As ``stroke-dasharray``."""
    width: float = 1.4
    area: bool = False
    """Whether it is an area and no line."""


class Chart:
    """A figure with its title and legend, which the page shows as HTML, as it does the caption of its name.

    Example::

        chart = Chart("loss", "Training loss")
        chart.line([(0, 2.3), (1, 1.9)], Series("all parties", "ink"))
        chart.svg()

    Args:
        name: Valid as an HTML id.
        title: What is shown, with its unit.
        height: In inches.
        panels: Axes one above another that share the x axis.
        x: What stands on the x axis.
        **facts: For its caption.
    """

    def __init__(
        self,
        name: str,
        title: str,
        *,
        height: float = 2.8,
        panels: int = 1,
        x: str = "round",
        **facts: object,
    ) -> None:
        self.name, self.title, self.height, self.facts = name, title, height, facts
        self.legend: list[Series] = []
        self.downsampled = False
        """Whether points were left out."""
        self._values: list[float] = []  # of all lines
        self._descriptions: list[str] = []
        with matplotlib.rc_context(STYLE):
            self._figure = Figure((WIDTH, height), layout="constrained")
            self.panels = [row[0] for row in self._figure.subplots(panels, 1, sharex=True, squeeze=False)]
            for axes in self.panels:
                axes.grid(axis="y")
        self.panels[-1].set_xlabel(x)
        if x in ("round", "optimizer steps"):
            self.panels[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was drawn."""
        return not any(axes.has_data() for axes in self.panels)

    @property
    def description(self) -> str:
        """What its lines show, in text, for screen readers."""
        more = ["and more"] if len(self._descriptions) > 12 else []
        return ". ".join([*self._descriptions[:12], *more])

    def line(self, points: Points, series: Series, *, panel: int = 0, named: bool = True) -> None:
        """Draw a line; a NaN interrupts it. It has an entry in the legend if it is ``named``."""
        finite = [y for _, y in points if math.isfinite(y)]
        if not finite:
            return
        few = downsample(points)
        self.downsampled |= len(few) < len(points)
        axes, colour = self.panels[panel], PALETTE[series.colour][0]
        style = (0, tuple(map(float, series.dash.split()))) if series.dash else "-"
        marker = "o" if len(few) <= 30 else ""
        axes.plot(*zip(*few, strict=True), color=colour, lw=series.width, ls=style, marker=marker,
                  ms=1.6 + series.width)  # fmt: skip
        if not marker and (alone := _isolated(few)):
            axes.plot(*zip(*alone, strict=True), color=colour, ls="", marker="o", ms=2)
        self._values += finite
        if named:
            self.legend.append(series)
            self._descriptions.append(f"{series.label}: from {finite[0]:.4g} to {finite[-1]:.4g}")

    def stack(
        self, rounds: Sequence[int], layers: Sequence[tuple[Series, Sequence[float]]], *, named: bool = True
    ) -> None:
        """Draw areas one upon another, each by its height in consecutive rounds."""
        if not rounds:
            return
        low = [0.0] * len(rounds)
        for series, heights in layers:
            high = [base + height for base, height in zip(low, heights, strict=True)]
            edges, (bottom, top) = bin_means(rounds, [low, high])
            self.downsampled |= len(edges) <= len(rounds)
            colour = PALETTE[series.colour][0]
            self.panels[0].stairs(top, edges, baseline=bottom, fill=True, color=colour, lw=0)
            self.legend += [series] if named else []
            low = high
        self.panels[0].set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)

    def bars(self, rows: Sequence[str], parts: Sequence[tuple[Series, Sequence[float]]]) -> None:
        """Draw stacked horizontal bars, the first row on top."""
        left = [0.0] * len(rows)
        for series, values in parts:
            colour = PALETTE[series.colour][0]
            self.panels[0].barh(range(len(rows)), values, left=left, height=0.6, color=colour)
            left = [a + b for a, b in zip(left, values, strict=True)]
            self.legend.append(series)
        self.rows(rows)

    def strip(self, row: int, spans: Sequence[tuple[float, float]], series: Series) -> None:
        """Fill spans (start, length) of a row."""
        colour = PALETTE[series.colour][0]
        self.panels[0].broken_barh(list(spans), (row - 0.36, 0.72), facecolors=colour, linewidth=0)
        if series not in self.legend:
            self.legend.append(series)

    def rows(self, names: Sequence[str]) -> None:
        """Label the rows, the first on top."""
        axes = self.panels[0]
        # A dollar would begin a formula.
        axes.set_yticks(range(len(names)), [shorten(name).replace("$", r"\$") for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")

    def use_log_scale_if_skewed(self) -> None:
        """Take a logarithmic axis where few large values would leave no room for all others."""
        axes, values = self.panels[0], sorted(y for y in self._values if y > 0)
        if values and values[-1] > 30 * values[len(values) // 2]:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.minorticks_off()
            self.title += ", logarithmic"

    def svg(self) -> str:
        """Return what stands inside the SVG element.

        It holds no text of a user but tick labels, which matplotlib escapes.
        """
        for axes in self.panels:
            low, high = axes.get_ylim()
            if axes.get_yscale() == "linear" and 0 < low < 0.35 * high:
                axes.set_ylim(bottom=0)  # close to it anyway, and then heights can be compared
        file = io.StringIO()
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": self.name}), warnings.catch_warnings():
            # It only measures with its font, which has no Kanji for example; the reader's browser has.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            self._figure.savefig(file, format="svg")
        text = file.getvalue()
        text = text[text.index("<g ") : text.rindex("</svg>")]
        text = re.sub(r'<g id="[^"]*"', "<g", text)  # every figure of a page has a "figure_1"
        # In tags only, since text may hold numbers: a hundredth of a point is enough.
        return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag.group()), text)


def shorten(name: str, most: int = 16) -> str:
    """Return a name cut to what a figure has room for."""
    return name if len(name) <= most else name[: most - 1] + "…"


def downsample(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Leave points out of a line, but of each stretch neither its lowest nor its highest."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [i for i in stretch if math.isfinite(points[i][1])] or [start]  # a NaN interrupts the line
        kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def bin_means(
    rounds: Sequence[int], values: Sequence[Sequence[float]], most: int = MAX_POINTS
) -> tuple[list[float], list[list[float]]]:
    """Return the edges of bins of consecutive rounds, and the means of values in them."""
    size = math.ceil(len(rounds) / most)
    starts = range(0, len(rounds), size)
    edges = [rounds[start] - 0.5 for start in starts] + [rounds[-1] + 0.5]
    return edges, [[sum(v[s : s + size]) / len(v[s : s + size]) for s in starts] for v in values]


def _isolated(points: Points) -> list[tuple[float, float]]:
    """Return points between two interruptions, of which a line would show nothing."""
    known = [False, *(math.isfinite(y) for _, y in points), False]
    return [p for i, p in enumerate(points) if known[i : i + 3] == [False, True, False]]
