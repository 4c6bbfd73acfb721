"""Model cards: what an adapter is, and the federation that trained it."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from pellm_lightning.report.formatting import schedule
from pellm_lightning.report.record import versions

FILE_NAME = "README.md"


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
        summary: ``asdict`` of a ``RunSummary``; empty if nothing is known.
        base: Name of the base model.
        merged: Whether the folder holds a whole model and no adapter.
        title: Of the card. Default: the name of the folder.
        contents: Sentences about what the folder holds.
    """
    environment = Environment(
        loader=PackageLoader("pellm_lightning", "report"),
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "schedule": schedule}
    counts = sorted(summary.get("trained", {}).items(), key=lambda item: -int(item[0]))
    text = environment.get_template("card.md").render(
        run=summary,
        trained=", ".join(f"{parties} in {rounds}" for parties, rounds in counts) or "unknown",
        base=base,
        base_yaml=json.dumps(base),  # a string of JSON is one of YAML
        merged=merged,
        title=title or folder.resolve().name,
        contents=contents,
        versions=versions(),
        today=date.today(),
    )
    (folder / FILE_NAME).write_text(text, encoding="utf-8")


def _code(value: Any) -> str:
    """Return a value as code in a table, whatever characters it holds."""
    text = str(value).replace("`", "'").replace("|", "/").replace("\n", " ")
    return f"`{text}`"
