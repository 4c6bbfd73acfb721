"""What came out of `training.py`: a table in Markdown and a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from round_times_report import machine

Rows = Sequence[dict[str, Any]]
_RULES = {"mean": "mean of A and of B", "default": "mean of the products"}


def report(rows: Rows, image: Path | None) -> None:
    """Print the table, and draw it if asked; each row is one run."""
    print(f"\n{machine()}. Accuracy on the held-out paragraphs, in percent.\n")
    print(table(rows))
    if image:
        image.parent.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(image, dpi=100)


def table(rows: Rows) -> str:
    rounds = range(len(rows[0]["accuracy"]))
    head = " | ".join(f"round {round}" for round in rounds)
    lines = [
        f"| | optimizer | LoRA | {head} | last loss | apart from ours | s, in all | s a round |"
        " MB sent by a party | MB through the server |",
        f"|---|---|---|{'---:|' * (len(rounds) + 6)}",
    ]
    for row in rows:
        cells = [row["who"], row["optimizer"], _RULES[row["rule"]]]
        cells += [f"{100 * accuracy:.1f}" for accuracy in row["accuracy"]]
        cells += [f"{row['loss'][-1]:.4f}", "" if row["apart"] is None else f"{row['apart']:.1e}"]
        cells += [f"{row['wall_s']:.0f}", f"{statistics.median(row['rounds_s'][1:] or row['rounds_s']):.1f}"]
        cells += [f"{row['sent_bytes'] / 1e6:.1f}", f"{row['server_bytes'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    by_round, by_time = figure.subplots(1, 2, sharey=True)
    for row in rows:
        name = f"{row['who']}, {row['optimizer']}" + (", products" if row["rule"] == "default" else "")
        style = {
            "marker": "o",
            "linestyle": "-" if row["who"] == "ours" else "--",
            "label": name,
            "alpha": 0.7,
        }
        percent = [100 * accuracy for accuracy in row["accuracy"]]
        start = row["wall_s"] - sum(row["rounds_s"])
        times = [start + sum(row["rounds_s"][:round]) for round in range(len(percent))]
        by_round.plot(range(len(percent)), percent, **style)
        by_time.plot(times, percent, **style)
    by_round.set(xlabel="round", ylabel="accuracy, %")
    by_time.set(xlabel="seconds since the start")
    figure.legend(
        *by_round.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8
    )
    return figure
