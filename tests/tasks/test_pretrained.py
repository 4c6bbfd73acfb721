from typing import Any

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

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
