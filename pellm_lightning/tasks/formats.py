"""Formats of a row: a document, a prompt with its completion, or a conversation."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pellm_lightning.comm.errors import did_you_mean
from pellm_lightning.tasks.columns import (
    check_characters,
    check_used,
    find_column,
    has_content,
    is_ignored,
    same_column,
    shown,
    string_of,
)
from pellm_lightning.tasks.reading import Row

Format = Literal["auto", "text", "prompt-completion", "messages", "alpaca", "dolly", "sharegpt"]
Message = dict[str, Any]

_EXTRAS = {"system": ("system",), "tools": ("tools",)}
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"text": ("text",)},
    "prompt-completion": {"prompt": ("prompt",), "completion": ("completion",), **_EXTRAS},
    "messages": {"messages": ("messages",), **_EXTRAS},
    "alpaca": {"prompt": ("instruction",), "context": ("input",), "completion": ("output",), **_EXTRAS},
    "dolly": {"prompt": ("instruction",), "context": ("context",), "completion": ("response",), **_EXTRAS},
    "sharegpt": {"messages": ("conversations",), **_EXTRAS},
}
"""Column names of each part, by format."""

FORMATS["auto"] = {
    part: tuple({name: None for parts in FORMATS.values() for name in parts.get(part, ())})
    for part in ("text", "prompt", "context", "completion", "messages", "system", "tools")
}

_OPTIONAL = ("context", "system", "tools")
_ROLES = {
    "human": "user",
    "observation": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
}
_KNOWN_ROLES = ("assistant", "user", "system")


@dataclass(frozen=True)
class Record:
    """Record of a document, or of messages to learn from.

    Args:
        text: The document.
        messages: Messages with ``role`` and ``content``; empty for a document.
        tools: JSON schemas of the functions that the messages may call.
        learned: Index of the first message that may be learned.
        is_chat: Whether the messages need a chat template, unlike one prompt with its completion.
        key: The natural key.
        where: File and line.
    """

    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    learned: int = 0
    is_chat: bool = False
    key: str = ""
    where: str = field(default="", compare=False)

    def is_learned(self, index: int) -> bool:
        """Whether a message is learned: an answer whose ``weight`` is not 0."""
        message = self.messages[index]
        is_answer = index >= self.learned and message["role"] == "assistant"
        return is_answer and message.get("weight") != 0

    @property
    def has_blank_prompt(self) -> bool:
        """Whether there is nothing to continue."""
        prompts = [m["content"] for m in self.messages if m["role"] not in ("assistant", "system")]
        return not any(text.strip() for text in (prompts if self.messages else [self.text]))

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to learn."""
        answers = [m for index, m in enumerate(self.messages) if self.is_learned(index)]
        learns = any(m["content"].strip() or m.get("tool_calls") for m in answers)
        return self.has_blank_prompt or bool(self.messages and not learns)


