"""A self-contained HTML page about a federation, made from the records of its parties."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pellm_lightning.report import figures, formatting
from pellm_lightning.report.chart import MAX_POINTS, PALETTE, WIDTH
from pellm_lightning.report.record import versions
from pellm_lightning.report.runs import Findings, Fit, find

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
    names = "number size duration moment count enumeration parties capital schedule"
    environment.filters |= {name: getattr(formatting, name) for name in names.split()}
    fit = findings.fit
    shown, every = list(fit.rounds), max(1, math.ceil(len(fit.rounds) / MAX_ROWS))
    columns = _columns(fit)
    return environment.get_template("page.html").render(
        findings=findings,
        fit=fit,
        chapters=figures.charts(findings),
        palette=PALETTE,
        width=WIDTH,
        max_points=MAX_POINTS,
        best=_best(fit),
        means=fit.means(),
        lower_is_better=figures.lower_is_better,
        columns=list(columns),
        rounds=[
            (fit.rounds[index], [formatting.number(values.get(index)) for values in columns.values()])
            for index in sorted({*shown[::every], *shown[-1:]})
        ],
        every=every,
        sent={party: sum(fit.own(party, "bytes_sent").values()) for party in fit.records},
        versions=_versions(fit),
        version_columns=["package", *(f"party {record.name}" for record in fit.records.values())],
        configs=formatting.grouped((r.name, r.start.config) for r in fit.records.values() if r.start.config),
        commands=formatting.grouped((r.name, _typed(r.start.command)) for r in fit.records.values()),
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


def _columns(fit: Fit) -> dict[str, Mapping[int, float]]:
    """Return the columns of numbers in the table of rounds, each by round."""
    means = fit.means()
    metrics = {name: {v.round: value for v, value in means[name]} for name in list(_best(fit))[:MAX_METRICS]}
    rates = fit.shared("outer_lr")
    optional = {
        "deviation (%)": {index: 100 * value for index, value in fit.shared("deviation.total").items()},
        "compression error": fit.shared("compression_error"),
        "epsilon": fit.shared("epsilon"),
        "outer learning rate": rates if len(set(rates.values())) > 1 else {},
    }
    return {
        "loss": fit.shared("loss"),
        **metrics,
        "update norm": fit.shared("update_norm"),
        "distance": fit.shared("distance"),
        **{name: values for name, values in optional.items() if values},
        "training (s)": fit.shared("training_seconds"),
        "waited (s)": fit.shared("waited_seconds"),
        "exchange (s)": fit.shared("seconds"),
    }


def _versions(fit: Fit) -> dict[str, list[str]]:
    """Return the versions that the parties had of each package."""
    installed = [record.start.versions for record in fit.records.values()]
    packages = sorted({package for each in installed for package in each})
    return {package: [each.get(package, "none") for each in installed] for package in packages}


def _typed(command: Sequence[str]) -> str:
    """Return ``sys.argv`` as it would be typed."""
    program, *words = command or ("",)
    if re.search(r"pellm_lightning[/\\]__main__\.py$", program):
        return shlex.join(["python", "-m", "pellm_lightning", *words])
    if Path(program).name == "pellm":
        return shlex.join(["pellm", *words])
    return shlex.join([*(["python"] if program.endswith(".py") else []), program, *words])
