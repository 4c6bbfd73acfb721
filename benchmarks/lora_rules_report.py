"""What came out of `lora_rules.py`: tables in Markdown and a picture."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

DRAWN = [
    "mean", "low_rank_exact", "low_rank_power", "residual", "stacking", "alternating", "frozen_a", "share_a",
    "alone", "central",
]  # fmt: skip
"""The rules in the picture; the others are variants of these."""
WITHOUT_RULE = ["alone", "central"]
MEASURES = ["accuracy", "deviation"]
Key: TypeAlias = tuple[str, float, int, int, int]
"""Rule, alpha, parties, seed (these three make a division of the data), rank."""


def report(rows: Sequence[dict[str, Any]], image: Path) -> None:
    """Print a table over the grid and one by setting, rules in the order of their rows; draw the curves."""
    alphas = {row["alpha"] for row in rows} - {None}
    results = {
        (_label(row), alpha, row["parties"], row["seed"], row["rank"]): row
        for row in rows
        # What divides no data stands beside every division.
        for alpha in ([row["alpha"]] if row["alpha"] else alphas)
    }
    print(summary_table(results), settings_table(results), sep="\n\n")
    image.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(image, dpi=150)


def summary_table(results: dict[Key, dict[str, Any]]) -> str:
    """Compare each rule with the mean, over the runs of both that share all but the rule.

    The standard error is that over the divisions of the data: runs of other rank on one division are not
    independent.
    """
    lines = [
        "| rule | runs | after round 1 | against mean | after the last | against mean | own labels"
        " | deviation, round 1 | the last | bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (label,), rows in _grouped(results, 0).items():
        accuracy = _mean([row["accuracy"] for row in rows.values()])
        own = _mean([row["own_accuracy"] for row in rows.values()])
        deviation = _mean([row["deviation"] for row in rows.values() if "deviation" in row])
        means = {key: results.get(("mean", *key[1:])) for key in rows}
        pairs = {key: (row, means[key]) for key, row in rows.items() if means[key]}
        gains = [
            _mean([np.subtract(a["accuracy"], b["accuracy"]) for a, b in of_division.values()])
            for of_division in _grouped(pairs, 1, 2, 3).values()
        ]
        sent = _mean([[a["bytes_per_round"] / b["bytes_per_round"]] for a, b in pairs.values()])
        cells = [label, str(len(rows))]
        for k in (0, -1):
            cells += [f"{100 * accuracy[k]:.1f}", _with_error([gain[k] for gain in gains], "+")]
        cells += [f"{100 * own[-1]:.1f}", *(f"{deviation[k]:.3f}" if len(deviation) else "" for k in (0, -1))]
        cells.append(f"{sent[0]:.2f}x" if any(sent) else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_table(results: dict[Key, dict[str, Any]]) -> str:
    """Show the accuracy after the last round by setting, with the standard error over the seeds."""
    settings = sorted({(alpha, parties, rank) for _, alpha, parties, _, rank in results})
    lines = [
        f"| rule | {' | '.join(f'Dir({alpha}), {n} parties, r={rank}' for alpha, n, rank in settings)} |",
        "|---" * (len(settings) + 1) + "|",
    ]
    by_setting = _grouped(results, 0, 1, 2, 4)
    for label in dict.fromkeys(key[0] for key in results):
        of_label = [by_setting.get((label, *setting), {}).values() for setting in settings]
        cells = [_with_error([row["accuracy"][-1] for row in of_seeds]) for of_seeds in of_label]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[Key, dict[str, Any]]) -> Figure:
    """Draw accuracy and deviation by round, averaged over ranks; bands are standard errors over seeds."""
    columns = sorted({key[1:3] for key in results})
    figure = Figure(figsize=(1.5 + 3.2 * len(columns), 6.5), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for ((label, *setting), rows), what in itertools.product(_grouped(results, 0, 1, 2).items(), MEASURES):
        curves = [
            _mean([row[what] for row in of_seed.values()])
            for of_seed in _grouped(rows, 3).values()
            if all(what in row for row in of_seed.values())
        ]
        if label in DRAWN and curves:
            axis = axes[MEASURES.index(what), columns.index(tuple(setting))]
            middle, error = _mean(curves), _standard_error(curves)
            rounds = np.arange(1, len(middle) + 1)
            style = {"color": f"C{DRAWN.index(label)}", "linestyle": "--" if label in WITHOUT_RULE else "-"}
            axis.plot(rounds, middle, label=label, **style)
            axis.fill_between(rounds, middle - error, middle + error, color=style["color"], alpha=0.15, lw=0)
            axis.set_xticks(rounds)
    for column, (alpha, parties) in enumerate(columns):
        axes[0, column].set_title(f"Dirichlet({alpha}), {parties} parties")
        axes[1, column].set_xlabel("round")
    for row, what in enumerate(MEASURES):
        axes[row, 0].set_ylabel(what)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


def _label(row: dict[str, Any]) -> str:
    head = ", head trained" if row["head"] == "trained" else ""
    state = ", state reset" if row["optimizer_state"] == "reset" else ""
    return row["rule"] + head + state


def _grouped(results: Mapping[Key, Any], *positions: int) -> dict[tuple[Any, ...], dict[Key, Any]]:
    """Group results by some entries of their keys."""
    groups: dict[tuple[Any, ...], dict[Key, Any]] = {}
    for key, value in results.items():
        groups.setdefault(tuple(key[position] for position in positions), {})[key] = value
    return groups


def _mean(curves: Sequence[Any]) -> np.ndarray:
    return np.mean(curves, axis=0) if curves else np.empty(0)


def _standard_error(curves: Sequence[Any]) -> np.ndarray:
    return np.std(curves, axis=0, ddof=min(1, len(curves) - 1)) / len(curves) ** 0.5


def _with_error(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    error = f" ± {100 * _standard_error(values):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{sign}.1f}{error}"
