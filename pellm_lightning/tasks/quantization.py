"""Quantised base models (QLoRA): bitsandbytes' settings, preparation for training, dequantisation."""

import copy
import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from transformers import BitsAndBytesConfig, PretrainedConfig

Quantization: TypeAlias = Literal["nf4", "fp4", "int8"] | BitsAndBytesConfig
"""A scheme by its name, with the settings of the QLoRA paper, or all settings."""

_SCHEMES = ("nf4", "fp4", "int8")


def config_of(quantization: Quantization | Mapping[str, Any] | None, dtype: str) -> BitsAndBytesConfig | None:
    """Return the configuration of a quantisation.

    A name stands for blocks of 64 weights in 4 bits, whose scales are quantised also (double quantisation),
    or for LLM.int8(). 4-bit weights are computed with in ``dtype``, in bfloat16 if that is ``auto``.

    Args:
        quantization: Name, configuration, or the dictionary that a checkpoint holds of one.
        dtype: Dtype of the other parameters.

    Raises:
        ValueError: If there is no such scheme or setting.
        ImportError: If bitsandbytes is not installed.
    """
    if quantization is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantization={quantization!r} needs the package bitsandbytes: pip install"
            " 'pellm-lightning[quantization]'."
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization in ("nf4", "fp4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
        )
    config = _from_dict(quantization) if isinstance(quantization, Mapping) else quantization
    if not isinstance(config, BitsAndBytesConfig) or config.quantization_method() is None:
        raise ValueError(
            f"quantization={quantization!r} names no scheme. Set it to one of {', '.join(_SCHEMES)}, or to"
            " the settings of a transformers.BitsAndBytesConfig with load_in_8bit=True, or with"
            " load_in_4bit=True and bnb_4bit_quant_type 'nf4' or 'fp4'."
        )
    return config


def _from_dict(settings: Mapping[str, Any]) -> BitsAndBytesConfig:
    known = inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    # What to_dict adds to them.
    given = {key: value for key, value in settings.items() if key[0] != "_" and key != "quant_method"}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ValueError(
            f"quantization has no setting {unknown[0]!r}. transformers.BitsAndBytesConfig knows"
            f" {', '.join(sorted(known))}."
        )
    return BitsAndBytesConfig(**given)


def options_of(config: BitsAndBytesConfig, device: torch.device) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` that quantise a model while it is loaded."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    place = device.type if index is None or device.type == "cpu" else f"{device.type}:{index}"
    return {"quantization_config": config, "device_map": {"": place}}


def skip_head(
    config: BitsAndBytesConfig, auto_class: Any, described: PretrainedConfig, trust_remote_code: bool
) -> BitsAndBytesConfig:
    """Return settings that leave what is not the base model, a head, as it is, since it may be trained.

    transformers leaves the last parameter's module as it is, but not if that parameter is a bias, and so
    quantises the new heads of many encoders.

    Args:
        config: Settings; modules that they skip already stay the only ones.
        auto_class: Class of the model with the head, which is built without memory.
        described: The model's configuration.
        trust_remote_code: Whether its own code may be run.
    """
    if config.llm_int8_skip_modules is not None:
        return config
    with torch.device("meta"):
        empty = auto_class.from_config(described, trust_remote_code=trust_remote_code)
    parts = [name for name, _ in empty.named_children()]
    if empty.base_model_prefix not in parts:
        return config
    config = copy.copy(config)
    config.llm_int8_skip_modules = [name for name in parts if name != empty.base_model_prefix]
    return config


def is_quantized(model: Any) -> bool:
    """Return whether a model of transformers has quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def prepare_(model: Any) -> None:
    """Freeze a quantised model for an adapter, with its other parameters in float32.

    This is PEFT's ``prepare_model_for_kbit_training`` without its gradient checkpointing, which is the same
    for all models. Models that are not quantised are not changed.
    """
    if not is_quantized(model):
        return
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for layer in model.modules():
        # On some CPUs the first evaluation would pack the weights anew and round their scales once more: the
        # base would no longer be that of the other parties, nor that of a resumed fit.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def dequantized(model: PeftModel) -> PeftModel:
    """Return a PEFT model with the same adapters on dequantised weights; ``model`` is used up.

    The base gets the dtype that its file has, or that was asked for.

    Raises:
        ValueError: If transformers cannot dequantise the base.
    """
    configs = {name: copy.deepcopy(config) for name, config in model.peft_config.items()}
    weights = {name: get_peft_model_state_dict(model, adapter_name=name) for name in configs}
    active = list(model.active_adapters)
    tuner: Any = model.base_model
    base: Any = tuner.unload()
    dtype = base.config.dtype
    try:
        base = base.dequantize()
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"transformers cannot dequantise this base model: {error}") from error
    for parameter in base.parameters():  # and no buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    adapters = iter(configs.items())
    name, config = next(adapters)
    again: Any = get_peft_model(base, _without_init(config), adapter_name=name)
    for name, config in adapters:
        again.add_adapter(name, _without_init(config))
    for name, values in weights.items():
        set_peft_model_state_dict(again, values, adapter_name=name)
    again.base_model.set_adapter(active)
    restored: PeftModel = again
    return restored


def _without_init(config: Any) -> Any:
    """Let an adapter's initialisation not change the base again."""
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True
    return config
