"""Strict readers of text, JSON and table files: each row with the line on which it begins.

``datasets`` reads these files by pandas and pyarrow, which drop or change rows silently: "NA" becomes
null, "007" the number 7, a timestamp a date, an unclosed quotation mark swallows lines, a duplicate key wins.
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from pellm_lightning.tasks.columns import same_column
from pellm_lightning.tasks.signatures import LONGEST, convert, describe_binary, describe_text

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

Row = Mapping[str, Any]
Fields = list[str]
Lines = list[tuple[int, Fields]]
"""Fields of each row, with the number of the line on which it begins."""


def suffix_of(path: Path) -> str:
    """Return a file's suffix in small letters, without that of its compression."""
    return Path(path.stem if is_compressed(path) else path).suffix.lower()


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, by its name."""
    return path.suffix.lower() in _COMPRESSED


@contextlib.contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """Raise a ValueError that names the file if it cannot be decompressed."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; those of codecs have none
            raise
        raise ValueError(f"{path}: is no whole compressed file ({error}). Write or copy it again.") from error


def opened(path: Path) -> BinaryIO:
    """Open a file to read its bytes, decompressed."""
    return cast(BinaryIO, _COMPRESSED.get(path.suffix.lower(), open)(path, "rb"))


def read_rows(path: Path, columns: Collection[str] = ()) -> Iterator[tuple[str, Row]]:
    """Read a file: ``.txt`` is one row with the column ``text``; the others have a row per object or line.

    ``.jsonl``, ``.csv`` and ``.txt`` are read as far as they are asked for.

    Args:
        path: The file, perhaps compressed (``.gz``, ``.bz2``, ``.xz``).
        columns: Names that the header of a table may have, by which the delimiter is recognised.

    Yields:
        ``file:line``, and the row by its columns.

    Raises:
        ValueError: Names the file, the line, and what to do.
    """
    suffix, empty = suffix_of(path), True
    for line, row in _rows(path, suffix, columns):
        empty = False
        yield f"{path}:{line}", row
    if empty:
        what = "has no rows" if any(line.strip() for line in _lines(path)) else "is empty"
        raise ValueError(f"{path}:1: the file {what}. Write it again, or take it out of the pattern.")


def _rows(path: Path, suffix: str, columns: Collection[str]) -> Iterable[tuple[int, Row]]:
    if suffix == ".jsonl":
        return _json_lines(path)
    if suffix == ".csv":
        return _table(_comma_lines(path, columns), path)
    text = "".join(_lines(path))
    if suffix == ".json":
        return _json_document(text, path)
    return _table(_tab_lines(text, path), path) if suffix == ".tsv" else [(1, {"text": text})]


# ---- bytes to lines


def _lines(path: Path, newline: str = "") -> Iterator[str]:
    r"""Yield the lines of a file of UTF-8 text, with or without a byte order mark, with their endings.

    Args:
        path: The file.
        newline: "" ends lines as any system does, "\n" at a line feed only.
    """
    try:
        with unpacking(path), _opened(path) as file:
            lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
            for number, line in enumerate(lines, start=1):
                if "\0" in line:
                    raise _binary(path) or ValueError(
                        f"{path}:{number}: holds a NUL character, so it is damaged, or UTF-16 without a mark."
                        f" {convert('UTF-16LE')} If it is damaged, write it again."
                    )
                yield line
    except UnicodeDecodeError as error:
        raise _binary(path) or _undecodable(path) from error


def _opened(path: Path) -> BinaryIO:
    file = opened(path)
    if problem := describe_text(file.read(LONGEST)):
        file.close()
        raise ValueError(f"{path}:1: {problem}")
    file.seek(0)
    return file


def _binary(path: Path) -> ValueError | None:
    """Return the error of a file that is something else than text; None if that is not known."""
    with _opened(path) as file:
        problem = describe_binary(file.read(LONGEST))
    return ValueError(f"{path}:1: {problem}") if problem else None


def _undecodable(path: Path) -> ValueError:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                return ValueError(
                    f"{path}:{number}: is not UTF-8 text: byte 0x{error.object[error.start]:02x}"
                    f" ({error.reason}). Its encoding is not guessed. {convert('CP1252')} CP1252 is what"
                    " Windows often writes; name the file's own."
                )
    return ValueError(f"{path}: is not UTF-8 text.")


# ---- JSON


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    # Lines end at line feeds only: JSON strings may hold U+2028 and others that end lines elsewhere.
    for number, line in enumerate(_lines(path, "\n"), start=1):
        if line.strip():
            value = _parsed_line(line, number, path)
            if isinstance(value, list) and value and isinstance(value[0], dict):
                raise ValueError(f"{path}:{number}: is a list of objects, {_one_document(path)}")
            yield number, _fields(value, f"{path}:{number}")


def _parsed_line(line: str, number: int, path: Path) -> Any:
    where = f"{path}:{number}"
    try:
        # strict=False takes a tab within a string as it stands: on one line it has only one meaning.
        return json.loads(line, strict=False, object_pairs_hook=_pairs_at(where))
    except json.JSONDecodeError as error:
        cure = "Correct the line; JSONL holds one whole object on each line."
        if _is_json("".join(_lines(path))):
            cure = f"The file is one JSON document over several lines, {_one_document(path)}"
        raise ValueError(f"{where}: is not JSON: {error.msg} (column {error.colno}). {cure}") from error
    except (ValueError, RecursionError) as error:
        raise _beyond_reading(where, error) from None


