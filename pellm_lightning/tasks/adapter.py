"""PEFT adapters: put one on a model, keep its configuration in a checkpoint, write it to a folder."""

import json
from collections.abc import MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftConfig, PeftModel, get_base_model_state_dict, get_peft_model
from transformers import PreTrainedModel

from pellm_lightning.callback import FederatedAveraging
from pellm_lightning.environment import party_of
from pellm_lightning.isolation import callbacks_of
from pellm_lightning.pickling import own_state
from pellm_lightning.report.card import write_card


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
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
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

    Args:
        dirpath: Folder, seen from the Trainer's ``default_root_dir``. With the placeholder ``{party}`` every
            party writes its own; without it only party 0 writes, as all parties end a federation with the
            same adapter.
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
        base = base_of(model)
        save_adapter(model, folder, with_base=federated is not None and federated.writes_base)
        if federated is not None and federated.about is not None:
            write_card(folder, asdict(federated.about), base)


def base_of(model: PeftModel) -> str | None:
    """Return the name of the base model of a PEFT model, None if nobody knows."""
    name = model.peft_config[model.active_adapter].base_model_name_or_path
    return str(name) if name else None


def save_adapter(model: PeftModel, folder: Path, *, with_base: bool) -> None:
    """Save an adapter, and the base model, too, in the subfolder ``base`` if training has changed it."""
    if with_base:
        _save_base(model, folder / "base")
    model.save_pretrained(str(folder))


def _save_base(model: PeftModel, folder: Path) -> None:
    """Save the base model without its adapters, and make their configurations name the folder."""
    base: Any = model.get_base_model
    base().save_pretrained(str(folder), state_dict=get_base_model_state_dict(model))
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(folder.resolve())


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
