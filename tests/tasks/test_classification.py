import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig

from pellm_lightning.tasks import ClassificationDataModule, TextClassification

LABELS = ["a", "b", "c"]


@pytest.fixture
def data(tmp_path: Path, bert: str) -> ClassificationDataModule:
    path = tmp_path / "all.jsonl"
    rows = [{"text": f"w{i} w{i}", "label": LABELS[i % 3]} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: str(path) for name in ("val_files", "test_files")}
    return ClassificationDataModule(str(path), bert, labels=LABELS, batch_size=8, **files)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=3e-2)


def test_an_adapter_and_its_head_learn(
    data: ClassificationDataModule, bert: str, quiet_trainer: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    module = TextClassification(bert, 3, LoraConfig(r=4, target_modules=["query", "value"]), optimizer=adam)
    trainer = Trainer(**quiet_trainer, max_epochs=25, limit_val_batches=0)
    trainer.fit(module, data)
    (result,) = trainer.test(module, data, verbose=False)
    predicted = torch.cat(trainer.predict(module, data))
    expected = torch.arange(30) % 3
    accuracy = (predicted == expected).float().mean().item()
    assert accuracy > 0.6
    assert result["test_accuracy"] == pytest.approx(accuracy)
    assert result["test_f1"] == pytest.approx(macro_f1(predicted, expected))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert any("classifier" in name for name in trained)


def macro_f1(predicted: torch.Tensor, expected: torch.Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of each label, averaged."""
    scores = []
    for label in range(3):
        hits = ((predicted == label) & (expected == label)).sum()
        scores.append(2 * hits / ((predicted == label).sum() + (expected == label).sum()))
    return float(torch.stack(scores).mean())


def test_all_parties_draw_the_same_head(bert: str) -> None:
    modules = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = TextClassification(bert, 3, LoraConfig(target_modules=["query"]))
        module.configure_model()
        modules.append(dict(module.named_parameters()))
    frozen = [name for name, parameter in modules[0].items() if not parameter.requires_grad]
    assert any("classifier.original_module" in name for name in frozen)
    assert all(torch.equal(modules[0][name], modules[1][name]) for name in frozen)


def test_the_head_s_seed_leaves_the_global_generator_alone(bert: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    TextClassification(bert, 3).configure_model()
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_loads(
    data: ClassificationDataModule, bert: str, quiet_trainer: dict[str, Any], tmp_path: Path
) -> None:
    module = TextClassification(bert, 3, optimizer=adam)
    trainer = Trainer(**quiet_trainer, max_steps=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = TextClassification.load_from_checkpoint(tmp_path / "x.ckpt", map_location="cpu")
    for left, right in zip(loaded.parameters(), module.parameters(), strict=True):
        assert torch.equal(left, right)


def test_one_label_is_refused() -> None:
    with pytest.raises(ValueError, match="num_labels=1"):
        TextClassification("model", 1)
