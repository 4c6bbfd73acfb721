"""What is drawn of a federation, chapter by chapter: learning, parties, drift, cost, privacy."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter

from pellm_lightning.report.chart import MOST_POINTS, Chart, Key, Picture
from pellm_lightning.report.runs import Findings, Fit, Round, State
from pellm_lightning.report.words import unit_of

COLOURS = 8
"""How many colours of parties the page has; more parties repeat them with other dashes."""
SINGLE_OUT = 3 * COLOURS
"""With more parties than this, lines of single parties have no names of their own."""

DASHES = ("", "5 2", "1.5 1.5")
# The worse, the later: of a stretch of rounds the worst is shown.
STATES: Mapping[State, str] = {
    "counted": "counted",
    "took part": "took part (weights are hidden)",
    "weight 0": "took part with weight 0",
    "absent": "absent",
    "left out": "left out: NaN or infinity",
}


def pictures(findings: Findings) -> list[Picture]:
    """Draw all there is data for."""
    fit, found = findings.fit, []
    plain: list[Callable[[Fit], Picture | None]]
    plain = [membership, trained, shares, update_norms, distances, deviation, compression, outer_lr]
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
        visits = [v.round for v in fit.validations]
        by_step = bool(others) or len(set(visits)) < len(visits)
        better = "lower" if lower_is_better(name) else "higher"
        compared = " Dashed: a party alone, on its own validation data; the federation should be no worse."
        apart = " Means over some of the parties, which validated at a moment of their own, are left out."
        chart = Chart(
            f"metric-{number}",
            "Learning",
            f"Validation: {name}",
            f"The thick line is the mean over the parties, weighted by their validation samples; {better} is"
            " taken to be better. A bad sign: it turns round while the training loss still falls, or one"
            " party goes the other way."
            + apart * (len(fit.joint_validations) < len(fit.validations))
            + compared * bool(others),
            x="optimizer steps" if by_step else "round",
        )

        def points(
            found: Sequence[tuple[object, float]], by_step: bool = by_step
        ) -> list[tuple[float, float]]:
            return [(getattr(v, "step" if by_step else "round"), value) for v, value in found]

        if len(fit.names) > 1:
            _key_of_all_if_unnamed(chart, fit)
            for party in fit.records:
                chart.line(points(fit.local(party).get(name, [])), _party(fit, party), named=_named(fit))
        for place, other in enumerate(others):
            chart.line(points(other.local(0).get(name, [])), _alone(fit, other, place))
        chart.line(points(means.get(name, [])), _all(fit))
        if picture := chart.done():
            found.append(picture)
    return found


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
    _key_of_all_if_unnamed(chart, fit)
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
        "A row is a party, from the first round to the last. A bad sign: gaps (the party was away), or rounds"
        " in which it was left out because its parameters held NaN. Weight 0 is normal for a party that has"
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


def trained(fit: Fit) -> Picture | None:
    """Draw how many parties trained in each round, and how many had to."""
    counts, quorum = fit.shared("trained_parties"), fit.shared("quorum")
    if len(fit.names) == 1 or not counts:
        return None
    chart = Chart(
        "trained",
        "Parties",
        "Parties that trained",
        "How many parties came to a round with local steps of their own. A bad sign: it falls below the"
        " quorum, since such a round moves nothing, and the federation ends. Then give all parties equally"
        " many rounds.",
    )
    chart.line(_points(fit, quorum), Key("quorum", "c1"))
    chart.line(_points(fit, counts), Key("trained", "ink", width=2.2))
    chart.panels[0].set_ylim(0, len(fit.names) + 0.5)
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
    return _by_party(chart, fit, lambda party: fit.own(party, "update_norm"))


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
    return _by_party(chart, fit, fit.distances)


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
    worst = [done.worst_module for done in fit.rounds.values() if done.worst_module]
    for what, key in (
        ("worst_deviation", Key(f"worst module, at last {worst[-1]}" if worst else "worst module", "c1")),
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
        " A bad sign: it grows from round to round.",
    )
    return _by_party(chart, fit, lambda party: fit.own(party, "compression_error"))


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
        mean = mean_by_round(fit, of)
        high = [base + mean.get(index, 0.0) for base, index in zip(low, rounds, strict=True)]
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
    parts = [[sum(_known(map(of, r.rounds.values()))) for r in fit.records.values()] for _, _, of in spent]
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
        " handed to the network. It should be level; a bad sign: rounds that cost more than the others, since"
        " they were tried again after a party was lost or left out.",
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


def mean_by_round(fit: Fit, of: Callable[[Round], float | None]) -> dict[int, float]:
    """Return the mean of a figure over those parties with a record that know it."""
    found = {
        index: _known(of(record.rounds[index]) for record in fit.records.values() if index in record.rounds)
        for index in fit.rounds
    }
    return {index: sum(values) / len(values) for index, values in found.items() if values}


def _spent(fit: Fit) -> list[tuple[str, str, Callable[[Round], float | None]]]:
    """Return the parts of a round's time: what to call them, their colours, and how to read them."""
    training, stalled = attrgetter("training_seconds"), attrgetter("stalled_seconds")
    waited, exchange = attrgetter("waited_seconds"), attrgetter("exchange_seconds")
    first = ("training and validation", "c0", training)
    done = fit.narrator.rounds.values()
    took = sum(_known(of(d) for d in done for of in (waited, exchange)))
    if sum(_known(map(stalled, done))) < 0.99 * took:  # waiting and exchange ran beside training
        return [first, ("standing still for a round", "c1", stalled)]
    return [
        first,
        ("waiting for others", "c4", waited),
        ("exchange", "c1", exchange),
    ]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _by_party(chart: Chart, fit: Fit, of: Callable[[int], Mapping[int, float]]) -> Picture | None:
    _parties(chart, fit, of)
    chart.be_logarithmic_if_steep()
    return chart.done()


def _parties(chart: Chart, fit: Fit, of: Callable[[int], Mapping[int, float]]) -> None:
    """Draw a line for each party."""
    _key_of_all_if_unnamed(chart, fit)
    for party in range(len(fit.names)):
        chart.line(_points(fit, of(party)), _party(fit, party), named=_named(fit))


def _key_of_all_if_unnamed(chart: Chart, fit: Fit) -> None:
    if not _named(fit):
        chart.legend.append(Key("each party", "soft"))


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


def _spans(marked: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Return start and length of stretches of rounds, those joined that follow each other."""
    spans: list[tuple[float, float]] = []
    for stretch in marked:
        start, end = stretch[0] - 0.5, stretch[-1] + 0.5
        if spans and sum(spans[-1]) == start:
            start = spans.pop()[0]
        spans.append((start, end - start))
    return spans
