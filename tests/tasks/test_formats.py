import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.tasks.formats import FORMATS, Record, RowMapper

WHERE = "party-1.jsonl:2"


def said(*contents: str, system: str | None = None, **more: Any) -> Record:
    """A record of one exchange."""
    turns = [("user", contents[0]), *(("assistant", answer) for answer in contents[1:])]
    turns = [*([("system", system)] if system is not None else []), *turns]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    return Record(messages=messages, learned=len(turns) - len(contents) + 1, **more)


def mapped(row: dict[str, Any], **settings: Any) -> Record:
    return RowMapper(**settings)(WHERE, row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "context": "c", "response": "r"}, said("q\n\nc", "r")),
        ({"instruction": "q", "context": "", "response": "r"}, said("q", "r")),
        ({"instruction": "q", "input": "c", "output": "r"}, said("q\n\nc", "r")),
        ({"instruction": "q", "input": "c", "response": "r"}, said("q\n\nc", "r")),
        ({"input": "c", "output": "r"}, said("c", "r")),
        ({"Instruction": "q", "Response": "r"}, said("q", "r")),
        ({"prompt": "q", "completion": "r"}, said("q", "r")),
        ({"system": "s", "instruction": "q", "response": "r"}, said("q", "r", system="s")),
        ({"system": None, "instruction": "q", "response": "r"}, said("q", "r")),
        ({"instruction": "i", "response": "r", "id": None}, said("i", "r")),
        ({"text": "line\u2028separator"}, Record("line\u2028separator")),
        ({"text": "t", "instruction": "", "response": None, "note": [" ", {}]}, Record("t")),
    ],
)
def test_each_column_is_used_for_what_it_is(row: dict[str, Any], expected: Record) -> None:
    assert mapped(row) == expected


TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "r"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": TURNS[1:], "system": "s"},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "r"},
            ]
        },
        {"messages": [{**turn, "tool_calls": None, "name": None} for turn in TURNS]},  # as Arrow fills gaps
        {"messages": [{**turn, "role": turn["role"].title()} for turn in TURNS]},
        {"messages": {key: [turn[key] for turn in TURNS] for key in ("role", "content")}},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]},
    ],
)
def test_conversations_are_read_alike(row: dict[str, Any]) -> None:
    assert mapped(row) == Record(messages=tuple(TURNS), is_chat=True)


def test_a_prompt_and_its_completion_may_be_messages() -> None:
    record = mapped({"prompt": TURNS[:2], "completion": TURNS[2:]})
    assert record == Record(messages=tuple(TURNS), learned=2, is_chat=True)
    assert mapped({"prompt": TURNS[:2], "completion": "r"}) == record
    prompt = mapped({"prompt": TURNS[:2]}, answers=False)
    assert prompt.messages == tuple(TURNS[:2])


def test_calls_of_sharegpt_are_the_assistant_s() -> None:
    turns = [("human", "q"), ("function_call", "{}"), ("observation", "7"), ("gpt", "r")]
    record = mapped({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "assistant"]


def test_answers_of_weight_0_are_not_learned() -> None:
    answers = [{**TURNS[2], "weight": 0}, TURNS[1], {**TURNS[2], "weight": 1}]
    record = mapped({"messages": [*TURNS[:2], *answers]})
    assert [record.is_learned(index) for index in range(5)] == [False, False, False, False, True]
    assert mapped({"messages": [*TURNS[:2], answers[0]]}).is_blank


def test_tools_are_schemas_or_their_json() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for tools in ([tool], json.dumps([tool]), [{**tool, "strict": None}]):
        assert mapped({"messages": TURNS, "tools": tools}).tools == (tool,)
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    record = mapped({"messages": [*TURNS[:2], call, {"role": "tool", "content": "7"}, TURNS[2]]})
    assert record.messages[2] == {**call, "content": ""}
    with pytest.raises(ValueError, match="'tools' must be a list"):
        mapped({"messages": TURNS, "tools": "no JSON"})


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("alpaca", {"instruction": "q", "input": "", "output": "r"}),
        ("dolly", {"instruction": "q", "context": "", "response": "r"}),
        ("prompt-completion", {"prompt": "q", "completion": "r"}),
        ("prompt_completion", {"prompt": "q", "completion": "r"}),
    ],
)
def test_a_named_format_reads_its_columns_only(format: Any, row: dict[str, str]) -> None:
    assert mapped(row, format=format) == said("q", "r")
    with pytest.raises(ValueError, match="expected 'text', a 'prompt'"):
        mapped({"text": "t"}, format=format)
    other = "context" if format == "alpaca" else "input"
    with pytest.raises(ValueError, match=f"'{other}' holds 'c': nothing would see that"):
        mapped({**row, other: "c"}, format=format)


