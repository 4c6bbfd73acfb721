"""Frozen state of a module: base weights, their quantisation, fixed projections; not sent, but compared.

It must be equal at every party. Excluded are tensors that no forward pass uses (PEFT keeps the layer that a
trained copy replaces, and inactive adapters), and those that training changes (running statistics of batch
norms; buffers of losses, metrics and the LightningModule).
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pellm_lightning.tensors.selection import plain_name

_MOST_NESTED = 4
"""Nesting depth of quantisation states, whose statistics may be quantised themselves."""


def frozen_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are not federated and must be equal at all parties, sorted by name.

    These are the frozen parameters, the quantisation states of quantised ones (``quant_state`` and ``SCB`` of
    bitsandbytes, the dictionaries of HQQ), all buffers of adapters, and the persistent buffers of PEFT's and
    transformers' models, which hold the weights of GPTQ and AWQ. Tied tensors appear once.

    Args:
        module: The trained module with its adapters.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # keeps them alive: another tensor could get the same id
    for name, tensor in _walk(module, "", _Place()):
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor
            found[plain_name(name)] = tensor.detach()
    return dict(sorted(found.items()))


def quantization_state(module: nn.Module) -> set[str]:
    """Return the names by which a state dict holds the quantisation state of frozen weights.

    These are no parameters and no buffers, such as ``weight.absmax`` and ``SCB`` of bitsandbytes. Most layers
    save them and cannot load them.
    """
    found: set[str] = set()
    for path, part in module.named_modules(remove_duplicate=False):
        own = dict(part.named_parameters(recurse=False))
        if any(not parameter.requires_grad for parameter in own.values()) and not list(part.children()):
            known = own.keys() | {name for name, _ in part.named_buffers(recurse=False)}
            added = part.state_dict(keep_vars=True).keys() - known - {"_extra_state"}
            found |= {f"{path}.{name}" if path else name for name in added}
    return found


@dataclass(frozen=True)
class _Place:
    """Position of a module relative to PEFT's and transformers' models."""

    owner: str = ""
    """Owner: "adapter" for modules that PEFT added, "base" for a pretrained model, else empty."""
    inactive: frozenset[str] = frozenset()
    """Names of inactive adapters."""


def _walk(module: nn.Module, path: str, place: _Place) -> Iterator[tuple[str, Tensor]]:
    """Yield the used tensors of a module and its children."""
    kind = _kind(module)
    if kind == "layer":
        place = _Place("adapter", _inactive_in_layer(module))
    elif kind in ("model", "tuner"):
        place = _Place("adapter", _inactive_in_model(module))
    elif kind == "pretrained" and not place.owner:
        place = replace(place, owner="base")
    yield from _own_tensors(module, path, place)
    unused = _unused_children(module) if kind == "layer" else set()
    for name, child in module.named_children():
        if name in unused or (place.owner == "adapter" and name in place.inactive):
            continue
        inner = _Place("base") if name in _BASE_CHILDREN.get(kind, ()) else place
        yield from _walk(child, f"{path}{name}.", inner)


_BASE_CHILDREN = {
    "model": ("base_model",),
    "tuner": ("model",),
    "layer": ("base_layer", "original_module"),
}
"""Children of PEFT's modules that contain the user's model."""


def _kind(module: nn.Module) -> str:
    """Classify a module by PEFT's and transformers' types, without importing either."""
    peft = sys.modules.get("peft")
    if peft is not None:
        if isinstance(module, peft.PeftModel | peft.PeftMixedModel):
            return "model"
        if isinstance(module, peft.tuners.tuners_utils.BaseTuner):
            return "tuner"
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer | _wrapper_type(peft)):
            return "layer"
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is not None and isinstance(module, transformers.PreTrainedModel):
        return "pretrained"
    return ""


def _wrapper_type(peft: Any) -> Any:
    """Return PEFT's type of wrappers that train a copy of a layer, or some of its rows."""
    return peft.utils.other.AuxiliaryTrainingWrapper


