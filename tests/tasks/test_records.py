import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.tasks.records import Record, read_records, split_records


@given(count=st.integers(2, 40), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_a_split_holds_out_whole_records(count: int, fraction: float, seed: int) -> None:
    records = [Record(f"text {i}") for i in range(count)]
    kept, held_out = split_records(records, fraction, seed)
    assert len(held_out) == min(max(1, round(count * fraction)), count - 1)
    assert sorted([*kept, *held_out], key=records.index) == records
    assert split_records(records, fraction, seed) == (kept, held_out)


def test_a_single_text_gives_its_end() -> None:
    assert split_records([Record("abcdefghij")], 0.2, seed=0) == ([Record("abcdefgh")], [Record("ij")])


def test_reading_text_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "blank.txt").write_text(" \n")
    records = [{"text": "line\u2028separator"}, {"instruction": "i", "response": "r", "id": None}]
    first, second = (json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "b.jsonl").write_text(f"{first}\r\n\r\n{second}\r\n", encoding="utf-8")
    assert read_records(tmp_path / "a.txt") == [Record("one\ntwo\n")]
    assert read_records(tmp_path / "blank.txt") == []
    assert read_records(tmp_path / "b.jsonl") == [Record("line\u2028separator"), Record("r", prompt="i")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "broken', r"b\.jsonl:2: is not JSON"),
        ('{"txt": "typo"}', r"b\.jsonl:2: expected strings under 'text'.*found the keys \['txt'\]"),
        ('{"instruction": "i"}', r"b\.jsonl:2: .*found the keys \['instruction'\]"),
        ('{"text": 7}', r"b\.jsonl:2: 'text' holds 7, no string"),
        ("[1]", r"b\.jsonl:2: .*found list"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "b.jsonl")


def test_unknown_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read \.parquet. Use \.txt, \.jsonl or \.json"):
        read_records(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"latin\.txt:1: is not UTF-8 text: byte 0xe9"):
        read_records(tmp_path / "latin.txt")


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "party-1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "context": "c", "response": "r"}, Record("r", "q\n\nc")),
        ({"instruction": "q", "context": "", "response": "r"}, Record("r", "q")),
        ({"instruction": "q", "input": "c", "output": "r"}, Record("r", "q\n\nc")),
        ({"input": "c", "output": "r"}, Record("r", "c")),
        ({"Instruction": "q", "Response": "r"}, Record("r", "q")),
        ({"system": "s", "instruction": "q", "response": "r"}, Record("r", "q", "s")),
        ({"system": None, "instruction": "q", "response": "r"}, Record("r", "q")),
        ({"text": "t", "instruction": "", "response": None, "note": [" ", {}]}, Record("t")),
    ],
)
def test_each_column_is_used_for_what_it_is(tmp_path: Path, row: dict[str, Any], expected: Record) -> None:
    assert read_records(written(tmp_path, [row])) == [expected]


@pytest.mark.parametrize("value", ["kept", 0, False, {"a": ["x"]}, [1]])
def test_a_column_that_nothing_uses_is_refused_unless_ignored(tmp_path: Path, value: object) -> None:
    rows = [{"instruction": "q", "response": "r"}, {"instruction": "q", "response": "r", "history": value}]
    path = written(tmp_path, rows)
    with pytest.raises(
        ValueError, match=r"party-1\.jsonl:2: 'history' holds .*ignore_columns: \[\"history\"\]"
    ):
        read_records(path)
    assert read_records(path, ["history"]) == [Record("r", "q")] * 2


def test_two_columns_for_one_part_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [{"instruction": "q", "response": "r", "output": "other"}])
    with pytest.raises(ValueError, match=r":1: \['response', 'output'\] each hold a response"):
        read_records(path)
    assert read_records(path, ["output"]) == [Record("r", "q")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, r":2: 'text' is empty \(null or NaN\)"),
        ({"text": float("nan")}, r":2: 'text' is empty"),
        ({"instruction": "q", "response": None}, r":2: 'response' is empty"),
        ({"instruction": 5, "response": "r"}, r":2: 'instruction' holds 5"),
        ({"text": "a\0b"}, r":2: 'text' holds the character U\+0000"),
        ({"text": "a\ud800"}, r":2: 'text' holds the character U\+D800"),
        ({"messages": [{"role": "user", "content": "hi"}]}, r":2: .*conversations are not read"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"party-1\.jsonl" + message):
        read_records(written(tmp_path, [{"text": "fine"}, row]))


def test_a_single_record_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match=r"a single record in x: val_fraction=0\.1 .* or val_fraction=0"):
        split_records([Record("r", "q")], 0.1, 0, "x")


def test_prompts_need_no_response(tmp_path: Path) -> None:
    path = written(tmp_path, [{"instruction": "q"}, {"instruction": "p", "response": None}])
    assert read_records(path, responses=False) == [Record("", "q"), Record("", "p")]
