"""What PEFT knows of a module: which parameters are adapters', and of which one.

PEFT is asked by its own classes, and imported only where it has been: a module that holds a PEFT model has
imported it.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pellm_lightning.tensors.selection import plain_name


def adapter_parameters(module: nn.Module) -> set[str] | None:
    """Return the names of all parameters that PEFT has added for adapting, None if PEFT has no part in it.

    These are the parameters of adapter layers, prompts, and what their tuner shares between layers (banks of
    vectors, routers). Copies of base layers (``modules_to_save``) and unfrozen layers of the base are none.
    Names are without the prefix of ``torch.compile``.
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
            found |= _ids(part.parameters(recurse=False))  # AdaptionPrompt's attention is no adapter layer
    if not adapted:
        return None
    return {plain_name(name) for name, p in module.named_parameters() if id(p) in found}


def parameters_of(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """Return the parameters of one adapter of a PEFT model, its copies of base layers among them.

    PEFT keeps what belongs to an adapter in dictionaries, under the adapter's name.
    """
    for part in model.modules():
        if isinstance(part, nn.ModuleDict) and adapter in part:
            yield from part[adapter].parameters()
        elif isinstance(part, nn.ParameterDict) and adapter in part:
            yield part[adapter]


def adapters_with(model: Any, parameters: Iterable[nn.Parameter]) -> list[str]:
    """Return the names of a PEFT model's adapters to which some of the parameters belong.

    Where no parameter tells whose it is (AdaptionPrompt, X-LoRA's classifier), it is the active one.
    """
    wanted = _ids(parameters)
    found = [name for name in model.peft_config if _ids(parameters_of(model, name)) & wanted]
    return found or [model.active_adapter]


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}
