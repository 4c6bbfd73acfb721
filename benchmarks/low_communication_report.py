"""What came out of `low_communication.py`: a table in Markdown and a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

REFERENCE = "gradients at every step"


def report(rows: Sequence[dict[str, Any]], image: Path) -> None:
    """Print the table, and draw the curves; each row is one run."""
    of_variants: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_variants.setdefault(row["variant"], []).append(row)
    print(table(of_variants))
    image.parent.mkdir(parents=True, exist_ok=True)
    draw(of_variants).savefig(image, dpi=100)


def table(of_variants: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| variant | H | runs | rounds | MB per party | fewer bytes | validation loss | against every step"
        " | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    references = {row["seed"]: row for row in of_variants.get(REFERENCE, [])}
    for name, rows in of_variants.items():
        pairs = [(row, references[row["seed"]]) for row in rows if row["seed"] in references]
        more = [100 * (row["loss"] / reference["loss"] - 1) for row, reference in pairs]
        fewer = [reference["bytes"] / row["bytes"] for row, reference in pairs]
        cells = [
            name,
            str(rows[0]["every_n_steps"] or "every step"),
            str(len(rows)),
            str(rows[0]["rounds"]),
            f"{mean(rows, 'bytes') / 1e6:,.2f}",
            f"{statistics.mean(fewer):,.0f}x" if fewer else "",
            f"{mean(rows, 'loss'):.4f}",
            f"{statistics.mean(more):+.1f} %" if more else "",
            f"{mean(rows, 'seconds'):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def draw(of_variants: dict[str, list[dict[str, Any]]]) -> Figure:
    """Plot the final loss against the bytes, and the loss of the first seed against the steps."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    by_bytes, by_steps = figure.subplots(1, 2)
    for number, (name, rows) in enumerate(of_variants.items()):
        look = {"color": f"C{number % 10}", "marker": "osD^v"[number // 10 + number % 2 * 2], "label": name}
        by_bytes.plot([row["bytes"] for row in rows], [row["loss"] for row in rows], linestyle="", **look)
        points = rows[0]["curve"]
        by_steps.plot([p[0] for p in points], [p[2] for p in points], markersize=3, linewidth=1, **look)
    if REFERENCE in of_variants:
        loss = mean(of_variants[REFERENCE], "loss")
        by_bytes.axhspan(loss, 1.02 * loss, color="0.9", zorder=0)
        by_bytes.text(
            0.98, 1.02 * loss, "+2 %", ha="right", va="bottom", transform=by_bytes.get_yaxis_transform()
        )
    by_bytes.set_xscale("log")
    by_bytes.set_xlabel("bytes that a party sends")
    by_bytes.set_ylabel("validation loss at the end, nats per token")
    by_steps.set_xlabel("local steps")
    by_steps.set_ylabel("validation loss after the last round, fewer texts")
    by_steps.legend(fontsize="x-small")
    return figure
