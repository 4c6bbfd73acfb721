"""Pictures of a federation as SVG, to be put into a page: their colours are the page's, light or dark."""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pellm_lightning.report.runs import Findings, Fit, Round, State, Validation
from pellm_lightning.report.words import unit_of

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
COLOURS = 8
"""How many colours of parties the page has; more parties repeat them with other dashes."""
SINGLE_OUT = 3 * COLOURS
"""With more parties than this, lines of single parties have no names of their own."""

INK, GRID, SOFT = "#000001", "#000002", "#000003"
"""Stand for colours of the page, which are put in afterwards: --ink, --grid and --soft."""
DASHES = ("", "5 2", "1.5 1.5")
# The worse, the later: of a stretch of rounds the worst is shown.
STATES: Mapping[State, str] = {
    "counted": "counted",
    "took part": "took part (weights are hidden)",
    "weight 0": "took part with weight 0",
    "absent": "absent",
    "left out": "left out: NaN or infinity",
}


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
        self.heights: list[float] = []
        """All values drawn as lines."""
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
        self.heights += finite
        if not named:
            return
        self.legend.append(key)
        if finite:
            self._said.append(f"{key.label}: from {finite[0]:.4g} to {finite[-1]:.4g}")


def pictures(findings: Findings) -> list[Picture]:
    """Draw all there is data for."""
    fit, found = findings.fit, []
    plain: list[Callable[[Fit], Picture | None]]
    plain = [membership, shares, update_norms, distances, deviation, compression, outer_lr]
    plain += [seconds, seconds_by_party, traffic, privacy]
    found += [loss(fit), *metrics(fit, findings.alone), loss_alone(fit, findings.alone)]
    found += [draw(fit) for draw in plain]
    return [picture for picture in found if picture is not None]


# ---- what is learnt


def loss(fit: Fit) -> Picture | None:
    """Draw the training loss."""
    chart = Chart(
        "loss",
        "Learning",
        "Training loss",
        "Each point is the mean training loss since the round before. It should fall and flatten. A bad sign:"
        " it rises, or one party's stays far above the others', whose data may be unlike theirs.",
    )
    if len(fit.names) > 1:
        _parties(chart, fit, fit.losses)
    chart.line(_points(fit, fit.shared("loss")), _all(fit))
    return chart.done()


def metrics(fit: Fit, alone: Sequence[Fit]) -> list[Picture]:
    """Draw each validation metric, of all parties together and of each."""
    means = fit.means()
    names = sorted({*means, *(name for party in fit.records for name in fit.local(party))})
    names.sort(key=lambda name: (not name.endswith("loss"), name))
    found = []
    for number, name in enumerate(names):
        others = [other for other in alone if name in other.local(0)]
        # Several validations in a round, or parties alone, have only their steps in common.
        visits = [v.round for v, _ in means.get(name, [])]
        by_step = bool(others) or len(set(visits)) < len(visits)
        better = "lower" if lower_is_better(name) else "higher"
        compared = (
            " Dashed: a party that trained alone, on its own validation data; the federation should be no"
            " worse."
            if others
            else ""
        )
        chart = Chart(
            f"metric-{number}",
            "Learning",
            f"Validation: {name}",
            f"The thick line is the mean over the parties, weighted by their validation samples; {better} is"
            " taken to be better. A bad sign: it turns round while the training loss still falls, or one"
            " party goes the other way." + compared,
            x="optimizer steps" if by_step else "round",
        )

        def points(
            found: Sequence[tuple[object, float]], by_step: bool = by_step
        ) -> list[tuple[float, float]]:
            return [(getattr(v, "step" if by_step else "round"), value) for v, value in found]

        for party in fit.records if len(fit.names) > 1 else ():
            chart.line(points(fit.local(party).get(name, [])), _party(fit, party), named=_named(fit))
        for place, other in enumerate(others):
            chart.line(points(other.local(0).get(name, [])), _alone(fit, other, place))
        mean = points(means.get(name, []))
        if by_step:
            mean = _at_mean_steps(fit, mean, means.get(name, []))
        chart.line(mean, _all(fit))
        if picture := chart.done():
            found.append(picture)
    return found


