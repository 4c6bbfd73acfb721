"""LoRA pairs of a PEFT model and the facts of their modules, by PEFT's names; PEFT is not imported."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pellm_lightning.tensors.selection import plain_name
from pellm_lightning.tensors.sharding import is_sharded, storage_key, whole

_FACTOR = re.compile(
    r"^(?:(?P<module>.*)\.)?lora_(?P<kind>embedding_)?(?P<factor>[AB])\.(?P<adapter>[^.]+)(?P<weight>\.weight)?$"
)

# PEFT's ``target_parameters`` adapt a parameter in place, and each further one of a module around the last.
_MAY_HOLD_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.base_layer)*\.lora_A\.|\.base_layer\.lora_A\.")

# Variants of a PEFT layer whose update is still scaling * B A, apart from other trainable parameters.
_PLAIN_VARIANTS = ("Dora", "_Dora", "ALora", "QALora", "Velora")


@dataclass(frozen=True)
class Pair:
    """A LoRA pair: the parameter names of the two factors of one adapted module.

    Args:
        name: Path of the module and name of the adapter, as in ``"encoder.q_proj.default"``.
        a: Name of the factor A, of shape (r, n); convolutions carry further dimensions, which are flattened.
            Of E experts (E r, n), see ``of_experts``.
        b: Name of the factor B, of shape (m, r); of E experts (m, r E).
    """

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class LoraModule:
    """Facts of a LoRA module that aggregation depends on.

    Args:
        scaling: The update is ``scaling * B A``: alpha / r, or alpha / sqrt(r) with rsLoRA.
        base: The frozen weight as an (m, n) view of its storage, of several experts (E, m, n); None unless
            in floating point.
        unsupported_reason: Why the update is not ``scaling * B A``; None if it is.
        unwritable_base_reason: Why an update cannot be added to the frozen weight; None if it can.
        zero_a: Whether the factor A is zero, as PEFT initialises those of embeddings.
        experts: Number E of the experts whose factors the parameters hold, each with a product of its own.

    Example:
        >>> lora = {"encoder.q_proj.default": LoraModule(scaling=2.0)}  # for an Aggregator without a model
    """

    scaling: float = 1.0
    base: Tensor | None = None
    unsupported_reason: str | None = None
    unwritable_base_reason: str | None = None
    zero_a: bool = False
    experts: int = 1

    def rank(self, a: Tensor) -> int:
        """Return the rank of a product, by its factor A."""
        return a.shape[0] // self.experts

    def bases(self) -> list[Tensor | None]:
        """Return the frozen weight of each expert, as (m, n) views."""
        if self.base is None or self.base.dim() == 2:
            return [self.base] * self.experts
        return list(self.base)


def find_pairs(names: Iterable[str]) -> list[Pair]:
    """Return the pairs with both factors among ``names``, sorted by name.

    Recognised are ``<module>.lora_A.<adapter>.weight`` and, for embeddings,
    ``<module>.lora_embedding_A.<adapter>`` (and B).
    """
    factors: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        match = _FACTOR.match(name)
        if match and bool(match["kind"]) != bool(match["weight"]):
            of = f"{match['module']}.{match['adapter']}" if match["module"] else match["adapter"]
            factors.setdefault((of, match["kind"] or ""), {})[match["factor"]] = name
    return [
        Pair(name, both["A"], both["B"])
        for (name, _), both in sorted(factors.items())
        if both.keys() == {"A", "B"}
    ]


def lora_modules(model: nn.Module) -> dict[str, LoraModule]:
    """Return the facts of every LoRA module of a PEFT model, by the names of its pairs.

    All processes of a party call it, since factors may lie in shards over them.
    """
    shared = _shared_storages(model.named_parameters(remove_duplicate=False))
    found = {}
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    for path, module in modules:
        if _is_lora(module):
            for adapter, value in module.scaling.items():
                name = plain_name(f"{path}.{adapter}" if path else adapter)
                a, b = _factors(module, adapter)
                tied = storage_key(a) in shared or storage_key(b) in shared
                unsupported_reason = (
                    "another module has the same factors" if tied else _unsupported_reason(module, adapter)
                )
                base, unwritable_base_reason = _base(
                    module, adapter, shared, (b.shape[0], a.flatten(1).shape[1])
                )
                found[name] = LoraModule(
                    float(value),
                    base,
                    unsupported_reason,
                    unwritable_base_reason,
                    not whole(a).any(),
                    1 if unsupported_reason else _num_experts(module),
                )
    return found


def unknown_module(pair: Pair) -> LoraModule:
    """Return the facts of a module of which only the names of its factors are known: scaling 1, one product.

    Factors that may be those of several experts are unsupported, since their shapes do not show how many.
    """
    if _MAY_HOLD_EXPERTS.search(pair.a):
        return LoraModule(
            unsupported_reason="its factors may hold several experts (pass lora=lora_modules(model))"
        )
    return LoraModule()


def matrix(factor: Tensor) -> Tensor:
    """Return a factor as a matrix; a convolution's kernel dimensions count as inputs."""
    return factor.flatten(1)


