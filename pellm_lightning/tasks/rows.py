"""Labelled texts read from files."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellm_lightning.tasks.columns import UnusedColumns, find_column, has_content, shown, string_of
from pellm_lightning.tasks.reading import FileRow, read_file

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
Label = str | bool | int | float


@dataclass(frozen=True)
class Row:
    """Row of a text, its label and, if requested, its natural key.

    Args:
        text: The text.
        label: The label, as `label_name` writes it.
        key: The natural key.
        where: File and line.
    """

    text: str
    label: str
    key: str = ""
    where: str = field(default="", compare=False)


def read_rows(
    path: Path,
    text_column: str,
    label_column: str,
    key_column: str | None = None,
    ignore_columns: Collection[str] = (),
) -> list[Row]:
    """Read labelled texts from a ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file.

    A further column that holds content is an error, unless it is ignored.

    Raises:
        ValueError: Names the file, the line, and what to do.
    """
    wanted = [name for name in (text_column, label_column, key_column) if name]
    unused = UnusedColumns(ignore_columns)
    rows = []
    for row in read_file(path, SUFFIXES, wanted):
        columns = {name: _column(row, name) for name in wanted}
        unused.add(row.fields, list(columns.values()), row.where)
        text = string_of(row.fields, columns[text_column], row.where)
        label = _scalar(row, columns[label_column])
        key = str(_scalar(row, columns[key_column])) if key_column else ""
        rows.append(Row(text, label_name(label), key, row.where))
    unused.check(f"Used are {wanted}.")
    return rows


def _column(row: FileRow, name: str) -> str:
    column = find_column(row.fields, name, row.where)
    if column is None or row.fields[column] is None:
        raise ValueError(
            f"{row.where}: has nothing under {[name]}; it has {list(row.fields)}. Name the columns by"
            " text_column, label_column and key_column, or fill the row."
        )
    return column


def _scalar(row: FileRow, column: str) -> Label:
    value = row.fields[column]
    if not has_content(value) or not isinstance(value, str | bool | int | float):
        what = f"holds {shown(value)}, no single value" if has_content(value) else "is empty"
        raise ValueError(f"{row.where}: {column!r} {what}. Fill it in, or take the row out of the file.")
    return value


def label_name(label: Label) -> str:
    """Return the canonical name of a label, as files or YAML may write it differently.

    ``1``, ``1.0`` and ``"1.0"`` are one label, as pandas and JSON write the same number, and so are ``True``,
    ``true`` and ``"TRUE"``; blanks around a name do not count.
    """
    if isinstance(label, bool):
        return str(label).lower()
    name = str(label).strip()
    if name.lower() in ("true", "false"):
        return name.lower()
    try:
        number = float(name)
    except ValueError:
        return name
    return str(int(number)) if math.isfinite(number) and number.is_integer() and abs(number) < 2**53 else name


def label_names(labels: object) -> list[str]:
    """Validate the argument ``labels`` and return the names.

    Raises:
        ValueError: If it is no list of labels, or two of them are one.
    """
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise ValueError(f"labels={labels!r} must be a list of labels, in the order of their indices.")
    for label in labels:
        if not isinstance(label, str | bool | int | float) or not has_content(label):
            raise ValueError(f"labels={labels!r} holds {label!r}: each label must be a text or a number.")
    names = [label_name(label) for label in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"labels={labels!r} names {twice} more than once (1, 1.0 and '1' are one label). Name each once."
        )
    return names


def index_labels(rows: Sequence[Row], names: Sequence[str], party: int) -> list[int]:
    """Return the index of each row's label.

    Raises:
        ValueError: Names the labels that are not listed, and where they are.
    """
    index: dict[str, int] = {name: number for number, name in enumerate(names)}
    unknown: dict[str, Any] = {}
    for row in rows:
        if row.label not in index:
            unknown.setdefault(row.label, row.where)
    if unknown:
        places = ", ".join(f"{label!r} at {where}" for label, where in sorted(unknown.items())[:5])
        raise ValueError(
            f"Party {party} has the labels {sorted(unknown)}, which are not among {list(names)} (first:"
            f" {places}). Add them to labels, at every party, or correct the rows. In YAML quote labels"
            " such as 'no' and 'on'."
        )
    return [index[row.label] for row in rows]
