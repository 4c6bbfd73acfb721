"""Read a checkpoint safely: what it is, what it holds of a federation, and how to build its module."""

import contextlib
import importlib
import inspect
import os
import pkgutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from lightning.pytorch import LightningModule
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from pellm_lightning.callbacks.federated_averaging import FederatedAveraging


class StandIn:
    """Takes the place of an object whose class a checkpoint names and nobody trusts: no code of it runs."""

    path = ""
    """Import path of the class that it stands for."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass


@contextlib.contextmanager
def safe_classes(checkpoint: Path, trusted: Sequence[str] = ()) -> Iterator[None]:
    """Let the safe loader build PEFT's configurations, what is trusted, and stand-ins for everything else.

    Args:
        checkpoint: Whose classes.
        trusted: Import paths of classes to build as they are.

    Raises:
        ValueError: If a trusted class cannot be imported, or is none.
    """
    known = _peft_classes() | {path: _class(path, "--trust") for path in trusted}
    allowed: list[Any] = []
    for name in _unsafe(checkpoint):
        stand_in = type(name.rpartition(".")[2], (StandIn,), {"path": name})
        allowed.append((known.get(name, stand_in), name))
    with torch.serialization.safe_globals(allowed):
        yield


def _peft_classes() -> dict[str, type]:
    """Return PEFT's configurations, and the enums and dataclasses that they hold: data without behaviour."""
    kinds = {vars(peft)[name] for name in dir(peft) if name.endswith(("Config", "Type", "TypeEnum"))}
    kinds |= set(PEFT_TYPE_TO_CONFIG_MAPPING.values())
    for kind in list(kinds):
        module = inspect.getmodule(kind)
        held = vars(module).values() if module is not None else ()
        kinds |= {each for each in held if inspect.isclass(each) and each.__module__.startswith("peft.")
                  and each.__name__.endswith(("Config", "Type", "Init"))}  # fmt: skip
    return {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds if inspect.isclass(kind)}


def _unsafe(checkpoint: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(checkpoint))
    except Exception:  # whatever it is, reading it will say so
        return []


