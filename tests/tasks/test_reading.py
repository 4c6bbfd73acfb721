import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.tasks.reading import read_rows

TABLE = "text,label\n" + "".join(f"café {i},{'good' if i % 2 else 'bad'}\n" for i in range(5))


def rows_of(path: Path, content: str | bytes) -> list[tuple[str, dict[str, str]]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [
        (where.removeprefix(f"{path}:"), dict(row))
        for where, row in read_rows(path, ["text", "label"] if path.suffix == ".csv" else [])
    ]


@pytest.mark.parametrize(
    "content",
    [
        TABLE.encode("utf-8-sig"),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\r"),
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", "|"),
        "sep=;\r\n" + TABLE.replace(",", ";"),
        TABLE.replace(",", ", "),
        TABLE.replace("\n", ",\n"),
        TABLE.replace("bad\n", "bad\n\n,\n"),
    ],
    ids=[
        "BOM",
        "CRLF",
        "CR",
        "semicolons",
        "tabs",
        "bars",
        "stated",
        "blanks",
        "comma at the end",
        "blank rows",
    ],
)
def test_tables_of_many_programs_read_alike(content: str | bytes, tmp_path: Path) -> None:
    expected = [{"text": f"café {i}", "label": "good" if i % 2 else "bad"} for i in range(5)]
    assert [fields for _, fields in rows_of(tmp_path / "a.csv", content)] == expected


def test_a_field_may_be_long_and_hold_lines(tmp_path: Path) -> None:
    long = "word " * 40_000
    rows = rows_of(tmp_path / "a.csv", f'text,label\n"two\nlines, ""quoted""",bad\n{long},good\n')
    assert [(line, fields["text"]) for line, fields in rows] == [("2", 'two\nlines, "quoted"'), ("4", long)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\ncaf\xe9,bad\n", r":2: is not UTF-8 text: byte 0xe9.*iconv"),
        (TABLE.encode("utf-16"), r":1: the file is UTF-16.*iconv -f UTF-16"),
        (TABLE.replace("é", "e").encode("utf-16-le"), r":1: holds a NUL"),
        (b"text,label\na,b\nw\0,bad\n", r":3: holds a NUL"),
        (b"", r":1: the file is empty"),
        (b"sep=;\ntext;label\na;b\n'c;d;e\n", r":4: the row has 3 fields"),
        (b'sep=;\ntext;label\n"open;b\n', r":3: a quotation mark .* is not closed before line 3"),
        (b"text,label\n", r":1: the file has no rows"),
        (b'text,label\na,b\n"open,bad\nc,d\n', r":3: a quotation mark .* is not closed before line 4"),
        (b'text,label\n"a"b,bad\n', r":2: a quotation mark"),
        (b"text,label\na,b\na,b,c\n", r":3: the row has 3 fields, the header 2"),
        (b"text,label\na\n", r":2: the row has 1 fields, the header 2"),
        (b"text,label,Text,label\na,b,c,d\n", r":1: the header has \['label'\] more than once"),
    ],
)
def test_a_table_that_would_lose_something_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv" + message):
        rows_of(tmp_path / "a.csv", content)


# ---- .tsv


def test_quotation_marks_in_a_tsv_are_text(tmp_path: Path) -> None:
    texts = ['"never closed', "plain", 'says "hi"', 'closes"', '"whole"']
    content = "text\tlabel\n" + "".join(f"{text}\tbad\n" for text in texts)
    assert [fields["text"] for _, fields in rows_of(tmp_path / "a.tsv", content)] == texts


def test_a_mark_before_a_tab_merges_no_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.tsv", 'text\tlabel\n"a\tbad\nb"\tgood\n')
    assert [fields["text"] for _, fields in rows] == ['"a', 'b"']


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_quoted_tsv_is_read_as_it_was_written(quoting: int, tmp_path: Path) -> None:
    written = [("text", "label"), ('says "hi"', "bad"), ("two\nlines", "good"), ("a\ttab", "bad")]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows(written)
    assert [tuple(row.values()) for _, row in read_rows(tmp_path / "a.tsv")] == written[1:]


def test_marks_of_two_meanings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tsv:3: .*rename the file to \.csv"):
        rows_of(tmp_path / "a.tsv", 'text\tlabel\na\tbad\n"b"\tgood\n')


def test_a_tsv_row_without_a_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tsv:3: the row has 1 fields"):
        rows_of(tmp_path / "a.tsv", "text\tlabel\na\tbad\nb\n")


# ---- JSON


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_and_lines_in_a_json_file(indent: int | None, tmp_path: Path) -> None:
    objects = [{"text": "a\u2028b"}, {"text": "c", "more": {"d": [1]}}]
    whole = json.dumps(objects, indent=indent, ensure_ascii=False)
    lines = "\n".join(json.dumps(value, indent=indent, ensure_ascii=False) for value in objects)
    for content in (whole, lines, f"\ufeff{whole}\n"):
        assert [fields for _, fields in rows_of(tmp_path / "a.json", content)] == objects


