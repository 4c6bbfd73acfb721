"""Checks of the strategy by which a party's processes train together, before the party joins."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pellm_lightning.callbacks.dp_sgd import DPSGD
from pellm_lightning.callbacks.drift.base import DriftCorrection
from pellm_lightning.comm.topology import Topology
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.tensors.frozen_state import quantization_state
from pellm_lightning.tensors.sharding import is_sharded
from pellm_lightning.trainer.isolation import callbacks_of

# The oldest torch with which the tests of parties in shards pass, of those tried: with 2.7 they do not.
OLDEST_TORCH = "2.13"
# These change gradients or copy weights one parameter at a time, each process by what it holds itself.
_WHOLE_ONLY = (DriftCorrection, DPSGD, WeightAveraging)


def check_strategy(trainer: Trainer, topology: Topology, factory: AggregatorFactory) -> None:
    """Refuse a strategy with which rounds would not work, or which reaches into other parties.

    Args:
        trainer: Whose strategy.
        topology: Party and rank of this process.
        factory: The callback's arguments.

    Raises:
        MisconfigurationException: If it is one.
    """
    strategy: Any = trainer.strategy  # the class of all lacks world_size, which those of here have
    parameters = factory.parameters
    name = type(strategy).__name__
    _check_kind(strategy, name, experimental=parameters.experimental)
    if strategy.world_size != topology.party_size:
        raise MisconfigurationException(
            f"The strategy {name} spans {strategy.world_size} processes, but a party has"
            f" {topology.party_size} ({topology.num_parties} parties). Gradients would cross between parties."
            " Pass plugins=[PartyEnvironment(num_parties=...)] so that each party is a world of its own,"
            " with devices set to the processes per party (devices=1 and no strategy for single-process"
            " parties)."
        )
    if not is_sharding(strategy):
        return
    if isinstance(strategy, DeepSpeedStrategy):
        _check_zero(factory, topology)
    for other in callbacks_of(trainer):
        if isinstance(other, _WHOLE_ONLY):
            raise MisconfigurationException(
                f"{type(other).__name__} needs whole parameters in each process, and {name} keeps them in"
                f" shards. Leave out {type(other).__name__}, or use a single device or strategy='ddp' inside"
                " a party."
            )
    if not parameters.save_frozen and vars(strategy).get("_save_distributed_checkpoint", False):
        raise MisconfigurationException(
            "save_frozen=False leaves parameters out of checkpoints, and a distributed checkpoint cannot be"
            f" loaded in part. Use {name}(save_distributed_checkpoint=False), or keep save_frozen=True."
        )


def is_sharding(strategy: Strategy) -> bool:
    """Return whether a strategy keeps parameters, or what its optimizer makes of them, in shards."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy)


def check_sharded_module(module: LightningModule) -> None:
    """Refuse a module whose shards cannot be compared or written.

    Raises:
        MisconfigurationException: If it is quantised and sharded.
    """
    if any(map(is_sharded, module.parameters())) and (quantised := quantization_state(module)):
        raise MisconfigurationException(
            f"The base model is quantised ({sorted(quantised)[0]!r}) and sharded over the party's processes,"
            " which has been tried nowhere: its quantisation state is not in the shards. Shard a base in"
            " bf16, or train a quantised one on a single device or by strategy='ddp'."
        )


def _check_zero(factory: AggregatorFactory, topology: Topology) -> None:
    """Refuse what clears moments of a local optimizer: DeepSpeed's are out of reach."""
    rule = factory.aggregation
    reasons = {
        "inner_optimizer_state='reset'": factory.inner_optimizer_state == "reset",
        "on_nonfinite='exclude'": factory.on_nonfinite == "exclude",
        f"aggregation={rule!r}": rule is not None and bool(rule.basis_changed(topology.num_parties)),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise MisconfigurationException(
            f"{found[0]} clears the moments of local optimizers, which DeepSpeed keeps to itself. Set"
            " inner_optimizer_state='keep' and on_nonfinite='raise', with a rule that keeps the factors'"
            " basis, such as Mean()."
        )


def _check_kind(strategy: Any, name: str, *, experimental: bool) -> None:
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        if experimental:
            return
        raise MisconfigurationException(
            f"Trainer(strategy={name}) has not been run in a federation yet: its parameters are read and"
            " written as tests without Lightning do. Use ModelParallelStrategy (FSDP2, tensor parallel),"
            " strategy='ddp' or a single device inside a party; or set"
            " parameters=Parameters(experimental=True) to try it."
        )
    if isinstance(strategy, ModelParallelStrategy) and not experimental and torch.__version__ < OLDEST_TORCH:
        raise MisconfigurationException(
            f"Parties in shards, as by {name}, were tried with torch {OLDEST_TORCH} and newer, and this is"
            f" torch {torch.__version__}. Update torch, use strategy='ddp' or a single device inside a party,"
            " or set parameters=Parameters(experimental=True) to try it."
        )
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"Trainer(strategy={name}) may shard or shadow a party's parameters in a way that rounds do not"
            " know, so a round's result could be lost by the next optimizer step. Use a single device,"
            " strategy='ddp' or ModelParallelStrategy inside a party."
        )