def _at_mean_steps(
    fit: Fit, points: Points, found: Sequence[tuple[Validation, float]]
) -> list[tuple[float, float]]:
    """Put means over the parties where the parties stood on average: they make different numbers of steps."""
    stood = [[v.step for v in record.validations] for record in fit.records.values()]
    if len({len(steps) for steps in stood}) > 1 or len(stood[0]) != len(found):
        return list(points)  # they did not validate side by side
    return [
        (sum(steps) / len(steps), y) for steps, (_, y) in zip(zip(*stood, strict=True), points, strict=True)
    ]


def loss_alone(fit: Fit, alone: Sequence[Fit]) -> Picture | None:
    """Draw each party's training loss in the federation against that of the party alone."""
    if not alone or len(fit.names) == 1:
        return None
    chart = Chart(
        "loss-alone",
        "Learning",
        "Training loss: in the federation and alone",
        "Solid: a party's training loss in the federation, on its own data; dashed: that of a party that"
        " trained alone. A party alone fits its own data at least as well; what it misses of the others' only"
        " validation shows. A bad sign: solid stays far above dashed.",
        x="optimizer steps",
    )
    for party in range(len(fit.names)):
        steps = {index: done.step for index, done in (fit.records.get(party) or fit.narrator).rounds.items()}
        points = [(steps[index], value) for index, value in fit.losses(party).items() if index in steps]
        chart.line(points, _party(fit, party), named=_named(fit))
    for place, other in enumerate(alone):
        points = [(other.rounds[index].step, value) for index, value in other.losses(0).items()]
        chart.line(points, _alone(fit, other, place))
    return chart.done()


# ---- who


def membership(fit: Fit) -> Picture | None:
    """Draw who took part in which round."""
    if len(fit.names) == 1 or not fit.rounds:
        return None
    chart = Chart(
        "membership",
        "Parties",
        "Who took part",
        "A row is a party, from the first round to the last. A bad sign: gaps (the party was away), or"
        " rounds in"
        " which it was left out because its parameters held NaN. Weight 0 is normal for a party that has"
        " finished before the others, or has just come back.",
        height=0.85 + 0.26 * len(fit.names),
    )
    colours = {"counted": "c2", "took part": "c2", "weight 0": "c4", "left out": "c1", "absent": "grid"}
    rounds = list(fit.rounds)
    size = math.ceil(len(rounds) / MOST_POINTS)
    stretches = [rounds[start : start + size] for start in range(0, len(rounds), size)]
    chart.thin(size > 1)
    worse = list(STATES)
    found = [
        [max((fit.state(party, index) for index in stretch), key=worse.index) for stretch in stretches]
        for party in range(len(fit.names))
    ]
    for state, label in STATES.items():
        for party, states in enumerate(found):
            marked = [stretch for stretch, seen in zip(stretches, states, strict=True) if seen == state]
            if marked:
                chart.strip(party, _spans(marked), Key(label, colours[state], patch=True))
    chart.rows(fit.names)
    chart.panels[0].set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    return chart.done()


