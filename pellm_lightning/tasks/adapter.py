"""PEFT adapters of the ready-made modules: creation, hyperparameters, and the saving callback."""

import json
import re
from collections.abc import MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel

from pellm_lightning.callbacks.federated_averaging import FederatedAveraging
from pellm_lightning.comm.errors import did_you_mean
from pellm_lightning.comm.evidence.summary import write_evidence
from pellm_lightning.report.card import write_card
from pellm_lightning.tasks.earlier import backed_up_adapter
from pellm_lightning.tasks.folder import atomic_folder
from pellm_lightning.tasks.saving import save_adapters
from pellm_lightning.tensors.adapters import adapters_with
from pellm_lightning.trainer.environment import party_of
from pellm_lightning.trainer.isolation import callbacks_of
from pellm_lightning.trainer.pickling import own_state


def with_adapter(
    model: PreTrainedModel,
    peft: PeftConfig | None,
    adapter: str | None,
    task: str,
    revision: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Add an adapter to a model and freeze the model; without an adapter, everything is trained.

    The result is in train mode: transformers loads models in eval mode, which Lightning does not change.

    Args:
        model: The base model.
        peft: A new adapter's configuration.
        adapter: Folder of a saved adapter to continue, with its own configuration instead of ``peft``.
        task: PEFT's task type, unless the configuration has one.
        revision: Revision of the base model, which the saved adapter names.
    """
    model.train()
    if adapter is not None:
        # PEFT cannot restore the prompt encoder from a saved prompt, which can only be evaluated.
        try:
            trains = not PeftConfig.from_pretrained(adapter).is_prompt_learning
        except ValueError as error:
            raise ValueError(
                f"adapter={adapter!r} is no folder of an adapter (seen from {Path.cwd()}): {error}."
                " SaveAdapter and `pellm export` write one; a new adapter is given by peft instead."
            ) from error
        return PeftModel.from_pretrained(model, adapter, is_trainable=trains)
    if peft is None:
        return model
    peft.task_type = peft.task_type or task
    try:
        return get_peft_model(model, peft, revision=revision)
    except ValueError as error:
        if not re.search("Target modules|No modules were targeted", str(error)):
            raise
        raise ValueError(_no_target(model, peft)) from error


def _no_target(model: PreTrainedModel, peft: PeftConfig) -> str:
    """Return the message that names the layers which an adapter could be on."""
    asked = getattr(peft, "target_modules", None)
    asked = sorted(asked) if isinstance(asked, set) else asked
    layers = [name.rpartition(".")[2] for name, part in model.named_modules() if hasattr(part, "weight")]
    matched = [name for name in dict.fromkeys(layers) if not name.isdigit() and "norm" not in name.lower()]
    wanted = next(iter(asked), "") if isinstance(asked, list) else str(asked)
    return (
        f"target_modules={asked!r} of the peft configuration match no layer of the model, which has"
        f" {', '.join(matched[:20])}. Give some of these, or all-linear.{did_you_mean(wanted, matched)}"
    )


def config_of(peft: Any) -> PeftConfig | None:
    """Return a configuration, given as an object or as the dictionary of ``make_plain_``."""
    config: PeftConfig | None = PeftConfig.from_peft_type(**peft) if isinstance(peft, dict) else peft
    return config


def make_plain_(hparams: MutableMapping[str, Any]) -> None:
    """Convert hyperparameters to plain values, which a checkpoint's safe loader accepts.

    Configurations of PEFT and of a quantisation become dictionaries; functions (optimizer, scheduler) are
    removed, so that ``load_from_checkpoint`` uses their defaults unless given others. Hyperparameters from
    the command line are already plain.
    """
    for name, value in list(hparams.items()):
        if isinstance(value, PeftConfig | BitsAndBytesConfig):
            # default=sorted for sets, in which PEFT keeps module names.
            hparams[name] = json.loads(json.dumps(value.to_dict(), default=sorted))
        elif callable(value):
            del hparams[name]


class SaveAdapter(Callback):
    """Callback that saves the trained adapter at the end of fit, for ``PeftModel.from_pretrained``.

    It supports any LightningModule with a PEFT model, and runs after the federation's last round. If the
    aggregation rule has changed the frozen weights (``ResidualMean``, ``Stacking``), the base model is saved
    in the subfolder ``base``, and the adapter's configuration refers to it.

    Of a model with several adapters the federated ones are saved: a single one in the folder itself; several
    in a subfolder each, and their sum (of plain LoRA) in the folder itself. The model card lists them.

    Args:
        dirpath: Folder relative to the Trainer's ``default_root_dir``. With the placeholder ``{party}`` every
            party writes its own; without it only party 0 writes, since all parties have the same adapter at
            the end. An adapter of an earlier fit is moved to ``<dirpath>-<n>``.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callbacks = [FederatedAveraging(every_n_epochs=1), SaveAdapter("adapter")]
    """

    def __init__(self, dirpath: str = "adapter") -> None:
        super().__init__()
        self.dirpath = dirpath

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Determine the index of the party."""
        self.party = party_of(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the callback without the module."""
        return own_state(self)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save in one process of the party, after the last round for any order of callbacks."""
        writes = self.party == 0 or "{party}" in self.dirpath
        if not (writes and trainer.is_global_zero) or getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(trainer.default_root_dir) / self.dirpath.replace("{party}", str(self.party))
        federated = next((c for c in callbacks_of(trainer) if isinstance(c, FederatedAveraging)), None)
        model = peft_model_in(pl_module, "SaveAdapter")
        names = self._names(model, pl_module, federated)
        base = base_of(model, names[0])
        with_base = federated is not None and federated.writes_base
        with backed_up_adapter(folder), atomic_folder(folder) as unfinished:
            contents = save_adapters(model, unfinished, names, with_base=with_base, final=folder)
            if federated is not None:
                contents += write_evidence(unfinished, federated.evidence)
            if federated is not None and federated.summary is not None:
                write_card(unfinished, asdict(federated.summary), base, title=folder.name, contents=contents)

    @staticmethod
    def _names(
        model: PeftModel, pl_module: LightningModule, federated: FederatedAveraging | None
    ) -> list[str]:
        """Return the names of the federated adapters; without a federation, of the trained ones."""
        if federated is None:
            return adapters_with(model, [p for p in model.parameters() if p.requires_grad])
        return adapters_with(model, federated.parameters.select(pl_module).values())


def base_of(model: PeftModel, adapter: str | None = None) -> str | None:
    """Return the name of an adapter's base model, by default of the active one; None if unknown."""
    name = model.peft_config[adapter or model.active_adapter].base_model_name_or_path
    return str(name) if name else None


def peft_model_in(module: LightningModule, who: str) -> PeftModel:
    """Return the PEFT model in a module.

    Raises:
        MisconfigurationException: If there is none; ``who`` is the subject of the message.
    """
    found = next((part for part in module.modules() if isinstance(part, PeftModel)), None)
    if found is None:
        raise MisconfigurationException(
            f"{who} found no PEFT model in {type(module).__name__}. "
            "Give the module a `peft` configuration, or save the whole model instead."
        )
    return found