def _one_document(path: Path) -> str:
    return f"which .json files hold: rename it to {path.name.replace('.jsonl', '.json', 1)}."


def _beyond_reading(where: str, error: Exception) -> Exception:
    """Return the error of a number with too many digits, or of too deep a nesting; else the same error."""
    if str(error).startswith(where):
        return error
    return ValueError(f"{where}: holds what cannot be read ({error}). Correct it, or take the row out.")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _json_document(text: str, path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the objects of a list, or objects one after the other, as some programs write into ``.json``."""
    position, line, counted = _skip_blanks(text, 0), 1, 0
    in_list = text.startswith("[", position)
    position = _skip_blanks(text, position + 1) if in_list else position
    while position < len(text) and not (in_list and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, end = json.JSONDecoder(object_pairs_hook=_pairs_at(where)).raw_decode(text, position)
            yield line, _fields(value, where)
            position = _skip_blanks(text, end)
            if in_list:
                position = _next_in_list(text, position)
        except json.JSONDecodeError as error:
            raise _broken(path, error) from error
        except (ValueError, RecursionError) as error:
            raise _beyond_reading(where, error) from None
    if in_list and _skip_blanks(text, position + 1) != len(text):
        end = _skip_blanks(text, position + 1) if position < len(text) else position
        raise _broken(
            path, json.JSONDecodeError("The list is not closed, or something follows it", text, end)
        )


def _next_in_list(text: str, position: int) -> int:
    """Return where the next element or the end of the list is."""
    if text.startswith("]", position):
        return position
    if not text.startswith(",", position):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    following = _skip_blanks(text, position + 1)
    if text.startswith("]", following):
        raise json.JSONDecodeError("Expecting value", text, following)
    return following


def _broken(path: Path, error: json.JSONDecodeError) -> ValueError:
    return ValueError(
        f"{path}:{error.lineno}: is not JSON: {error.msg} (column {error.colno}). Correct the file; it should"
        " be a list of objects, [{...}, {...}]."
    )


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _fields(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(
            f'{where}: expected an object, found {type(value).__name__}. Write rows as {{"column": value}}.'
        )
    return value


def _pairs_at(where: str) -> Any:
    """Raise on duplicate keys of an object, of which json would keep the last."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) < len(found):
            keys = [key for key, _ in found]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise ValueError(f"{where}: has {twice} twice in one object. Give each value a key of its own.")
        return made

    return pairs


# ---- tables


def _table(lines: Iterable[tuple[int, Fields]], path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows below the header."""
    rows = iter(lines)
    start, header = next(rows, (1, []))
    names = _names(header, f"{path}:{start}")
    for line, fields in rows:
        yield line, _row(names, fields, f"{path}:{line}")


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


def _row(names: Fields, fields: Fields, where: str) -> Row:
    if len(fields) < len(names) or any(field.strip() for field in fields[len(names) :]):
        raise ValueError(
            f"{where}: the row has {len(fields)} fields, the header {len(names)} names ({', '.join(names)})."
            " Quote a field that holds the delimiter, and fill in what is missing."
        )
    return dict(zip(names, fields, strict=False))


def _comma_lines(path: Path, columns: Collection[str]) -> Iterator[tuple[int, Fields]]:
    """Parse quoted fields as RFC 4180 says, with a comma, a semicolon, a tab or a bar between them."""
    lines = ((number, line) for number, line in enumerate(_lines(path)) if line.strip())
    first, header = next(lines, (0, ""))
    stated = _STATED.fullmatch(header.strip())
    if stated:
        return _quoted(islice(_lines(path), first + 1, None), path, stated[1], before=first + 1)

    def known(delimiter: str) -> int:
        names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
        return sum(any(same_column(name, column) for column in columns) for name in names)

    delimiter = max(",;\t|", key=known)  # of equals the first
    names = next(_quoted(_lines(path), path, delimiter), (0, []))[1]
    # "text, label": blanks that belong to the delimiter throughout, as the header shows.
    blanks = len(names) > 1 and all(name.startswith(" ") for name in names[1:])
    return _quoted(_lines(path), path, delimiter, blanks)


_STATED = re.compile(r"sep=(.)")
"""First line by which a spreadsheet states the delimiter."""


def _quoted(
    lines: Iterable[str], path: Path, delimiter: str, skip_blanks: bool = False, before: int = 0
) -> Iterator[tuple[int, Fields]]:
    # A field can be as long as the file; the limit is of the process, and raising it harms nobody.
    csv.field_size_limit(2**31 - 1)
    # strict: otherwise text after a closing mark joins the field, and an open field swallows the rest.
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=skip_blanks, strict=True)
    start = before + 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield start, fields
            start = before + reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f'{path}:{start}: a quotation mark (") that begins a field in this row is not closed before line'
            f" {before + reader.line_num} ends, or something follows where it closes ({error}). Close the"
            ' field; write a mark within a quoted field twice ("").'
        ) from error


def _tab_lines(text: str, path: Path) -> Lines:
    """Split lines at tabs; marks are text, unless the file evidently has quoted fields."""
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
        quoted = _parsed_tabs(text, path)
        return plain if quoted is None else quoted
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


def _parsed_tabs(text: str, path: Path) -> Lines | None:
    """Parse quoted fields; None unless that gives every row as many fields as the header."""
    try:
        rows = list(_quoted(io.StringIO(text, newline=""), path, "\t"))
    except ValueError:
        return None
    return rows if len({len(fields) for _, fields in rows}) == 1 else None


_QUOTED = re.compile(r'"(?:[^"]|"")*"')