def shares(fit: Fit) -> Picture | None:
    """Draw the parties' shares of the mean."""
    weights = {party: fit.weights(party) for party in range(len(fit.names))}
    total = {index: sum(w.get(index, 0.0) for w in weights.values()) for index in fit.rounds}
    # Those whose weights are hidden would be missing in the sum.
    whole = {
        index: value
        for index, value in total.items()
        if value > 0 and math.isclose(value, fit.rounds[index].total_weight or 0.0, rel_tol=1e-3)
    }
    if len(fit.names) == 1 or not whole:
        return None
    chart = Chart(
        "shares",
        "Parties",
        "Share of each party in the mean (%)",
        "A colour's height is how much a party counted in a round. A bad sign: one party fills nearly all,"
        " unless it holds nearly all the data, or one vanishes.",
    )
    rounds = list(range(min(whole), max(whole) + 1))
    low = [0.0] * len(rounds)
    for party, weight in weights.items():
        high = [
            base + (100 * weight.get(index, 0.0) / whole[index] if index in whole else 0.0)
            for base, index in zip(low, rounds, strict=True)
        ]
        key = _party(fit, party)
        chart.band(rounds, low, high, Key(key.label, f"c{party % COLOURS}", patch=True), named=_named(fit))
        low = high
    chart.panels[0].set_ylim(0, 100)
    chart.panels[0].set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    return chart.done()


# ---- how they drift apart


def update_norms(fit: Fit) -> Picture | None:
    """Draw how far each party moved in a round."""
    chart = Chart(
        "updates",
        "Drift",
        "Length of each party's update (2-norm)",
        "How far a party's parameters moved in a round; each party knows only its own. It should shrink or"
        " stay level. A bad sign: it grows from round to round, or one party's is many times the others'.",
    )
    _parties(chart, fit, lambda party: fit.own(party, "update_norm"))
    _maybe_log(chart)
    return chart.done()


def distances(fit: Fit) -> Picture | None:
    """Draw how far each party was from the result."""
    chart = Chart(
        "distances",
        "Drift",
        "Distance of each party from the result (2-norm)",
        "How far a party's own parameters were from what the round made of all. Large for one party only: its"
        " data are unlike the others'. Growing for all: too many local steps in a round, or too high a"
        " learning rate.",
    )
    _parties(chart, fit, fit.distances)
    _maybe_log(chart)
    return chart.done()


def deviation(fit: Fit) -> Picture | None:
    """Draw by how much the LoRA factors miss the mean of their products."""
    chart = Chart(
        "deviation",
        "Drift",
        "Deviation of the LoRA products (%)",
        "By how much the averaged factors miss the mean of the parties' LoRA products; 0 is exact. A few per"
        " cent are usual; a bad sign: it grows, or stays above some 30 %. Then another rule or a higher rank"
        " helps.",
    )
    for what, key in (
        ("worst_deviation", Key("worst module", "c1")),
        ("deviation", Key("all modules", "ink", width=2.2)),
    ):
        chart.line(_points(fit, {k: 100 * v for k, v in fit.shared(what).items()}), key)
    return chart.done()


def compression(fit: Fit) -> Picture | None:
    """Draw what coding loses."""
    chart = Chart(
        "compression",
        "Drift",
        "Compression error (relative)",
        "What a party's codes lost of its update, relative to what they say; error feedback sends it later."
        " A bad"
        " sign: it grows from round to round.",
    )
    _parties(chart, fit, lambda party: fit.own(party, "compression_error"))
    return chart.done()


def outer_lr(fit: Fit) -> Picture | None:
    """Draw the outer learning rate, if it is scheduled."""
    rates = fit.shared("outer_lr")
    if len(set(rates.values())) < 2:
        return None
    chart = Chart(
        "outer-lr",
        "Drift",
        "Outer learning rate",
        "How much of the parties' mean step is taken, as its schedule says. A bad sign: it is near 0 while"
        " the loss still falls.",
    )
    chart.line(_points(fit, rates), Key("outer learning rate", "ink", width=2.2))
    return chart.done()


# ---- what it cost


def seconds(fit: Fit) -> Picture | None:
    """Draw where the time of a round went, mean over the parties recorded."""
    if not fit.rounds:
        return None
    chart = Chart(
        "seconds",
        "Cost",
        "Seconds in each round",
        "Mean over the parties with a record here. A bad sign: waiting as high as training, since then the"
        " fast parties stand still for the slow ones.",
    )
    rounds = list(range(min(fit.rounds), max(fit.rounds) + 1))
    low = [0.0] * len(rounds)
    for label, colour, of in _spent(fit):
        at = [[of(r.rounds[k]) for r in fit.records.values() if k in r.rounds] for k in rounds]
        high = [base + (sum(x) / len(x) if x else 0.0) for base, x in zip(low, at, strict=True)]
        chart.band(rounds, low, high, Key(label, colour, patch=True))
        low = high
    chart.panels[0].set_ylim(bottom=0)
    chart.panels[0].set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    return chart.done()


