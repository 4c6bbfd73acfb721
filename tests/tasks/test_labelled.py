import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from pellm_lightning.tasks import ClassificationDataModule
from pellm_lightning.tasks.labelled import Row, read_rows

ROWS = [{"text": f"w{i}", "label": "ab"[i % 2], "who": f"person {i % 4}"} for i in range(24)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_and_jsonl_read_alike(suffix: str, delimiter: str, tmp_path: Path, file: str) -> None:
    path = tmp_path / f"all.{suffix}"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ROWS[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    rows = read_rows(path, "text", "label", "who")
    assert rows == read_rows(Path(file), "text", "label", "who")
    assert rows[5] == Row("w5", "b", "person 1")


def parties(file: str, llama: str, **options: object) -> list[ClassificationDataModule]:
    built = []
    for party in range(2):
        data = ClassificationDataModule(file, llama, num_parties=2, party=party, val_fraction=0.0, **options)
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
    data = ClassificationDataModule(file, bert, labels=["b", "a"], batch_size=4, val_fraction=0.25)
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
        ClassificationDataModule(file, bert, labels=["a", "c"], party=0).setup("fit")
    with pytest.raises(ValueError, match=r"all\.jsonl:1: has nothing under \['topic'\]; it has \['text'"):
        ClassificationDataModule(file, bert, labels=["a", "b"], label_column="topic").setup("fit")
    (tmp_path / "short.csv").write_text("text,label\nonly text\n")
    with pytest.raises(ValueError, match=r"short\.csv:2: has nothing under \['label'\]"):
        read_rows(tmp_path / "short.csv", "text", "label")
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: expected an object, found list"):
        read_rows(tmp_path / "bad.jsonl", "text", "label")


def test_settings_that_contradict_are_refused(file: str, bert: str) -> None:
    with pytest.raises(ValueError, match="partition='key' and key_column=None"):
        ClassificationDataModule(file, bert, num_parties=2, partition="key")
    with pytest.raises(ValueError, match="Party 2 has no part of num_parties=2"):
        ClassificationDataModule(file, bert, num_parties=2, party=2).setup("fit")
    with pytest.raises(ValueError, match="test_files is not given"):
        ClassificationDataModule(file, bert, labels=["a", "b"]).setup("test")
