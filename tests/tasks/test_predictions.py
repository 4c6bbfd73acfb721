import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pellm_lightning.tasks import SavePredictions


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([["one", "naïve"], ["two"]], ["one", "naïve", "two"]),
        ([torch.tensor([2, 0]), torch.tensor([1])], [2, 0, 1]),
    ],
    ids=["texts", "labels"],
)
@pytest.mark.parametrize(("world_size", "name"), [(1, "kept/p.jsonl"), (2, "kept/p.1.jsonl")])
def test_predictions_are_lines_of_json(
    batches: list, expected: list, world_size: int, name: str, tmp_path: Path
) -> None:
    trainer = SimpleNamespace(default_root_dir=tmp_path, world_size=world_size, global_rank=world_size - 1)
    SavePredictions("kept/p.jsonl").write_on_epoch_end(trainer, None, batches, [])
    assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == expected
