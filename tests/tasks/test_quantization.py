"""Fits on quantised base models: what is loaded, trained by two parties, saved, resumed, exported, merged."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import Connecting, run_parties
from peft import LoraConfig, PeftModel
from tiny_language_models import word_tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from pellm_lightning import FederatedAveraging, FederatedCLI, Federation, Parameters
from pellm_lightning.cli.export import export
from pellm_lightning.tasks import CausalLM, TextClassification, quantization
from pellm_lightning.tasks.quantization import config_of, dequantized
from pellm_lightning.tensors.frozen_state import frozen_state

bnb = pytest.importorskip("bitsandbytes")

pytestmark = [
    # Of int8 layers, whose inputs are rounded from float16.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:::peft"),
    # Lightning calls what jsonargparse has renamed.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    # Of a checkpoint with a quantised base that is loaded in spite of what ours warns of.
    pytest.mark.filterwarnings("ignore:Found keys that are not in the model state dict:UserWarning"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model as wide as bitsandbytes' kernels for inference on CPUs ask for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


KINDS = {"nf4": "Linear4bit", "fp4": "Linear4bit", "int8": "Linear8bitLt"}
CLASS = "pellm_lightning.tasks.CausalLM"


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def loader(seed: int) -> DataLoader[Any]:
    ids = torch.randint(3, 35, (8, 8), generator=torch.Generator().manual_seed(seed))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    return DataLoader(rows, batch_size=4)


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 35)[None]).logits


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def trained_in(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- what is loaded


@pytest.mark.parametrize("scheme", KINDS)
def test_the_base_is_quantised_and_the_adapter_is_not(scheme: Any, llama: str) -> None:
    module = CausalLM(llama, lora(), quantization=scheme)
    module.configure_model()
    layer = module.model.get_base_model().model.layers[0].self_attn
    assert type(layer.k_proj).__name__ == type(layer.q_proj.base_layer).__name__ == KINDS[scheme]
    assert type(module.model.get_base_model().lm_head) is nn.Linear
    floating = {p.dtype for p in module.model.parameters() if p.is_floating_point()}
    assert floating == {torch.float32}
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        name for name, _ in module.named_parameters() if "lora_" in name
    }


def test_names_have_the_settings_of_the_qlora_paper() -> None:
    config = config_of("nf4", "auto")
    assert config is not None
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert (config.bnb_4bit_use_double_quant, config.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    assert config_of("fp4", "float16").bnb_4bit_compute_dtype == torch.float16
    assert config_of("int8", "auto").load_in_8bit
    assert config_of(None, "auto") is None


def test_all_settings_can_be_given_and_come_out_of_a_checkpoint(
    llama: str, quiet_trainer: dict[str, Any], tmp_path: Path
) -> None:
    given = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["up_proj"]
    )
    module = CausalLM(llama, lora(), optimizer=adam, quantization=given)
    trainer = Trainer(**quiet_trainer, max_steps=1)
    trainer.fit(module, loader(0))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "x.ckpt", map_location="cpu", strict=False)
    for each in (module, loaded):
        layer = each.model.get_base_model().model.layers[0]
        assert isinstance(layer.self_attn.k_proj, bnb.nn.Linear4bit)
        assert type(layer.mlp.up_proj) is nn.Linear
        assert not layer.self_attn.k_proj.weight.quant_state.nested
    assert_same(trained_in(loaded), trained_in(module))


@pytest.mark.parametrize("scheme", KINDS)
def test_a_new_head_is_not_quantised(
    scheme: Any, bert: str, quiet_trainer: dict[str, Any], tmp_path: Path
) -> None:
    peft = LoraConfig(r=2, target_modules=["query"])
    module = TextClassification(bert, num_labels=3, peft=peft, optimizer=adam, quantization=scheme)
    module.configure_model()
    before = trained_in(module)
    assert any("classifier" in name for name in before)
    rows = [{"input_ids": torch.arange(3, 9), "attention_mask": torch.ones(6).long(), "labels": 2}] * 4
    Trainer(**quiet_trainer, max_steps=2).fit(module, DataLoader(rows, batch_size=2))
    after = trained_in(module)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    kept = module.model.get_base_model().bert.encoder.layer[0].attention.self.key
    assert type(kept).__name__ == KINDS[scheme]


@pytest.mark.parametrize("scheme", KINDS)
def test_evaluation_leaves_the_weights_as_they_are(scheme: Any, llama: str) -> None:
    """On CPUs with bfloat16 bitsandbytes would pack 4 bits anew, for inference only."""
    module = CausalLM(llama, lora(), quantization=scheme)
    module.configure_model()
    before = {name: value.clone() for name, value in frozen_state(module).items()}
    said = logits(module.model)
    after = frozen_state(module)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())
    assert torch.equal(logits(module.model), said)


def test_a_model_that_was_saved_quantised_is_prepared(llama: str, tmp_path: Path) -> None:
    config = config_of("nf4", "auto")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config).save_pretrained(tmp_path / "q")
    module = CausalLM(str(tmp_path / "q"), lora())
    module.configure_model()
    assert isinstance(module.model.get_base_model().model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert all("lora_" in name for name in trained_in(module))


# ---- two parties


class Fit:
    """A federated fit of two parties on quantised weights."""

    def __init__(self, llama: str, folder: Path, scheme: Any) -> None:
        self.llama, self.folder, self.scheme = llama, folder, scheme

    def module(self, **options: Any) -> CausalLM:
        return CausalLM(self.llama, lora(), optimizer=adam, quantization=self.scheme, **options)

    def run(self, epochs: int, name: str, resume: str | None = None) -> list[CausalLM]:
        modules = [self.module(gradient_checkpointing=True) for _ in range(2)]
        for module in modules:  # here, since parties are threads and draw from one generator
            torch.manual_seed(0)
            module.configure_model()

        def act(federation: Federation) -> CausalLM:
            party = federation.party
            path, module = self.folder / f"party-{party}", modules[party]
            callback = Connecting(
                lambda: federation, every_n_steps=1, record=False, parameters=Parameters(save_frozen=False)
            )
            trainer = Trainer(
                max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=path,
                callbacks=[callback],
            )  # fmt: skip
            trainer.fit(module, loader(party), ckpt_path=None if resume is None else path / resume)
            trainer.save_checkpoint(path / name)
            return module

        return run_parties(2, act)


@pytest.fixture(params=KINDS)
def fit(request: pytest.FixtureRequest, llama: str, tmp_path: Path) -> Fit:
    return Fit(llama, tmp_path, request.param)


def test_parties_end_alike_and_resume_exactly(fit: Fit) -> None:
    whole = fit.run(2, "whole.ckpt")
    assert_same(*map(trained_in, whole))
    assert any(value.any() for name, value in trained_in(whole[0]).items() if "lora_B" in name)
    saved = torch.load(fit.folder / "party-0/whole.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name for name in saved)
    fit.run(1, "half.ckpt")
    resumed = fit.run(2, "again.ckpt", resume="half.ckpt")
    assert_same(trained_in(resumed[1]), trained_in(whole[1]))


def test_an_exported_and_a_merged_model_say_what_was_trained(fit: Fit) -> None:
    trained = fit.run(2, "x.ckpt")[0].model
    checkpoint, folder = fit.folder / "party-1/x.ckpt", fit.folder
    export(checkpoint, folder / "adapter", module=CLASS)
    config = config_of(fit.scheme, "auto")
    base = AutoModelForCausalLM.from_pretrained(fit.llama, quantization_config=config, dtype="float32")
    expected = logits(trained)
    # On CPUs with bfloat16 bitsandbytes computes otherwise in inference, where ours does not let it.
    assert off(logits(PeftModel.from_pretrained(base, folder / "adapter")), expected) < 0.01
    export(checkpoint, folder / "merged", module=CLASS, merged=True)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    with trained.disable_adapter():
        effect = off(logits(trained), expected)
    # What is left is what rounding the inputs of layers does: to bfloat16, and to 8 bits.
    assert off(logits(merged), expected) < 0.02
    assert off(logits(merged), expected) < 0.25 * effect


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_merged_model_has_the_dtype_of_the_base(scheme: Any, llama: str, tmp_path: Path) -> None:
    base = str(tmp_path / "bfloat16")
    AutoModelForCausalLM.from_pretrained(llama, dtype="bfloat16").save_pretrained(base)
    fit = Fit(base, tmp_path, scheme)
    trained = fit.run(1, "x.ckpt")[0].model
    export(tmp_path / "party-0/x.ckpt", tmp_path / "merged", module=CLASS, merged=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert off(logits(merged).float(), logits(trained)) < 0.05


def test_settings_of_the_command_line_come_out_of_a_checkpoint(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["cli"])
    texts = tmp_path / "text.txt"
    texts.write_text("w1 w2 w3 w4 w5 w6 " * 32)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    config = {
        "seed_everything": False,
        "federated": {"record": False, "parameters": {"save_frozen": False}},
        "model": {
            "class_path": CLASS,
            "init_args": {
                "model": llama,
                "quantization": settings,
                "peft": {
                    "class_path": "peft.LoraConfig",
                    "init_args": {"r": 2, "target_modules": ["q_proj"]},
                },
            },
        },
        "data": {
            "class_path": "pellm_lightning.tasks.TextDataModule",
            "init_args": {"files": str(texts), "tokenizer": llama, "block_size": 12, "batch_size": 2},
        },
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "logger": False,
            "default_root_dir": str(tmp_path),
            "enable_progress_bar": False,
            "enable_checkpointing": False,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    words = [f"--config={tmp_path}/run.yaml"]
    cli = FederatedCLI(run=False, args=words, save_config_callback=None, auto_configure_optimizers=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.trainer.save_checkpoint(tmp_path / "x.ckpt")
    export(tmp_path / "x.ckpt", tmp_path / "merged", merged=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert off(logits(merged), logits(cli.model.model)) < 1e-4
    kept = cli.model.model.get_base_model().model.layers[0].mlp.up_proj
    assert (kept.compute_dtype, kept.weight.quant_state.nested) == (torch.float32, False)


def test_a_merged_model_that_dequantised_wrongly_is_refused(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Fit(llama, tmp_path, "nf4")
    fit.run(1, "x.ckpt")

    def without_a_factor(model: PeftModel) -> PeftModel:
        again = dequantized(model)
        again.get_base_model().lm_head.weight.data.zero_()
        return again

    monkeypatch.setattr("pellm_lightning.cli.merging.dequantized", without_a_factor)
    with pytest.raises(ValueError, match="says something else than the adapter model"):
        export(tmp_path / "party-0/x.ckpt", tmp_path / "out", module=CLASS, merged=True)
    assert not (tmp_path / "out").exists()


def test_a_base_that_cannot_be_dequantised_is_refused_with_the_cure(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Fit(llama, tmp_path, "nf4")
    module = fit.run(1, "x.ckpt")[0]

    def dequantize(*_: Any) -> None:
        raise NotImplementedError("gptq has no implementation of `dequantize`")

    monkeypatch.setattr(type(module.model.get_base_model()), "dequantize", dequantize)
    with pytest.raises(ValueError, match=r"gptq has no implementation.*Export it without --merged"):
        export(tmp_path / "party-0/x.ckpt", tmp_path / "out", module=CLASS, merged=True)
    assert not (tmp_path / "out").exists()


def test_several_adapters_and_trained_copies_survive_dequantisation(llama: str) -> None:
    module = CausalLM(llama, lora(modules_to_save=["lm_head"]), quantization="nf4", dtype="float32")
    module.configure_model()
    model = module.model
    model.add_adapter("second", LoraConfig(r=3, target_modules=["k_proj"], use_dora=True))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = logits(model)
    again = dequantized(model)
    assert set(again.active_adapters) == {"default", "second"}
    assert off(logits(again), expected) < 1e-5
    assert not any(isinstance(part, bnb.nn.Linear4bit) for part in again.modules())


# ---- what cannot work


def test_checkpoints_with_a_quantised_base_are_warned_of(
    llama: str, quiet_trainer: dict[str, Any], tmp_path: Path
) -> None:
    def fit(save_frozen: bool) -> None:
        parameters = Parameters(save_frozen=save_frozen)
        callbacks = [
            FederatedAveraging(record=False, parameters=parameters),
            ModelCheckpoint(tmp_path / str(save_frozen)),
        ]
        options = quiet_trainer | {"enable_checkpointing": True, "callbacks": callbacks, "max_steps": 1}
        Trainer(**options).fit(CausalLM(llama, lora(), optimizer=adam, quantization="nf4"), loader(0))

    fit(save_frozen=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(save_frozen=True)
    assert [w for w in caught if re.search("base model is quantised.*save_frozen=False", str(w.message))]


def test_quantised_weights_themselves_are_not_trained(llama: str, quiet_trainer: dict[str, Any]) -> None:
    module = CausalLM(llama, quantization="nf4")
    trainer = Trainer(**quiet_trainer, max_steps=1)
    with pytest.raises(MisconfigurationException, match=r"nothing to train.*integers.*--model.peft"):
        trainer.fit(module, loader(0))
    Trainer(**quiet_trainer).validate(module, loader(0), verbose=False)


def test_bitsandbytes_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"'int8' needs.*pip install 'pellm-lightning\[quantization\]'"):
        CausalLM("a/model", lora(), quantization="int8")
    CausalLM("a/model", lora())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("nf5", "names no scheme.*nf4, fp4, int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "setting 'bnb_4bit_quant_typ'.*quant_type"),
        ({"load_in_4bit": False}, "names no scheme"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf8"}, "names no scheme.*'nf4' or 'fp4'"),
        ({"class_path": "transformers.GPTQConfig", "init_args": {"bits": 4}}, "no setting 'class_path'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("build", [CausalLM, lambda *a, **k: TextClassification(*a, num_labels=2, **k)])
def test_unknown_settings_are_refused(build: Callable[..., Any], given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build("a/model", peft=lora(), quantization=given)


def test_gguf_files_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quantization='nf4'.*GGUF file 'a/b.gguf'.*save_pretrained"):
        CausalLM("a/b.gguf", lora(), quantization="nf4")


# The page's percents are rounded ones.
@pytest.mark.parametrize(("kind", "percent"), [("nf4", 9), ("fp4", 12), ("int8", 1)])
def test_the_errors_of_layers_are_those_of_the_page(kind: str, percent: int) -> None:
    from bitsandbytes import nn as quantised

    generator = torch.Generator().manual_seed(0)
    weights, inputs = (torch.randn(rows, 1024, generator=generator) for rows in (512, 64))
    if kind == "int8":
        layer: Any = quantised.Linear8bitLt(1024, 512, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = quantised.Int8Params(weights.clone(), requires_grad=False, has_fp16_weights=False)
        inputs = inputs.bfloat16()
    else:
        layer = quantised.Linear4bit(1024, 512, bias=False, quant_type=kind, compute_dtype=torch.float32)
        layer.weight = quantised.Params4bit(weights.clone(), requires_grad=False, quant_type=kind)
    found, wanted = layer.to("cpu")(inputs).float(), inputs.float() @ weights.T
    assert 100 * float((found - wanted).norm() / wanted.norm()) == pytest.approx(percent, abs=0.5)
