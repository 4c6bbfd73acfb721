import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pellm_lightning.tasks import ClassificationDataModule
from pellm_lightning.tasks.labelled import LabelledMapper
from pellm_lightning.tasks.labels import label_name
from pellm_lightning.tasks.source import Source

IGNORED: dict = {"ignore_columns": ["who"]}
ROWS = [{"text": f"w{i}", "label": "ab"[i % 2], "who": f"person {i % 4}"} for i in range(24)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def read(
    path: Path | str, text: str = "text", label: str = "label", key: str | None = None, ignored: Any = ()
) -> list:
    """The rows of a file, as they are stored."""
    mapper = LabelledMapper(text, label, key, ignored)
    rows = Source((str(path),), columns=(text, label)).rows()
    return [{k: v for k, v in mapper.stored(*row).items() if k != "where"} for row in rows]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_and_jsonl_read_alike(suffix: str, delimiter: str, tmp_path: Path, file: str) -> None:
    path = tmp_path / f"all.{suffix}"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ROWS[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    rows = read(path, key="who")
    assert rows == read(file, key="who")
    assert rows[5] == {"text": "w5", "label": "b", "key": "person 1", "blank": False}


def parties(file: str, llama: str, **options: object) -> list[ClassificationDataModule]:
    built, ignored = [], [] if "key_column" in options else ["who"]
    for party in range(2):
        data = ClassificationDataModule(
            file, llama, num_parties=2, party=party, val_fraction=0.0, ignore_columns=ignored, **options
        )
        data.setup("fit")
        built.append(data)
    return built


def texts(data: ClassificationDataModule) -> list[int]:
    return [sample["input_ids"][0] for sample in data.train_samples]


@pytest.mark.parametrize(
    "options", [{}, {"partition": "dirichlet", "alpha": 0.1}, {"partition": "key", "key_column": "who"}]
)
def test_a_simulation_gives_each_sample_to_one_party(options: dict, file: str, bert: str) -> None:
    first, second = parties(file, bert, **options)
    assert sorted(texts(first) + texts(second)) == list(range(2, 26))
    assert first.label_names == second.label_names == ["a", "b"]


def test_dirichlet_makes_parties_unlike_and_keys_stay_together(file: str, bert: str) -> None:
    skewed = Counter(
        s["labels"] for s in parties(file, bert, partition="dirichlet", alpha=0.01)[0].train_samples
    )
    assert all(count in (0, 1, 11, 12) for count in (skewed[0], skewed[1]))
    keyed, _ = parties(file, bert, partition="key", key_column="who")
    assert {(token - 2) % 4 for token in texts(keyed)} == {0, 2}


def test_batches_are_padded_and_labelled(file: str, bert: str) -> None:
    data = ClassificationDataModule(file, bert, labels=["b", "a"], batch_size=4, val_fraction=0.25, **IGNORED)
    data.setup("fit")
    (loader,) = data.val_dataloader()
    batch = next(iter(loader))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert len(data.val_samples) == 6
    # An even word belongs to "a", here the second label; "w0" has the index 2.
    assert batch["labels"].tolist() == [1 - token % 2 for token in batch["input_ids"][:, 0].tolist()]


def test_labels_must_be_told_where_a_party_cannot_know_them(file: str) -> None:
    with pytest.raises(ValueError, match="labels is not given"):
        ClassificationDataModule(file, "tokenizer")


def test_unknown_labels_and_columns_are_named(file: str, bert: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Party 0 has the labels \['b'\], which are not among \['a', 'c'\]"):
        ClassificationDataModule(file, bert, labels=["a", "c"], party=0, **IGNORED).setup("fit")
    with pytest.raises(ValueError, match=r"all\.jsonl:1: has no column 'topic'; it has \['text'"):
        ClassificationDataModule(file, bert, labels=["a", "b"], label_column="topic").setup("fit")
    (tmp_path / "short.csv").write_text("text,label\nonly text\n")
    with pytest.raises(ValueError, match=r"short\.csv:2: the row has 1 fields, the header 2"):
        read(tmp_path / "short.csv")
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: expected an object, found list"):
        read(tmp_path / "bad.jsonl")


def test_settings_that_contradict_are_refused(file: str, bert: str) -> None:
    with pytest.raises(ValueError, match="partition='key' and key_column=None"):
        ClassificationDataModule(file, bert, num_parties=2, partition="key")
    with pytest.raises(ValueError, match="Party 2 has no part of num_parties=2"):
        ClassificationDataModule(file, bert, num_parties=2, party=2, **IGNORED).setup("fit")
    with pytest.raises(ValueError, match="test_files is not given"):
        ClassificationDataModule(file, bert, labels=["a", "b"]).setup("test")


# ---- what a table brings


def table(tmp_path: Path, content: str) -> str:
    (tmp_path / "t.csv").write_text(content)
    return str(tmp_path / "t.csv")


def labels_of(file: str, bert: str, labels: list) -> list[int]:
    data = ClassificationDataModule(file, bert, labels=labels, party=0, val_fraction=0.0)
    data.setup("fit")
    return [sample["labels"] for sample in data.train_samples]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ("0\n1", [0, 1]),
        ("0.0\n1.0", ["0", "1"]),
        ("0\n1", ["0.0", 1.0]),
        ("False\ntrue", [False, True]),
        ("FALSE\nTRUE", ["false", "true"]),
        (" bad\ngood ", ["bad", " good"]),
        ("v1.0\n1.5", ["v1.0", 1.5]),
        ("no\nYes", [False, True]),
        ("off\non", [False, True]),
        ("007\n7", ["007", 7]),
        ("1e3\n1000", ["1e3", 1000]),
        ("NA\nnan", ["NA", "nan"]),
    ],
)
def test_a_label_is_one_however_it_is_written(values: str, labels: list, tmp_path: Path, bert: str) -> None:
    first, second = values.split("\n")
    assert labels_of(table(tmp_path, f"text,label\nw1,{first}\nw2,{second}\n"), bert, labels) == [0, 1]


def test_labels_of_json_keep_their_kind(tmp_path: Path, bert: str) -> None:
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": "w1", "label": label}) + "\n" for label in (True, 1, 1.0))
    )
    assert labels_of(str(tmp_path / "t.jsonl"), bert, [1, True]) == [1, 0, 0]
    assert label_name(True) != label_name(1)