def seconds_by_party(fit: Fit) -> Picture | None:
    """Draw where each party's time went, over all rounds."""
    if len(fit.records) < 2 or not fit.rounds:
        return None
    chart = Chart(
        "seconds-by-party",
        "Cost",
        "Seconds by party, all rounds",
        "Who waits much is fast, who waits little is the one the others wait for. A bad sign: one party never"
        " waits and the others mostly do; give it fewer steps, or rounds by the clock (every_n_seconds).",
        height=0.95 + 0.3 * len(fit.records),
        x="seconds",
    )
    spent = _spent(fit)
    parts = [
        [sum(of(done) for done in r.rounds.values()) for r in fit.records.values()] for _, _, of in spent
    ]
    keys = [Key(label, colour, patch=True) for label, colour, _ in spent]
    chart.bars(parts, [fit.names[party] for party in fit.records], keys)
    return chart.done()


def traffic(fit: Fit) -> Picture | None:
    """Draw bytes by round, and their sum so far."""
    sent: dict[int, float] = {}
    for party in fit.records:
        for index, value in fit.own(party, "bytes_sent").items():
            sent[index] = sent.get(index, 0.0) + value
    if not any(sent.values()):
        return None
    sent = dict(sorted(sent.items()))
    unit, size = unit_of(max(sent.values()))
    all_of_it, so_far, total = unit_of(sum(sent.values())), 0.0, {}
    for index, value in sent.items():
        total[index] = so_far = so_far + value
    chart = Chart(
        "bytes",
        "Cost",
        f"Sent in each round ({unit}), and so far ({all_of_it[0]})",
        f"What {'all parties' if len(fit.records) == len(fit.names) else 'the parties with a record here'}"
        " handed"
        " to the network. It should be level; a bad sign: rounds that cost more than the others, since they"
        " were tried again after a party was lost or left out.",
        height=3.6,
        panels=2,
    )
    each, summed = Key("in a round", "c0"), Key("so far", "ink", width=2.2)
    chart.line(_points(fit, {k: v / size for k, v in sent.items()}), each)
    chart.line(_points(fit, {k: v / all_of_it[1] for k, v in total.items()}), summed, panel=1)
    for axes in chart.panels:
        axes.set_ylim(bottom=0)
    return chart.done()


def privacy(fit: Fit) -> Picture | None:
    """Draw what differential privacy has cost."""
    spent: dict[int, float] = {}
    for party in fit.records:
        for index, value in fit.own(party, "epsilon").items():
            spent[index] = max(value, spent.get(index, 0.0))
    clipped = fit.shared("clipping_norm")
    adapts = len(set(clipped.values())) > 1
    chart = Chart(
        "epsilon",
        "Privacy",
        "Epsilon so far" + (", and the clipping norm" if adapts else ""),
        "What differential privacy has promised away: the higher, the more could be told from the result. It"
        " only grows. A bad sign: it is used up long before the loss has settled.",
        panels=2 if adapts else 1,
        height=3.6 if adapts else 2.8,
    )
    chart.line(_points(fit, dict(sorted(spent.items()))), Key("epsilon", "ink", width=2.2))
    if adapts and spent:
        chart.line(_points(fit, clipped), Key("clipping norm", "c0"), panel=1)
    if spent:
        chart.panels[0].set_ylim(bottom=0)
    return chart.done()


# ---- helpers


