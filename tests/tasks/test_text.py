import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pellm_lightning.comm.topology import Topology
from pellm_lightning.tasks import TextDataModule
from pellm_lightning.tasks.loading import EpochSampler


def write_parties(folder: Path) -> str:
    """Party 0 holds w0 to w9, party 1 w10 to w19: ten documents of two blocks of four tokens each."""
    for party in (0, 1):
        (folder / f"party-{party}").mkdir()
        for document in range(10):
            word = f"w{10 * party + document} "
            (folder / f"party-{party}" / f"{document}.txt").write_text(word * 7)
    return str(folder / "party-{party}" / "*.txt")


def tokens(data: TextDataModule) -> set[int]:
    return {token for sample in data.train_samples for token in sample["input_ids"].tolist()}


def test_each_party_reads_its_own_files(tmp_path: Path, llama: str) -> None:
    pattern = write_parties(tmp_path)
    data = TextDataModule(pattern, llama, block_size=4, val_fraction=0.0, party=1)
    data.setup("fit")
    assert tokens(data) == {0, *range(12, 22)}
    assert len(data.train_samples) == 20
    assert data.val_dataloader() == []


def test_the_party_is_the_federation_s_when_it_is_not_given(tmp_path: Path, llama: str) -> None:
    data = TextDataModule(write_parties(tmp_path), llama, block_size=4, val_fraction=0.0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
            patch.setenv(name, str(value))
        data.setup("fit")
    assert tokens(data) == {0, *range(12, 22)}


def test_held_out_documents_are_not_trained_on(tmp_path: Path, llama: str) -> None:
    data = TextDataModule(write_parties(tmp_path), llama, block_size=4, val_fraction=0.2, party=0)
    data.setup("fit")
    held_out = {token for sample in data.val_samples for token in sample["input_ids"].tolist()}
    assert len(held_out) == 3  # two documents' words, and the end token that both sides share
    assert tokens(data) & held_out == {0}


def test_an_epoch_has_its_own_order_and_always_the_same(tmp_path: Path, llama: str) -> None:
    pattern = write_parties(tmp_path)

    def order(epoch: int) -> list[list[int]]:
        data = TextDataModule(pattern, llama, block_size=4, party=0, batch_size=3)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [row for batch in loader for row in batch["input_ids"].tolist()]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))


def test_the_processes_of_a_party_share_its_samples() -> None:
    samples = list(range(10))
    halves = [
        list(EpochSampler(samples, SimpleNamespace(world_size=2, global_rank=rank), seed=0))
        for rank in (0, 1)
    ]
    assert sorted(halves[0] + halves[1]) == samples
    assert sorted(EpochSampler(samples, None, seed=0)) == samples


