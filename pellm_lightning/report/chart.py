"""Charts as SVG, to be put into a page: their colours are the page's, light or dark."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError(
        "A report draws with the package matplotlib: pip install 'pellm-lightning[plots]'."
    ) from error

MOST_POINTS = 400
"""A line or band of more rounds is thinned out to about as many points."""
INK, GRID, SOFT = "#000001", "#000002", "#000003"
"""Stand for colours of the page, which are put in afterwards: --ink, --grid and --soft."""


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    label: str
    colour: str
    """Name of the page's colour: "ink", "grid", "soft" or "c0" to "c7"."""
    dash: str = ""
    """As ``stroke-dasharray``."""
    width: float = 1.4
    patch: bool = False
    """Whether it is an area and no line."""


@dataclass(frozen=True)
class Picture:
    """A drawing and what to say about it."""

    name: str
    """Good as an HTML id."""
    group: str
    """Heading under which it belongs."""
    title: str
    reading: str
    """How to read it, and what would be a bad sign."""
    legend: tuple[Key, ...]
    svg: str
    """The element, with ids of its own; holds no text of a user but tick labels, which are escaped."""
    thinned: bool
    """Whether points were left out."""


Points = Sequence[tuple[float, float]]


class Chart:
    """A picture under work.

    Args:
        name: Good as an HTML id.
        group: Heading under which it belongs.
        title: What is shown, with its unit.
        reading: How to read it, and what would be a bad sign.
        height: In inches; the width is always 5.4.
        panels: Axes one above another that share the x axis.
        x: What stands on the x axis.
    """

    def __init__(
        self,
        name: str,
        group: str,
        title: str,
        reading: str,
        *,
        height: float = 2.8,
        panels: int = 1,
        x: str = "round",
    ) -> None:
        self.name, self.group, self.title, self.reading = name, group, title, reading
        self._figure = Figure(figsize=(5.4, height), layout="constrained")
        axes = self._figure.subplots(panels, 1, sharex=True, squeeze=False)
        self.panels: list[Axes] = [row[0] for row in axes]
        for one in self.panels:
            _style(one)
        self.panels[-1].set_xlabel(x)
        if x in ("round", "optimizer steps"):
            self.panels[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        self.legend: list[Key] = []
        self._heights: list[float] = []  # all values drawn as lines
        self._said: list[str] = []
        self._thinned = False
        self._drawn = False

    def line(self, points: Points, key: Key, *, panel: int = 0, named: bool = True) -> None:
        """Draw a line; a NaN interrupts it."""
        if not any(math.isfinite(y) for _, y in points):
            return
        few = thinned(points)
        self._thinned |= len(few) < len(points)
        xs, ys = [x for x, _ in few], [y for _, y in few]
        axes, colour = self.panels[panel], _stand_in(key.colour)
        style = (0, tuple(float(x) for x in key.dash.split())) if key.dash else "-"
        marker = "o" if len(few) <= 30 else ""
        axes.plot(xs, ys, color=colour, lw=key.width, ls=style, marker=marker, ms=1.6 + key.width)
        if not marker and (alone := _lonely(few)):
            axes.plot([x for x, _ in alone], [y for _, y in alone], color=colour, ls="", marker="o", ms=2)
        self._note(key, points, named=named)

    def band(
        self,
        rounds: Sequence[int],
        low: Sequence[float],
        high: Sequence[float],
        key: Key,
        *,
        named: bool = True,
    ) -> None:
        """Fill between two values, round by round."""
        edges, (low, high) = buckets(rounds, [low, high])
        self._thinned |= len(edges) <= len(rounds)
        self.panels[0].stairs(high, edges, baseline=low, fill=True, color=_stand_in(key.colour), lw=0)
        self._note(key, [], named=named)

    def bars(self, parts: Sequence[Sequence[float]], rows: Sequence[str], keys: Sequence[Key]) -> None:
        """Draw stacked horizontal bars, the first row on top."""
        left = [0.0] * len(rows)
        for values, key in zip(parts, keys, strict=True):
            self.panels[0].barh(range(len(rows)), values, left=left, height=0.6, color=_stand_in(key.colour))
            left = [a + b for a, b in zip(left, values, strict=True)]
            self._note(key, [])
        self.rows(rows)

    def strip(self, row: int, spans: Sequence[tuple[float, float]], key: Key) -> None:
        """Fill spans (start, length) of a row."""
        self.panels[0].broken_barh(
            list(spans), (row - 0.36, 0.72), facecolors=_stand_in(key.colour), linewidth=0
        )
        if key not in self.legend:
            self._note(key, [])

    def thin(self, is_so: bool) -> None:
        """Note that what is drawn was thinned out."""
        self._thinned |= is_so

    def rows(self, names: Sequence[str]) -> None:
        """Name the rows, the first on top."""
        axes = self.panels[0]
        axes.set_yticks(range(len(names)), [_literal(short(name)) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")

    def be_logarithmic_if_steep(self) -> None:
        """Take a logarithmic axis where few values would press all others flat."""
        axes, values = self.panels[0], sorted(y for y in self._heights if y > 0)
        if values and values[-1] > 30 * values[len(values) // 2]:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            self.title += ", logarithmic"

    def done(self) -> Picture | None:
        """Return the picture, if anything was drawn."""
        if not self._drawn:
            return None
        for axes in self.panels:
            low, high = axes.get_ylim()
            if axes.get_yscale() == "linear" and 0 < low < 0.35 * high:
                axes.set_ylim(bottom=0)  # close to it anyway, and then heights can be compared
        said = ". ".join([*self._said[:12], "and more"] if len(self._said) > 12 else self._said)
        svg = _svg(self._figure, self.name, self.title, said)
        legend = tuple(self.legend)
        return Picture(self.name, self.group, self.title, self.reading, legend, svg, self._thinned)

    def _note(self, key: Key, points: Points, *, named: bool = True) -> None:
        self._drawn = True
        finite = [y for _, y in points if math.isfinite(y)]
        self._heights += finite
        if not named:
            return
        self.legend.append(key)
        if finite:
            self._said.append(f"{key.label}: from {finite[0]:.4g} to {finite[-1]:.4g}")


def short(name: str, most: int = 16) -> str:
    """Return a name cut to what a figure has room for."""
    return name if len(name) <= most else name[: most - 1] + "…"


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Leave points out of a line, but of each stretch neither its lowest nor its highest."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [i for i in stretch if math.isfinite(points[i][1])]
        # Where nothing is known the line is interrupted.
        chosen = (
            [min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])]
            if finite
            else []
        )
        kept.update(chosen or [start])
    return [points[i] for i in sorted(kept)]


def buckets(
    rounds: Sequence[int], values: Sequence[Sequence[float]], most: int = MOST_POINTS
) -> tuple[list[float], list[list[float]]]:
    """Return edges and heights of steps around consecutive rounds: means of stretches."""
    size = math.ceil(len(rounds) / most)
    starts = range(0, len(rounds), size)
    edges = [rounds[start] - 0.5 for start in starts] + [rounds[-1] + 0.5]
    heights = [[sum(v[s : s + size]) / len(v[s : s + size]) for s in starts] for v in values]
    return edges, heights


def _lonely(points: Points) -> list[tuple[float, float]]:
    """Return points between two interruptions, of which a line would show nothing."""
    ends = (math.nan, math.nan)
    padded = [ends, *points, ends]
    return [
        here
        for before, here, after in zip(padded, padded[1:], padded[2:], strict=False)
        if math.isfinite(here[1]) and not math.isfinite(before[1]) and not math.isfinite(after[1])
    ]


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(SOFT)
        spine.set_linewidth(0.8)
    axes.tick_params(colors=INK, labelcolor=INK, color=SOFT, width=0.8, labelsize=10)
    axes.xaxis.label.set_color(INK)
    axes.xaxis.label.set_fontsize(10)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.ticklabel_format(useOffset=False)


def _stand_in(colour: str) -> str:
    named = {"ink": INK, "grid": GRID, "soft": SOFT}
    return named.get(colour) or f"#0000{16 + int(colour[1:]):02x}"


def _literal(text: str) -> str:
    """Return text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def _svg(figure: Figure, name: str, title: str, said: str) -> str:
    """Return a figure as an SVG element with text as text, the page's colours, and ids of its own."""
    figure.patch.set_visible(False)
    file = io.StringIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}),
        warnings.catch_warnings(),
    ):
        # It only measures with its font, which has no Kanji for example; the reader's browser has.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)  # matplotlib repeats each text as a comment
    box = re.search(r'viewBox="([^"]*)"', svg)
    inside = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    inside = re.sub(r"<defs>\s*</defs>", "", inside)
    # Within tags only: between them stand numbers and names that are to be read as they are.
    inside = re.sub(r"<[^>]*>", lambda tag: _of_page(tag.group(), name), inside)
    inside = re.sub(r"\n\s*", "\n", inside)
    return (
        f'<svg viewBox="{box.group(1) if box else "0 0 446 223"}" role="img"'
        f' aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{_escaped(title)}</title><desc id="{name}-desc">{_escaped(said)}</desc>'
        f"{inside}</svg>"
    )


def _of_page(tag: str, name: str) -> str:
    """Return a tag with the page's colours and font, ids that begin with ``name``, and no digits to spare."""
    tag = re.sub(r'<g id="[^"]*"', "<g", tag)  # groups that nothing refers to
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', tag).replace("url(#", f"url(#{name}-")
    tag = re.sub(r"#0000([01][0-9a-f])", _colour, tag)
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)  # of a point a hundredth is enough
    return re.sub(r"font-family: [^;\"]*;? ?", "", tag)  # the page has its own


def _colour(found: re.Match[str]) -> str:
    number = int(found.group(1), 16)
    named = {1: "ink", 2: "grid", 3: "soft"}
    return f"var(--{named[number] if number in named else f'c{number - 16}'})"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
