"""Saving of a PEFT model's adapters, for ``from_pretrained`` to load."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, PeftType, get_base_model_state_dict
from safetensors.torch import load_file, save_file

from pellm_lightning.tensors.selection import plain_name

log = logging.getLogger(__name__)


def save_adapters(
    model: PeftModel, folder: Path, names: Sequence[str], *, with_base: bool, final: Path | None = None
) -> list[str]:
    """Save adapters so that ``PeftModel.from_pretrained(base, folder)`` restores the trained model.

    A single adapter is saved at the root of the folder, whatever its name. Several have a subfolder each, by
    name; for plain LoRA their sum, which the model with all of them active computes, is saved as an adapter
    at the root. Other adapters of the model are not saved.

    Args:
        model: The PEFT model.
        folder: The folder to write to.
        names: Names of the adapters.
        with_base: Whether to save the base model also, in ``base``, since training has changed it.
        final: Final path of the folder, if it will be moved.

    Returns:
        Sentences about the content of the folder, for its model card.
    """
    final = folder if final is None else final
    if not with_base:
        return _save_all(model, folder, names, final)
    _save_base(model, folder / "base")
    contents = _save_all(model, folder, names, final)
    _name_base(model, folder, str((final / "base").resolve()))
    return contents


def _save_all(model: PeftModel, folder: Path, names: Sequence[str], final: Path) -> list[str]:
    if len(names) == 1:
        _save(model, names[0], folder)
        return _kept_together(model, names)
    places = {name: name if name != "base" else "base-adapter" for name in names}
    for name, place in places.items():
        _save(model, name, folder / place)
    listed = ", ".join(f"`{name}` in `{place}/`" for name, place in places.items())
    contents = [f"These adapters were trained together, all active: {listed}."]
    unsupported_reason = _unsupported_reason(model, names)
    if unsupported_reason is None:
        _save_sum(model, names, folder)
        contents.append(
            "Their sum is one adapter at the root of this folder: it alone gives the trained model."
        )
    else:
        first, *others = names
        loads = "".join(
            f' model.load_adapter("{final.name}/{places[name]}", adapter_name="{name}");' for name in others
        )
        contents.append(
            f"There is none at the root, since {unsupported_reason}. Load them all:"
            f' `model = PeftModel.from_pretrained(base, "{final.name}/{places[first]}",'
            f' adapter_name="{first}");{loads} model.base_model.set_adapter({list(names)})`.'
        )
        log.warning(
            "%s has an adapter in each of %s and none at its root, since %s. See README.md for loading.",
            final,
            ", ".join(places.values()),
            unsupported_reason,
        )
    return contents + _kept_together(model, names)


def _kept_together(model: PeftModel, names: Sequence[str]) -> list[str]:
    """Tell of adapters that were active and are not saved: without them the model is another."""
    missing = [name for name in model.active_adapters if name in model.peft_config and name not in names]
    if model.peft_type == PeftType.XLORA or not missing:
        return []
    listed = ", ".join(f"`{name}`" for name in missing)
    return [
        f"It was trained on a model on which {listed} was active, too, which is not federated and not here:"
        " load it as well to get the same model."
    ]


def _save(model: PeftModel, name: str, folder: Path) -> None:
    """Save one adapter into a folder itself: PEFT would put it below, unless it is called "default"."""
    scratch = folder / ".scratch"
    model.save_pretrained(str(scratch), selected_adapters=[name])
    written = scratch if name == "default" else scratch / name
    for path in list(written.iterdir()):
        if path.is_file():
            path.rename(folder / path.name)
    for path in sorted(scratch.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    scratch.rmdir()
    _unmark_compiled(folder)


def _unmark_compiled(folder: Path) -> None:
    """Take ``torch.compile``'s prefix out of saved names: no freshly loaded base model has it."""
    file = folder / "adapter_model.safetensors"
    if file.exists():
        weights = load_file(file)
        if any(plain_name(key) != key for key in weights):
            plain = {plain_name(key): value for key, value in weights.items()}
            save_file(plain, file, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    text = config.read_text(encoding="utf-8")
    if plain_name(text) != text:
        config.write_text(plain_name(text), encoding="utf-8")


def _unsupported_reason(model: PeftModel, names: Sequence[str]) -> str | None:
    """Return why adapters cannot be added up to one, None if they can."""
    if set(model.active_adapters) != set(names):
        return "they were not all active at once"
    for name in names:
        config: Any = model.peft_config[name]
        if type(config) is not LoraConfig:
            return f"{name!r} is no LoRA, of which alone the sum is an adapter"
        for option in (
            "use_dora", "use_rslora", "rank_pattern", "layers_to_transform", "exclude_modules",
            "modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters",
            "alora_invocation_tokens", "layer_replication", "use_qalora", "arrow_config",
            "use_bdlora", "velora_config", "monteclora_config",
        ):  # fmt: skip
            if getattr(config, option, None):
                return f"{name!r} has {option}, with which PEFT cannot add it to another"
        if config.bias != "none":
            return f"{name!r} has trained biases, whose sum is no adapter"
        if not isinstance(config.target_modules, set | list):
            return "their target_modules are patterns, not names"
    return None


def _save_sum(model: PeftModel, names: Sequence[str], folder: Path) -> None:
    """Save the adapter whose factors are those of all side by side: scaling * B A adds up."""
    added = "+".join(names).replace(".", "_")
    trains = {id(p): p.requires_grad for p in model.parameters()}
    tuner: Any = model.base_model
    tuner.add_weighted_adapter(list(names), [1.0] * len(names), added, combination_type="cat")
    try:
        _save(model, added, folder)
    finally:
        tuner.delete_adapter(added)
        tuner.set_adapter(list(names))
        for parameter in model.parameters():
            parameter.requires_grad_(trains.get(id(parameter), parameter.requires_grad))


def _save_base(model: PeftModel, folder: Path) -> None:
    """Save the base model without its adapters, and make their configurations name the folder."""
    base: Any = model.get_base_model
    base().save_pretrained(str(folder), state_dict=get_base_model_state_dict(model))
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(folder.resolve())


def _name_base(model: PeftModel, folder: Path, name: str) -> None:
    """Let what is saved name the base model where it will lie when the folder has its place."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
    for path in folder.rglob("adapter_config.json"):
        saved = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": name}
        path.write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")
