"""What is written says what was trained, or nothing is: merged models, several adapters, odd checkpoints."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pellm_lightning import FederatedAveraging, Parameters
from pellm_lightning.cli import export as export_module
from pellm_lightning.cli.export import export
from pellm_lightning.tasks import CausalLM, SaveAdapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:::huggingface_hub"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

IDS = torch.arange(3, 33)[None]  # the last tokens are w28 and w29: indices 30, 31
CLASS = "pellm_lightning.tasks.CausalLM"


@dataclass
class Settings:
    """A class of a user's own among hyperparameters."""

    rate: float = 0.05


class Own(LightningModule):
    """A user's module: it saves whatever it was given."""

    def __init__(
        self, model: str, peft: LoraConfig, settings: Settings | None = None, compiles: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft)
        if compiles:
            layers = self.model.get_base_model().model.layers
            layers[0] = torch.compile(layers[0], backend="eager")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Rows(CausalLM):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss


ROWS = f"{__name__}.Rows"


def fit(module: LightningModule, folder: Path, *callbacks: Any, **options: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = torch.utils.data.DataLoader(torch.randint(3, 35, (8, 8), generator=generator), batch_size=4)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
        callbacks=[FederatedAveraging(record=False, **options), *callbacks],
    )  # fmt: skip
    module.train()  # transformers loads in eval mode
    trainer.fit(module, rows)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def rows_of(model: str, peft: Any) -> Rows:
    return Rows(model, peft, optimizer=lambda params: torch.optim.Adam(params, lr=0.05))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, llama: str) -> str:
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(llama, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


TIED = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "DoRA on the head": {"target_modules": ["lm_head"], "use_dora": True},
    "copied head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "copied embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [30, 31]},
    "attention only": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}, "use_rslora": True},
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_merges_into_the_trained_one(name: str, tied: str, tmp_path: Path) -> None:
    module = rows_of(tied, LoraConfig(r=2, **TIED[name]))
    checkpoint = fit(module, tmp_path)
    said = logits(module.model)
    export(checkpoint, tmp_path / "out", module=ROWS, merged=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(whole), said, atol=1e-4, rtol=1e-4)  # rounding: W + BA once more
    both = whole.lm_head.weight, whole.model.embed_tokens.weight
    alike = name in ("rows", "attention only")
    assert torch.equal(*both) == whole.config.tie_word_embeddings == alike


def test_a_merged_model_that_differs_is_not_left(
    tied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = fit(rows_of(tied, LoraConfig(r=2, target_modules=["lm_head"])), tmp_path)

    def broken(model: PeftModel) -> Any:  # as PEFT alone does: both ends of the tied weight change
        return model.merge_and_unload()

    monkeypatch.setattr(export_module, "merge_", broken)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"says something else than the adapter model: .* off by"):
        export(checkpoint, tmp_path / "out", module=ROWS, merged=True)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_prompts_are_refused_before_anything_is_built(
    kind: Any, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = rows_of(llama, kind(num_virtual_tokens=3))
    checkpoint = fit(module, tmp_path)
    said = logits(module.model)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "configure_model", lambda self: pytest.fail("built"))
        with pytest.raises(ValueError, match=r"adds no weights that could be merged .* without --merged"):
            export(checkpoint, tmp_path / "out", module=ROWS, merged=True)
    assert not (tmp_path / "out").exists()
    export(checkpoint, tmp_path / "out", module=ROWS)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out")
    assert torch.allclose(logits(again), said, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_hyperparameters_with_classes(merged: bool, llama: str, tmp_path: Path) -> None:
    path = f"{__name__}.Own"
    peft = LoraConfig(r=2, target_modules=["q_proj"])
    module = Own(llama, peft)
    said = logits(module.model.eval()) * 0
    checkpoint = fit(module, tmp_path)
    said = logits(module.model)
    export(checkpoint, tmp_path / "out", module=path, merged=merged)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" if merged else llama)
    again = base if merged else PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.allclose(logits(again), said, atol=1e-4)


def test_other_classes_want_trust(llama: str, tmp_path: Path) -> None:
    peft = LoraConfig(r=2, target_modules=["q_proj"])
    checkpoint = fit(Own(llama, peft, Settings()), tmp_path)
    name = f"{__name__}.Settings"
    with pytest.raises(ValueError, match=rf"hold {name}, .* --trust {name}; or add --config"):
        export(checkpoint, tmp_path / "out", module=f"{__name__}.Own")
    export(checkpoint, tmp_path / "out", module=f"{__name__}.Own", trusted=[name])
    export(checkpoint, tmp_path / "given", module=Own(llama, peft))  # needs no hyperparameters


@pytest.mark.compiled
@pytest.mark.parametrize("compiles", [True, False])
def test_a_compiled_checkpoint_and_a_plain_module(compiles: bool, llama: str, tmp_path: Path) -> None:
    peft = LoraConfig(r=2, target_modules=["q_proj"])
    module = Own(llama, peft, compiles=compiles)
    checkpoint = fit(module, tmp_path, SaveAdapter("saved"))
    said = logits(module.model)
    export(checkpoint, tmp_path / "out", module=Own(llama, peft, compiles=not compiles))
    for folder in ("out", "saved"):
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / folder)
        assert torch.allclose(logits(again), said, atol=1e-5)


