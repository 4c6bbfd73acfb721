"""A self-contained HTML page about a federation, made from the records of its parties."""

import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pellm_lightning.report import figures, formatting
from pellm_lightning.report.chart import MAX_POINTS, PALETTE, WIDTH
from pellm_lightning.report.record import Round, versions
from pellm_lightning.report.runs import Findings, Fit, PartyRecord, find, number_of

MAX_ROWS = 400
"""The table of a longer fit shows every n-th round and the last."""
MAX_METRICS = 3
"""As many metrics have columns in the table of rounds."""


def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of the federation whose records lie below a folder; return its path.

    Args:
        folder: Holds the parties' ``rounds.jsonl``, at any depth.
        out: The page; None is ``report.html`` in the folder.

    Raises:
        ValueError: If there is no record, or none that could be read, or there are several federations.
        OSError: If the page cannot be written.
    """
    text = html(find(folder))
    path = Path(folder) / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def html(findings: Findings) -> str:
    """Return the page."""
    environment = Environment(
        autoescape=True,  # all that comes out of a record is untrusted
        loader=PackageLoader("pellm_lightning", "report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (formatting.number, formatting.size, formatting.duration, formatting.moment, formatting.count,
               formatting.enumeration, formatting.parties, formatting.capital)  # fmt: skip
    environment.filters |= {function.__name__: function for function in formats}
    fit = findings.fit
    shown, every = list(fit.rounds), max(1, math.ceil(len(fit.rounds) / MAX_ROWS))
    columns = _round_columns(fit)
    return environment.get_template("page.html").render(
        findings=findings,
        fit=fit,
        main=fit.main_record,
        start=fit.main_record.start,
        settings=fit.main_record.start.settings,
        schedule=formatting.schedule(fit.main_record.start.settings),
        chapters=figures.charts(findings),
        palette=PALETTE,
        width=WIDTH,
        max_points=MAX_POINTS,
        best=_best(fit),
        means=fit.means(),
        lower_is_better=figures.lower_is_better,
        columns=list(columns),
        rounds=[
            (fit.rounds[index], [read(fit.rounds[index]) for read in columns.values()])
            for index in sorted({*shown[::every], *shown[-1:]})
        ],
        every=every,
        epsilon=max((e for party in fit.records for e in fit.own(party, "epsilon").values()), default=None),
        sent={party: sum(fit.own(party, "bytes_sent").values()) for party in fit.records},
        versions=_versions(fit),
        version_columns=["package", *(f"party {record.name}" for record in fit.records.values())],
        configs=_same(fit, lambda record: record.start.config),
        commands=_same(fit, lambda record: _typed(record.start.command)),
        version=versions().get("pellm-lightning", ""),
    )


def _best(fit: Fit) -> dict[str, tuple[float, int]]:
    """Return the best mean of each validation metric, and the round that it followed; losses first."""
    means, found = fit.means(), {}
    for name in sorted(means, key=figures.losses_first):
        pick = min if figures.lower_is_better(name) else max
        validation, value = pick(means[name], key=lambda pair: pair[1])
        found[name] = (value, validation.round)
    return found


def _round_columns(fit: Fit) -> dict[str, Callable[[Round], str]]:
    """Return the columns of figures in the table of rounds: how to read each of a round."""
    after = {v.round: v.mean for v in fit.joint_validations}

    def metric(name: str) -> Callable[[Round], str]:
        return lambda done: formatting.number(after.get(done.round, {}).get(name))

    def attribute(name: str, factor: float = 1.0) -> Callable[[Round], str]:
        def read(done: Round) -> str:
            value = number_of(done, name)
            return "" if value is None else formatting.number(factor * value)

        return read

    columns = {"loss": attribute("loss")} | {name: metric(name) for name in list(_best(fit))[:MAX_METRICS]}
    columns |= {"update norm": attribute("update_norm"), "distance": attribute("distance")}
    if fit.shared("deviation.total"):
        columns["deviation (%)"] = attribute("deviation.total", 100.0)
    for name in ("compression_error", "epsilon"):
        if fit.shared(name):
            columns[name.replace("_", " ")] = attribute(name)
    if len(set(fit.shared("outer_lr").values())) > 1:
        columns["outer learning rate"] = attribute("outer_lr")
    columns |= {"training (s)": attribute("training_seconds"), "waited (s)": attribute("waited_seconds")}
    return columns | {"exchange (s)": attribute("seconds"), "sent": lambda d: formatting.size(d.bytes_sent)}


def _versions(fit: Fit) -> dict[str, list[str]]:
    """Return the versions that the parties had of each package."""
    installed = [record.start.versions for record in fit.records.values()]
    packages = sorted({package for each in installed for package in each})
    return {package: [each.get(package, "none") for each in installed] for package in packages}


def _same(fit: Fit, get: Callable[[PartyRecord], str | None]) -> dict[str, list[str]]:
    """Return each text that parties have, with their names."""
    found: dict[str, list[str]] = {}
    for record in fit.records.values():
        if (text := get(record)) is not None:
            found.setdefault(text, []).append(record.name)
    return found


def _typed(command: Sequence[str]) -> str:
    """Return ``sys.argv`` as it would be typed."""
    program, *words = command or ("",)
    if re.search(r"pellm_lightning[/\\]__main__\.py$", program):
        return shlex.join(["python", "-m", "pellm_lightning", *words])
    if Path(program).name == "pellm":
        return shlex.join(["pellm", *words])
    return shlex.join([*(["python"] if program.endswith(".py") else []), program, *words])
