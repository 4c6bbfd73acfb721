"""Selection of the federated parameters: trainable ones, filtered by name patterns."""

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

# Fallback without PEFT: substrings of adapter parameters, and of copied heads and embeddings, which are far
# larger than a LoRA and easily overlooked.
_ADAPTER = ("lora_", "adapter", "prompt", "prefix")
_NOT_ADAPTER = ("modules_to_save", "embed", "wte", "lm_head", "classifier", "score", "pooler")


def select(
    module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the federated parameters, sorted by name.

    A parameter is federated if it requires a gradient, matches a pattern of ``include`` (or ``include`` is
    empty) and no pattern of ``exclude``. Patterns are shell globs matched against the whole name, e.g.
    ``"*lora_B*"``. Tied parameters appear once; the prefix of ``torch.compile`` is stripped, so that
    compiled and other parties agree.

    Raises:
        ValueError: If nothing remains, or a pattern of ``include`` matches no trainable parameter, or one of
        ``exclude`` no parameter at all (it is most likely a typo).
    """
    everything = dict(_named(module))
    trainable = {name: p for name, p in everything.items() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "No parameter of the module requires a gradient, so there is nothing to federate. Add a PEFT"
            " adapter, or unfreeze what should be trained, before the fit starts."
        )
    for kind, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            # Excluded parameters may be frozen now and unfrozen later.
            candidates = trainable if kind == "include" else everything
            if not any(fnmatchcase(name, pattern) for name in candidates):
                which = "trainable parameters" if kind == "include" else "parameters"
                raise ValueError(
                    f"The {kind} pattern {pattern!r} matches none of the {len(candidates)} {which} (such as"
                    f" {next(iter(candidates))!r}). Patterns are globs over whole names: try '*{pattern}*'."
                )
    selected = {name: p for name, p in trainable.items() if is_federated(name, include, exclude)}
    if not selected:
        raise ValueError(
            f"include={list(include)} and exclude={list(exclude)} together leave none of the {len(trainable)}"
            " trainable parameters. Loosen one of them."
        )
    return dict(sorted(selected.items()))


def share_outside_adapter(parameters: Mapping[str, Tensor], adapter: Collection[str] | None = None) -> float:
    """Return the fraction of scalars in heads, embeddings or other layers of the base.

    Args:
        parameters: Parameters by name.
        adapter: Names of the adapter's parameters according to PEFT; None guesses by names.
    """
    total = sum(p.numel() for p in parameters.values())
    outside = sum(p.numel() for name, p in parameters.items() if not _is_adapter(name, adapter))
    return outside / total if total else 0.0


def _is_adapter(name: str, adapter: Collection[str] | None) -> bool:
    if adapter is not None:
        return name in adapter
    if "modules_to_save" in name:
        return False
    return any(mark in name for mark in _ADAPTER) or not any(mark in name for mark in _NOT_ADAPTER)


def plain_name(name: str) -> str:
    """Strip from a name what wrappers add: ``torch.compile``, FSDP1 and activation checkpointing."""
    for prefix in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(prefix, "")
    return name


def named_as_in(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a state dict to the names of ``module``, which may differ by ``torch.compile``'s prefix."""
    own = {plain_name(name): name for name in module.state_dict()}
    return {own.get(plain_name(name), name): value for name, value in state_dict.items()}


def load_compiled_(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook to load compiled checkpoints into plain modules and vice versa.

    For ``register_load_state_dict_pre_hook``: renames keys of the state dict that differ in
    ``torch.compile``'s prefix.
    """
    own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    renamed = named_as_in(module, {name[len(prefix) :]: value for name, value in own.items()})
    if len(renamed) < len(own) or all(prefix + name in own for name in renamed):
        return  # loading reports an error for two names of one parameter; otherwise all names match
    for name in own:
        del state_dict[name]
    state_dict.update({prefix + name: value for name, value in renamed.items()})


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        yield plain_name(name), parameter


def is_federated(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether a trainable parameter of that name is federated."""
    included = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return included and not any(fnmatchcase(name, pattern) for pattern in exclude)
