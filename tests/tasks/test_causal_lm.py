import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from peft import LoraConfig, PeftModel
from tolerances import assert_says_the_same
from transformers import AutoModelForCausalLM

from pellm_lightning.tasks import CausalLM, SaveAdapter, TextDataModule

Arguments = dict[str, Any]


@pytest.fixture
def data(tmp_path: Path, llama: str) -> TextDataModule:
    (tmp_path / "train.txt").write_text("w1 w2 w3 w4 w5 w6 " * 32)
    (tmp_path / "val.jsonl").write_text(
        '{"instruction": "w1 w2", "response": "w3"}\n'
        '{"instruction": "w1", "response": "w2 w3 w4 w5"}\n'
        '{"instruction": "w4 w5 w6", "response": "w1 w2"}\n'
    )
    return TextDataModule(
        str(tmp_path / "train.txt"),
        llama,
        batch_size=2,
        block_size=12,
        val_files=str(tmp_path / "val.jsonl"),
        test_files=str(tmp_path / "val.jsonl"),
        predict_files=str(tmp_path / "val.jsonl"),
    )


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def parameters_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_a_fit_reduces_the_loss(
    peft: LoraConfig | None, data: TextDataModule, llama: str, quiet_trainer: Arguments
) -> None:
    torch.manual_seed(0)
    module = CausalLM(llama, peft, optimizer=adam)
    trainer = Trainer(**quiet_trainer, max_epochs=3)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert after["val_loss"] < before["val_loss"] - 0.01
    assert trainer.callback_metrics["val_perplexity"] == pytest.approx(math.exp(after["val_loss"]))


@pytest.mark.filterwarnings("ignore:You are trying to `self.log.*` but the `self.trainer`:UserWarning")
def test_a_mean_over_records_weighs_every_record_alike(llama: str) -> None:
    labels = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, -100, -100, -100, -100]])
    batch = {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}
    torch.manual_seed(0)
    module = CausalLM(llama, mean_over="records")
    module.configure_model()
    alone = [
        module.model(**{key: value[row : row + 1] for key, value in batch.items()}).loss for row in (0, 1)
    ]
    torch.testing.assert_close(module.training_step(batch, 0), (alone[0] + alone[1]) / 2)
    module.mean_over = "tokens"
    torch.testing.assert_close(module.training_step(batch, 0), (5 * alone[0] + alone[1]) / 6)