def of_experts(b: Tensor, a: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Return the factors (B, A) of each of E experts, (m, r) and (r, n), as views of the parameters.

    PEFT keeps r rows of A for each expert in turn, ``(E r, n)``, but the columns of B by rank first: those of
    one expert are every E-th, ``(m, r E)``.
    """
    if experts == 1:
        return [(matrix(b), matrix(a))]
    of_a = matrix(a).unflatten(0, (experts, -1)).unbind(0)
    of_b = matrix(b).unflatten(1, (-1, experts)).unbind(2)
    return list(zip(of_b, of_a, strict=True))


def join_experts(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the factors (B, A) of several experts in one, as ``of_experts`` takes them apart."""
    if len(factors) == 1:
        return factors[0]
    b = torch.stack([b for b, _ in factors], dim=2).flatten(1)
    return b, torch.cat([a for _, a in factors])


def _is_lora(module: Any) -> bool:
    """Return whether a module is LoRA by its attributes. AdaLoRA's factors, bare parameters, are no pair."""
    factors = getattr(module, "lora_A", None)
    with_modules = isinstance(factors, nn.Module) and not isinstance(factors, nn.ParameterDict)
    return with_modules and isinstance(getattr(module, "scaling", None), dict)


def _unsupported_reason(module: Any, adapter: str) -> str | None:
    if (unknown := _unknown_experts(module, adapter)) is not None:
        return unknown
    base = module.get_base_layer()
    if getattr(base, "groups", 1) > 1:
        return f"its convolution has {base.groups} groups"
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None and not type(variant).__name__.startswith(_PLAIN_VARIANTS):
        return f"its update is changed by {type(variant).__name__}"
    return None


def _num_experts(module: Any) -> int:
    return int(getattr(module, "num_experts", 1))


def _unknown_experts(module: Any, adapter: str) -> str | None:
    """Return why the factors cannot be divided into those of single experts, None if they can."""
    experts = _num_experts(module)
    if experts <= 1:
        return None
    weight = getattr(module.get_base_layer(), getattr(module, "parameter_name", ""), None)
    a, b = _factors(module, adapter)
    # DeepSpeed's shards have no shape of their own.
    shape: Sequence[int] = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    known = len(shape) == 3 and shape[0] == experts
    if known and a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] and a.shape[0] % experts == 0:
        return None
    return f"its factors hold {experts} experts at once, in an order that is not known"


def _factors(module: Any, adapter: str) -> tuple[Tensor, Tensor]:
    if adapter in getattr(module, "lora_embedding_A", {}):
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    # torch.compile may have wrapped these dictionaries.
    a, b = (getattr(layers, "_orig_mod", layers) for layers in (module.lora_A, module.lora_B))
    return a[adapter].weight, b[adapter].weight


def _base(
    module: Any, adapter: str, shared: set[int], shape: tuple[int, int]
) -> tuple[Tensor | None, str | None]:
    layer = module.get_base_layer()
    weight = getattr(layer, getattr(module, "parameter_name", "weight"), None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or hasattr(weight, "quant_state"):
        return None, "its base weight is quantised, or in another read-only form"
    if is_sharded(weight):
        return None, "its base weight lies in shards over the party's processes"
    if storage_key(weight) in shared:
        return None, "its base weight is tied to that of another module"
    if not weight.is_contiguous():
        return None, "its base weight is not contiguous"
    if getattr(module, "merged_adapters", None):
        return None, "its adapter is merged into the base weight"
    if len(module.scaling) > 1:
        return None, f"it has several adapters ({', '.join(module.scaling)}) on one base weight"
    variant = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
    if variant.startswith(("ALora", "QALora")):
        return None, f"its update is not one of the base weight ({variant})"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return None, f"its convolution pads with {layer.padding_mode!r}, the adapter with zeros"
    if type(layer).__name__ in ("MultiheadAttention", "NonDynamicallyQuantizableLinear"):
        return None, "PEFT computes the weights of an attention anew at every step"
    if weight.dim() == 3 and hasattr(module, "num_experts"):
        # (experts, outputs, inputs), or (experts, inputs, outputs) where the layer says so, as PEFT reads it.
        each = weight.detach().mT if getattr(layer, "is_transposed", False) else weight.detach()
        if each.shape[1:] != shape:
            return None, f"its base weight has shape {list(weight.shape)}, an update {list(shape)}"
        return (each if len(each) > 1 else each[0]), None
    flat = weight.detach().flatten(1)
    embedding = adapter in getattr(module, "lora_embedding_A", {})
    base = flat.T if embedding or getattr(module, "fan_in_fan_out", False) else flat
    if base.shape != shape:
        return None, f"its base weight has shape {list(weight.shape)}, its update {list(shape)}"
    return base, None


def _shared_storages(parameters: Iterable[tuple[str, nn.Parameter]]) -> set[int]:
    """Return the addresses of parameters with several names."""
    seen = Counter(storage_key(parameter) for _, parameter in parameters)
    return {address for address, times in seen.items() if times > 1}
