"""Checks of the Trainer and of checkpoints, with errors that say what to do."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from pellm_lightning.callbacks.dp_sgd import DPSGD
from pellm_lightning.comm.topology import Topology
from pellm_lightning.tensors.frozen_state import quantization_state
from pellm_lightning.trainer.isolation import callbacks_of

log = logging.getLogger(__name__)


def protects_records(trainer: Trainer, weighting: object) -> bool:
    """Tell whether single records are protected, so that nothing else of the data may leave the party."""
    if not any(isinstance(other, DPSGD) for other in callbacks_of(trainer)):
        return False
    if weighting == "samples":
        raise MisconfigurationException(
            "weighting='samples' tells the others how many records a party has drawn, which DPSGD's"
            " guarantee does not cover. Set weighting='uniform', or a number of your own."
        )
    if trainer.limit_val_batches and trainer.enable_validation:
        log.warning(
            "Validation metrics are averaged over the parties as they are, which DPSGD's guarantee does"
            " not cover. Validate on data that may be seen, or set limit_val_batches=0."
        )
    return True


def trainer(trainer: Trainer, callback: Callback) -> None:
    """Check that no other callback of the Trainer federates, or searches at each party alone."""
    only_one(trainer, callback)
    for other in callbacks_of(trainer):
        if isinstance(other, LearningRateFinder | BatchSizeFinder):
            rank_zero_warn(
                f"{type(other).__name__} searches at each party alone, without rounds: parties may end with"
                " different settings. Search once before the federation and fix the value."
            )


def only_one(trainer: Trainer, callback: Callback) -> None:
    """Check that the Trainer has no other callback that federates, be it of a class derived from ours."""
    bases = type(callback).__mro__
    kind = bases[bases.index(Callback) - 1]
    found = [type(other).__name__ for other in callbacks_of(trainer) if isinstance(other, kind)]
    if len(found) > 1:
        raise MisconfigurationException(
            f"The Trainer has {len(found)} callbacks that federate ({', '.join(found)}): their rounds would"
            " mix, and a checkpoint holds the state of one. Keep one; those that the command line adds, and"
            " configure_callbacks, count as well."
        )


def checkpoints(trainer: Trainer) -> None:
    """Warn about checkpoints that hold the frozen parameters although the callback would leave them out."""
    for other in callbacks_of(trainer):
        if isinstance(other, ModelCheckpoint) and other.save_weights_only:
            rank_zero_warn(
                "ModelCheckpoint(save_weights_only=True) asks no callback what to save, so save_frozen=False"
                " has no effect on its files: they hold the frozen parameters as well. Drop one of the two."
            )


def quantized_base(trainer: Trainer, module: LightningModule) -> None:
    """Warn about checkpoints that hold a quantised base, which torch saves and cannot load again."""
    if trainer.checkpoint_callbacks and quantization_state(module):
        rank_zero_warn(
            "The base model is quantised, and checkpoints of this fit will hold it: no fit can be resumed"
            " from them, since quantised layers save more than they can load. Set"
            " parameters.save_frozen=False (--federated.parameters.save_frozen false); the base is then"
            " quantised again, to the same weights."
        )


def samplers(trainer: Trainer, topology: Topology, copies: int = 1) -> None:
    """Check that no sampler hands out only a part of the party's private data.

    Args:
        trainer: Its training DataLoader has the sampler.
        topology: Party and rank of this process.
        copies: Processes of the party that get the same batch.
    """
    replicas = topology.party_size // copies

    def check(loader: Any) -> Any:
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas != replicas:
            raise MisconfigurationException(
                f"The training DataLoader of party {topology.party} has a DistributedSampler over"
                f" {sampler.num_replicas} replicas, but the party has {replicas} process(es) with data: it"
                " would train on a part of its private data only. Remove the sampler; Lightning adds one"
                " inside a party by itself."
            )
        return loader

    apply_to_collection(trainer.train_dataloader, DataLoader, check)


def optimizers(trainer: Trainer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Warn about federated parameters that no optimizer trains."""
    trained = {
        id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
    }
    idle = [name for name, parameter in parameters.items() if id(parameter) not in trained]
    if idle:
        rank_zero_warn(
            f"{len(idle)} federated parameter(s) are in no optimizer, the first is {idle[0]!r}: they cross"
            " each round but nothing trains them. Give them to configure_optimizers, freeze them, or name"
            " them in `exclude`."
        )


def devices(described: Sequence[object]) -> None:
    """Warn if two parties compute on the same accelerator."""
    named = [device for device in described if device is not None]
    if len(set(named)) < len(named):
        rank_zero_warn(
            f"Several parties compute on the same accelerator ({named}). Start torchrun with"
            " --virtual-local-rank, or set CUDA_VISIBLE_DEVICES per party, so that each has its own."
        )


def trainable_checkpoint(
    module: LightningModule, state_dict: Mapping[str, Any], left_out: Collection[str]
) -> None:
    """Check that a checkpoint without frozen parameters holds all others and nothing unknown."""
    expected = [name for name, _ in module.named_parameters() if name not in left_out]
    missing = [name for name in expected if name not in state_dict]
    known = set(module.state_dict())
    unknown = [name for name in state_dict if name not in known]
    for words, names in (("lacks the", missing), ("holds the unknown", unknown)):
        if names:
            raise ValueError(
                f"The checkpoint {words} parameter {names[0]!r} ({len(names)} in all). Build the module as it"
                " was when the checkpoint was saved: same base, same PEFT configuration."
            )
