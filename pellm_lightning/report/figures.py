"""Figures of a report, chapter by chapter: learning, parties, drift, cost, privacy."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from pellm_lightning.report.chart import MAX_POINTS, Chart, Series
from pellm_lightning.report.formatting import unit_of
from pellm_lightning.report.record import Validation
from pellm_lightning.report.runs import Findings, Fit, State

COLOURS = 8
"""How many colours there are for parties; more parties repeat them with other dashes."""
MAX_NAMED_PARTIES = 3 * COLOURS
"""With more parties than this, their lines share one entry of the legend."""
DASHES = ("", "5 2", "1.5 1.5")
# In this order: of several rounds that share a strip, the last state is shown.
STATES: Mapping[State, Series] = {
    "counted": Series("counted", "c2", area=True),
    "took part": Series("took part (weights are hidden)", "c2", area=True),
    "weight 0": Series("took part with weight 0", "c4", area=True),
    "absent": Series("absent", "grid", area=True),
    "left out": Series("left out: NaN or infinity", "c1", area=True),
}

Lines = Sequence[tuple[Series, Mapping[int, float]]]
"""Series, and their values by round."""


def charts(findings: Findings) -> dict[str, list[Chart]]:
    """Return the figures that there is data for, by chapter."""
    fit, several = findings.fit, len(findings.fit.names) > 1

    def own(attribute: str) -> Callable[[int], Mapping[int, float]]:
        return lambda party: fit.own(party, attribute)

    chapters = {"Learning": [loss(fit), *metrics(fit, findings.baselines)]}
    if several and findings.baselines:
        chapters["Learning"].append(loss_and_baselines(fit, findings.baselines))
    if several and fit.rounds:
        chapters["Parties"] = [membership(fit), trained(fit), shares(fit)]
    if fit.rounds:
        chapters["Drift"] = [
            by_party("updates", "Length of each party's update (2-norm)", fit, own("update_norm")),
            by_party("distances", "Distance of each party from the result (2-norm)", fit, fit.distances),
            deviation(fit),
            by_party("compression", "Compression error (relative)", fit, own("compression_error")),
            outer_lr(fit),
        ]
        chapters["Cost"] = [seconds(fit), *([seconds_by_party(fit)] * (len(fit.records) > 1)), traffic(fit)]
        chapters["Privacy"] = [privacy(fit)]
    drawn = {name: [chart for chart in members if not chart.is_empty] for name, members in chapters.items()}
    return {name: members for name, members in drawn.items() if members}


def by_party(name: str, title: str, fit: Fit, values: Callable[[int], Mapping[int, float]]) -> Chart:
    """Draw a line for each party, on a logarithmic axis if one of them would leave no room for the others."""
    chart = Chart(name, title)
    _draw_parties(chart, fit, values)
    chart.use_log_scale_if_skewed()
    return chart


def by_round(name: str, title: str, fit: Fit, lines: Lines) -> Chart:
    """Draw a line for each quantity."""
    chart = Chart(name, title)
    for series, values in lines:
        chart.line(_points(fit, values), series)
    return chart


# ---- learning


def loss(fit: Fit) -> Chart:
    """Draw the training loss."""
    chart = Chart("loss", "Training loss")
    if len(fit.names) > 1:
        _draw_parties(chart, fit, fit.losses)
    chart.line(_points(fit, fit.shared("loss")), _all_parties(fit))
    return chart


def metrics(fit: Fit, baselines: Sequence[Fit]) -> list[Chart]:
    """Draw each validation metric, of all parties together and of each."""
    names = {*fit.means(), *(name for party in fit.records for name in fit.local(party))}
    return [_metric(fit, baselines, n, name) for n, name in enumerate(sorted(names, key=losses_first))]


def _metric(fit: Fit, baselines: Sequence[Fit], number: int, name: str) -> Chart:
    baselines = [other for other in baselines if name in other.local(0)]
    # Several validations in a round, or baselines, have only their steps in common.
    rounds = [v.round for v in fit.validations]
    x = "step" if baselines or len(set(rounds)) < len(rounds) else "round"
    chart = Chart(
        f"metric-{number}",
        f"Validation: {name}",
        better="lower" if lower_is_better(name) else "higher",
        baselines=bool(baselines),
        x="optimizer steps" if x == "step" else x,
    )

    def points(values: Mapping[str, Sequence[tuple[Validation, float]]]) -> list[tuple[float, float]]:
        return [(getattr(validation, x), value) for validation, value in values.get(name, ())]

    if len(fit.names) > 1:
        _add_shared_entry(chart, fit)
        for party in fit.records:
            chart.line(points(fit.local(party)), _party(fit, party), named=_is_named(fit))
    for place, other in enumerate(baselines):
        chart.line(points(other.local(0)), _baseline(fit, other, place))
    chart.line(points(fit.means()), _all_parties(fit))
    return chart


def loss_and_baselines(fit: Fit, baselines: Sequence[Fit]) -> Chart:
    """Draw each party's training loss in the federation against that of the party alone."""
    chart = Chart("loss-alone", "Training loss: in the federation and alone", x="optimizer steps")
    _add_shared_entry(chart, fit)
    for party in range(len(fit.names)):
        steps = {index: done.step for index, done in fit.records.get(party, fit.main_record).rounds.items()}
        points = [(steps[index], value) for index, value in fit.losses(party).items() if index in steps]
        chart.line(points, _party(fit, party), named=_is_named(fit))
    for place, other in enumerate(baselines):
        points = [(other.rounds[index].step, value) for index, value in other.losses(0).items()]
        chart.line(points, _baseline(fit, other, place))
    return chart