def test_prompts_are_padded_on_the_left(tmp_path: Path, llama: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"text": "w1 w2"}\n{"instruction": "w3", "response": "unseen"}\n'
    )
    data = TextDataModule("unused", llama, predict_files=str(tmp_path / "prompts.jsonl"))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["input_ids"].tolist() == [[3, 4], [0, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_no_file_is_an_error_that_says_where_it_looked(
    tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = TextDataModule("data/party-{party}/*.txt", llama, party=2)
    with pytest.raises(ValueError, match=r"No file matches 'data/party-2/\*\.txt' .*party 2") as error:
        data.setup("fit")
    assert str(tmp_path) in str(error.value)


def test_too_little_text_is_an_error_with_the_block_that_fits(tmp_path: Path, llama: str) -> None:
    pattern = write_parties(tmp_path)
    # Nine documents of seven words and an end are kept, one is held out.
    with pytest.raises(ValueError, match=r"Party 1 has no sample in files: .* 72 tokens, .* of at most 72\."):
        TextDataModule(pattern, llama, party=1, block_size=512).setup("fit")
    with pytest.raises(
        ValueError, match=r"the validation split: its 1 texts .* at most 8; .* val_fraction=0\."
    ):
        TextDataModule(pattern, llama, party=1, block_size=10).setup("fit")
    TextDataModule(pattern, llama, party=1, block_size=8).setup("fit")


def write_records(folder: Path, *records: tuple[str, str]) -> str:
    rows = [json.dumps({"instruction": prompt, "response": text}) + "\n" for prompt, text in records]
    (folder / "r.jsonl").write_text("".join(rows))
    return str(folder / "r.jsonl")


def test_prompts_that_fill_the_block_ask_for_a_larger_one(tmp_path: Path, llama: str) -> None:
    file = write_records(tmp_path, ("w1 w2 w3 w4", "w5"), ("w1 w2 w3 w4 w5", "w6 w7"))
    data = TextDataModule(file, llama, party=0, block_size=4, val_fraction=0.0)
    # 4 + 2 and 5 + 3 tokens; a response is learned from its first token on.
    message = "larger block_size: 8 holds every record whole, 6 some of each, 5 some of one"
    with pytest.raises(ValueError, match=rf"r\.jsonl:1, 4 tokens of prompt.*{message}"):
        data.setup("fit")


def test_a_single_record_is_not_held_out(tmp_path: Path, llama: str) -> None:
    file = write_records(tmp_path, ("w1", "w2"))
    with pytest.raises(ValueError, match=r"single record in files=.*of party 2.* or val_fraction=0"):
        TextDataModule(file, llama, party=2).setup("fit")
    data = TextDataModule(file, llama, party=2, val_fraction=0)
    data.setup("fit")
    assert len(data.train_samples) == 1


def test_what_is_left_out_or_cut_is_said_once(
    tmp_path: Path, llama: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_records(
        tmp_path,
        ("w1 w2 w3 w4", "w5"),
        ("w1", "w2 w3 w4 w5"),
        ("w1", " "),
        ("w1", "w2"),
        ("w1 w2 w3 w4 w5", "w6"),
    )
    data = TextDataModule(file, llama, party=1, block_size=4, val_fraction=0)
    data.setup("fit")
    data.setup("validate")
    assert len(data.train_samples) == 2
    (said,) = caplog.messages
    assert [line.split() for line in said.splitlines()[:2]] == [
        ["Party", "1,", "block_size=4", "records", "samples", "tokens", "cut", "left", "out"],
        ["files", "5", "2", "7", "1", "3"],  # 4 and 3 tokens
    ]
    assert "\nfiles: 1 blank record is left out" in said
    assert "2 records are left out, whose prompt leaves no room for a response, 4 tokens" in said
    assert f"(the first: {file}:1)" in said
    # 1 + 5 tokens in a block of 4.
    assert (
        f"1 response is cut, by 2 tokens in all and without an end-of-sequence token (the first: {file}:2)"
        in said
    )
    assert "block_size=7 would keep each record whole" in said


def test_only_the_first_process_of_a_party_speaks(
    tmp_path: Path, llama: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        monkeypatch.setattr(
            "pellm_lightning.tasks.summary.topology_of", lambda _, rank=rank: Topology(0, 1, rank, 2)
        )
        data = TextDataModule(
            write_records(tmp_path, ("w1", "w2 w3 w4 w5")), llama, party=0, block_size=4, val_fraction=0
        )
        data.trainer = SimpleNamespace(default_root_dir=tmp_path)
        data.setup("fit")
    assert len(caplog.messages) == 1


def test_blank_files_and_prompts_are_named(tmp_path: Path, llama: str) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(
        ValueError, match=r"Party 0 has no text in files: all there is in .*blank\.txt is blank"
    ):
        TextDataModule(str(tmp_path / "blank.txt"), llama, party=0).setup("fit")
    file = write_records(tmp_path, ("w1", ""), (" ", "w2"))
    with pytest.raises(ValueError, match=r"r\.jsonl:2: the prompt is blank"):
        TextDataModule("x", llama, party=0, predict_files=file).setup("predict")


def test_a_stage_without_files_is_an_error(tmp_path: Path, llama: str) -> None:
    data = TextDataModule(write_parties(tmp_path), llama, party=0)
    with pytest.raises(ValueError, match=r"test_files is not given.*--data\.test_files"):
        data.setup("test")


@pytest.mark.parametrize(("argument", "value"), [("block_size", 1), ("val_fraction", 1.0)])
def test_arguments_are_checked_at_once(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        TextDataModule("x.txt", "tokenizer", **{argument: value})
