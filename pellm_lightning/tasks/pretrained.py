"""Loading of pretrained models and tokenizers: by hub id, local folder or GGUF file."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and make sure that it has padding and end-of-sequence tokens.

    Raises:
        ValueError: If there is no such tokenizer, or it has no end-of-sequence token.
        ImportError: If it is a GGUF file and the package gguf is not installed.
    """
    folder, options = _locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("tokenizer", name, error)) from error
    end = tokenizer.eos_token if tokenizer.eos_token is not None else tokenizer.sep_token
    if end is None:
        raise ValueError(
            f"tokenizer={name!r} has no eos_token (nor sep_token) to end a document with. Give it"
            " the one that the model was trained with: load it, set tokenizer.eos_token, save_pretrained into"
            " a folder, and name that."
        )
    tokenizer.eos_token = end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = end  # padding is masked in attention and loss: any token will do
    return tokenizer


def load_model(auto_class: Any, name: str, dtype: Dtype = "auto", **options: Any) -> PreTrainedModel:
    """Load a model by one of transformers' auto classes.

    Args:
        auto_class: For example ``AutoModelForCausalLM``.
        name: Hub id, local folder or GGUF file (``folder/file.gguf``; ``owner/repo/file.gguf`` on the hub).
        dtype: Dtype of the parameters; ``auto`` keeps that of the file, float32 for a GGUF file.
        options: Passed to ``from_pretrained``.

    Raises:
        ValueError: If there is no such model.
        ImportError: If it is a GGUF file and the package gguf is not installed.
    """
    folder, gguf = _locate(name)
    if gguf:
        options = {**options, **gguf, **_unpacked()}
    try:
        model: PreTrainedModel = auto_class.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("model", name, error)) from error
    return model


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """Split ``folder/file.gguf`` for ``from_pretrained``; other names are not changed."""
    path = Path(name)
    if path.suffix != ".gguf":
        return name, {}
    if find_spec("gguf") is None:
        raise ImportError(
            f"{name!r} needs the package gguf to be read: pip install 'pellm-lightning[tasks]'."
        )
    return str(path.parent), {"gguf_file": path.name}


def _unpacked() -> dict[str, Any]:
    """Request plain tensors: newer transformers may keep GGUF blocks packed, which cannot be trained."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _not_found(what: str, name: str, error: Exception) -> str:
    return (
        f"{what}={name!r} cannot be loaded: it should be a folder or a .gguf file (seen from {Path.cwd()}), "
        "or the id of a model on the hub, which has to be reachable or in the local cache. "
        f"{str(error).splitlines()[0]:.200}"
    )
