"""PEFT configurations of the adapters in use: what must be equal at all parties, as plain values.

Equal names and shapes do not say what a number means: which tokens a row stands for, from which seed a fixed
projection was drawn, by what an update is scaled. That is in the configuration. Nothing of PEFT is imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeAlias

from torch import nn

AdapterConfigs: TypeAlias = dict[str, dict[str, Any]]
"""Plain values of each adapter's configuration, by the adapter's name and the field's."""

MAY_DIFFER = {
    "peft_version": "what a number means is compared field by field",
    "auto_mapping": "it names the class of the base model",
    "base_model_name_or_path": "the same weights may lie elsewhere, and are compared themselves",
    "revision": "the weights are compared themselves",
    "inference_mode": "it says what is trained, which the parameters show",
    "runtime_config": "it says where something is computed",
    "tokenizer_name_or_path": "a path",
    "prompt_tuning_init_state_dict_path": "a path to values that the first broadcast overwrites",
    "cache_file": "a path",
    "covariance_file": "a path",
    "verbose": "output only",
    "target_modules": "the names of the parameters show where adapters sit",
    "exclude_modules": "the names of the parameters show where adapters sit",
    "target_parameters": "the names of the parameters show where adapters sit",
    "layers_to_transform": "the names of the parameters show where adapters sit",
    "layers_pattern": "the names of the parameters show where adapters sit",
    "modules_to_save": "the names of the parameters show what is trained in whole",
}
"""Fields that may differ between parties, and why; so may every field with ``dropout`` in its name."""

RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""Fields of LoRA that may differ where the aggregation lets ranks differ: it knows each party's scaling."""

_DRAWN = "it draws random numbers"
_OF_DATA = "it depends on a party's own data"
_ROUNDED = "it decomposes the weights, which rounds differently on another processor"
_WRITES_BASE = {
    "pissa": _ROUNDED,
    "pissa_niter": _DRAWN,
    "olora": _ROUNDED,
    "loftq": _ROUNDED,
    "lora_ga": _OF_DATA,
    "corda": _OF_DATA,
}


def adapter_configs(module: nn.Module) -> AdapterConfigs:
    """Return the configurations of the adapters that a module's forward pass uses, by adapter.

    What means that a field is unset (None, False, an empty list or dictionary) is left out, so that a field
    which only one party's version of PEFT knows makes no difference until somebody sets it. So is what may
    differ.
    """
    found: AdapterConfigs = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        configs = getattr(part, "peft_config", None)
        if not isinstance(configs, Mapping) or id(configs) in seen:
            continue
        seen.add(id(configs))
        used = _active(part)
        for adapter, config in configs.items():
            if (adapter in used or getattr(config, "arrow_config", None)) and is_dataclass(config):
                name = f"{path}.{adapter}" if adapter in found else adapter
                found[name] = _fields(config)
    return found


def config_differences(
    ours: AdapterConfigs, theirs: AdapterConfigs, fields_of: Sequence[str] = (), without: Sequence[str] = ()
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield adapter, field and both values where two parties' configurations differ; None is unset.

    Args:
        ours: Configurations of one party.
        theirs: Those of another.
        fields_of: Compare these fields of LoRA's only.
        without: Compare all fields but these of LoRA's.
    """
    for adapter in sorted(ours.keys() & theirs.keys()):
        one, other = ours[adapter], theirs[adapter]
        kinds = {config.get("peft_type") for config in (one, other)}
        for field in sorted(one.keys() | other.keys(), key=lambda name: (name != "peft_type", name)):
            if fields_of and not (field in fields_of and kinds == {"LORA"}):
                continue
            if field in without and kinds == {"LORA"}:
                continue
            if one.get(field) != other.get(field):
                yield adapter, field, one.get(field), other.get(field)


def without_ranks(configs: AdapterConfigs) -> AdapterConfigs:
    """Return configurations without what may differ where ranks may."""
    return {
        adapter: {
            field: value
            for field, value in config.items()
            if config.get("peft_type") != "LORA" or field not in RANK_FIELDS
        }
        for adapter, config in configs.items()
    }


def init_that_writes_base(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return an initialisation that writes into the frozen weights, and why its result may differ.

    None if the adapter's initialisation leaves them alone.
    """
    init = config.get("init_lora_weights")
    if isinstance(init, str):
        kind = "pissa_niter" if init.lower().startswith("pissa_niter") else init.lower().partition("_")[0]
        why = _WRITES_BASE.get(init.lower()) or _WRITES_BASE.get(kind)
        if why is not None:
            return f"init_lora_weights={init!r}", why
    if config.get("kasa_config"):
        return "kasa_config", _ROUNDED
    return None


def _active(part: Any) -> set[str]:
    active = getattr(part, "active_adapters", None)
    if active is None:
        return set(part.peft_config)
    active = active() if callable(active) else active  # a method in transformers, a property in PEFT
    return {active} if isinstance(active, str) else set(active)


def _fields(config: Any) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name, None) for field in fields(config)}
    mixed = values.get("adapters")
    if isinstance(mixed, Mapping):  # X-LoRA's: the names count, their paths may differ
        values["adapters"] = sorted(mixed)
    return {key: value for key, value in _compared(values).items() if not _is_unset(value)}


def _compared(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _plain(value) for key, value in values.items() if not _may_differ(str(key))}


def _may_differ(field: str) -> bool:
    return field in MAY_DIFFER or "dropout" in field


def _is_unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, the same in every process: no address, no order of a set."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, str | int | float | bool | None):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, Mapping):
        return _compared(value)
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and arrays
        return value.tolist()
    named = value if isinstance(value, type) or callable(value) else type(value)
    return getattr(named, "__qualname__", type(named).__qualname__)