def lower_is_better(metric: str) -> bool:
    """Guess from a metric's name which way is better."""
    words = re.split(r"[^a-z0-9]+", metric.lower())
    return any(
        word.endswith(("loss", "perplexity", "ppl", "error", "err"))
        or word in ("mse", "mae", "rmse", "nll", "bpb", "wer", "cer", "ece", "brier")
        for word in words
    )


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


def _spent(fit: Fit) -> list[tuple[str, str, Callable[[Round], float]]]:
    """Return the parts of a round's time: what to call them, their colours, and how to read them."""

    def part(name: str) -> Callable[[Round], float]:
        return lambda done: getattr(done, name) or 0.0

    first = ("training and validation", "c0", part("training_seconds"))
    done = list(fit.narrator.rounds.values())
    in_background = sum(part("stalled_seconds")(d) for d in done) < 0.99 * sum(
        part("waited_seconds")(d) + part("exchange_seconds")(d) for d in done
    )
    if in_background:  # waiting and exchange ran beside training
        return [first, ("standing still for a round", "c1", part("stalled_seconds"))]
    return [
        first,
        ("waiting for others", "c4", part("waited_seconds")),
        ("exchange", "c1", part("exchange_seconds")),
    ]


def _parties(chart: Chart, fit: Fit, of: Callable[[int], Mapping[int, float]]) -> None:
    """Draw a line for each party."""
    for party in range(len(fit.names)):
        key = _party(fit, party)
        if not _named(fit) and party == 0:
            chart.legend.append(Key("each party", "soft"))
        chart.line(_points(fit, of(party)), key, named=_named(fit))


def _points(fit: Fit, values: Mapping[int, float]) -> list[tuple[float, float]]:
    """Return a line's points; a round in between that is not known interrupts it."""
    known = [index for index in fit.rounds if index in values]
    if not known:
        return []
    between = [index for index in fit.rounds if known[0] <= index <= known[-1]]
    return [(index, values.get(index, math.nan)) for index in between]


def _named(fit: Fit) -> bool:
    return len(fit.names) <= SINGLE_OUT


def _all(fit: Fit) -> Key:
    return Key("all parties" if len(fit.names) > 1 else "the party", "ink", width=2.2)


def _party(fit: Fit, party: int) -> Key:
    label = fit.names[party]
    if not _named(fit):
        return Key(f"party {label}", "soft", width=0.7)
    return Key(f"party {label}", f"c{party % COLOURS}", DASHES[party // COLOURS])


def _alone(fit: Fit, other: Fit, place: int) -> Key:
    """Return the key of a party alone: its folder's name, and the colour of the party that it names."""
    folder = other.folder.name
    party = next((k for k, name in enumerate(fit.names) if re.split(r"[-_ ]", folder)[-1] == name), None)
    colour = "soft" if party is None else f"c{party % COLOURS}"
    return Key(folder, colour, ("4 3", "1 2", "6 2 1 2")[0 if party is not None else place % 3])


def _lonely(points: Points) -> list[tuple[float, float]]:
    """Return points between two interruptions, of which a line would show nothing."""
    ends = (math.nan, math.nan)
    padded = [ends, *points, ends]
    return [
        here
        for before, here, after in zip(padded, padded[1:], padded[2:], strict=False)
        if math.isfinite(here[1]) and not math.isfinite(before[1]) and not math.isfinite(after[1])
    ]


def _spans(marked: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Return start and length of stretches of rounds, those joined that follow each other."""
    spans: list[tuple[float, float]] = []
    for stretch in marked:
        start, end = stretch[0] - 0.5, stretch[-1] + 0.5
        if spans and sum(spans[-1]) == start:
            start = spans.pop()[0]
        spans.append((start, end - start))
    return spans


def _maybe_log(chart: Chart) -> None:
    """Take a logarithmic axis where few values would press all others flat."""
    axes = chart.panels[0]
    values = sorted(y for y in chart.heights if y > 0)
    if values and values[-1] > 30 * values[len(values) // 2]:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        chart.title += ", logarithmic"


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