def test_labels_that_are_one_or_none_are_refused(tmp_path: Path, bert: str) -> None:
    for labels, message in (
        (["1", 1.0], "more than once"),
        ("ab", "must be a list"),
        (["a", ""], "must be a text or a number"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassificationDataModule("x", bert, labels=labels)
    with pytest.raises(ValueError, match=r"t\.csv:3: 'label' is empty"):
        labels_of(table(tmp_path, "text,label\nw1,a\nw2,\n"), bert, ["a", "b"])
    with pytest.raises(ValueError, match=r"\['c'\], which are not among .*'c' at .*t\.csv:3"):
        labels_of(table(tmp_path, "text,label\nw1,a\nw2,c\n"), bert, ["a", "b"])


def test_a_third_column_is_refused_unless_it_is_ignored_or_the_key(file: str) -> None:
    with pytest.raises(ValueError, match=r"all\.jsonl:1: 'who' holds 'person 0'"):
        read(file)
    assert len(read(file, ignored=["who"])) == 24
    with pytest.raises(ValueError, match="names \\['label'\\], which are used"):
        ClassificationDataModule(file, "t", labels=["a", "b"], ignore_columns=["label"])
    with pytest.raises(ValueError, match="must be a list of columns"):
        ClassificationDataModule(file, "t", labels=["a", "b"], ignore_columns="who")


def test_what_is_cut_or_blank_is_counted_once(
    tmp_path: Path, bert: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = table(tmp_path, "text,label\nw1 w2 w3 w4 w5,a\n,b\nw1,b\nw1 w2 w3 w4,a\n")
    data = ClassificationDataModule(file, bert, labels=["a", "b"], party=3, val_fraction=0.0, max_length=3)
    data.setup("fit")
    data.setup("validate")
    assert [len(sample["input_ids"]) for sample in data.train_samples] == [3, 1, 3]
    (said,) = caplog.messages
    assert [line.split() for line in said.splitlines()[:2]] == [
        ["Party", "3,", "max_length=3", "records", "samples", "tokens", "cut", "left", "out"],
        ["files", "4", "3", "7", "2", "1"],  # 3, 1 and 3 tokens
    ]
    assert "files: 1 blank row is left out" in said
    assert f"{file}:3" in said
    # 5 + 4 tokens, of which 3 + 3 stay.
    assert f"2 texts are cut, by 3 tokens (the first: {file}:2); max_length=5" in said


def test_a_text_that_is_no_string_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "w1", "label": 0}\n{"text": {"a": "w"}, "label": 0}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:2: 'text' holds \{'a': 'w'\}, no string"):
        read(tmp_path / "t.jsonl")


def test_a_single_row_is_not_held_out(tmp_path: Path, bert: str) -> None:
    file = table(tmp_path, "text,label\nw1,a\n")
    with pytest.raises(ValueError, match=r"single record in files=.*t\.csv.* or val_fraction=0"):
        ClassificationDataModule(file, bert, labels=["a", "b"], party=0).setup("fit")


@pytest.mark.parametrize(("num_parties", "launched"), [(3, 2), (2, 3), (3, 1)])
def test_a_division_is_over_the_parties_that_there_are(
    num_parties: int, launched: int, file: str, bert: str
) -> None:
    data = ClassificationDataModule(file, bert, num_parties=num_parties, **IGNORED)
    message = rf"data\.num_parties={num_parties} .* the federation has {launched} \(this is party 0\)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", str(launched))
        with pytest.raises(ValueError, match=message):
            data.setup("fit")
        patch.setenv("WORLD_SIZE", str(num_parties))
        data.setup("fit")
        with pytest.raises(ValueError, match=r"data\.party=1 is given to party 0"):
            ClassificationDataModule(file, bert, num_parties=num_parties, party=1, **IGNORED).setup("fit")
