"""Model cards: what an adapter is, and which federation has made it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pellm_lightning.report.record import versions
from pellm_lightning.report.words import schedule

NAME = "README.md"


def write_card(
    folder: Path,
    summary: Mapping[str, Any],
    base: str | None,
    *,
    merged: bool = False,
    title: str | None = None,
    contents: Sequence[str] = (),
) -> None:
    """Write the model card of a folder, in place of the one that PEFT writes.

    Args:
        folder: Of the adapter or model.
        summary: ``asdict`` of an ``RunSummary``; empty if nothing is known.
        base: Name of the base model.
        merged: Whether the folder holds a whole model and no adapter.
        title: Of the card. Default: the name of the folder.
        contents: What there is to say of what lies in the folder.
    """
    tags = ["federated-learning", "pellm-lightning", *([] if merged else ["lora"])]
    front = [f"library_name: {'transformers' if merged else 'peft'}", "tags:", *(f"- {tag}" for tag in tags)]
    if base:
        front.append(f"base_model: {json.dumps(base)}")  # a string of JSON is one of YAML
    text = "\n".join(
        [
            "---",
            *front,
            "---\n",
            f"# {title or folder.resolve().name}\n",
            *_body(summary, base, merged, contents),
            "",
        ]
    )
    (folder / NAME).write_text(text, encoding="utf-8")


def _body(
    summary: Mapping[str, Any], base: str | None, merged: bool, contents: Sequence[str]
) -> Iterator[str]:
    what = "A model with a merged adapter" if merged else "An adapter"
    yield (
        f"{what} for `{base or 'an unknown base model'}`, trained by several parties together without sharing"
        " their data (federated learning) with pellm_lightning.\n"
    )
    if summary.get("writes_base") and not merged:
        yield (
            "Its training has changed the weights beside the adapter, too: load it onto the model in `base/`,"
            f" and not onto `{base}`.\n"
        )
    if contents:
        yield " ".join(contents) + "\n"
    yield "## The federation\n"
    if not summary:
        yield "The checkpoint does not tell anything about it.\n"
        return
    settings = summary["settings"]
    rows = {
        "rounds": summary["rounds"],
        "parties that trained in a round": _trained(summary),
        "rounds that moved nothing, for lack of a quorum": summary["short_rounds"],
        "aggregation": settings.get("aggregation"),
        "outer optimizer": settings.get("outer_optimizer"),
        "a round every": schedule(settings),
        "weighting": settings.get("weighting"),
        "exchange": settings.get("exchange"),
        "privacy": settings.get("privacy") if summary["epsilon"] is not None else "none",
    }
    if summary["epsilon"] is not None:
        rows["epsilon, over all rounds"] = f"{summary['epsilon']:.4g}"
    if settings.get("drift correction"):
        rows["drift correction"] = settings["drift correction"]
    yield from _table(["", ""], [[name, _code(value)] for name, value in rows.items()])
    yield "## The parties\n"
    by_samples = settings.get("weighting") == "samples"
    nothing = [0] * len(summary["parties"])
    took_part = summary["took_part"] or nothing
    weights = [None for _ in nothing] if summary["weights"] is None else summary["weights"] or nothing
    yield from _table(
        ["party", "rounds", "training samples" if by_samples else "sum of its weights"],
        [
            [_code(name), str(rounds), "hidden by the exchange" if weight is None else f"{weight:,.10g}"]
            for name, rounds, weight in zip(summary["parties"], took_part, weights, strict=True)
        ],
    )
    if by_samples:
        yield "Samples are counted as often as they were trained on.\n"
    if (seen := max(took_part)) < summary["rounds"]:
        yield f"The table is of the {seen} rounds that the party which has saved this took part in.\n"
    yield "## Made with\n"
    yield ", ".join(f"{package} {number}" for package, number in versions().items()) + f", {date.today()}.\n"


def _trained(summary: Mapping[str, Any]) -> str:
    """Return how many parties trained in how many rounds."""
    counts = sorted(summary["trained"].items(), key=lambda item: -int(item[0]))
    seen = ", ".join(f"{number} in {rounds}" for number, rounds in counts)
    return f"{seen or 'unknown'}; quorum {summary['settings'].get('quorum', 'unknown')}"


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    lines = [head, ["---"] * len(head), *rows]
    yield "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _code(value: Any) -> str:
    """Return a value as code in a table, whoever has chosen it."""
    text = str(value).replace("`", "'").replace("|", "/").replace("\n", " ")
    return f"`{text}`"
