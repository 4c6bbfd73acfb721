"""Queries of a Trainer's state during a fit, and of the paths and records that belong to the fit."""

import os

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pellm_lightning.aggregation import lora_modules
from pellm_lightning.comm.topology import Topology
from pellm_lightning.report import record
from pellm_lightning.tensors.frozen_state import quantization_state
from pellm_lightning.trainer import isolation


def validates_in_fit(trainer: Trainer) -> bool:
    """Return whether the running validation belongs to a fit, and is no sanity check."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def is_stopping(trainer: Trainer) -> bool:
    """Return whether training ends at this batch: it was told to stop, and may."""
    free = trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (
        trainer.min_steps or 0
    )
    return trainer.should_stop and free


def raise_if_terminated(trainer: Trainer) -> None:
    """Stop waiting for other parties when this process is told to end; Lightning looks only between batches.

    Raises:
        SIGTERMException: If it was told to.
    """
    if trainer.received_sigterm:
        raise SIGTERMException


def why_nothing_was_trained(trainer: Trainer) -> str:
    """Return why a fit ended before training started."""
    if trainer.limit_train_batches == 0 or trainer.num_training_batches == 0:
        return (
            "it has no training batches, so its fit ended before it began; give it data or start without it"
        )
    return "its fit ended before it began, since max_epochs or max_steps was reached already"


def unchanged_frozen(module: LightningModule, *, writes_base: bool) -> set[str]:
    """Return the names of frozen parameters, and their quantisation state, that are as before the fit.

    Args:
        module: The module.
        writes_base: Whether rounds write into the frozen weights below LoRA factors.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    written: set[int] = set()
    if writes_base:
        bases = [lora.base for lora in lora_modules(module).values()]
        written = {base.data_ptr() for base in bases if base is not None}
    frozen = {name for name, p in parameters.items() if not p.requires_grad and p.data_ptr() not in written}
    return frozen | quantization_state(module)


def new_record(trainer: Trainer, topology: Topology) -> record.RunRecord | None:
    """Return the record of a fit; None where the Trainer writes nothing."""
    if vars(trainer).get("fast_dev_run") or trainer.barebones:
        return None
    root = trainer.default_root_dir
    if topology.num_parties > 1:
        root = isolation.below(root, topology.party)
    return record.RunRecord(os.path.join(root, record.FILE_NAME))