# ---- parties


def membership(fit: Fit) -> Chart:
    """Draw who took part in which round."""
    chart = Chart("membership", "Who took part", height=0.85 + 0.26 * len(fit.names))
    rounds, worse = list(fit.rounds), list(STATES)
    size = math.ceil(len(rounds) / MAX_POINTS)
    chart.downsampled = size > 1
    stretches = [rounds[start : start + size] for start in range(0, len(rounds), size)]
    shown = [
        [max((fit.state(party, index) for index in stretch), key=worse.index) for stretch in stretches]
        for party in range(len(fit.names))
    ]
    for state, series in STATES.items():
        for party, states in enumerate(shown):
            if marked := [s for s, seen in zip(stretches, states, strict=True) if seen == state]:
                chart.strip(party, _spans(marked), series)
    chart.rows(fit.names)
    chart.panels[0].set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    return chart


def trained(fit: Fit) -> Chart:
    """Draw how many parties trained in each round, and the quorum."""
    lines = [
        (Series("quorum", "c1"), fit.shared("quorum")),
        (Series("trained", "ink", width=2.2), fit.shared("trained_parties")),
    ]
    chart = by_round("trained", "Parties that trained", fit, lines)
    chart.panels[0].set_ylim(0, len(fit.names) + 0.5)
    return chart


def shares(fit: Fit) -> Chart:
    """Draw how much each party's update counted: its share of the weights, or what a rule made of it."""
    known = fit.shares()
    chart = Chart("shares", "Share of each party in the result (%)")
    rounds = range(min(known, default=0), max(known, default=-1) + 1)
    layers = [
        (
            Series(_party(fit, party).label, f"c{party % COLOURS}", area=True),
            [100 * known[i][party] if i in known else 0.0 for i in rounds],
        )
        for party in range(len(fit.names))
    ]
    chart.stack(rounds, layers, named=_is_named(fit))
    chart.panels[0].set_ylim(0, 100)
    return chart


# ---- drift


def deviation(fit: Fit) -> Chart:
    """Draw by how much the LoRA factors miss the mean of their products."""
    names = [done.deviation.worst_module for done in fit.rounds.values() if done.deviation]
    worst = Series(f"worst module, at last {names[-1]}" if names else "worst module", "c1")
    lines = [
        (series, {index: 100 * value for index, value in fit.shared(f"deviation.{attribute}").items()})
        for attribute, series in (("worst", worst), ("total", Series("all modules", "ink", width=2.2)))
    ]
    return by_round("deviation", "Deviation of the LoRA products (%)", fit, lines)


def outer_lr(fit: Fit) -> Chart:
    """Draw the outer learning rate, if it is scheduled."""
    rates = fit.shared("outer_lr")
    lines = [(Series("outer learning rate", "ink", width=2.2), rates)] if len(set(rates.values())) > 1 else []
    return by_round("outer-lr", "Outer learning rate", fit, lines)


# ---- cost


def seconds(fit: Fit) -> Chart:
    """Draw the durations of a round's parts, means over the parties recorded."""
    chart = Chart("seconds", "Seconds in each round")
    rounds = range(min(fit.rounds), max(fit.rounds) + 1)
    means = [(series, fit.mean(attribute)) for attribute, series in _durations(fit).items()]
    chart.stack(rounds, [(series, [mean.get(i, 0.0) for i in rounds]) for series, mean in means])
    chart.panels[0].set_ylim(bottom=0)
    return chart


def seconds_by_party(fit: Fit) -> Chart:
    """Draw the durations of all rounds' parts by party."""
    chart = Chart(
        "seconds-by-party",
        "Seconds by party, all rounds",
        height=0.95 + 0.3 * len(fit.records),
        x="seconds",
    )
    sums = [
        (series, [sum(fit.own(party, attribute).values()) for party in fit.records])
        for attribute, series in _durations(fit).items()
    ]
    chart.bars([fit.names[party] for party in fit.records], sums)
    return chart


