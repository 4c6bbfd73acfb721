"""PEFT configurations of active adapters, as plain values to compare between parties.

Parameters of equal names and shapes may still have different semantics: the tokens of a row, the seed of a
fixed projection, the scaling of an update. These are in the configuration. PEFT is not imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeAlias

from torch import nn

AdapterConfigs: TypeAlias = dict[str, dict[str, Any]]
"""Plain values of each adapter's configuration, by the names of adapter and field."""

MAY_DIFFER = {
    "peft_version": "the fields themselves are compared",
    "auto_mapping": "class of the base model",
    "base_model_name_or_path": "a path; the weights are compared",
    "revision": "the weights are compared",
    "inference_mode": "the trainable parameters are compared",
    "runtime_config": "where something is computed",
    "tokenizer_name_or_path": "a path",
    "prompt_tuning_init_state_dict_path": "a path to values that the first broadcast overwrites",
    "cache_file": "a path",
    "covariance_file": "a path",
    "verbose": "output only",
    "target_modules": "parameter names show the adapted modules",
    "exclude_modules": "parameter names show the adapted modules",
    "target_parameters": "parameter names show the adapted modules",
    "layers_to_transform": "parameter names show the adapted modules",
    "layers_pattern": "parameter names show the adapted modules",
    "modules_to_save": "parameter names show the copied modules",
}
"""Fields that may differ between parties, and reason; so may every field with ``dropout`` in its name."""

RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""LoRA fields that may differ if the aggregation rule lets ranks differ; it knows each party's scaling."""

_RANDOM = "it is random"
_DATA_DEPENDENT = "it depends on a party's data"
_ROUNDED = "it decomposes the weights, with rounding that depends on the processor"
_WRITES_BASE = {
    "pissa": _ROUNDED,
    "pissa_niter": _RANDOM,
    "olora": _ROUNDED,
    "loftq": _ROUNDED,
    "lora_ga": _DATA_DEPENDENT,
    "corda": _DATA_DEPENDENT,
}


def adapter_configs(module: nn.Module) -> AdapterConfigs:
    """Return the configurations of a module's active adapters, by adapter.

    Unset fields (None, False, an empty list or dictionary) are omitted, so that a field that only one party's
    version of PEFT knows matters only if set. So are fields that may differ.
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
    """Yield adapter, field and both values wherever two parties' configurations differ; None means unset.

    Args:
        ours: Configurations of one party.
        theirs: Configurations of another.
        fields_of: Compare only these fields of LoRA.
        without: Compare all fields but these of LoRA.
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
    """Return configurations without the fields that may differ with ranks."""
    return {
        adapter: {
            field: value
            for field, value in config.items()
            if config.get("peft_type") != "LORA" or field not in RANK_FIELDS
        }
        for adapter, config in configs.items()
    }


def init_that_writes_base(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return an initialisation that changes the frozen weights, and reason its result may differ.

    None if the adapter's initialisation does not change them.
    """
    init = config.get("init_lora_weights")
    if isinstance(init, str):
        kind = "pissa_niter" if init.lower().startswith("pissa_niter") else init.lower().partition("_")[0]
        reason = _WRITES_BASE.get(init.lower()) or _WRITES_BASE.get(kind)
        if reason is not None:
            return f"init_lora_weights={init!r}", reason
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
    if isinstance(mixed, Mapping):  # X-LoRA's: compare the names, not their paths
        values["adapters"] = sorted(mixed)
    return {key: value for key, value in _compared(values).items() if not _is_unset(value)}


def _compared(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _plain(value) for key, value in values.items() if not _may_differ(str(key))}


def _may_differ(field: str) -> bool:
    return field in MAY_DIFFER or "dropout" in field


def _is_unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _plain(value: Any) -> Any:
    """Return a value as JSON, equal in every process: without addresses, with sets sorted."""
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
