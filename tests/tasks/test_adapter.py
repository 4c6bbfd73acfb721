from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import AdaLoraConfig, LoraConfig

from pellm_lightning.tasks import CausalLM, SaveAdapter
from pellm_lightning.tasks.adapter import config_of, make_plain_


@pytest.fixture
def module(llama: str) -> CausalLM:
    module = CausalLM(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    module.configure_model()
    return module


def save(callback: SaveAdapter, module: torch.nn.Module, folder: Path, party: int, **state: bool) -> None:
    trainer = SimpleNamespace(
        **{"default_root_dir": str(folder), "is_global_zero": True, "callbacks": [], **state}
    )
    callback.party = party
    callback.on_fit_end(trainer, module)


def test_without_a_placeholder_only_party_0_writes(module: CausalLM, tmp_path: Path) -> None:
    save(SaveAdapter(), module, tmp_path, party=1)
    assert list(tmp_path.iterdir()) == []
    save(SaveAdapter(), module, tmp_path, party=0)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_with_a_placeholder_every_party_writes_its_own(module: CausalLM, tmp_path: Path) -> None:
    save(SaveAdapter("party-{party}"), module, tmp_path, party=2)
    assert [folder.name for folder in tmp_path.iterdir()] == ["party-2"]


def test_one_process_of_a_party_writes_and_a_dry_run_none(module: CausalLM, tmp_path: Path) -> None:
    save(SaveAdapter(), module, tmp_path, party=0, is_global_zero=False)
    save(SaveAdapter(), module, tmp_path, party=0, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_an_adapter_is_refused(llama: str, tmp_path: Path) -> None:
    whole = CausalLM(llama)
    whole.configure_model()
    with pytest.raises(MisconfigurationException, match="no PEFT model in CausalLM"):
        save(SaveAdapter(), whole, tmp_path, party=0)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules=["a", "b"], rank_pattern={"a": 1}, task_type="CAUSAL_LM"),
        AdaLoraConfig(target_modules="all-linear", total_step=10, tinit=1, tfinal=1),
    ],
    ids=["lora", "adalora"],
)
def test_a_configuration_returns_from_its_plain_form(config: LoraConfig, tmp_path: Path) -> None:
    hparams = {"peft": config, "optimizer": torch.optim.SGD, "dtype": "auto"}
    make_plain_(hparams)
    torch.save(hparams, tmp_path / "hparams.pt")
    loaded = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert loaded.keys() == {"peft", "dtype"}
    assert config_of(loaded["peft"]) == config
