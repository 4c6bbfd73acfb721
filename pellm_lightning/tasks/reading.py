"""Reader of JSON, CSV and TSV files, with the line of each row."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellm_lightning.tasks.delimited import delimited_rows


@dataclass(frozen=True)
class FileRow:
    """A row of a file by its columns; ``where`` is ``file:line``, of the line on which the row begins."""

    where: str
    fields: Mapping[str, Any]


def read_text(path: Path) -> str:
    """Read a file of UTF-8 text, with or without a byte order mark; line endings stay as they are.

    Raises:
        ValueError: Names the file, and the line of the first byte that is not UTF-8 text.
    """
    content = path.read_bytes()
    for mark, encoding in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{path}:1: the file is {encoding}, by its first bytes. {_convert(encoding)}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A byte order mark is not part of what the error counts in.
        bad = error.object[error.start]
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}: is not UTF-8 text: byte 0x{bad:02x} ({error.reason}). Its encoding is not"
            f" guessed. {_convert('CP1252')} CP1252 is what Windows often writes; name the file's own."
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{path}:{1 + text.count(chr(10), 0, text.index(chr(0)))}: holds a NUL character, so it is"
            f" damaged, or UTF-16 without a mark. {_convert('UTF-16LE')} If it is damaged, write it again."
        )
    return text


def read_file(path: Path, suffixes: Sequence[str], columns: Sequence[str] = ()) -> list[FileRow]:
    """Read the rows of a ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file.

    Args:
        path: The file.
        suffixes: The suffixes that the caller can use, ``.txt`` perhaps among them.
        columns: Columns that a table has to have, by which its delimiter is recognised.

    Raises:
        ValueError: Names the file, the line, and what to do.
    """
    check_suffix(path, suffixes)
    text = read_text(path)
    rows: Iterable[tuple[int, Mapping[str, Any]]]
    if path.suffix == ".jsonl":
        rows = _json_lines(text, path)
    elif path.suffix == ".json":
        rows = _json_document(text, path)
    else:
        rows = delimited_rows(text, path, columns)
    found = [FileRow(f"{path}:{line}", fields) for line, fields in rows]
    if not found:
        what = "has no rows" if text.strip() else "is empty"
        raise ValueError(f"{path}:1: the file {what}. Write it again, or take it out of the pattern.")
    return found


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """Validate a file's suffix.

    Raises:
        ValueError: Names the file and the suffixes that can be read.
    """
    if path.suffix not in suffixes:
        raise ValueError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}. Use"
            f" {', '.join(suffixes[:-1])} or {suffixes[-1]}."
        )


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _fields_of(_parsed_line(line, number, text, path), f"{path}:{number}")


def _parsed_line(line: str, number: int, text: str, path: Path) -> Any:
    where = f"{path}:{number}"
    try:
        # strict=False takes a tab within a string as it stands: on one line it has only one meaning.
        return json.loads(line, strict=False, object_pairs_hook=_pairs_at(where))
    except json.JSONDecodeError as error:
        cure = "Correct the line; JSONL holds one whole object on each line."
        if _is_json(text):
            cure = f"The file is one JSON document over several lines: rename it to {path.stem}.json."
        raise ValueError(f"{where}: is not JSON: {error.msg} (column {error.colno}). {cure}") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _json_document(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the objects of a list, or objects one after the other, as some programs write into ``.json``."""
    position, line, counted = _skip_blanks(text, 0), 1, 0
    in_list = text.startswith("[", position)
    position = _skip_blanks(text, position + 1) if in_list else position
    while position < len(text) and not (in_list and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, end = json.JSONDecoder(object_pairs_hook=_pairs_at(where)).raw_decode(text, position)
            yield line, _fields_of(value, where)
            position = _skip_blanks(text, end)
            if in_list:
                position = _next_in_list(text, position)
        except json.JSONDecodeError as error:
            raise _broken(path, error) from error
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


def _fields_of(value: Any, where: str) -> Mapping[str, Any]:
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


_OTHER_MARKS = {
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def _convert(encoding: str) -> str:
    return f"Convert it to UTF-8: iconv -f {encoding} -t UTF-8 OLD > NEW."
