"""Which named parameters federate: what requires a gradient, narrowed by name patterns."""

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# Without PEFT only names tell. Substrings that mark parameters which are no adapter: copied heads and
# embeddings dwarf a LoRA and are easily missed.
_ADAPTER = ("lora_", "adapter", "prompt", "prefix")
_NOT_ADAPTER = ("modules_to_save", "embed", "wte", "lm_head", "classifier", "score", "pooler")


def select(
    module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the parameters that leave the party, sorted by name.

    A parameter federates if it requires a gradient, matches a pattern of ``include`` (or ``include`` is
    empty) and no pattern of ``exclude``. Patterns are shell globs matched against the whole name, e.g.
    ``"*lora_B*"``. Tied parameters appear once; the prefix of ``torch.compile`` is stripped, so that a
    compiled and a plain party agree.

    Raises:
        ValueError: If nothing is left, or a pattern of ``include`` matches no trainable parameter, or one of
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
            # What is excluded may be frozen yet, and stays at home when it is not any more.
            named = trainable if kind == "include" else everything
            if not any(fnmatchcase(name, pattern) for name in named):
                which = "trainable parameters" if kind == "include" else "parameters"
                raise ValueError(
                    f"The {kind} pattern {pattern!r} matches none of the {len(named)} {which} (such as"
                    f" {next(iter(named))!r}). Patterns are globs over whole names: try '*{pattern}*'."
                )
    chosen = {name: p for name, p in trainable.items() if wanted(name, include, exclude)}
    if not chosen:
        raise ValueError(
            f"include={list(include)} and exclude={list(exclude)} together leave none of the {len(trainable)}"
            " trainable parameters. Loosen one of them."
        )
    return dict(sorted(chosen.items()))


def share_outside_adapter(
    parameters: Mapping[str, nn.Parameter], adapter: Collection[str] | None = None
) -> float:
    """Return which part (0 to 1) of the scalars sits in heads, embeddings or other layers of the base.

    Args:
        parameters: By name.
        adapter: Names of those that are an adapter's, as PEFT knows them; None goes by the parameters' names.
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
    """Return a name without the prefix that ``torch.compile`` puts before the module's own."""
    return name.replace("_orig_mod.", "")


def named_as_in(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict under the names of ``module``, where only ``torch.compile``'s prefix differs."""
    own = {plain_name(name): name for name in module.state_dict()}
    return {own.get(plain_name(name), name): value for name, value in state_dict.items()}


def load_compiled_(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Let a module load what was saved compiled, or what was not though the module is.

    A hook for ``register_load_state_dict_pre_hook``: it renames in the state dict what differs in
    ``torch.compile``'s prefix.
    """
    own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    renamed = named_as_in(module, {name[len(prefix) :]: value for name, value in own.items()})
    if len(renamed) < len(own) or all(prefix + name in own for name in renamed):
        return  # two names for one parameter are an error that loading itself reports; else nothing to do
    for name in own:
        del state_dict[name]
    state_dict.update({prefix + name: value for name, value in renamed.items()})


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        yield plain_name(name), parameter


def wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Tell whether a trainable parameter of that name federates."""
    included = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return included and not any(fnmatchcase(name, pattern) for pattern in exclude)
