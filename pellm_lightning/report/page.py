"""One self-contained HTML page that tells a federation to whom was not there."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pellm_lightning.report import figures, runs
from pellm_lightning.report.chart import MOST_POINTS, Picture
from pellm_lightning.report.record import versions
from pellm_lightning.report.runs import Findings, Fit, PartyRecord
from pellm_lightning.report.words import duration, number, schedule, size

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise ImportError(
        "A report is laid out with the package jinja2: pip install 'pellm-lightning[plots]'."
    ) from error

MOST_ROWS = 400
"""The table of a longer fit shows every n-th round and the last."""
MOST_METRICS = 3
"""As many metrics have columns in the table of rounds."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    differs: bool = False
    """Whether parties differ in it where they had better not."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Alert:
    """What a reader must know first."""

    bad: bool
    text: str


def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of the federation whose records lie below a folder; return its path.

    Args:
        folder: Holds the parties' ``rounds.jsonl``, at any depth.
        out: The page; None is ``report.html`` in the folder.

    Raises:
        ValueError: If there is no record, or none that could be read, or there are several federations.
        OSError: If the page cannot be written.
    """
    text = html(runs.find(folder))
    path = Path(folder) / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def html(findings: Findings) -> str:
    """Return the page."""
    fit = findings.fit
    drawn = figures.pictures(findings)
    environment = Environment(
        # All that comes out of a record is untrusted; SVG is ours.
        autoescape=True,
        loader=PackageLoader("pellm_lightning", "report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown, every = _rounds_table(fit)
    return environment.get_template("page.html").render(
        title=_title(fit),
        alerts=_alerts(findings),
        facts=_facts(fit),
        story=_story(findings),
        groups=_grouped(drawn),
        svg={picture.name: Markup(picture.svg) for picture in drawn},
        most_points=MOST_POINTS,
        best=_best_table(fit),
        parties=_parties_table(fit),
        rounds=shown,
        every=every,
        settings=_settings(fit),
        configs=_configs(fit),
        versions=_versions_table(fit),
        surroundings=_surroundings_table(fit),
        commands=_commands(fit),
        folder=str(findings.folder),
        records=len(fit.records),
        version=versions().get("pellm-lightning", ""),
    )


# ---- in words


def _title(fit: Fit) -> str:
    what = "A fit of one party" if len(fit.names) == 1 else f"A federation of {len(fit.names)} parties"
    return f"{what}: {fit.narrator.start.module}"


def _alerts(findings: Findings) -> list[Alert]:
    fit, alerts = findings.fit, []
    for record in fit.records.values():
        last = max(record.rounds, default=None)
        where = "before its first round" if last is None else f"after round {last}"
        if record.failed is not None:
            alerts.append(Alert(True, f"Party {record.name} failed {where}: {record.failed}"))
        elif not record.ended:
            alerts.append(
                Alert(
                    True,
                    f"Party {record.name}'s record stops {where} at {_moment(record.last_time)} without an"
                    " end: the fit still runs, or was cut off (killed, or its host went down).",
                )
            )
    if lost := [name for party, name in enumerate(fit.names) if party not in fit.records]:
        them = "it" if len(lost) == 1 else "them"
        here = _parties_words([record.name for record in fit.records.values()])
        alerts.append(
            Alert(
                False,
                f"Of {_parties_words(lost)} there is no record here. What is shown of {them} is what"
                f" {here} was told. Put all parties' folders into one and call the report"
                " again to see all.",
            )
        )
    for name, found in _differing_versions(fit).items():
        alerts.append(
            Alert(False, f"The parties ran different versions of {name}: {', '.join(sorted(found))}.")
        )
    if short := fit.short_rounds:
        quorum = fit.rounds[short[-1]].quorum
        alerts.append(
            Alert(
                False,
                f"{_capital(_counted(len(short), 'round'))} moved nothing, since fewer than a quorum of"
                f" {quorum:.0f} parties trained: {_listed([str(index) for index in short[:9]])}"
                f"{' and more' if len(short) > 9 else ''}. What was trained alone is not in the result.",
            )
        )
    alerts += [Alert(False, note) for note in findings.notes]
    return alerts


def _outcome(fit: Fit) -> str:
    records = fit.records.values()
    if any(record.failed is not None for record in records):
        return "failed"
    return "finished" if all(record.ended for record in records) else "no end recorded"


def _facts(fit: Fit) -> list[tuple[str, str]]:
    """Return the few figures that stand on top: what, and how much."""
    record, rounds = fit.narrator, fit.rounds
    facts = [("Outcome", _outcome(fit)), ("Parties", str(len(fit.names))), ("Rounds", f"{len(rounds):,}")]
    if rounds:
        facts.append(("Optimizer steps", _span([_steps(r) for r in fit.records.values()])))
    facts.append(("Time", duration(max(r.seconds for r in fit.records.values()))))
    if losses := list(fit.shared("loss").values()):
        facts.append(("Training loss", " → ".join(map(number, _ends(losses)))))
    for name, (value, _) in list(_best(fit).items())[:2]:
        facts.append((f"Best {name}", number(value)))
    sent = sum(sum(fit.own(party, "bytes_sent").values()) for party in fit.records)
    whole = len(fit.records) == len(fit.names)
    facts.append(("Sent, all parties" if whole else "Sent, as recorded here", size(sent)))
    if spent := [max(fit.own(p, "epsilon").values()) for p in fit.records if fit.own(p, "epsilon")]:
        facts.append(("Epsilon", number(max(spent))))
    facts.append(("Began", _moment(record.starts[0].time)))
    return facts


def _story(findings: Findings) -> list[str]:
    """Return the fit in a few sentences, a paragraph each."""
    fit = findings.fit
    start, settings = fit.narrator.start, fit.narrator.start.settings
    alone = len(fit.names) == 1
    trained = "trained" if fit.rounds else "were to train" if not alone else "was to train"
    who = f"One party {trained} {start.module} on its own data."
    if not alone:
        who = _capital(_parties_words(fit.names))
        who += f" {trained} {start.module} together; their data stayed with them."
    share = 100 * start.leaving / max(start.parameters, 1)
    turns = int(settings.get("fragments") or 1)
    leaves = (
        f"Of its {start.parameters:,} parameters {start.leaving:,} ({share:.3g} %) take part in the rounds"
    )
    leaves += f", in {start.lora_modules} LoRA modules" if start.lora_modules else ""
    if not alone:
        which = (
            "they leave a party once a round"
            if turns == 1
            else f"one in {turns} of them leaves in each round"
        )
        leaves += f"; {which}, {size(4 * start.leaving / turns)} as 32-bit numbers"
        leaves += f". {_who_sees(str(settings.get('exchange')), str(settings.get('privacy')))}"
    else:
        leaves += "."
    paragraphs = [
        f"{who} {leaves}",
        _how_it_went(fit),
    ]
    if result := _what_came_out(fit):
        paragraphs.append(result)
    if findings.alone:
        paragraphs.append(
            f"Beside it: {_counted(len(findings.alone), 'fit')} of one party each"
            f" ({_listed([other.folder.name for other in findings.alone])}), drawn dashed for comparison."
        )
    return paragraphs


def _who_sees(exchange: str, privacy: str) -> str:
    if exchange.startswith("SecureAggregation"):
        text = "They are masked: no party sees more of another's than the sum over all."
    elif exchange.startswith("Plain"):
        text = "The other parties could see each party's values."
    else:
        text = f"They cross as {exchange} codes them; the other parties could see each party's values."
    return text if privacy == "None" else f"{text} Updates are clipped and noisy: {privacy}."


def _how_it_went(fit: Fit) -> str:
    text = f"There {'was' if len(fit.rounds) == 1 else 'were'} {_counted(len(fit.rounds), 'round')}"
    text += f", with one due every {schedule(fit.narrator.start.settings)}"
    text += f", in {duration(max(r.seconds for r in fit.records.values()))}."
    restarts = {r.name: len(r.starts) - 1 for r in fit.records.values() if len(r.starts) > 1}
    if restarts:
        text += (
            " Resumed: "
            + ", ".join(f"party {name} {_counted(n, 'time')}" for name, n in restarts.items())
            + "."
        )
    missed = {
        fit.names[party]: sum(fit.state(party, index) == "absent" for index in fit.rounds)
        for party in range(len(fit.names))
    }
    if away := {name: n for name, n in missed.items() if n}:
        text += (
            " Missing: "
            + ", ".join(f"party {name} in {_counted(n, 'round')}" for name, n in away.items())
            + "."
        )
    elif fit.rounds and len(fit.names) > 1:
        text += " All parties took part in all of them."
    healed = {
        fit.names[party]: n
        for party in range(len(fit.names))
        if (n := sum(fit.state(party, index) == "left out" for index in fit.rounds))
    }
    if healed:
        told = ", ".join(f"party {name} in {n:,}" for name, n in healed.items())
        text += f" Left out because of NaN or infinity, and healed by the result: {told}."
    return text


def _what_came_out(fit: Fit) -> str:
    text = ""
    if losses := list(fit.shared("loss").values()):
        mean = ", mean over the parties," if len(fit.names) > 1 else ""
        text = f"The training loss{mean} {_course(losses)}."
    means = fit.means()
    for name, (value, after) in list(_best(fit).items())[:2]:
        course = _course([mean for _, mean in means[name]])
        text += f" The mean {name} {course}; the best was {number(value)}, {_after(after)}."
    if epsilon := fit.shared("epsilon"):
        text += f" Differential privacy has cost epsilon = {number(list(epsilon.values())[-1])}."
    return text.strip()


def _ends(values: Sequence[float]) -> Sequence[float]:
    return values if len(values) == 1 else (values[0], values[-1])


def _course(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"was {number(values[0])}"
    return f"went from {number(values[0])} to {number(values[-1])}"


def _after(index: int) -> str:
    return "before the first round" if index < 0 else f"after round {index}"


# ---- tables


def _best(fit: Fit) -> dict[str, tuple[float, int]]:
    """Return the best mean of each validation metric, and the round that it followed; losses first."""
    means = fit.means()
    found = {}
    for name in sorted(means, key=lambda name: (not name.endswith("loss"), name)):
        pick = min if figures.lower_is_better(name) else max
        visit, value = pick(means[name], key=lambda pair: pair[1])
        found[name] = (value, visit.round)
    return found


def _best_table(fit: Fit) -> Table | None:
    means, best = fit.means(), _best(fit)
    rows = [
        [
            Cell(name),
            Cell("lower" if figures.lower_is_better(name) else "higher"),
            Cell(number(means[name][0][1])),
            Cell(number(means[name][-1][1])),
            Cell(number(value)),
            Cell(_after(after)),
        ]
        for name, (value, after) in best.items()
    ]
    return Table(["metric", "better", "first", "last", "best", "best came"], rows) if rows else None


def _parties_table(fit: Fit) -> Table:
    columns = ["party", "host", "device", "precision", "processes", "rounds", "steps"]
    columns += ["mean weight", "last loss", "time", "sent", "end"]
    precisions = {record.start.precision for record in fit.records.values()}
    rows = []
    for party, name in enumerate(fit.names):
        record = fit.records.get(party)
        weights, losses = list(fit.weights(party).values()), list(fit.losses(party).values())
        told = [
            number(sum(weights) / len(weights)) if weights else "hidden" if fit.rounds else "",
            number(losses[-1]) if losses else "unknown",
        ]
        if record is None:
            took = sum(party in done.parties for done in fit.rounds.values())
            rows.append(_cells([name, *["no record"] * 4, f"{took:,}", "", *told, "", "", ""]))
            continue
        start = record.start
        end = "failed" if record.failed is not None else "finished" if record.ended else "none recorded"
        took = sum(party in done.parties for done in record.rounds.values())
        row = _cells([name, start.host, start.device, start.precision, str(start.processes), f"{took:,}"])
        row[3] = Cell(start.precision, differs=len(precisions) > 1)
        row += _cells([f"{_steps(record):,}", *told, duration(record.seconds)])
        row += _cells([size(sum(fit.own(party, "bytes_sent").values()))])
        rows.append([*row, Cell(end, differs=end != "finished")])
    return Table(columns, rows)


def _rounds_table(fit: Fit) -> tuple[Table | None, int]:
    """Return the rounds, and every how many-th is among them."""
    if not fit.rounds:
        return None, 1
    every = -(-len(fit.rounds) // MOST_ROWS)
    last = list(fit.rounds)[-1]
    shown = [index for place, index in enumerate(fit.rounds) if place % every == 0 or index == last]
    after: dict[int, Mapping[str, float]] = {v.round: v.mean for v in fit.joint_validations}
    metrics = list(_best(fit))[:MOST_METRICS]
    optional = {
        "deviation": ("deviation (%)", 100.0),
        "compression_error": ("compression error", 1.0),
        "epsilon": ("epsilon", 1.0),
        "outer_lr": ("outer learning rate", 1.0),
    }
    optional = {name: how for name, how in optional.items() if fit.shared(name)}
    if len(set(fit.shared("outer_lr").values())) < 2:
        optional.pop("outer_lr", None)
    columns = ["round", "steps", "counted", "left out", "absent", "loss", *metrics, "update norm", "distance"]
    columns += [head for head, _ in optional.values()]
    columns += ["training (s)", "waited (s)", "exchange (s)", "sent"]
    rows = []
    for index in shown:
        done = fit.rounds[index]
        states = {party: fit.state(party, index) for party in range(len(fit.names))}
        counted = sum(state in ("counted", "took part") for state in states.values())
        lost, away = (
            ", ".join(fit.names[party] for party, state in states.items() if state == which)
            for which in ("left out", "absent")
        )
        row = _cells([str(index), f"{done.step:,}", f"{counted} of {len(fit.names)}"])
        row += [Cell(lost, bool(lost)), Cell(away, bool(away)), Cell(number(done.loss))]
        row += [Cell(number(after.get(index, {}).get(name))) for name in metrics]
        row += _cells([number(done.update_norm), number(done.distance)])
        for name, (_, times) in optional.items():
            value = getattr(done, name)
            row.append(Cell(number(None if value is None else times * value)))
        row += _cells(
            [number(s) for s in (done.training_seconds, done.waited_seconds, done.exchange_seconds)]
        )
        rows.append([*row, Cell("" if done.bytes_sent is None else size(done.bytes_sent))])
    return Table(columns, rows), every


def _versions_table(fit: Fit) -> Table:
    named = {record.name: record.start.versions for record in fit.records.values()}
    packages = sorted({package for each in named.values() for package in each})
    differing = _differing_versions(fit)
    rows = [
        [
            Cell(package),
            *(Cell(each.get(package, "none"), differs=package in differing) for each in named.values()),
        ]
        for package in packages
    ]
    return Table(["package", *(f"party {name}" for name in named)], rows)


def _differing_versions(fit: Fit) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    everywhere = [record.start.versions for record in fit.records.values()]
    for package in {package for each in everywhere for package in each}:
        found[package] = {each.get(package, "none") for each in everywhere}
    return {package: texts for package, texts in sorted(found.items()) if len(texts) > 1}


def _surroundings_table(fit: Fit) -> Table:
    rows = []
    for record in fit.records.values():
        for place, start in enumerate(record.starts):
            again = f", resumed ({place})" if place else ""
            rows.append(
                _cells(
                    [
                        record.name + again,
                        _moment(start.time),
                        f"round {start.round}, step {start.step:,}",
                        start.host,
                        start.platform,
                        "" if start.processors is None else str(start.processors),
                    ]
                )
            )
    return Table(["party", "started", "at", "host", "platform", "processors"], rows)


def _settings(fit: Fit) -> Table:
    """Return what the parties have agreed on."""
    rows = [
        _cells([name, "none" if value in (None, "None") else str(value)])
        for name, value in fit.narrator.start.settings.items()
    ]
    return Table(["setting", "value"], rows)


def _configs(fit: Fit) -> list[tuple[str, str]]:
    """Return the YAML of the command line, once for all parties that have the same."""
    found: dict[str, list[str]] = {}
    for record in fit.records.values():
        if record.start.config is not None:
            found.setdefault(record.start.config, []).append(record.name)
    return [(_capital(_parties_words(names)), text) for text, names in found.items()]


def _commands(fit: Fit) -> list[tuple[str, str]]:
    """Return what each party ran, once for all that ran the same."""
    found: dict[str, list[str]] = {}
    for record in fit.records.values():
        found.setdefault(_typed(record.start.command), []).append(record.name)
    return [(_capital(_parties_words(names)), text) for text, names in found.items()]


def _typed(command: Sequence[str]) -> str:
    """Return ``sys.argv`` as it would be typed."""
    program, *words = command or ("",)
    if re.search(r"pellm_lightning[/\\]__main__\.py$", program):
        return shlex.join(["python", "-m", "pellm_lightning", *words])
    return shlex.join([*(["python"] if program.endswith(".py") else []), program, *words])


def _grouped(drawn: Sequence[Picture]) -> dict[str, list[Picture]]:
    groups: dict[str, list[Picture]] = {}
    for picture in drawn:
        groups.setdefault(picture.group, []).append(picture)
    return groups


def _steps(record: PartyRecord) -> int:
    return max((done.step for done in record.rounds.values()), default=0)


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _moment(text: str) -> str:
    """Return a time of a record as people write it."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return text


def _listed(names: Sequence[str], most: int = 8) -> str:
    """Return names as words: parties 0, 1 and 2."""
    if len(names) == 1:
        return names[0]
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _parties_words(names: Sequence[str]) -> str:
    return f"{'party' if len(names) == 1 else 'parties'} {_listed(names)}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _cells(texts: Sequence[str]) -> list[Cell]:
    return [Cell(text) for text in texts]
