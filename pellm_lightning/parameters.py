"""Which named parameters federate: what requires a gradient, narrowed by name patterns."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

# Substrings that mark parameters which are no adapter: copied heads and embeddings dwarf a LoRA and are
# easily missed.
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


def frozen(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that never leave the party because they require no gradient, sorted by name."""
    return dict(sorted((name, p.detach()) for name, p in _named(module) if not p.requires_grad))


def share_outside_adapter(parameters: Mapping[str, nn.Parameter]) -> float:
    """Return which part (0 to 1) of the scalars sits in heads, embeddings or ``modules_to_save``."""
    total = sum(p.numel() for p in parameters.values())
    outside = sum(
        p.numel()
        for name, p in parameters.items()
        if "lora_" not in name and any(mark in name for mark in _NOT_ADAPTER)
    )
    return outside / total


def plain_name(name: str) -> str:
    """Return a name without the prefix that ``torch.compile`` puts before the module's own."""
    return name.replace("_orig_mod.", "")


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        yield plain_name(name), parameter


def wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Tell whether a trainable parameter of that name federates."""
    included = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return included and not any(fnmatchcase(name, pattern) for pattern in exclude)