def read(checkpoint: Path, trusted: Sequence[str] = ()) -> Mapping[str, Any]:
    """Read a checkpoint of Lightning.

    Raises:
        ValueError: If it is anything else; the error says what it is, and what to do.
    """
    if (wrong := _what_else(checkpoint)) is not None:
        raise ValueError(wrong)
    with safe_classes(checkpoint, trusted):
        try:
            saved: Mapping[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load fails in many ways on what is no checkpoint
            raise ValueError(
                f"{checkpoint} cannot be read as a Lightning checkpoint ({checkpoint.stat().st_size:,}"
                f" bytes): {(str(error) or type(error).__name__).splitlines()[0]} If it was copied or"
                " written only in part, take it again, or an earlier one."
            ) from error
    if not isinstance(saved, Mapping) or "state_dict" not in saved:
        weights = isinstance(saved, Mapping) and any(isinstance(v, torch.Tensor) for v in saved.values())
        what = (
            "holds weights only (a state_dict that torch.save has written)"
            if weights
            else "is something else"
        )
        raise ValueError(
            f"{checkpoint} is no Lightning checkpoint: it has no state_dict, and {what}. Name a file that"
            " ModelCheckpoint or trainer.save_checkpoint has written in the federated fit."
        )
    return saved


_FOLDERS = {
    ("adapter_config.json",): (
        "{path} is a folder of an adapter and no checkpoint: what `export` makes is there already."
        ' PeftModel.from_pretrained(base, "{path}") loads it, and merge_and_unload() of that merges it. To'
        " export with a model card or merged, name the checkpoint (.ckpt) of the fit."
    ),
    (".metadata", "*.distcp"): (
        "{path} is a distributed (sharded) checkpoint. Make one file of it by `python -m"
        " lightning.pytorch.utilities.consolidate_checkpoint {path}`, and export that."
    ),
    ("config.json",): (
        "{path} is a folder of a whole model and no checkpoint: from_pretrained loads it as it is."
    ),
    ("latest", "zero_to_fp32.py"): (
        "{path} is a DeepSpeed checkpoint, of which no federated fit makes one. Name a file (.ckpt)."
    ),
}
"""What a folder is that holds one of some files, and what to do."""


def _what_else(path: Path) -> str | None:
    """Tell what a path is that is no file of a checkpoint, and what to do; None if it may be one."""
    if not path.exists():
        return f"There is no checkpoint {path} (seen from {Path.cwd()})."
    if path.is_dir():
        for files, says in _FOLDERS.items():
            if any(any(path.glob(file)) for file in files):
                return says.format(path=path)
        inside = sorted(path.rglob("*.ckpt"))
        found = f"Name one of its files, such as {inside[0]}." if inside else "Name a file (.ckpt)."
        return f"{path} is a folder and no checkpoint. {found}"
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        return f"{path} is empty. Take an earlier checkpoint."
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return (
            f"{path} is a safetensors file: weights only, and no Lightning checkpoint. If an"
            " adapter_config.json lies in its folder, it is exported already: PeftModel.from_pretrained loads"
            " its folder. Else name a file that ModelCheckpoint has written."
        )
    if not zipfile.is_zipfile(path):  # torch.save writes archives, with their index at the end
        return (
            f"{path} cannot be read as a Lightning checkpoint ({path.stat().st_size:,} bytes): it is another"
            " kind of file, or was copied or written only in part. Take it again, or an earlier one."
        )
    return None


def federated_state(checkpoint: Path, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the callback has left in a checkpoint.

    Raises:
        ValueError: If it is of no federation.
    """
    states = saved.get("callbacks", {})
    found = next((s for name, s in states.items() if name.startswith(FederatedAveraging.__name__)), None)
    if not found:
        raise ValueError(
            f"{checkpoint} is of no federated fit: it has no state of FederatedAveraging. The adapter of any"
            " other fit is in the module's state_dict; PEFT's save_pretrained writes it."
        )
    state: Mapping[str, Any] = found
    return state


def rebuilt(
    checkpoint: Path, saved: Mapping[str, Any], path: str | None, trusted: Sequence[str] = ()
) -> LightningModule:
    """Build the module by the hyperparameters in its checkpoint.

    Raises:
        ValueError: If they do not tell how, or would need a class that is not trusted.
    """
    importlib.import_module("pellm_lightning.tasks")  # Lightning builds only classes that are imported
    hparams = saved.get("hyper_parameters", {})
    kind: type[LightningModule] = LightningModule
    if path is not None:
        kind = _class(path, "--module")
        if not issubclass(kind, LightningModule):
            raise ValueError(f"--module {path} is no LightningModule.")
    elif "_instantiator" not in hparams:
        raise ValueError(
            f"{checkpoint} does not tell how to build its module, since no command line has. Add --config"
            " with a configuration of it, or --module with the import path of its class."
        )
    strange = sorted({value.path for value in map(_kind, _values(hparams)) if issubclass(value, StandIn)})
    if strange:
        raise ValueError(
            f"The hyperparameters in {checkpoint} hold {', '.join(strange)}, and building what a file names"
            f" can run its code. If you trust the file, add --trust {' --trust '.join(strange)}; or add"
            " --config with a configuration of the module, or give the module itself to export() in Python."
        )
    try:
        with safe_classes(checkpoint, trusted), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found keys that are")  # these are checked and refused here
            module: LightningModule = kind.load_from_checkpoint(
                checkpoint, map_location="cpu", strict=False, weights_only=True
            )
    except (TypeError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"The module of {checkpoint} cannot be built of the hyperparameters in it ({error}). Add --config"
            " with a configuration of it."
        ) from error
    return module


def _class(path: str, option: str) -> type:
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {path} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise ValueError(f"{option} {path} is no class.")
    return found


@contextlib.contextmanager
def where_it_was_fitted(checkpoint: Path, saved: Mapping[str, Any], directory: str | None) -> Iterator[None]:
    """See relative paths from where the fit saw them, if some are not here and that folder is.

    Args:
        checkpoint: Named in the error.
        saved: Its content, whose hyperparameters hold the paths.
        directory: The working directory of the fit, None if it is not known.

    Raises:
        ValueError: If a path is nowhere.
    """
    relative = [
        value
        for value in _values(saved.get("hyper_parameters", {}))
        if isinstance(value, str) and os.sep in value and not os.path.isabs(value) and len(value) < 1000
    ]
    there = [v for v in relative if directory is not None and os.path.exists(os.path.join(directory, v))]
    here = os.getcwd()
    if directory is None or not there:
        gone = [value for value in relative if _is_path(value) and not os.path.exists(value)]
        if gone:
            raise ValueError(
                f"{checkpoint} names {gone[0]!r}, seen from where it was fitted"
                f" ({directory or 'not recorded'}), and it is neither there nor here ({here}). Run the"
                " command in the folder from which the fit was started, or give the path anew: --config"
                " run.yaml --model.model PATH."
            )
        yield
        return
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(here)


def _is_path(value: str) -> bool:
    """Tell a path from an id on a hub, which has one separator, and from other text."""
    several = value.count(os.sep) > 1 or Path(value).parts[0] in (".", "..")
    return several and not any(mark in value for mark in " :{*")


def _kind(value: Any) -> type[Any]:
    return value if isinstance(value, type) else type(value)


def _values(hparams: Any) -> Iterator[Any]:
    if isinstance(hparams, Mapping):
        for value in hparams.values():
            yield from _values(value)
    elif isinstance(hparams, list | tuple | set):
        for value in hparams:
            yield from _values(value)
    else:
        yield hparams
