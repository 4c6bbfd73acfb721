"""Columns of a row: used, ignored by name, or an error if they have content."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def same_column(name: str, other: str) -> bool:
    """Return whether two column names are equal up to surrounding blanks and case."""
    return name.strip().casefold() == other.strip().casefold()


def ignored_columns(value: object) -> tuple[str, ...]:
    """Validate the argument ``ignore_columns``.

    Raises:
        ValueError: If it is no list of names.
    """
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or any(not isinstance(n, str) for n in value)
    ):
        raise ValueError(f"ignore_columns={value!r} must be a list of columns, for example ['id', 'source'].")
    return tuple(value)


def is_ignored(name: str, ignored: Collection[str]) -> bool:
    """Return whether a column is to be ignored."""
    return any(same_column(name, other) for other in ignored)


def has_content(value: Any) -> bool:
    """Return whether a value has content: null, NaN, blank strings and containers of only these have none."""
    if isinstance(value, Mapping):
        return any(has_content(part) for part in value.values())
    if isinstance(value, list):
        return any(has_content(part) for part in value)
    if isinstance(value, float):
        return not math.isnan(value)
    return bool(value.strip()) if isinstance(value, str) else value is not None


def find_column(fields: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return the column of a name; capitals and blanks around it make no difference unless two columns match.

    Raises:
        ValueError: If several match and none exactly.
    """
    if name in fields:
        return name
    found = [column for column in fields if same_column(column, name)]
    if len(found) > 1:
        raise ValueError(
            f"{where}: {found} may each be the column {name!r}. Name it exactly as it is written."
        )
    return found[0] if found else None


def string_of(fields: Mapping[str, Any], column: str, where: str) -> str:
    """Return a column's text.

    Raises:
        ValueError: If it is null, NaN or no string: what it should be is not guessed.
    """
    value = fields[column]
    if not isinstance(value, str):
        what = "is empty (null or NaN)" if not has_content(value) else f"holds {shown(value)}, no string"
        raise ValueError(f"{where}: {column!r} {what}. Write its text, or take the row out of the file.")
    check_characters(value, column, where)
    return value


def check_characters(value: str, column: str, where: str) -> None:
    """Validate that a text has no characters that tokenizers drop or fail on.

    Raises:
        ValueError: Names the character.
    """
    bad = next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if bad is not None:
        raise ValueError(
            f"{where}: {column!r} holds the character U+{ord(bad):04X}, which is not text. Remove it, or"
            " write the file anew from its source."
        )


def check_used(
    fields: Mapping[str, Any], used: Collection[str], ignored: Collection[str], where: str, known: str
) -> None:
    """Validate that a row has no content in a column that is neither used nor ignored.

    Args:
        fields: The row.
        used: Columns that are used.
        ignored: Columns that may be left out.
        where: File and line.
        known: Says which columns are used.

    Raises:
        ValueError: Names each column with its value.
    """
    unused = [
        name
        for name, value in fields.items()
        if name not in used and not is_ignored(name, ignored) and has_content(value)
    ]
    if unused:
        found = "; ".join(f"{name!r} holds {shown(fields[name])}" for name in unused)
        names = ", ".join(json.dumps(name, ensure_ascii=False) for name in [*ignored, *unused])
        raise ValueError(
            f"{where}: {found}: nothing would see that. {known} If the model need not see it, leave it out by"
            f" ignore_columns: [{names}] (--data.ignore_columns='[{names}]')."
        )


def shown(value: Any) -> str:
    """Return a value, shortened to fit into a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
