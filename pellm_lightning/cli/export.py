"""From a checkpoint of a federation to a folder that others can load."""

import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from peft import PeftModel
from transformers import AutoTokenizer

from pellm_lightning.callbacks import arguments
from pellm_lightning.cli.checkpoint import federated_state, read, rebuilt, where_it_was_fitted
from pellm_lightning.cli.configured import Configured
from pellm_lightning.cli.merging import (
    coarsest,
    compare,
    dequantized_as_trained,
    merge_,
    outputs,
    probe,
    refuse_prompt_learning,
    refuse_unmergeable,
    reload,
)
from pellm_lightning.comm.evidence.summary import write_evidence
from pellm_lightning.report.card import write_card
from pellm_lightning.tasks.adapter import base_of, peft_model_in
from pellm_lightning.tasks.folder import atomic_folder
from pellm_lightning.tasks.saving import save_adapters
from pellm_lightning.tensors.adapters import adapters_with
from pellm_lightning.tensors.selection import named_as_in, plain_name

log = logging.getLogger(__name__)


def main(options: Namespace, rest: Sequence[str]) -> None:
    """Run ``pellm export``."""
    export(
        options.checkpoint,
        options.out,
        module=options.module,
        config=rest,
        merged=options.merged,
        overwrite=options.overwrite,
        trusted=options.trust,
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
    trusted: Sequence[str] = (),
) -> None:
    """Write the adapter of a checkpoint, or the model merged with it, and a model card.

    Where the rounds were signed, their certificates lie next to the adapter, for ``pellm verify``.

    Args:
        checkpoint: A Lightning checkpoint of a fit with ``FederatedAveraging``, of any party, with or without
            the frozen parameters.
        out: Folder to make.
        module: The module, freshly built as for the fit, or the import path of its class, whose
            hyperparameters the checkpoint must hold. None builds it as the command line has built it.
        config: Instead, arguments of the command line's ``fit`` that build it.
        merged: Write a model of transformers with the adapter merged into it, and the tokenizer if there is
            one with the base model. What is written is loaded again and compared with the adapter model.
            A ``module`` that is given is merged in place.
        overwrite: Write into a folder that is not empty: an earlier adapter or model in it is replaced.
        trusted: Import paths of classes that the checkpoint's hyperparameters hold, to be built as they are.
            PEFT's configurations always are; without trust, nothing else is.

    Raises:
        ValueError: If the checkpoint is of no federation, the module cannot be built or is another one,
            ``out`` is not empty, or a merged model is not the same model. ``out`` is then as it was.
    """
    out, checkpoint = Path(os.path.abspath(out)), Path(os.path.abspath(checkpoint))
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (overwrite and out.is_dir()):
        raise ValueError(f"{out} is not empty. Name another folder, or add --overwrite.")
    saved = read(checkpoint, trusted)
    state = federated_state(checkpoint, saved)
    if merged:
        refuse_prompt_learning(saved.get("hyper_parameters", {}), list(saved["state_dict"]))
    given = Configured(config).module if config else module
    with where_it_was_fitted(checkpoint, {} if config else saved, state.get("directory")):
        if not isinstance(given, LightningModule):
            given = rebuilt(checkpoint, saved, given, trusted)
        given.configure_model()
    _fill(given, saved["state_dict"])
    summary = state.get("summary", {})
    model = peft_model_in(given, "export")
    if merged:
        held = [model]
        # A large model fits once: nothing may hold it when it is loaded again.
        del module, given, saved, model
        _write_merged(held, out, summary)
        return
    names = _federated(model, state)
    base = base_of(model, names[0])
    with atomic_folder(out) as folder:
        said = save_adapters(model, folder, names, with_base=summary.get("writes_base", False), final=out)
        said += write_evidence(folder, state.get("aggregator", {}).get("evidence"))
        write_card(folder, summary, base, title=out.name, contents=said)


def _write_merged(held: list[PeftModel], out: Path, summary: Mapping[str, Any]) -> None:
    """Write the merged model, and reload it to compare what it says; ``held`` is emptied for that."""
    model = held[0]
    refuse_unmergeable(model)
    base, revision, inputs = base_of(model), model.peft_config[model.active_adapter].revision, probe(model)
    model = dequantized_as_trained(model, inputs)
    dtype = coarsest(model)
    expected, without = outputs(model, inputs), outputs(model, inputs, adapter=False)
    whole = merge_(model)
    kind = type(whole)
    with atomic_folder(out) as folder:
        whole.save_pretrained(str(folder))
        held.clear()
        del model, whole
        again = reload(kind, folder)
        doubt = compare(outputs(again, inputs), expected, without, dtype)
        if doubt:
            log.warning(doubt)
        _save_tokenizer(base, revision, folder)
        write_card(folder, summary, base, merged=True, title=out.name)


def _federated(model: PeftModel, state: Mapping[str, Any]) -> list[str]:
    """Return the adapters that federated: of the names of parameters in the aggregator's state."""
    shapes = state.get("aggregator", {}).get("shapes", {})
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    found = [p for name, p in parameters.items() if any(full.endswith(name) for full in shapes)]
    return adapters_with(model, found or [p for p in model.parameters() if p.requires_grad])


def _fill(module: LightningModule, state_dict: Mapping[str, Any]) -> None:
    """Load what the checkpoint holds; only frozen parameters may be missing."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    state_dict = named_as_in(module, state_dict)
    arguments.trainable_checkpoint(module, state_dict, frozen)
    module.load_state_dict(state_dict, strict=False)


def _save_tokenizer(base: str | None, revision: str | None, out: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision or "main", trust_remote_code=False)
        tokenizer.save_pretrained(str(out))
    except (OSError, ValueError, TypeError, ImportError):  # of readers that transformers 4 tries last
        log.warning("There is no tokenizer with the base model %s: save yours into %s.", base, out)
