"""Loading of pretrained models and tokenizers: by hub id, local folder or GGUF file."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from lightning.pytorch import LightningModule
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pellm_lightning.tasks.quantization import Quantization, config_of, options_of, prepare_, skip_head

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_OF_ATTENTION = "[Aa]ttention|attn|kernels"


@dataclass(frozen=True)
class Pretrained:
    """Source of a pretrained model: its name, and how transformers loads it.

    The fields are arguments of the ready-made modules, which describe them.

    Raises:
        ValueError: If ``quantization`` has no meaning, or is of a GGUF file.
        ImportError: If it needs bitsandbytes, which is not installed.
    """

    name: str
    dtype: Dtype = "auto"
    quantization: Quantization | dict[str, Any] | None = None
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        quantized = config_of(self.quantization, self.dtype) is not None
        if quantized and Path(self.name).suffix == ".gguf":
            raise ValueError(
                f"quantization={self.quantization!r} cannot be applied to the GGUF file {self.name!r}. Unpack"
                " it once: load the file without quantization, call save_pretrained of model and tokenizer"
                " with a folder, and name that."
            )

    def model(self, auto_class: Any, device: torch.device, **options: Any) -> PreTrainedModel:
        """Load the model, prepared for training on its quantised weights if it has any.

        Args:
            auto_class: For example ``AutoModelForCausalLM``.
            device: Where a quantised model is loaded, since it is hard to move; others are loaded on the CPU.
            options: Passed to ``from_pretrained``.

        Raises:
            ValueError: If there is no such model, or it lacks what is asked for.
            ImportError: If a package is missing.
        """
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        options |= self._hub_options()
        config = config_of(self.quantization, self.dtype)
        if config is not None:
            described = _from_pretrained("model", AutoConfig, self.name, self.name, self._hub_options())
            options |= options_of(skip_head(config, auto_class, described, self.trust_remote_code), device)
        model = load_model(auto_class, self.name, self.dtype, **options)
        prepare_(model)
        if self.gradient_checkpointing:
            checkpoint_activations_(model, self.name)
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the same name and revision."""
        return load_tokenizer(self.name, **self._hub_options())

    def _hub_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        return options if self.revision is None else options | {"revision": self.revision}


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and make sure that it has padding and end-of-sequence tokens.

    Args:
        name: Hub id, local folder or GGUF file.
        options: Passed to ``from_pretrained``, such as ``revision`` and ``trust_remote_code``.

    Raises:
        ValueError: If there is no such tokenizer, or it has no end-of-sequence token.
        ImportError: If it is a GGUF file and the package gguf is not installed.
    """
    folder, gguf = _locate(name)
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(
        "tokenizer", AutoTokenizer, name, folder, options | gguf
    )
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
        ValueError: If there is no such model, or it has code of its own that is not trusted, no such revision
            or no such attention.
        ImportError: If a package is missing that the file or the attention needs.
    """
    folder, gguf = _locate(name)
    if gguf:
        options = {**options, **gguf, **_unpacked()}
    model: PreTrainedModel = _from_pretrained("model", auto_class, name, folder, {"dtype": dtype, **options})
    return model


def device_of(module: LightningModule) -> torch.device:
    """Return the device on which a module will be trained; the CPU if it is in no Trainer."""
    try:
        return module.trainer.strategy.root_device
    except RuntimeError:  # not attached to a Trainer
        return torch.device("cpu")


def checkpoint_activations_(model: Any, name: str) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    Raises:
        ValueError: If the model cannot.
    """
    # transformers 5.23 has renamed the method and its argument.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        # The reentrant kind needs inputs that require gradients, which a frozen embedding does not give.
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(
            f"gradient_checkpointing=True is not supported by model={name!r} ({type(model).__name__}). Leave"
            " it out; smaller batches, with the Trainer's accumulate_grad_batches, save memory also."
        ) from error


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


def _from_pretrained(what: str, auto_class: Any, name: str, folder: str, options: dict[str, Any]) -> Any:
    revision, attention = options.get("revision"), options.get("attn_implementation")
    if revision is not None and Path(folder).exists():
        raise ValueError(
            f"revision={revision!r} is of a repository on the hub, and {what}={name!r} is a local folder,"
            " which has no revisions. Leave revision out, or give the id on the hub."
        )
    # Without an answer transformers would ask on the terminal of each party, and wait.
    options = {"trust_remote_code": False, **options}
    try:
        return auto_class.from_pretrained(folder, **options)
    except SafetensorError as error:
        raise ValueError(
            f"{what}={name!r} cannot be loaded: its weights are damaged, or copied in part ({error}). Copy or"
            " download them again."
        ) from error
    except (OSError, ValueError, ImportError) as error:
        text = str(error)
        if "trust_remote_code=True" in text and not options["trust_remote_code"]:
            raise ValueError(
                f"{what}={name!r} comes with Python code of its own, which would be run at every party."
                " Read that code; then set trust_remote_code=True, with revision=<commit> so that it stays"
                " the code that you have read."
            ) from error
        if attention is not None and not isinstance(error, OSError) and re.search(_OF_ATTENTION, text):
            raise (ImportError if isinstance(error, ImportError) else ValueError)(
                f"attn_implementation={attention!r} cannot be used for {what}={name!r}:"
                f" {text.splitlines()[0]} Install the package, or take 'sdpa' or 'eager', which need none."
            ) from error
        if isinstance(error, ImportError):
            raise
        raise ValueError(_not_found(what, name, revision, text)) from error


def _not_found(what: str, name: str, revision: str | None, reason: str) -> str:
    at = "" if revision is None else f" at revision={revision!r}"
    return (
        f"{what}={name!r}{at} cannot be loaded: it should be a folder or a .gguf file (seen from"
        f" {Path.cwd()}), or the id of a model on the hub, which has to be reachable or in the local cache."
        f" {reason.splitlines()[0].removesuffix(' from one of:'):.200}"
    )