def test_perplexity_weights_every_token_alike(
    data: TextDataModule, llama: str, quiet_trainer: Arguments
) -> None:
    """Batches of 2 and 1 samples with 2 + 5 and 3 response tokens: a mean of batch means would differ."""
    (result,) = Trainer(**quiet_trainer).test(CausalLM(llama), data, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(llama).double()
    losses = []
    for prompt, response in (([3, 4], [5, 0]), ([3], [4, 5, 6, 7, 0]), ([6, 7, 8], [3, 4, 0])):
        with torch.no_grad():
            log_probabilities = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        first = len(prompt)
        losses += [-log_probabilities[first + i - 1, token].item() for i, token in enumerate(response)]
    assert len(losses) == 10
    assert result["test_loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)
    assert result["test_perplexity"] == pytest.approx(math.exp(sum(losses) / 10), rel=1e-5)


def test_only_the_adapter_trains(data: TextDataModule, llama: str, quiet_trainer: Arguments) -> None:
    module = CausalLM(llama, lora(), optimizer=adam)
    module.configure_model()
    before = parameters_of(module)
    assert all(part.training for part in module.modules())
    Trainer(**quiet_trainer, max_steps=3).fit(module, data)
    changed = {name for name, value in parameters_of(module).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_a_saved_adapter_gives_the_same_logits(
    data: TextDataModule, llama: str, quiet_trainer: Arguments, tmp_path: Path
) -> None:
    module = CausalLM(llama, lora(), optimizer=adam)
    Trainer(**quiet_trainer, max_steps=3, callbacks=SaveAdapter("saved/party-{party}")).fit(module, data)
    tokens = torch.arange(12).view(1, -1)
    folder = str(tmp_path / "saved" / "party-0")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder)
    again = CausalLM(llama, adapter=folder)
    again.configure_model()
    with torch.no_grad():
        expected = module.model(input_ids=tokens).logits
        for loaded in (plain, again.model):
            assert_same(dict(loaded.named_parameters()), dict(module.model.named_parameters()))
            assert_says_the_same(loaded(input_ids=tokens).logits, expected)
    assert any(parameter.requires_grad for parameter in again.parameters())
    assert all(part.training for part in again.modules())


def test_a_checkpoint_loads_without_its_configuration(
    data: TextDataModule, llama: str, quiet_trainer: Arguments, tmp_path: Path
) -> None:
    module = CausalLM(llama, lora(), optimizer=adam)
    trainer = Trainer(**quiet_trainer, max_steps=3)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "x.ckpt", map_location="cpu")
    assert_same(parameters_of(loaded), parameters_of(module))
    assert loaded.peft.target_modules == {"q_proj", "v_proj"}


# Lightning calls what jsonargparse has renamed.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
def test_a_checkpoint_of_the_command_line_loads(
    data: TextDataModule,
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quiet_trainer: Arguments,
) -> None:
    monkeypatch.setattr("sys.argv", ["cli"])
    ia3 = {"target_modules": ["k_proj"], "feedforward_modules": []}
    decay = {"step_size": 1, "gamma": 0.1}
    config = {
        "class_path": "pellm_lightning.tasks.CausalLM",
        "init_args": {
            "model": llama,
            "peft": {"class_path": "peft.IA3Config", "init_args": ia3},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
            "scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": decay},
        },
    }
    cli = LightningCLI(
        CausalLM,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        seed_everything_default=False,
        save_config_callback=None,
        trainer_defaults={**quiet_trainer, "default_root_dir": str(tmp_path), "max_steps": 2},
        args={"model": config},
        run=False,
    )
    cli.trainer.fit(cli.model, data)
    again = pickle.loads(pickle.dumps(cli.model))
    assert_same(parameters_of(again), parameters_of(cli.model))
    # 0.5 * 0.1 ** 2: the scheduler moves with each step.
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
    cli.trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "x.ckpt", map_location="cpu")
    assert_same(parameters_of(loaded), parameters_of(cli.model))
    assert type(loaded.optimizer([torch.nn.Parameter(torch.zeros(1))])) is torch.optim.SGD


def test_a_resumed_fit_ends_where_an_unbroken_one_does(
    data: TextDataModule, llama: str, quiet_trainer: Arguments, tmp_path: Path
) -> None:
    def fit(epochs: int, resume: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = CausalLM(llama, lora(), optimizer=adam)
        trainer = Trainer(**quiet_trainer, max_epochs=epochs)
        trainer.fit(module, data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return parameters_of(module)

    unbroken = fit(2)
    fit(1)
    assert_same(fit(2, resume=tmp_path / "1.ckpt"), unbroken)


def test_prediction_continues_each_prompt(data: TextDataModule, llama: str, quiet_trainer: Arguments) -> None:
    torch.manual_seed(0)
    module = CausalLM(llama, optimizer=adam, max_new_tokens=3)
    trainer = Trainer(**quiet_trainer, max_epochs=25, limit_val_batches=0)
    trainer.fit(module, data)
    # It has learned to count from w1 to w6, round and round; the prompts end on w2, w1 and w6.
    assert trainer.predict(module, data) == [["w3 w4 w5", "w2 w3 w4"], ["w1 w2 w3"]]


def test_plateau_schedulers_step_on_the_validation_loss(
    data: TextDataModule, llama: str, quiet_trainer: Arguments
) -> None:
    def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, threshold=100.0, threshold_mode="abs", patience=0
        )

    trainer = Trainer(**quiet_trainer, max_epochs=2)
    trainer.fit(CausalLM(llama, optimizer=adam, scheduler=plateau), data)
    # The first epoch sets the mark, the second does not better it by 100.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)


def test_the_constructor_loads_nothing() -> None:
    module = CausalLM("no/such-model")
    assert list(module.parameters()) == []


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model='.*missing\.gguf' cannot be loaded") as error:
        CausalLM(str(tmp_path / "missing.gguf")).configure_model()
    assert isinstance(error.value.__cause__, OSError)
