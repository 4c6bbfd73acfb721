import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pellm_lightning.tasks import ClassificationDataModule, TextDataModule

ROWS = [{"text": f"w{i}", "label": "ab"[i % 2], "site": f"s{i % 3}"} for i in range(24)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def words(data: Any) -> list[int]:
    """The first token of each sample, of which w0 has the index 2."""
    return [int(sample["input_ids"][0]) - 2 for sample in data.train_samples]


def texts(files: Any, llama: str, **options: Any) -> TextDataModule:
    ignored = [name for name in ("label", "site") if name != options.get("key_column")]
    settings = {"block_size": 2, "val_fraction": 0, "ignore_columns": ignored, **options}
    data = TextDataModule(files, llama, **settings)
    data.setup("fit")
    return data


def labelled(files: Any, bert: str, **options: Any) -> ClassificationDataModule:
    ignored = [] if options.get("key_column") else ["site"]
    settings = {"labels": ["a", "b"], "val_fraction": 0, "ignore_columns": ignored, **options}
    data = ClassificationDataModule(files, bert, **settings)
    data.setup("fit")
    return data


# ---- sources


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl.gz", "parquet", "saved"])
@pytest.mark.parametrize("make", [texts, labelled])
def test_both_modules_read_every_kind_of_file(make: Any, kind: str, tmp_path: Path, llama: str) -> None:
    path = tmp_path / f"a-1.{kind}"
    if kind == "saved":
        Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        delimiter = {"csv": ",", "tsv": "\t"}[kind]
        lines = [list(ROWS[0]), *(row.values() for row in ROWS)]
        path.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    data = make(str(tmp_path / "a-{party}.*"), llama, party=1)
    assert words(data) == list(range(24))


def test_several_files_are_read_in_their_order(tmp_path: Path, llama: str) -> None:
    for name, word in (("a.txt", "w1"), ("b.txt", "w2"), ("c.txt", "w3")):
        (tmp_path / name).write_text(word)
    files = [str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]
    assert words(texts(files, llama)) == [2, 1, 3]


def test_each_argument_has_its_split(tmp_path: Path, llama: str) -> None:
    from datasets import DatasetDict

    rows = Dataset.from_list(ROWS)
    splits = {"train": rows.select(range(20)), "validation": rows.select([21]), "dev": rows.select([22])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    for split, expected in ((None, 21), ({"val_files": "dev"}, 22)):
        data = texts(saved, llama, val_files=saved, split=split)
        assert words(data) == list(range(20))
        assert int(data.val_samples[0]["input_ids"][0]) - 2 == expected
    assert words(texts(saved, llama, split="dev")) == [22]
    with pytest.raises(ValueError, match=r"names \['dev'\]; use files, val_files"):
        TextDataModule("x", llama, split={"dev": "train"})


def test_a_chat_template_is_given_as_text_or_file(tmp_path: Path, llama: str) -> None:
    rows = [{"prompt": "w1", "completion": "w2"}]
    (tmp_path / "q.jsonl").write_text(json.dumps(rows[0]))
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    file = str(tmp_path / "q.jsonl")
    for given in (template, str(tmp_path / "chat.jinja")):
        data = texts(file, llama, chat_template=given, block_size=9)
        assert data.tokenizer.chat_template == template
        # user : w1 | assistant : w2, of which the generation prompt is no part here
        assert data.train_samples[0]["input_ids"].tolist() == [32, 34, 3, 33, 34, 4]
    plain = texts(file, llama, chat_template="", block_size=9)
    assert plain.train_samples[0]["input_ids"].tolist() == [3, 4, 0]
    with pytest.raises(ValueError, match=r"chat_template='none\.jinja' is neither a template nor"):
        texts(file, llama, chat_template="none.jinja")


# ---- streams


def test_a_stream_needs_no_copy_and_no_division(file: str, llama: str) -> None:
    data = texts(file, llama, streaming=True)
    assert sorted(words(data)) == list(range(24))
    assert words(data) != list(range(24))
    batches = list(data.train_dataloader())
    assert sum(len(batch["input_ids"]) for batch in batches) == 24
    assert not list(data._folder().rglob("*.arrow"))
    for more in ({"num_parties": 2}, {"num_workers": 1}, {"val_fraction": 0.1}):
        with pytest.raises(ValueError, match="a stream is neither divided nor read by workers"):
            texts(file, llama, streaming=True, **more)


def test_a_stream_names_a_bad_row_when_it_comes_to_it(tmp_path: Path, llama: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\n{"text": null}\n')
    data = TextDataModule(str(path), llama, val_fraction=0, streaming=True, block_size=2)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: 'text' is empty"):
        list(data.train_dataloader())


# ---- simulation


@pytest.mark.parametrize("partition", ["iid", "key", "dirichlet"])
def test_texts_are_divided_also(partition: str, file: str, llama: str) -> None:
    options: dict[str, Any] = {"partition": partition, "key_column": None if partition == "iid" else "site"}
    parts = [words(texts(file, llama, num_parties=2, party=party, **options)) for party in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(24))
    if partition == "key":
        assert not {word % 3 for word in parts[0]} & {word % 3 for word in parts[1]}


def test_only_what_is_divided_needs_the_key(file: str, tmp_path: Path, llama: str) -> None:
    with_key, without = tmp_path / "v.jsonl", tmp_path / "w.jsonl"
    with_key.write_text('{"text": "w1", "label": "a", "site": "s9"}')
    without.write_text('{"text": "w1", "label": "a"}')
    options = {"partition": "key", "key_column": "site", "num_parties": 2, "party": 0}
    for make in (texts, labelled):
        for path in (with_key, without):
            assert len(make(file, llama, val_files=str(path), **options).val_samples) == 1
    with pytest.raises(ValueError, match=r"w\.jsonl:1: has no column"):
        labelled(str(without), llama, **options)


def test_who_holds_what_is_told_once_and_drawn(
    file: str, bert: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pellm_lightning")
    modules = [
        labelled(file, bert, num_parties=2, party=party, partition="dirichlet", alpha=0.3, seed=1)
        for party in range(2)
    ]
    held = [Counter("ab"[sample["labels"]] for sample in data.train_samples) for data in modules]
    rows = [f"{party} {h['a']} {h['b']} {h.total()}".split() for party, h in enumerate(held)]
    first, second = (message.splitlines() for message in caplog.messages)
    assert [line.split() for line in first[-3:]] == [["party", "a", "b", "total"], *rows]
    assert not any(line.startswith("party") for line in second)
    axes = modules[1].plot_parties().axes[0]
    assert [[bar.get_width() for bar in label] for label in axes.containers] == [
        [h[name] for h in held] for name in "ab"
    ]
    with pytest.raises(ValueError, match="num_parties is not given"):
        labelled(file, bert).plot_parties()


def test_a_party_without_text_is_told(tmp_path: Path, bert: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,site\n,a,s0\nw1,b,s1\n,a,s0\n")
    with pytest.raises(ValueError, match=r"Party 0 has no text in files: all there is in .*a\.csv is blank"):
        labelled(str(path), bert, num_parties=2, party=0, partition="key", key_column="site")
