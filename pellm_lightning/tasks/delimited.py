"""Parser of CSV and TSV files, strict about quotes and fields."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Fields = list[str]
Lines = list[tuple[int, Fields]]
"""Fields of each row, with the number of the line on which it begins."""


def delimited_rows(text: str, path: Path, columns: Sequence[str] = ()) -> list[tuple[int, Mapping[str, str]]]:
    """Return the rows below the header, each with the line on which it begins.

    The fields of ``.csv`` are quoted as RFC 4180 says, with a comma, a semicolon or a tab between them:
    whichever makes the header hold ``columns``. Those of ``.tsv`` are parted by tabs; quotation marks are
    part of the text, unless the file shows that they quote.

    Raises:
        ValueError: Names the file, the line, and what to do.
    """
    # A field can be as long as the file; the limit is of the process, and raising it harms nobody.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    lines = _tab_lines(text, path) if path.suffix == ".tsv" else _comma_lines(text, path, columns)
    if not lines:
        return []
    (start, header), *rows = lines
    names = _names(header, f"{path}:{start}")
    return [(line, _row(names, fields, f"{path}:{line}")) for line, fields in rows]


def same_column(name: str, other: str) -> bool:
    """Return whether two column names are equal up to surrounding blanks and case."""
    return name.strip().casefold() == other.strip().casefold()


def _names(header: Fields, where: str) -> Fields:
    names = [name.strip() for name in header]
    while names and not names[-1]:  # a delimiter at the end of the line
        names.pop()
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{where}: the header has {twice} more than once, so one column would hide the other. Give each"
            " column a name of its own; the first line must be the header."
        )
    return names


def _row(names: Fields, fields: Fields, where: str) -> Mapping[str, str]:
    if len(fields) < len(names) or any(field.strip() for field in fields[len(names) :]):
        raise ValueError(
            f"{where}: the row has {len(fields)} fields, the header {len(names)} names ({', '.join(names)})."
            " Quote a field that holds the delimiter, and fill in what is missing."
        )
    return dict(zip(names, fields, strict=False))


# ---- .csv


def _comma_lines(text: str, path: Path, columns: Sequence[str]) -> Lines:
    delimiter = _delimiter(text, columns)
    header = next(_quoted(io.StringIO(text, newline=""), path, delimiter), (0, []))[1]
    # "text, label": blanks that belong to the delimiter throughout, as the header shows.
    blanks = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    return list(_quoted(io.StringIO(text, newline=""), path, delimiter, blanks))


def _delimiter(text: str, columns: Sequence[str]) -> str:
    """Return the delimiter with which the header has the columns; the comma if none does."""
    header = next((line for line in re.split(r"[\r\n]+", text, maxsplit=2) if line.strip()), "")
    for delimiter in ",;\t":
        names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
        if all(any(same_column(name, column) for name in names) for column in columns):
            return delimiter
    return ","


def _quoted(
    stream: io.StringIO, path: Path, delimiter: str, skip_blanks: bool = False
) -> Iterator[tuple[int, Fields]]:
    # strict: otherwise text after a closing mark joins the field, and an open field swallows the rest.
    reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=skip_blanks, strict=True)
    start = 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f'{path}:{start}: a quotation mark (") that begins a field in this row is not closed before line'
            f" {reader.line_num} ends, or something follows where it closes ({error}). Close the field; write"
            ' a mark within a quoted field twice ("").'
        ) from error


# ---- .tsv


def _tab_lines(text: str, path: Path) -> Lines:
    """Split lines at tabs, or parse quoted fields if the file evidently has them."""
    plain = [
        (number, line.removesuffix("\r").split("\t"))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    marked = [(number, field) for number, fields in plain for field in fields if '"' in field]
    if not marked:
        return plain
    if len({len(fields) for _, fields in plain}) > 1:
        # A field that holds a tab or a line's end must be quoted; else some row lacks a field.
        return list(_quoted(io.StringIO(text, newline=""), path, "\t")) if _parses(text, path) else plain
    if not all(_QUOTED.fullmatch(field) for _, field in marked):
        return plain  # whoever writes quoted fields quotes every one that holds a mark
    needless = [number for number, field in marked if '"' not in field[1:-1]]
    everywhere = all(not field or field.startswith('"') for _, fields in plain for field in fields)
    if needless and not everywhere:
        raise ValueError(
            f"{path}:{needless[0]}: a field stands in quotation marks that may quote it or be part of its"
            " text: other fields of the file are not quoted. If they quote, rename the file to .csv (its tabs"
            " are recognised); if they are text, write the file as .jsonl."
        )
    return list(_quoted(io.StringIO(text, newline=""), path, "\t"))


def _parses(text: str, path: Path) -> bool:
    """Return whether parsing quoted fields gives every row as many fields as the header."""
    try:
        return len({len(fields) for _, fields in _quoted(io.StringIO(text, newline=""), path, "\t")}) == 1
    except ValueError:
        return False


_QUOTED = re.compile(r'"(?:[^"]|"")*"')