class RowMapper:
    """Mapper of rows to records, by the names of their columns.

    Args:
        format: Name of a format; "auto" takes each row for what its columns are.
        columns: Column of a part, for example ``{"prompt": "question", "completion": "answer"}``.
        ignored: Columns to ignore.
        key: Column of the natural key.
        answers: Whether a prompt must have its completion.
    """

    def __init__(
        self,
        format: Format = "auto",
        columns: Mapping[str, str] | None = None,
        ignored: Collection[str] = (),
        key: str | None = None,
        answers: bool = True,
    ) -> None:
        name = str(format).replace("_", "-")
        if name not in FORMATS:
            raise ValueError(f"format={format!r} must be one of {', '.join(map(repr, FORMATS))}.")
        self.columns = check_columns(columns, ignored)
        self.parts = {**FORMATS[name], **{part: (column,) for part, column in self.columns.items()}}
        self.ignored, self.key, self.answers = tuple(ignored), key, answers
        names = {part: "/".join(map(repr, columns)) for part, columns in self.parts.items()}
        self.known = "Used are " + ", ".join(f"{n} ({part})" for part, n in names.items()) + "."

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are looked for."""
        wanted = [name for names in self.parts.values() for name in names]
        return (*wanted, *self.ignored, *([self.key] if self.key else []))

    def __call__(self, where: str, row: Row) -> Record:
        """Return a row's record.

        Raises:
            ValueError: If it has no known columns, or content that nothing would see. Names the row.
        """
        self._check_no_preference(where, row)
        found = self._found(where, row)
        filled = {part for part, column in found.items() if has_content(row[column])}
        if "messages" in filled:
            used = {"messages", "system", "tools"}
        elif self._is_exchange(found, filled):
            used = {"prompt", "context", "completion", "system", "tools"}
        elif "text" in found:
            used = {"text"}
        elif "messages" in found:
            used = {"messages", "system", "tools"}
        else:
            raise self._unknown(where, row)
        parts = {p: row[c] for p, c in found.items() if p in used and (p in filled or p not in _OPTIONAL)}
        columns = [column for part, column in found.items() if part in used]
        key = self._key(where, row)
        check_used(row, [*columns, *([key] if key else [])], self.ignored, where, self.known)
        named = _Named(where, found, parts)
        if "text" in used:
            record: dict[str, Any] = {"text": string_of(row, found["text"], where)}
        else:
            record = named.messages() if "messages" in used else named.exchange(self.answers)
        return Record(**record, key=str(row[key]) if key else "", where=where)

    def _is_exchange(self, found: Collection[str], filled: Collection[str]) -> bool:
        if not {"prompt", "context"} & set(found) or ("completion" not in found and self.answers):
            return False
        # Tables have every column in every row: one whose other columns are blank is a text.
        return bool({"prompt", "context", "completion"} & set(filled)) or "text" not in filled

    def _found(self, where: str, row: Row) -> dict[str, str]:
        """Map the parts of a row to its columns."""
        claimed, parts = set(), {}
        for part, name in self.columns.items():
            column = find_column(row, name, where)
            if column is None and part in ("text", "prompt", "messages"):
                raise ValueError(
                    f"{where}: has no column {name!r} (columns: {part}); it has {list(row)}. Correct"
                    " --data.columns, or the file."
                )
            if column is not None:
                parts[part] = column
                claimed.add(column)
        for part, names in self.parts.items():
            if part in self.columns:
                continue
            columns = [
                column
                for column in row
                if column not in claimed
                and any(same_column(column, name) for name in names)
                and not is_ignored(column, self.ignored)
            ]
            full = [column for column in columns if has_content(row[column])]
            if len(full) > 1:
                raise ValueError(
                    f"{where}: {full} each hold a {part}. Join them in one column, or leave one out by"
                    f" ignore_columns: [{full[-1]}]."
                )
            if columns:
                parts[part] = (full or columns)[0]
        return parts

    def _key(self, where: str, row: Row) -> str | None:
        column = find_column(row, self.key, where) if self.key else None
        if self.key and (column is None or not has_content(row[column])):
            raise ValueError(f"{where}: has nothing under the key_column {self.key!r}; it has {list(row)}.")
        return column

    def _check_no_preference(self, where: str, row: Row) -> None:
        names = {name.strip().casefold() for name in row if has_content(row[name])}
        if {"chosen", "rejected"} <= names and not is_ignored("rejected", self.ignored):
            raise ValueError(
                f"{where}: 'chosen' and 'rejected' are a preference pair. Fine-tuning learns one answer and"
                " would never see the other; preferences need another loss (DPO, for example in TRL). To"
                " learn the chosen answers alone, name them by columns: {completion: chosen} (or messages:"
                " chosen) and leave the others out by ignore_columns: [rejected]."
            )
        label = next((row[name] for name in row if same_column(name, "label")), None)
        if isinstance(label, bool) and "completion" in names and not is_ignored("label", self.ignored):
            raise ValueError(
                f"{where}: 'label' says whether the completion is wanted, an unpaired preference. Fine-tuning"
                " would learn the unwanted ones as well; preferences need another loss (KTO, for example in"
                " TRL). To learn from the wanted ones, take the other rows out, and ignore_columns: [label]."
            )

    def _unknown(self, where: str, row: Row) -> ValueError:
        nested = next((name for name, value in row.items() if _is_table(value)), None)
        remedy = "Name others by --data.columns, for example columns: {prompt: question, completion: answer}."
        if nested is not None:
            remedy = f"If the rows are the list under {nested!r}, write that list alone into the file."
        return ValueError(
            f"{where}: expected 'text', a 'prompt' with its 'completion', or 'messages'; found the columns"
            f" {sorted(row)}. {self.known} {remedy}"
        )


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def check_columns(columns: Mapping[str, str] | None, ignored: Collection[str]) -> dict[str, str]:
    """Validate the argument ``columns``.

    Raises:
        ValueError: If a part is unknown, or a column is also ignored.
    """
    named = {} if columns is None else columns
    if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"columns={columns!r} must map parts to names, as {{prompt: question}}.")
    for part, name in named.items():
        if part not in FORMATS["auto"]:
            raise ValueError(
                f"columns has {part!r}, which is no part of a record. Use {', '.join(FORMATS['auto'])}, each"
                " with the name of its column, as {prompt: question}."
            )
        if is_ignored(name, ignored):
            raise ValueError(f"ignore_columns={list(ignored)} names {name!r}, which columns uses.")
    return dict(named)


class _Named:
    """Parts of one row, for messages that name row and column."""

    def __init__(self, where: str, columns: Mapping[str, str], parts: Mapping[str, Any]) -> None:
        self.where, self.columns, self.parts = where, columns, parts

    def messages(self) -> dict[str, Any]:
        messages = self._messages("messages")
        if any(message["role"] == "system" for message in messages) and "system" in self.parts:
            raise ValueError(f"{self.where}: has a system message and content under 'system'. Keep one.")
        return {"messages": (*self._system(), *messages), "tools": self._tools(), "is_chat": True}

    def exchange(self, answers: bool) -> dict[str, Any]:
        """Return a prompt and its completion, each strings or messages."""
        is_chat = isinstance(self.parts.get("prompt"), list)
        if is_chat and "context" in self.parts:
            raise ValueError(f"{self.where}: a prompt of messages has no place for the context. Join them.")
        if is_chat:
            prompt = self._messages("prompt")
        else:
            texts = [self._text(part) for part in ("prompt", "context") if part in self.parts]
            prompt = ({"role": "user", "content": "\n\n".join(text for text in texts if text)},)
        if not answers:
            completion: tuple[Message, ...] = ()
        elif isinstance(self.parts["completion"], list):
            completion, is_chat = self._messages("completion"), True
        else:
            completion = ({"role": "assistant", "content": self._text("completion")},)
        before = (*self._system(), *prompt)
        tools = self._tools()
        return {
            "messages": (*before, *completion),
            "tools": tools,
            "learned": len(before),
            "is_chat": is_chat or bool(tools),
        }

    def _text(self, part: str) -> str:
        column = self.columns[part]
        return string_of({column: self.parts[part]}, column, self.where)

    def _system(self) -> tuple[Message, ...]:
        return ({"role": "system", "content": self._text("system")},) if "system" in self.parts else ()

    def _tools(self) -> tuple[Any, ...]:
        tools = self.parts.get("tools", [])
        if isinstance(tools, str):  # as many data sets store them
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError:
                tools = None
        if not isinstance(tools, list):
            raise ValueError(f"{self.where}: 'tools' must be a list of JSON schemas. Correct the row.")
        return tuple(without_nulls(tools))

    def _messages(self, part: str) -> tuple[Message, ...]:
        column, value = self.columns[part], self.parts[part]
        if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
            # How datasets stores a list of objects that is declared a Sequence.
            value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(
                f"{self.where}: {column!r} holds {shown(value)}, no list of messages. A table cannot hold"
                " conversations: write the file as .jsonl or .parquet."
            )
        if len(value) > 1 and not any(isinstance(message, Mapping) for message in value):
            raise ValueError(
                f"{self.where}: {column!r} is a list of {type(value[0]).__name__}, not of messages. If it is"
                " the whole column, write an object per row (pandas: orient='records')."
            )
        return tuple(_message(message, f"{self.where}: {column!r}, message {n}") for n, message in
                     enumerate(value, start=1))  # fmt: skip


def _message(value: Any, where: str) -> Message:
    value = without_nulls(value)
    role = value.get("role", value.get("from")) if isinstance(value, dict) else None
    if not isinstance(role, str):
        raise ValueError(
            f'{where} is {shown(value)}: expected {{"role": ..., "content": ...}} (or "from" and "value").'
        )
    content = value.get("content", value.get("value"))
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        if any(part is None for part in parts):
            raise ValueError(f"{where} holds {shown(content)}: only texts can be learned.")
        content = "".join(map(str, parts))
    if content is None and value.get("tool_calls"):
        content = ""
    text = string_of({"content": content}, "content", where) if content != "" else ""
    rest = {k: v for k, v in value.items() if k not in ("role", "from", "content", "value")}
    for key, part in strings_in(rest):
        check_characters(part, key, where)
    if rest.get("weight", 1) not in (0, 1):
        raise ValueError(
            f"{where} has weight={shown(rest['weight'])}: it must be 1 (learned) or 0 (not). Correct it, or"
            " take it out."
        )
    return {"role": _role(role, where), "content": text, **rest}


def _role(written: str, where: str) -> str:
    """Return a role by its common name; others than these are the template's."""
    role = _ROLES.get(written.strip().lower(), written.strip().lower())
    meant = "" if role in _KNOWN_ROLES else did_you_mean(role, _KNOWN_ROLES)
    if meant:
        raise ValueError(f"{where} has the role {written!r}, by which nothing would be learned.{meant}")
    return role


def strings_in(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Return all strings in a nested value, each with the key that it stands under."""
    if isinstance(value, Mapping):
        return [found for name, part in value.items() for found in strings_in(part, str(name))]
    if isinstance(value, list):
        return [found for part in value for found in strings_in(part, key)]
    return [(key, value)] if isinstance(value, str) else []


def without_nulls(value: Any) -> Any:
    """Return a nested value without nulls, with which Arrow fills what only some rows have."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
