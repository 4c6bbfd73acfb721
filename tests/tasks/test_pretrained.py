import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CTRLConfig,
    CTRLLMHeadModel,
    PreTrainedTokenizerFast,
)

from pellm_lightning.tasks import CausalLM
from pellm_lightning.tasks.pretrained import load_model, load_tokenizer


class Recorder:
    """Stands in for an auto class and keeps what it was asked."""

    def from_pretrained(self, name: str, **options: Any) -> tuple[str, dict[str, Any]]:
        return name, options


def test_a_gguf_file_is_unpacked_into_plain_tensors() -> None:
    name, options = load_model(Recorder(), "folder/model.Q4.gguf")
    assert (name, options["gguf_file"], options["dtype"]) == ("folder", "model.Q4.gguf", "auto")
    if hasattr(transformers, "GgufConfig"):
        assert options["quantization_config"].dequantize


def test_other_names_pass_as_they_are() -> None:
    # Unless told, transformers asks on the terminal whether code of the model's own may run.
    options = {"dtype": "bfloat16", "trust_remote_code": False}
    assert load_model(Recorder(), "owner/model", "bfloat16") == ("owner/model", options)


def test_a_tokenizer_can_pad(llama: str) -> None:
    assert load_tokenizer(llama).pad_token == "<eos>"


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_is_nowhere_is_named(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"tokenizer='.*nothing' cannot be loaded"):
        load_tokenizer(str(tmp_path / "nothing"))


# ---- how it is loaded


@pytest.fixture
def own_code(tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder whose model is of a class in the folder itself."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        'class OwnConfig(LlamaConfig):\n    model_type = "own"\n'
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return str(folder)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_code_of_the_model_s_own_is_run_only_if_trusted(own_code: str, quantization: Any) -> None:
    peft = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match=r"own' comes with Python code.*trust_remote_code=True, with revision"
    ):
        CausalLM(own_code, peft, quantization=quantization).configure_model()
    trusting = CausalLM(own_code, peft, quantization=quantization, trust_remote_code=True)
    trusting.configure_model()
    assert type(trusting.model.get_base_model()).__name__ == "Own"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flash_attention_2", "FlashAttention2.*Install the package, or take 'sdpa' or 'eager'"),
        ("own_attention", "attn_implementation='own_attention' cannot be used"),
    ],
)
def test_attention_that_is_not_there_is_named(name: str, says: str, llama: str) -> None:
    if name == "flash_attention_2" and find_spec("flash_attn"):
        pytest.skip("it is installed")
    with pytest.raises((ImportError, ValueError), match=says):
        CausalLM(llama, attn_implementation=name).configure_model()


def test_attention_is_chosen(llama: str) -> None:
    for name in ("eager", "sdpa"):
        module = CausalLM(llama, attn_implementation=name)
        module.configure_model()
        assert module.model.config._attn_implementation == name


def test_a_folder_has_no_revisions(llama: str) -> None:
    with pytest.raises(ValueError, match=r"revision='v1'.*is a local folder"):
        CausalLM(llama, revision="v1").configure_model()
    with pytest.raises(ValueError, match=r"revision='v1'.*tokenizer=.*is a local folder"):
        load_tokenizer(llama, revision="v1")


def test_a_revision_is_asked_for_and_named_by_the_adapter(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def found(kind: Any) -> Any:
        load = kind.from_pretrained

        def from_pretrained(name: str, revision: str | None = None, **options: Any) -> Any:
            if name == llama:  # transformers itself
                return load(name, **options)
            asked.append((kind.__name__, name, revision))
            return load(llama, **options)

        return from_pretrained

    for kind in (AutoModelForCausalLM, AutoTokenizer, AutoConfig):
        monkeypatch.setattr(kind, "from_pretrained", found(kind))
    peft = LoraConfig(r=2, target_modules=["q_proj"])
    module = CausalLM("owner/name", peft, revision="v1", quantization="nf4")
    module.configure_model()
    module.on_predict_start()
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    assert asked == [(kind, "owner/name", "v1") for kind in kinds]
    assert module.model.peft_config["default"].revision == "v1"


def test_gradient_checkpointing_computes_twice_and_the_same(llama: str) -> None:
    def gradients(checkpointing: bool) -> tuple[int, dict[str, Tensor]]:
        torch.manual_seed(0)
        peft = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        module = CausalLM(llama, peft, gradient_checkpointing=checkpointing)
        module.configure_model()
        calls: list[Any] = []
        mlp = module.model.get_base_model().model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_: calls.append(None))
        ids = torch.arange(3, 19).view(2, 8)
        module.model(input_ids=ids, labels=ids).loss.backward()
        found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        return len(calls), found

    (once, expected), (twice, found) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)
    assert any(value.any() for value in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_a_model_that_cannot_checkpoint_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    CTRLLMHeadModel(CTRLConfig(vocab_size=37, n_embd=8, dff=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True is not supported.*CTRLLMHeadModel"):
        CausalLM(str(tmp_path), gradient_checkpointing=True).configure_model()
