"""Adapter parameters of a module, according to PEFT's classes; PEFT is used only if already imported."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pellm_lightning.tensors.selection import plain_name


def adapter_parameters(module: nn.Module) -> set[str] | None:
    """Return the names of all adapter parameters, None if PEFT is not used.

    These are the parameters of adapter layers, prompts, and those that a tuner shares between layers (vector
    banks, routers), without copies of base layers (``modules_to_save``) and unfrozen base layers. Names are
    without the prefix of ``torch.compile``.
    """
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted, found = False, set[int]()
    for part in module.modules():
        if isinstance(part, PeftModel):
            adapted = True
            found |= _ids(part.parameters()) - _ids(part.get_base_model().parameters())
        elif isinstance(part, BaseTunerLayer):
            adapted = True
            base = getattr(part, "base_layer", None)
            found |= _ids(part.parameters()) - (_ids(base.parameters()) if base is not None else set())
        elif type(part).__module__.startswith("peft.tuners."):
            found |= _ids(
                part.parameters(recurse=False)
            )  # AdaptionPrompt's attention is not an adapter layer
    if not adapted:
        return None
    return {plain_name(name) for name, p in module.named_parameters() if id(p) in found}


def parameters_of(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of one adapter of a PEFT model, including its copies of base layers.

    PEFT keeps an adapter's modules and parameters in dictionaries, by the adapter's name.
    """
    for part in model.modules():
        if isinstance(part, nn.ModuleDict) and adapter in part:
            yield from part[adapter].parameters()
        elif isinstance(part, nn.ParameterDict) and adapter in part:
            yield part[adapter]


def adapters_with(model: Any, parameters: Iterable[nn.Parameter]) -> list[str]:
    """Return the names of a PEFT model's adapters that own some of the parameters.

    If no parameter has an owner (AdaptionPrompt, X-LoRA's classifier), it is the active adapter.
    """
    ids = _ids(parameters)
    found = [name for name in model.peft_config if _ids(parameters_of(model, name)) & ids]
    return found or [model.active_adapter]


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}
