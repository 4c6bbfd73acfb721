"""From a checkpoint of a federation to a folder that others can load."""

import argparse
import importlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from transformers import AutoTokenizer

from pellm_lightning import checks
from pellm_lightning.callback import FederatedAveraging
from pellm_lightning.report.card import write_card
from pellm_lightning.results.configured import Configured
from pellm_lightning.tasks.adapter import base_of, peft_model_in, save_adapter

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``export``; what it leaves over is of the module."""
    made = argparse.ArgumentParser(
        prog="python -m pellm_lightning export",
        description="Make a PEFT adapter folder, or a merged model, of a checkpoint of a federated fit.",
        epilog="All else is as of `fit` and tells how to build the module: --config run.yaml, --model.x ... "
        "Checkpoints of a module that the command line has built need none of it.",
        allow_abbrev=False,
    )
    made.add_argument("checkpoint", type=Path, help="written by Lightning in a federated fit, of any party")
    made.add_argument("--out", type=Path, required=True, help="folder to make")
    made.add_argument("--module", help="import path of the module's class, if a script has built it")
    made.add_argument("--merged", action="store_true", help="write the whole model, adapter merged")
    made.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    return made


def main(words: Sequence[str]) -> None:
    """Run ``python -m pellm_lightning export``."""
    options, rest = parser().parse_known_args(words)
    export(
        options.checkpoint,
        options.out,
        module=options.module,
        config=rest,
        merged=options.merged,
        overwrite=options.overwrite,
    )
    log.info("wrote %s", options.out)


def export(
    checkpoint: Path,
    out: Path,
    *,
    module: str | LightningModule | None = None,
    config: Sequence[str] = (),
    merged: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the adapter of a checkpoint, or the model merged with it, and a model card.

    Args:
        checkpoint: A Lightning checkpoint of a fit with ``FederatedAveraging``, of any party, with or without
            the frozen parameters.
        out: Folder to make.
        module: The module, freshly built as for the fit, or the import path of its class, whose
            hyperparameters the checkpoint must hold. None builds it as the command line has built it.
        config: Instead, arguments of the command line's ``fit`` that build it.
        merged: Write a model of transformers with the adapter merged into it, and the tokenizer if there is
            one beside the base model.
        overwrite: Write into a folder that is not empty.

    Raises:
        ValueError: If the checkpoint is of no federation, the module cannot be built or is another one, or
            ``out`` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ValueError(f"{out} is not empty. Name another folder, or add --overwrite.")
    saved = _read(checkpoint)
    state = _state_of(checkpoint, saved)
    if config:
        built = Configured(config).module
    elif isinstance(module, LightningModule):
        built = module
    else:
        built = _rebuilt(checkpoint, saved, module)
    built.configure_model()
    _fill(built, saved["state_dict"])
    model = peft_model_in(built, "export")
    about = state.get("about", {})
    base = base_of(model)
    if merged:
        whole: Any = model.merge_and_unload()
        whole.save_pretrained(str(out))
        _save_tokenizer(base, out)
        write_card(out, about, base, merged=True)
    else:
        save_adapter(model, out, with_base=about.get("writes_base", False))
        write_card(out, about, base)


def _read(checkpoint: Path) -> Mapping[str, Any]:
    try:
        saved: Mapping[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"There is no checkpoint {checkpoint}.") from error
    except Exception as error:  # torch.load fails in many ways on what is no checkpoint
        raise ValueError(f"{checkpoint} cannot be read as a Lightning checkpoint: {error}") from error
    if not isinstance(saved, Mapping) or "state_dict" not in saved:
        raise ValueError(f"{checkpoint} is no Lightning checkpoint: it has no state_dict.")
    return saved


def _state_of(checkpoint: Path, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    states = saved.get("callbacks", {})
    found = next((s for name, s in states.items() if name.startswith(FederatedAveraging.__name__)), None)
    if not found:
        raise ValueError(
            f"{checkpoint} is of no federated fit: it has no state of FederatedAveraging. The adapter of any"
            " other fit is in the module's state_dict; PEFT's save_pretrained writes it."
        )
    state: Mapping[str, Any] = found
    return state


def _rebuilt(checkpoint: Path, saved: Mapping[str, Any], path: str | None) -> LightningModule:
    """Build the module by the hyperparameters in its checkpoint."""
    importlib.import_module("pellm_lightning.tasks")  # Lightning builds only classes that are imported
    hparams = saved.get("hyper_parameters", {})
    kind: type[LightningModule] = LightningModule
    if path is not None:
        kind = _class(path)
    elif "_instantiator" not in hparams:
        raise ValueError(
            f"{checkpoint} does not tell how to build its module, since no command line has. Add --config"
            " with a configuration of it, or --module with the import path of its class."
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found keys that are")  # we look for those, too, and refuse
            module: LightningModule = kind.load_from_checkpoint(
                checkpoint, map_location="cpu", strict=False, weights_only=True
            )
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"The module of {checkpoint} cannot be built of the hyperparameters in it ({error}). Add --config"
            " with a configuration of it."
        ) from error
    return module


def _class(path: str) -> type[LightningModule]:
    where, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(where), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--module {path} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ValueError(f"--module {path} is no LightningModule.")
    return found


def _fill(module: LightningModule, state_dict: Mapping[str, Any]) -> None:
    """Load what the checkpoint holds; only frozen parameters may be missing."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    checks.trainable_checkpoint(module, state_dict, frozen)
    module.load_state_dict(state_dict, strict=False)


def _save_tokenizer(base: str | None, out: Path) -> None:
    try:
        AutoTokenizer.from_pretrained(base).save_pretrained(str(out))
    except (OSError, ValueError, TypeError):
        log.warning("There is no tokenizer beside the base model %s: save yours into %s.", base, out)