def _inactive_in_layer(layer: Any) -> frozenset[str]:
    """Return the names of a layer's inactive adapters."""
    known = {
        key
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names)
        for key in _keys(_attribute(layer, attribute))
    }
    if layer.disable_adapters:
        return frozenset(known)
    active = set(layer.active_adapters)
    if isinstance(layer, sys.modules["peft"].utils.ModulesToSaveWrapper):
        active = set(layer.active_adapters[:1])  # it runs the copy of the first active adapter only
    elif active & set(getattr(layer, "lora_arrow", {})):
        return frozenset()  # Arrow also uses inactive adapters
    return frozenset(known - active)


def _inactive_in_model(model: Any) -> frozenset[str]:
    active = model.active_adapters
    active = active() if callable(active) else active  # a method in transformers, a property in PEFT
    return frozenset(
        set(model.peft_config) - {active} if isinstance(active, str) else set(model.peft_config) - {*active}
    )


def _unused_children(layer: Any) -> set[str]:
    """Return the name of the original layer if a trained copy replaces it."""
    if not isinstance(layer, sys.modules["peft"].utils.ModulesToSaveWrapper) or layer.disable_adapters:
        return set()
    active = layer.active_adapters
    return {"original_module"} if active and set(active) <= set(layer.modules_to_save) else set()


def _attribute(module: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        module = getattr(module, name, None)
    return module


def _keys(container: Any) -> list[str]:
    return list(container.keys()) if hasattr(container, "keys") else []


# ---- the tensors of one module


def _own_tensors(module: nn.Module, path: str, place: _Place) -> Iterator[tuple[str, Tensor]]:
    used = {name for name in vars(module).get("_parameters", {}) if _is_used(name, place)}
    quantised = False
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if name in used and not parameter.requires_grad:
            yield path + name, parameter
            yield from _attached(parameter, module, path + name)
            quantised |= not (parameter.is_floating_point() or parameter.is_complex())
    unsaved = module._non_persistent_buffers_set  # the only public way is a state_dict of the whole module
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        compared = place.owner == "adapter" or (place.owner == "base" and name not in unsaved)
        if compared and _is_used(name, place) and not isinstance(module, _NormBase):
            yield path + name, buffer
    if place.owner == "adapter" and _kind(module) == "layer":
        yield from _in_containers(module, path, place)
    elif quantised:
        yield from _in_containers(module, path, replace(place, owner="quantised"))


def _is_used(name: str, place: _Place) -> bool:
    return not (place.owner == "adapter" and name in place.inactive)


def _attached(parameter: nn.Parameter, module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the quantisation state of a bitsandbytes parameter."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield from _inside(state, f"{name}.quant_state")
    scale = getattr(parameter, "SCB", None)
    if scale is None and parameter.dtype == torch.int8:  # the first forward pass moves it to the module
        scale = getattr(getattr(module, "state", None), "SCB", None)
    if isinstance(scale, Tensor):
        yield f"{name}.SCB", scale


def _in_containers(module: nn.Module, path: str, place: _Place) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors in a module's plain attributes and dictionaries, such as indices and scales.

    Attributes with a leading underscore are caches.
    """
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, Mapping):
            value = {key: item for key, item in value.items() if str(key) not in place.inactive}
            if place.owner == "adapter":
                value = {key: item for key, item in value.items() if isinstance(item, Tensor)}
            yield from _inside(value, path + name)
        elif isinstance(value, Tensor):
            yield path + name, value


def _inside(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested objects, and their plain settings as one tensor of characters."""
    settings = []
    items = value if isinstance(value, Mapping) else vars(value)
    for key, item in sorted(items.items(), key=lambda pair: str(pair[0])):
        if isinstance(item, Tensor):
            yield f"{name}.{key}", item
        elif isinstance(item, str | int | float | bool | torch.dtype | torch.Size | tuple | list):
            settings.append(f"{key}={item}")
        elif depth < _MOST_NESTED and _is_container(item):
            yield from _inside(item, f"{name}.{key}", depth + 1)
    if settings:
        text = ", ".join(settings).encode()
        yield f"{name}.settings", torch.tensor(list(text), dtype=torch.uint8)


def _is_container(item: Any) -> bool:
    if isinstance(item, Mapping):
        return True
    return hasattr(item, "__dict__") and not callable(item)  # not a module, type or function