def test_columns_are_named() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    assert mapped({"question": "q", "answer": "r"}, columns=columns) == said("q", "r")
    # `input` is claimed, and so no context.
    assert mapped({"input": "q", "label": "r"}, columns={"prompt": "input", "completion": "label"}) == said(
        "q", "r"
    )
    assert mapped({"question": "q"}, columns=columns, answers=False).messages == (
        {"role": "user", "content": "q"},
    )
    with pytest.raises(
        ValueError, match=rf"{WHERE}: has no column 'question' \(columns: prompt\); it has \['q'"
    ):
        mapped({"q": "q", "answer": "r"}, columns=columns)
    with pytest.raises(ValueError, match="columns has 'question', which is no part"):
        RowMapper(columns={"question": "prompt"})
    for wrong in (["question", "answer"], {"prompt": None}):
        with pytest.raises(ValueError, match="must map parts to names"):
            RowMapper(columns=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names 'a', which columns uses"):
        RowMapper(columns={"prompt": "a"}, ignored=["a"])
    with pytest.raises(ValueError, match="format='chatml' must be one of"):
        RowMapper("chatml")  # type: ignore[arg-type]


def test_preference_pairs_are_refused_with_the_reason() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    with pytest.raises(ValueError, match=r"preference pair.*another loss.*completion: chosen.*\[rejected\]"):
        mapped(row)
    assert mapped(row, columns={"completion": "chosen"}, ignored=["rejected"]) == said("q", "good")
    for more in ({"messages": TURNS}, {"completion": "good"}):
        with pytest.raises(ValueError, match="preference pair"):
            mapped({**row, **more})
    implicit = {"chosen": TURNS, "rejected": TURNS[:2]}
    with pytest.raises(ValueError, match="preference pair"):
        mapped(implicit)
    conversation = mapped(implicit, columns={"messages": "chosen"}, ignored=["rejected"])
    assert conversation.messages == tuple(TURNS)


def test_unpaired_preferences_are_refused_with_the_reason() -> None:
    row = {"prompt": "q", "completion": "r", "label": False}
    with pytest.raises(ValueError, match=r"unpaired preference.*KTO.*ignore_columns: \[label\]"):
        mapped(row)
    assert mapped(row, ignored=["label"]) == said("q", "r")


@pytest.mark.parametrize("value", ["kept", 0, False, {"a": ["x"]}, [1]])
def test_a_column_that_nothing_uses_is_refused_unless_ignored(value: object) -> None:
    row = {"instruction": "q", "response": "r", "history": value}
    with pytest.raises(ValueError, match=rf"{WHERE}: 'history' holds .*ignore_columns: \[\"history\"\]"):
        mapped(row)
    assert mapped(row, ignored=["history"]) == said("q", "r")


def test_two_columns_for_one_part_are_refused() -> None:
    row = {"instruction": "q", "response": "r", "output": "other"}
    with pytest.raises(ValueError, match=r":2: \['response', 'output'\] each hold a completion"):
        mapped(row)
    assert mapped(row, ignored=["output"]) == said("q", "r")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "typo"}, r"expected 'text', .*found the columns \['txt'\]"),
        ({"instruction": "i"}, r"found the columns \['instruction'\]"),
        ({"data": [{"prompt": "q", "completion": "r"}]}, r"the list under 'data', write that list alone"),
        ({"prompt": ["q", "p"], "completion": ["r", "s"]}, r"'prompt' is a list of str.*orient='records'"),
        ({"messages": [{"role": "asistant", "content": "r"}]}, r"'asistant'.* Did you mean 'assistant'"),
        ({"messages": [{**TURNS[2], "weight": 0.5}]}, r"message 1 has weight=0\.5: it must be 1"),
        ({"text": 7}, r"'text' holds 7, no string"),
        ({"text": None}, r"'text' is empty \(null or NaN\)"),
        ({"text": float("nan")}, r"'text' is empty"),
        ({"instruction": "q", "response": None}, r"'response' is empty"),
        ({"instruction": 5, "response": "r"}, r"'instruction' holds 5"),
        ({"text": "a\0b"}, r"'text' holds the character U\+0000"),
        ({"text": "a\ud800"}, r"'text' holds the character U\+D800"),
        ({"messages": "hi"}, r"'messages' holds 'hi', no list of messages"),
        ({"messages": [{"content": "hi"}]}, r"message 1 is .*expected \{\"role\""),
        ({"messages": [{"role": "user", "content": None}]}, r"message 1: 'content' is empty"),
        (
            {"messages": [{"role": "user", "content": "a\0"}]},
            r"message 1: 'content' holds the character U\+0000",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"only texts can be learned"),
        ({"messages": TURNS, "system": "t"}, r"a system message and content under 'system'"),
        ({"prompt": TURNS, "context": "c", "completion": "r"}, r"no place for the context"),
    ],
)
def test_what_is_no_record_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{WHERE}: .*{message}"):
        mapped(row)


@pytest.mark.parametrize(
    ("row", "is_blank", "has_blank_prompt"),
    [
        ({"text": " "}, True, True),
        ({"instruction": "q", "response": " "}, True, False),
        ({"instruction": " ", "response": "r"}, True, True),
        ({"messages": []}, True, True),
        ({"messages": TURNS[:2]}, True, False),
        ({"messages": TURNS}, False, False),
    ],
)
def test_what_teaches_nothing_is_blank(row: dict[str, Any], is_blank: bool, has_blank_prompt: bool) -> None:
    record = mapped(row)
    assert (record.is_blank, record.has_blank_prompt) == (is_blank, has_blank_prompt)


def test_prompts_need_no_completion() -> None:
    for row in (
        {"instruction": "q"},
        {"instruction": "q", "response": None},
        {"instruction": "q", "response": "r"},
    ):
        assert mapped(row, answers=False).messages == ({"role": "user", "content": "q"},)


Content = st.text(min_size=1, max_size=5).filter(lambda text: text.strip() and "\0" not in text)


@given(values=st.lists(Content, min_size=3, max_size=3), extra=Content)
def test_nothing_that_a_row_says_is_lost(values: list[str], extra: str) -> None:
    """Whatever a row holds is in the record, or an error."""
    for format in ("alpaca", "dolly"):
        names = [name for part in ("prompt", "context", "completion") for name in FORMATS[format][part]]
        record = mapped(dict(zip(names, values, strict=True)))
        prompt, answer = (message["content"] for message in record.messages)
        assert prompt == f"{values[0]}\n\n{values[1]}"
        assert answer == values[2]
        with pytest.raises(ValueError, match="nothing would see that"):
            mapped({**dict(zip(names, values, strict=True)), "more": extra})