def test_what_is_no_checkpoint_is_named(llama: str, tmp_path: Path) -> None:
    checkpoint = fit(rows_of(llama, LoraConfig(r=2, target_modules=["q_proj"])), tmp_path, SaveAdapter())
    (tmp_path / "half.ckpt").write_bytes(checkpoint.read_bytes()[:3000])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"w": torch.zeros(1)}, tmp_path / "weights.pt")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").write_bytes(b"")
    for given, words in {
        "adapter": "is a folder of an adapter and no checkpoint",
        "adapter/adapter_model.safetensors": "is a safetensors file",
        "half.ckpt": "cannot be read as a Lightning checkpoint",
        "empty.ckpt": "is empty",
        "weights.pt": "holds weights only",
        "sharded": "consolidate_checkpoint",
        "none.ckpt": "There is no checkpoint",
        ".": r"is a folder and no checkpoint\. Name one of its files",
    }.items():
        with pytest.raises(ValueError, match=words):
            export(tmp_path / given, tmp_path / "out", module=ROWS)
    assert not (tmp_path / "out").exists()


def test_relative_paths_are_seen_from_where_the_fit_was(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, other = tmp_path / "project", tmp_path / "other"
    other.mkdir()
    shutil.copytree(llama, project / "some" / "model" / "small")
    monkeypatch.chdir(project)
    checkpoint = fit(rows_of("some/model/small", LoraConfig(r=2, target_modules=["q_proj"])), project)
    monkeypatch.chdir(other)
    export(checkpoint, Path("out"), module=ROWS, merged=True)
    assert (other / "out" / "config.json").exists()
    shutil.rmtree(project / "some")
    with pytest.raises(ValueError, match=r"names 'some/model/small', .* neither there nor here"):
        export(checkpoint, Path("again"), module=ROWS)


def two_adapters(llama: str, active: list[str]) -> Own:
    module = Own(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    base = AutoModelForCausalLM.from_pretrained(llama)
    module.model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="general")
    module.model.add_adapter("hospital", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]))
    module.model.base_model.set_adapter(active)
    return module


@pytest.mark.parametrize("active", [["general"], ["hospital"], ["general", "hospital"]])
def test_the_folder_of_two_adapters_loads(active: list[str], llama: str, tmp_path: Path) -> None:
    module = two_adapters(llama, active)
    checkpoint = fit(module, tmp_path, SaveAdapter("saved"))
    said = logits(module.model)
    export(checkpoint, tmp_path / "out", module=two_adapters(llama, active))
    assert list(module.model.peft_config) == ["general", "hospital"]  # as before
    for folder in ("saved", "out"):
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / folder)
        assert torch.allclose(logits(again), said, atol=1e-5)
    inside = {path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()}
    assert inside == (set(active) if len(active) > 1 else set())


def test_an_excluded_adapter_stays_and_the_card_says_so(llama: str, tmp_path: Path) -> None:
    module = two_adapters(llama, ["general", "hospital"])
    fit(module, tmp_path, SaveAdapter("saved"), parameters=Parameters(exclude=["*.general.*"]))
    said = logits(module.model)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "on which `general` was active, too, which is not federated and not here" in card
    module.model.save_pretrained(tmp_path / "own", selected_adapters=["general"])
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "saved")
    again.load_adapter(tmp_path / "own" / "general", adapter_name="general")
    again.base_model.set_adapter(["default", "general"])
    assert torch.allclose(logits(again), said, atol=1e-5)
