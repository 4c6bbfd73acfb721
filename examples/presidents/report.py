"""Tell the result: a table in the terminal, JSON, Markdown, and a heatmap."""

import json
import math
from pathlib import Path

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from prepare import ERAS
from rich.console import Console
from rich.table import Table

COLUMNS = [*ERAS, "all"]

Perplexities = dict[str, list[float]]
"""By model: its perplexity on each era, then over all of them, each era counting alike."""


def write(folder: Path, seconds: dict[str, float]) -> None:
    """Print the table, and save ``results.json``, ``results.md`` and ``perplexity.png``."""
    evaluated = json.loads((folder / "evaluated.json").read_text(encoding="utf-8"))
    losses: dict[str, list[float]] = evaluated["metrics"]["test_loss"]
    results = {name: [math.exp(x) for x in (*row, sum(row) / len(row))] for name, row in losses.items()}
    named = {name: dict(zip(COLUMNS, row, strict=True)) for name, row in results.items()}
    numbers = json.dumps({"perplexity": named, "seconds": seconds}, indent=2)
    (folder / "results.json").write_text(numbers, encoding="utf-8")
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    heatmap(results).savefig(folder / "perplexity.png", dpi=150)
    Console().print(table(results))
    print(conclusion(results))


def table(results: Perplexities) -> Table:
    """Lay out the perplexities, the best of each column in bold."""
    view = Table(title="Perplexity on held-out messages (lower is better)")
    view.add_column("trained on")
    for column in COLUMNS:
        view.add_column(column, justify="right")
    best = [min(column) for column in zip(*results.values(), strict=True)]
    for name, row in results.items():
        cells = [
            f"[bold green]{x:.1f}[/]" if x == least else f"{x:.1f}"
            for x, least in zip(row, best, strict=True)
        ]
        view.add_row(name, *cells, end_section=name in ("base", list(results)[-2]))
    return view


def markdown(results: Perplexities) -> str:
    lines = [["trained on", *COLUMNS], ["---", *("---:" for _ in COLUMNS)]]
    lines += [[name, *(f"{value:.1f}" for value in row)] for name, row in results.items()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def heatmap(results: Perplexities) -> Figure:
    """Colour each perplexity by its ratio to the base model's: blue is better, red is worse."""
    base = results["base"]
    ratios = [[value / start for value, start in zip(row, base, strict=True)] for row in results.values()]
    spread = 1.25 * max(0.05, *(abs(ratio - 1) for row in ratios for ratio in row))
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(ratios, cmap="RdBu_r", norm=TwoSlopeNorm(1, 1 - spread, 1 + spread), aspect="auto")
    for y, row in enumerate(results.values()):
        for x, value in enumerate(row):
            change = ratios[y][x] - 1
            note = f"\n{change:+.0%}" if y > 0 else ""
            colour = "white" if abs(change) > 0.5 * spread else "black"
            axes.text(x, y, f"{value:.1f}{note}", ha="center", va="center", color=colour)
    # The rows of the parties alone stand between two lines, the joint column behind one.
    for y in (0.5, len(results) - 1.5):
        axes.axhline(y, color="black", linewidth=1)
    axes.axvline(len(ERAS) - 0.5, color="black", linewidth=1)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS)
    axes.set_yticks(range(len(results)), list(results))
    axes.set_xlabel("held-out messages")
    axes.set_ylabel("trained on")
    axes.set_title("Perplexity, and its change from the base model")
    figure.colorbar(image, label="ratio to the base model", format="%.1f")
    return figure


def conclusion(results: Perplexities) -> str:
    """Say what the numbers say: what federating costs a party at home, and what it brings elsewhere."""
    federated = results["federated"]
    alone = [row for name, row in results.items() if name.endswith("alone")]
    eras = range(len(ERAS))
    home = [federated[era] / alone[era][era] - 1 for era in eras]
    away = [federated[era] / alone[party][era] - 1 for party in eras for era in eras if party != era]
    return (
        "The federated model's perplexity, compared with that of a party alone (minus is better):\n"
        f"  on the party's own era {min(home):+.0%} to {max(home):+.0%},"
        f" on the others' eras {min(away):+.0%} to {max(away):+.0%}.\n"
        f"Over all eras: base {results['base'][-1]:.1f}, best party alone"
        f" {min(row[-1] for row in alone):.1f}, federated {federated[-1]:.1f}."
    )
