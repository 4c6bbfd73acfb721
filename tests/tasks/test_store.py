import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fork_server import python
from launch import process_environ
from transformers import PreTrainedTokenizerFast

from pellm_lightning.tasks import TextDataModule, store
from pellm_lightning.tasks.formats import RowMapper
from pellm_lightning.tasks.store import quiet_datasets
from pellm_lightning.tasks.text import encode_texts


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "w{i} w{i}"}}\n' for i in range(20)))
    return tmp_path


def module(texts: Path, llama: str, **options: Any) -> TextDataModule:
    settings = {
        "block_size": 4,
        "val_fraction": 0.2,
        "party": 1,
        "cache_dir": str(texts / "{party}"),
        **options,
    }
    data = TextDataModule(str(texts / "a.jsonl"), llama, **settings)
    data.setup("fit")
    return data


def tokens(data: TextDataModule) -> list[list[int]]:
    return [sample["input_ids"].tolist() for sample in data.train_samples]


def test_what_was_read_and_tokenized_is_not_done_again(
    texts: Path, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokens(module(texts, llama))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(RowMapper, "__call__", never)
        patch.setattr("pellm_lightning.tasks.text.Encoder", never)
        assert tokens(module(texts, llama)) == first
        assert tokens(module(texts, llama, block_size=5))[0][:4] == first[0], (
            "blocks are views on the same tokens"
        )
        with pytest.raises(AssertionError, match="made again"):
            module(texts, llama, ignore_columns=["id"])
    (texts / "a.jsonl").write_text('{"text": "w5"}\n' * 20)
    assert tokens(module(texts, llama))[0] == [7, 0, 7, 0], "other content in a file of the same name"


@pytest.mark.torchrun
def test_another_process_finds_the_cache(texts: Path, llama: str) -> None:
    first = tokens(module(texts, llama))
    files = {path: path.stat().st_mtime_ns for path in (texts / "1").rglob("*.arrow")}
    code = f"""
from pathlib import Path
from pellm_lightning.tasks import TextDataModule
data = TextDataModule({str(texts / "a.jsonl")!r}, {llama!r}, block_size=4, val_fraction=0.2, party=1,
                      cache_dir={str(texts)!r} + "/{{party}}")
data.setup("fit")
print([sample["input_ids"].tolist() for sample in data.train_samples])
"""
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True, env=process_environ())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(first)
    assert files == {path: path.stat().st_mtime_ns for path in (texts / "1").rglob("*.arrow")}


def test_the_key_is_of_the_tokenizer_s_rules_not_of_its_use(tokenizer: PreTrainedTokenizerFast) -> None:
    before = store._tokenizer_key(tokenizer)
    tokenizer(["w1 w2", "w3"], truncation=True, max_length=1)
    tokenizer.pad_token = None
    assert store._tokenizer_key(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    with_template = store._tokenizer_key(tokenizer)
    tokenizer.add_tokens("w30")
    assert len({before, with_template, store._tokenizer_key(tokenizer)}) == 3


@pytest.mark.parametrize("num_proc", [2, 50])
def test_processes_tokenize_alike(num_proc: int, texts: Path, llama: str) -> None:
    alone = tokens(module(texts, llama))
    assert tokens(module(texts, llama, num_proc=num_proc, cache_dir=str(texts / "other"))) == alone


def test_the_folder_is_the_party_s_own(texts: Path, llama: str) -> None:
    module(texts, llama)
    assert (texts / "1").stat().st_mode & 0o077 == 0, "it holds the data"
    data = module(texts, llama, cache_dir=None)
    folder = data._folder()
    assert list(folder.rglob("*.arrow"))
    del data
    assert not folder.exists(), "without a Trainer it is temporary"


def test_a_remote_root_holds_no_copy(texts: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    data = module(texts, llama, cache_dir=None)
    data.trainer = SimpleNamespace(default_root_dir="s3://bucket/runs")
    assert data._folder().is_dir()
    assert texts not in data._folder().parents
    assert not list(texts.glob("s3*"))


def test_progress_bars_are_only_hidden_meanwhile() -> None:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    with quiet_datasets():
        assert are_progress_bars_disabled()
    assert not are_progress_bars_disabled()
    disable_progress_bars()
    with quiet_datasets():
        pass
    assert are_progress_bars_disabled()
    enable_progress_bars()


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'pellm-lightning\[tasks\]'"), quiet_datasets():
        pass


def test_batches_of_a_map_are_records(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = {name: [value] for name, value in RowMapperColumns.items()}
    assert encode_texts(batch, tokenizer)["input_ids"] == [[3, 0]]


RowMapperColumns = {
    "text": "w1",
    "messages": None,
    "tools": None,
    "learned": 0,
    "is_chat": False,
    "key": "",
    "where": "a:1",
    "blank": False,
}
