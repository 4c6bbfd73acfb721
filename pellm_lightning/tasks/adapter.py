"""PEFT adapters: put one on a model, keep its configuration in a checkpoint, write it to a folder."""

import json
from collections.abc import MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from pellm_lightning.callbacks.federated_averaging import FederatedAveraging
from pellm_lightning.report.card import write_card
from pellm_lightning.tasks.earlier import earlier_adapter_kept
from pellm_lightning.tasks.folder import written_whole
from pellm_lightning.tasks.saving import save_adapters
from pellm_lightning.tensors.adapters import adapters_with
from pellm_lightning.trainer.environment import party_of
from pellm_lightning.trainer.isolation import callbacks_of
from pellm_lightning.trainer.pickling import own_state


def with_adapter(
    model: PreTrainedModel, peft: PeftConfig | None, adapter: str | None, task: str
) -> PreTrainedModel | PeftModel:
    """Put an adapter on ``model``, which is frozen then; without one, everything trains.

    The result is in train mode: transformers loads models in eval mode, and Lightning leaves it at that.

    Args:
        model: The base model.
        peft: A new adapter's configuration.
        adapter: Folder of a saved adapter to go on with; its own configuration counts then, not ``peft``.
        task: PEFT's task type, for a configuration that names none.
    """
    model.train()
    if adapter is not None:
        # PEFT has no way back from a saved prompt to the encoder that was trained: it can be evaluated only.
        trains = not PeftConfig.from_pretrained(adapter).is_prompt_learning
        return PeftModel.from_pretrained(model, adapter, is_trainable=trains)
    if peft is None:
        return model
    peft.task_type = peft.task_type or task
    return get_peft_model(model, peft)


def config_of(peft: Any) -> PeftConfig | None:
    """Read a configuration: the object itself, or the dictionary that `make_plain_` left in a checkpoint."""
    config: PeftConfig | None = PeftConfig.from_peft_type(**peft) if isinstance(peft, dict) else peft
    return config


def make_plain_(hparams: MutableMapping[str, Any]) -> None:
    """Leave in a module's hyperparameters only what a checkpoint can give back to the safe loader.

    A PEFT configuration becomes a dictionary; functions (optimizer, scheduler) go, so that
    `load_from_checkpoint` falls back to their defaults unless it is given others. Hyperparameters from the
    command line are plain already.
    """
    for name, value in list(hparams.items()):
        if isinstance(value, PeftConfig):
            # default=sorted: JSON has no set, which PEFT keeps module names in.
            hparams[name] = json.loads(json.dumps(value.to_dict(), default=sorted))
        elif callable(value):
            del hparams[name]


class SaveAdapter(Callback):
    """Write the trained adapter at the end of fit, for ``PeftModel.from_pretrained`` to load.

    It works with any LightningModule that holds a PEFT model, and comes after the federation's last round.
    Where the aggregation has written into the frozen weights (``ResidualMean``, ``Stacking``), the base model
    as it is now is saved in the subfolder ``base``, and the adapter's configuration names it.

    Of a model with several adapters, those that federate are written: one to the folder itself, whatever its
    name; several to a subfolder each, and their sum (of plain LoRA) to the folder itself. The model card says
    what is where.

    Args:
        dirpath: Folder, seen from the Trainer's ``default_root_dir``. With the placeholder ``{party}`` every
            party writes its own; without it only party 0 writes, as all parties end a federation with the
            same adapter. It holds the latest adapter; that of an earlier fit is moved to ``<dirpath>-<n>``.
    """

    def __init__(self, dirpath: str = "adapter") -> None:
        super().__init__()
        self.dirpath = dirpath

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask which party this is."""
        self.party = party_of(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the module of a fit out of a pickled callback or a copy."""
        return own_state(self)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save from one process of the party, after the last round whatever the order of callbacks."""
        writes = self.party == 0 or "{party}" in self.dirpath
        if not (writes and trainer.is_global_zero) or getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(trainer.default_root_dir) / self.dirpath.replace("{party}", str(self.party))
        federated = next((c for c in callbacks_of(trainer) if isinstance(c, FederatedAveraging)), None)
        model = peft_model_in(pl_module, "SaveAdapter")
        names = self._names(model, pl_module, federated)
        base = base_of(model, names[0])
        with_base = federated is not None and federated.writes_base
        with earlier_adapter_kept(folder), written_whole(folder) as unfinished:
            said = save_adapters(model, unfinished, names, with_base=with_base, final=folder)
            if federated is not None and federated.summary is not None:
                write_card(unfinished, asdict(federated.summary), base, title=folder.name, contents=said)

    @staticmethod
    def _names(
        model: PeftModel, pl_module: LightningModule, federated: FederatedAveraging | None
    ) -> list[str]:
        """Return which adapters federate; without a federation, which train."""
        if federated is None:
            return adapters_with(model, [p for p in model.parameters() if p.requires_grad])
        return adapters_with(model, federated.parameters.select(pl_module).values())


def base_of(model: PeftModel, adapter: str | None = None) -> str | None:
    """Return the name of the base model of an adapter, by default the active one; None if nobody knows."""
    name = model.peft_config[adapter or model.active_adapter].base_model_name_or_path
    return str(name) if name else None


def peft_model_in(module: LightningModule, who: str) -> PeftModel:
    """Return the PEFT model in a module.

    Raises:
        MisconfigurationException: If there is none; ``who`` begins the error.
    """
    found = next((part for part in module.modules() if isinstance(part, PeftModel)), None)
    if found is None:
        raise MisconfigurationException(
            f"{who} found no PEFT model in {type(module).__name__}. "
            "Give the module a `peft` configuration, or save the whole model instead."
        )
    return found
