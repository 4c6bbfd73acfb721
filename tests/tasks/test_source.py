import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from pellm_lightning.tasks import source
from pellm_lightning.tasks.source import Source, check_splits, locate

ROWS = [{"text": "NA", "label": "007"}, {"text": "a\nb", "label": "1.0"}]


def written(folder: Path, kind: str) -> str:
    """Write the rows; return the path."""
    path, data = folder / f"a.{kind}", Dataset.from_list(ROWS)
    if kind in ("parquet.gz", "arrow.gz"):
        path.write_bytes(gzip.compress(Path(written(folder, kind.removesuffix(".gz"))).read_bytes()))
        return str(path)
    if kind == "parquet":
        data.to_parquet(path)
    elif kind == "arrow":
        data.save_to_disk(folder / "saved")
        (file,) = (folder / "saved").glob("*.arrow")
        file.rename(path)
    elif kind == "folder":
        data.save_to_disk(path)
    elif kind == "splits":
        DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(lines) if kind.lower().endswith("gz") else lines)
    return str(path)


def rows_of(source: Source) -> list[tuple[str, dict[str, Any]]]:
    return [(where, dict(row)) for where, row in source.rows()]


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "jsonl.gz", "JSONL.GZ", "parquet", "parquet.gz", "arrow", "arrow.gz", "folder", "splits"],
)
def test_every_kind_of_source_has_the_same_rows(kind: str, tmp_path: Path) -> None:
    name = written(tmp_path, kind)
    assert locate("files", name, 0) == (name,)
    assert rows_of(Source((name,))) == [(f"{name}:1", ROWS[0]), (f"{name}:2", ROWS[1])]


def test_a_split_is_chosen(tmp_path: Path) -> None:
    name = written(tmp_path, "splits")
    assert rows_of(Source((name,), split="test")) == [(f"{name}:1", ROWS[0])]
    with pytest.raises(ValueError, match=r"cannot be read as a data set .*the split 'dev'"):
        rows_of(Source((name,), split="dev"))


def test_what_chooses_nothing_is_refused(tmp_path: Path) -> None:
    folder, file = written(tmp_path, "splits"), written(tmp_path, "jsonl")
    check_splits("files", [folder, file], "test", None)
    with pytest.raises(
        ValueError, match=r"split='train\[:1\]' .* choose nothing in files, .*a\.jsonl is a file"
    ):
        check_splits("files", [file], "train[:1]", None)


def test_class_indices_become_their_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {"text": ["w1", "w2", "w3"], "label": [1, 0, -1]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    found = rows_of(Source((str(tmp_path / "saved"),)))
    assert [row["label"] for _, row in found] == ["pos", "neg", None]


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as a data set"):
        rows_of(Source((str(tmp_path / "a.parquet"),)))
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1" * 99)[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet\.gz: is no whole compressed file"):
        rows_of(Source((str(tmp_path / "a.parquet.gz"),)))
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"a\.parquet: the file is a pointer .*git lfs pull"):
        rows_of(Source((str(tmp_path / "a.parquet"),)))


def test_several_patterns_are_read_in_their_order_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b-1.txt", "a-1.txt", "a-2.txt"):
        Path(name).write_text("x")
    assert locate("files", ["b-*.txt", "*-{party}.txt"], 1) == ("b-1.txt", "a-1.txt")
    Dataset.from_list(ROWS).save_to_disk("saved-1")
    assert locate("files", "*-{party}*", 1) == ("a-1.txt", "b-1.txt", "saved-1")


def test_a_name_may_hold_brackets_and_the_home_folder(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    file = tmp_path / "a[1]" / "b.txt"
    file.write_text("x")
    assert locate("files", str(file), 0) == (str(file),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        assert locate("files", "~/a[1]/b.txt", 0) == (str(file),)


def test_what_is_no_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "clinic-2.csv").write_text("text\nw")
    for pattern, message in (
        ("folder", "folder is a folder: name its files"),
        ("data/train.jsonl", r"No file matches 'data/train\.jsonl' \(files='data/train\.jsonl', party 2"),
        ("a.xlsx", r"cannot read \.xlsx\. Use \.txt, .*\.parquet or \.arrow"),
        ("*.txt", "No file matches"),
        ("clinic-{rank}.csv", r"Nothing replaces '\{rank\}': .* is written '\{party\}'"),
        ("clinic-{party:02d}.csv", r"Nothing replaces '\{party:02d\}'"),
        ("clinic-{party}.tsv", r"Did you mean 'clinic-2\.csv'"),
        ("https://example.org/a.csv", "Addresses are not read: download"),
    ):
        with pytest.raises(ValueError, match=message):
            locate("files", pattern, 2)


def test_other_names_are_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Dataset:
        asked.append((arguments, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(source, "_commit", lambda name, revision: f"{name}@{revision}")
    (name,) = locate("files", "owner/name:main", 0)
    hub = Source((name,), split="train[:9]", revision="v1")
    assert [row for _, row in hub.rows(str(tmp_path), streaming=True)] == ROWS
    options = {"split": "train[:9]", "revision": "v1", "cache_dir": str(tmp_path), "streaming": True}
    assert asked == [(("owner/name", "main"), options)]
    assert hub.stamp() != Source((name,), split="train[:9]", revision="v2").stamp()


def test_offline_the_revision_is_read_that_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "datasets--owner--name"
    for revision, commit, label in (("main", "a" * 40, "new"), ("v1", "b" * 40, "old")):
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text(json.dumps({"text": "w", "label": label}) + "\n")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    named = {revision: Source(("owner/name",), revision=revision) for revision in (None, "v1", "b" * 40)}
    for streaming in (False, True):
        labels = {
            revision: [row["label"] for _, row in source.rows(str(tmp_path / "data"), streaming)]
            for revision, source in named.items()
        }
        assert labels == {None: ["new"], "v1": ["old"], "b" * 40: ["old"]}
    assert len({source.stamp() for source in named.values()}) == 3
    with pytest.raises(ValueError, match="owner/name: cannot be read"):
        list(Source(("owner/name",), revision="v2").rows(str(tmp_path / "data")))


def test_a_name_that_is_nowhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"owner/name: cannot be read .*no network.*an id on the hub"):
        rows_of(Source(locate("files", "owner/name", 0)))


def test_a_stamp_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Source((str(path),)).stamp()
    assert Source((str(path),)).stamp() == before
    path.write_text("two")
    assert Source((str(path),)).stamp() != before
