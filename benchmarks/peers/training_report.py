"""What came out of `training.py`: a table in Markdown and a picture."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure
from round_times_report import machine

Rows = Sequence[dict[str, Any]]
_RULES = {
    "mean": "mean of A and of B",
    "reset": "mean of A and of B, optimizers reset",
    "default": "mean of the products",
}


def report(rows: Rows, image: Path | None) -> None:
    """Print the table, and draw it if asked; each row is one run."""
    seeds = len({row["seed"] for row in rows})
    print(f"\n{machine()}. Accuracy on the held-out paragraphs, in percent; means over {seeds} seed(s).\n")
    print(table(rows))
    if image:
        image.parent.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(image, dpi=100)


def alike(rows: Rows) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Return the runs that differ in their seeds only, by who, optimizer and rule."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["who"], row["optimizer"], row["rule"]), []).append(row)
    return found


def table(rows: Rows) -> str:
    rounds = range(len(rows[0]["accuracy"]))
    head = " | ".join(f"round {round}" for round in rounds)
    lines = [
        f"| | optimizer | LoRA | {head} | last: lowest, highest | last loss | apart from reset | s, in all |"
        " s a round | MB sent by a party | MB through the server |",
        f"|---|---|---|{'---:|' * (len(rounds) + 7)}",
    ]
    for (who, optimizer, rule), runs in alike(rows).items():
        last = [100 * run["accuracy"][-1] for run in runs]
        apart = [run["apart"] for run in runs if run["apart"] is not None]
        a_round = [seconds for run in runs for seconds in run["rounds_s"][1:] or run["rounds_s"]]
        cells = [who, optimizer, _RULES[rule]]
        cells += [f"{percent:.1f}" for percent in percents(runs)]
        cells += [f"{min(last):.1f}, {max(last):.1f}", f"{mean(run['loss'][-1] for run in runs):.4f}"]
        cells += [f"{mean(apart):.1e}" if apart else ""]
        cells += [f"{mean(run['wall_s'] for run in runs):.0f}", f"{median(a_round):.1f}"]
        cells += [f"{mean(run[name] for run in runs) / 1e6:.1f}" for name in ("sent_bytes", "server_bytes")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percents(runs: Rows) -> list[float]:
    """Return the accuracy after each round in percent, the mean over the runs."""
    return [100 * mean(of_round) for of_round in zip(*(run["accuracy"] for run in runs), strict=True)]


def draw(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    by_round, by_time = figure.subplots(1, 2, sharey=True)
    for number, ((who, optimizer, rule), runs) in enumerate(alike(rows).items()):
        style = {"color": f"C{number}", "linestyle": "-" if who == "ours" else "--"}
        name = f"{who}, {optimizer}" + {"default": ", products", "reset": ", reset"}.get(rule, "")
        for run in runs:  # faint, below their mean
            by_round.plot([100 * accuracy for accuracy in run["accuracy"]], alpha=0.25, linewidth=1, **style)
        by_round.plot(percents(runs), marker="o", label=name, **style)
        seconds = [mean(of_round) for of_round in zip(*(run["rounds_s"] for run in runs), strict=True)]
        start = mean(run["wall_s"] for run in runs) - sum(seconds)
        by_time.plot(list(accumulate(seconds, initial=start)), percents(runs), marker="o", **style)
    by_round.set(xlabel="round", ylabel="accuracy, %")
    by_time.set(xlabel="seconds since the start")
    figure.legend(
        *by_round.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8
    )
    return figure
