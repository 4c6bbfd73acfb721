"""What an earlier run has written is kept when a later one writes to the same place."""

import json
from pathlib import Path

import pytest

from pellm_lightning.tasks.earlier import backed_up_adapter, keep_earlier_file
from pellm_lightning.trainer.file_names import numbered, unused


def save(folder: Path, weights: bytes, *, base: bytes | None = None) -> None:
    with backed_up_adapter(folder):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        config = {"base_model_name_or_path": "hub/name"}
        if base is not None:
            (folder / "base").mkdir()
            (folder / "base/model.safetensors").write_bytes(base)
            config = {"base_model_name_or_path": str(folder / "base")}
        (folder / "adapter_config.json").write_text(json.dumps(config))


def test_the_folder_holds_the_latest_adapter_and_earlier_ones_have_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for weights in (b"one", b"two", b"two", b"three"):
        save(folder, weights)
    found = {path.parent.name: path.read_bytes() for path in tmp_path.glob("*/adapter_model.safetensors")}
    assert found == {"adapter": b"three", "adapter-1": b"one", "adapter-2": b"two"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter-1", "adapter-2"]


def test_an_adapter_that_is_moved_names_the_base_that_moves_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for weights in (b"one", b"two"):
        save(folder, weights, base=b"base of " + weights)
    for name, weights in {"adapter": b"two", "adapter-1": b"one"}.items():
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        base = Path(config["base_model_name_or_path"])
        assert (base / "model.safetensors").read_bytes() == b"base of " + weights


def test_what_is_no_adapter_stays(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for weights in (b"one", b"two"):
        save(folder, weights)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints/last.ckpt").write_bytes(weights)
    assert not (tmp_path / "adapter-1/checkpoints").exists()
    assert (folder / "checkpoints/last.ckpt").read_bytes() == b"two"


def test_a_file_is_kept_unless_it_holds_the_same(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    for content in ("1\n", "1\n", "2\n"):
        keep_earlier_file(path, content)
        path.write_text(content)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "predictions.jsonl": "2\n",
        "predictions-1.jsonl": "1\n",
    }


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a.csv", ["a.csv", "a-1.csv", "a-2.csv"]), ("b.c/a", ["b.c/a", "b.c/a-1", "b.c/a-2"])],
)
def test_numbered_names(path: str, expected: list[str]) -> None:
    names = numbered(path)
    assert [next(names) for _ in range(3)] == expected
    assert unused(path, {expected[0], expected[1]}.__contains__) == expected[2]


def test_several_adapters_of_an_earlier_run_are_kept_in_their_subfolders(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for weights in (b"one", b"two", b"two"):
        with backed_up_adapter(folder):
            for name in ("general", "hospital"):
                (folder / name).mkdir(parents=True, exist_ok=True)
                (folder / name / "adapter_config.json").write_text("{}")
                (folder / name / "adapter_model.safetensors").write_bytes(weights)
    found = {
        str(path.parent.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("adapter_model.safetensors")
    }
    assert found == {
        "adapter/general": b"two",
        "adapter/hospital": b"two",
        "adapter-1/general": b"one",
        "adapter-1/hospital": b"one",
    }