def traffic(fit: Fit) -> Chart:
    """Draw bytes by round, and their sum so far."""
    sent = {index: sum(values) for index, values in fit.recorded("bytes_sent").items()}
    (unit, size), (total_unit, total_size) = unit_of(max(sent.values())), unit_of(sum(sent.values()))
    title = f"Sent in each round ({unit}), and so far ({total_unit})"
    chart = Chart("bytes", title, height=3.6, panels=2)
    so_far = zip(sent, accumulate(sent.values()), strict=True)
    if any(sent.values()):
        chart.line([(i, value / size) for i, value in sent.items()], Series("in a round", "c0"))
        total = Series("so far", "ink", width=2.2)
        chart.line([(i, value / total_size) for i, value in so_far], total, panel=1)
    for axes in chart.panels:
        axes.set_ylim(bottom=0)
    return chart


def privacy(fit: Fit) -> Chart:
    """Draw the privacy budget spent."""
    spent, clipping = fit.epsilon, fit.shared("clipping_norm")
    if len(set(clipping.values())) > 1:
        chart = Chart("epsilon", "Epsilon so far, and the clipping norm", panels=2, height=3.6)
    else:
        chart = Chart("epsilon", "Epsilon so far")
    if spent:
        chart.line(_points(fit, spent), Series("epsilon", "ink", width=2.2))
        for panel in range(1, len(chart.panels)):
            chart.line(_points(fit, clipping), Series("clipping norm", "c0"), panel=panel)
        chart.panels[0].set_ylim(bottom=0)
    return chart


# ---- helpers


def lower_is_better(metric: str) -> bool:
    """Guess from a metric's name which way is better."""
    words = re.split(r"[^a-z0-9]+", metric.lower())
    return any(
        word.endswith(("loss", "perplexity", "ppl", "error", "err"))
        or word in ("mse", "mae", "rmse", "nll", "bpb", "wer", "cer", "ece", "brier")
        for word in words
    )


def losses_first(metric: str) -> tuple[bool, str]:
    """Return the key to sort metrics by."""
    return not metric.endswith("loss"), metric


def _durations(fit: Fit) -> dict[str, Series]:
    """Return the parts of a round's time, by attribute of ``Round``."""
    training = {"training_seconds": Series("training and validation", "c0", area=True)}
    stalled, waited, exchange = (
        sum(fit.own(fit.main_record.party, name).values())
        for name in ("stalled_seconds", "waited_seconds", "seconds")
    )
    if stalled < 0.99 * (waited + exchange):  # both ran in parallel with training
        return training | {"stalled_seconds": Series("standing still for a round", "c1", area=True)}
    return training | {
        "waited_seconds": Series("waiting for others", "c4", area=True),
        "seconds": Series("exchange", "c1", area=True),
    }


def _draw_parties(chart: Chart, fit: Fit, values: Callable[[int], Mapping[int, float]]) -> None:
    """Draw a line for each party."""
    _add_shared_entry(chart, fit)
    for party in range(len(fit.names)):
        chart.line(_points(fit, values(party)), _party(fit, party), named=_is_named(fit))


def _add_shared_entry(chart: Chart, fit: Fit) -> None:
    if not _is_named(fit):
        chart.legend.append(Series("each party", "soft"))


def _points(fit: Fit, values: Mapping[int, float]) -> list[tuple[float, float]]:
    """Return a line's points; a round in between that is not known interrupts it."""
    known = [index for index in fit.rounds if index in values]
    return [(i, values.get(i, math.nan)) for i in fit.rounds if known and known[0] <= i <= known[-1]]


def _is_named(fit: Fit) -> bool:
    return len(fit.names) <= MAX_NAMED_PARTIES


def _all_parties(fit: Fit) -> Series:
    return Series("all parties" if len(fit.names) > 1 else "the party", "ink", width=2.2)


def _party(fit: Fit, party: int) -> Series:
    label = f"party {fit.names[party]}"
    if not _is_named(fit):
        return Series(label, "soft", width=0.7)
    return Series(label, f"c{party % COLOURS}", DASHES[party // COLOURS])


def _baseline(fit: Fit, other: Fit, place: int) -> Series:
    """Return the series of a party alone: its folder's name, and the colour of the party that it names."""
    folder = other.folder.name
    party = next((k for k, name in enumerate(fit.names) if re.split(r"[-_ ]", folder)[-1] == name), None)
    if party is None:
        return Series(folder, "soft", ("4 3", "1 2", "6 2 1 2")[place % 3])
    return Series(folder, f"c{party % COLOURS}", "4 3")


def _spans(marked: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Return start and length of stretches of rounds, those joined that follow each other."""
    spans: list[tuple[float, float]] = []
    for stretch in marked:
        start, end = stretch[0] - 0.5, stretch[-1] + 0.5
        if spans and sum(spans[-1]) == start:
            start = spans.pop()[0]
        spans.append((start, end - start))
    return spans
