"""Records read from files: documents, or prompts with responses."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pellm_lightning.tasks.columns import UnusedColumns, has_content, is_ignored, shown, string_of
from pellm_lightning.tasks.reading import FileRow, check_suffix, read_file, read_text
from pellm_lightning.tasks.source import hold_out

SUFFIXES = (".txt", ".jsonl", ".json")

COLUMNS = {
    "text": ("text",),
    "system": ("system",),
    "instruction": ("instruction",),
    "context": ("context", "input"),
    "response": ("response", "output"),
}
"""Column names of each part: Dolly has context and response, Alpaca input and output."""

KNOWN = (
    "Used are 'text'; or 'instruction', its 'context' (or 'input'), 'system', and 'response' (or 'output')."
)


@dataclass(frozen=True)
class Record:
    """Record of a document, or of a prompt with its response, the text.

    Args:
        text: The text, or the response.
        prompt: The prompt of a response; None for a document.
        system: System message of a chat.
        where: File and line.
    """

    text: str
    prompt: str | None = None
    system: str = ""
    where: str = field(default="", compare=False)

    @property
    def is_blank(self) -> bool:
        """Whether text or prompt is blank."""
        return not self.text.strip() or self.has_blank_prompt

    @property
    def has_blank_prompt(self) -> bool:
        """Whether the prompt, or the document, is blank."""
        return not (self.text if self.prompt is None else self.prompt).strip()


def read_records(path: Path, ignore_columns: Collection[str] = (), responses: bool = True) -> list[Record]:
    """Read a ``.txt`` file as one record, other files as a record for each row.

    A row is a text, or a prompt and its response. The parts of a prompt, the instruction and its context, are
    joined by a blank line. A column that holds content and is none of these is an error, unless it is
    ignored.

    Args:
        path: The file.
        ignore_columns: Columns to leave out.
        responses: Whether a prompt must have its response.

    Raises:
        ValueError: Names the file, the line, and what to do.
    """
    check_suffix(path, SUFFIXES)
    if path.suffix == ".txt":
        content = read_text(path)
        return [Record(content, where=f"{path}:1")] if content.strip() else []
    unused = UnusedColumns(ignore_columns)
    records = [_record(row, ignore_columns, responses, unused) for row in read_file(path, SUFFIXES)]
    unused.check(KNOWN)
    return records


def _record(row: FileRow, ignored: Collection[str], responses: bool, unused: UnusedColumns) -> Record:
    parts = _parts(row, ignored)
    filled = {part for part, column in parts.items() if has_content(row.fields[column])}
    is_exchange = bool({"instruction", "context"} & parts.keys() and ("response" in parts or not responses))
    # Tables have every column in every row: one whose other columns are blank is a text.
    if is_exchange and not filled & set(_EXCHANGE) and "text" in filled:
        is_exchange = False
    if not is_exchange and "text" not in parts:
        raise _unknown(row)
    parts_used = (*_EXCHANGE, "system") if is_exchange else ("text",)
    used = {part: column for part, column in parts.items() if part in parts_used}
    unused.add(row.fields, list(used.values()), row.where)
    texts = {part: _text(row, part, column, responses) for part, column in used.items()}
    if not is_exchange:
        return Record(texts["text"], where=row.where)
    prompt = [texts[part] for part in ("instruction", "context") if texts.get(part)]
    return Record(texts.get("response", ""), "\n\n".join(prompt), texts.get("system", ""), row.where)


_EXCHANGE = ("instruction", "context", "response")


def _text(row: FileRow, part: str, column: str, responses: bool) -> str:
    """Return a part's text; a missing context or system message is empty."""
    may_be_missing = part in ("system", "context") or (part == "response" and not responses)
    if may_be_missing and not has_content(row.fields[column]):
        return ""
    return string_of(row.fields, column, row.where)


def _parts(row: FileRow, ignored: Collection[str]) -> dict[str, str]:
    """Map the parts of a row to its columns."""
    parts = {}
    for part, names in COLUMNS.items():
        columns = [c for c in row.fields if c.strip().casefold() in names and not is_ignored(c, ignored)]
        filled = [column for column in columns if has_content(row.fields[column])]
        if len(filled) > 1:
            raise ValueError(
                f"{row.where}: {filled} each hold a {part}. Join them in one column, or leave one out by"
                f" ignore_columns: [{filled[-1]}]."
            )
        if columns:
            parts[part] = (filled or columns)[0]
    return parts


def _unknown(row: FileRow) -> ValueError:
    chats = [name for name, value in row.fields.items() if isinstance(value, list) and has_content(value)]
    cure = "Rename its columns so."
    if chats:
        cure = (
            f"{chats[0]!r} holds a list, {shown(row.fields[chats[0]])}: conversations are not read. Write"
            " each exchange as a row of its own, with 'instruction' and 'response'."
        )
    return ValueError(
        f"{row.where}: expected strings under 'text', or under 'instruction' and 'response'; found the keys"
        f" {sorted(row.fields)}. {KNOWN} {cure}"
    )


def split_records(
    records: Sequence[Record], fraction: float, seed: int, source: str = "the data"
) -> tuple[list[Record], list[Record]]:
    """Split records into training and validation records by ``seed``; a single text is split at its end.

    Splitting between records keeps documents out of their own evaluation. At least one is kept.

    Raises:
        ValueError: If there is a single record with a prompt, which cannot be divided; names ``source``.
    """
    if len(records) == 1 and records[0].prompt is None:
        text, where = records[0].text, records[0].where
        cut = round(len(text) * (1 - fraction))
        return [Record(text[:cut], where=where)], [Record(text[cut:], where=where)]
    held_out = hold_out(len(records), fraction, seed, source)
    kept = [record for index, record in enumerate(records) if index not in held_out]
    return kept, [records[index] for index in sorted(held_out)]