def test_rows_of_a_json_list_have_their_lines(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.json", '[\n {"text": "a"},\n\n {"text":\n "b"}, {"text": "c"}\n]\n')
    assert [line for line, _ in rows] == ["2", "4", "5"]


def test_a_tab_in_a_string_and_crlf_are_read(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.jsonl", '\ufeff{"text": "a\tb"}\r\n\r\n{"text": "c"}\r\n')
    assert rows == [("1", {"text": "a\tb"}), ("3", {"text": "c"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '[\n {"text": "a"}\n]\n', r":1: is not JSON.*rename it to a\.json"),
        (
            "a.jsonl",
            '[{"text": "a"}, {"text": "b"}]\n',
            r":1: is a list of objects, .*rename it to a\.json\.",
        ),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', r":2: is not JSON.*one whole object on each line"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', r":2: has \['text'\] twice"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', r":2: expected an object, found str"),
        ("a.json", '[{"text": "a"},\n {"text": "b"}', r":2: is not JSON"),
        ("a.json", '[{"text": "a"}\n {"text": "b"}]', r":2: is not JSON: Expecting ','"),
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', r":2: is not JSON: The list"),
        ("a.json", '[{"text": "a"},\n]', r":2: is not JSON"),
        ("a.json", "[]", r":1: the file has no rows"),
        ("a.json", "[\n[1]]", r":2: expected an object, found list"),
    ],
)
def test_json_that_would_lose_something_is_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + message):
        rows_of(tmp_path / name, content)


def test_the_line_of_a_bad_byte_is_an_editor_s(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\nth\xffree")
    with pytest.raises(ValueError, match=r"a\.txt:3: is not UTF-8 text: byte 0xff"):
        list(read_rows(tmp_path / "a.txt"))


# ---- properties

Text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=12)


@given(rows=st.lists(st.tuples(Text, Text), min_size=1, max_size=6), delimiter=st.sampled_from(",;\t"))
def test_a_table_is_read_as_python_s_csv_reads_it(
    rows: list[tuple[str, str]], delimiter: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=delimiter).writerows([("text", "label"), *rows])
    path = tmp_path_factory.getbasetemp() / "property.csv"
    path.write_bytes(written.getvalue().encode())
    expected = [row for row in rows if any(field.strip() for field in row)]
    if not expected:
        return
    found = [tuple(row.values()) for _, row in read_rows(path, ["text", "label"])]
    assert found == expected
    assert (
        found
        == [
            tuple(row)
            for row in csv.reader(io.StringIO(written.getvalue(), newline=""), delimiter=delimiter)
            if any(field.strip() for field in row)
        ][1:]
    )


Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | Text,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(Text, parts, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(Text, Json, max_size=3), min_size=1, max_size=5),
    suffix=st.sampled_from(["json", "jsonl"]),
)
def test_json_is_read_as_python_s_json_reads_it(
    rows: list[dict], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"property.{suffix}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if suffix == "json" else lines, encoding="utf-8", newline="")
    assert [row for _, row in read_rows(path)] == rows


@pytest.mark.parametrize("value", ["NA", "nan", "null", "007", "1.0", "1e3", "2024-01-01", "True", " a "])
def test_values_stay_as_they_are_written(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{value},{value}\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value, "label": value}) + "\n")
    for name in ("a.csv", "a.jsonl"):
        ((_, row),) = read_rows(tmp_path / name, ["text"])
        assert row == {"text": value, "label": value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"text": "a"}', mtime=0), "is compressed by gzip, .*let its name end in .gz"),
        (bz2.compress(b'{"text": "a"}'), "is compressed by bzip2"),
        (lzma.compress(b'{"text": "a"}'), "is compressed by xz"),
        (b"PK\x03\x04\x14\0\6\0\x08", r"is a spreadsheet \(\.xlsx\).*Export the sheet as CSV"),
        (b"PAR1\x15\x04\x15\0\xff", r"is a Parquet file, .*end in \.parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "is a pointer of .*git lfs pull"),
    ],
    ids=["gzip", "bzip2", "xz", "xlsx", "parquet", "pointer"],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.tsv", "a.json"])
def test_files_that_are_no_text_are_named_for_what_they_are(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{name}:1: (the file )?{message}"):
        rows_of(tmp_path / name, content)


def test_a_text_may_begin_like_another_kind_of_file(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.txt", "PAR1 is the first par.") == [
        ("1", {"text": "PAR1 is the first par."})
    ]


# ---- compressed

COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.csv.{suffix}"
    path.write_bytes(COMPRESSORS[suffix](TABLE.encode("utf-8-sig")))
    rows = list(read_rows(path, ["text"]))
    assert rows[1] == (f"{path}:3", {"text": "café 1", "label": "good"})
    path.write_bytes(COMPRESSORS[suffix](TABLE.encode())[:-9])
    with pytest.raises(ValueError, match=rf"a\.csv\.{suffix}: is no whole compressed file"):
        list(read_rows(path, ["text"]))


def test_a_bad_byte_in_a_compressed_file_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "caf\xe9"}\n'))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:2: is not UTF-8 text: byte 0xe9"):
        list(read_rows(tmp_path / "a.jsonl.gz"))
