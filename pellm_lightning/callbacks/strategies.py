"""Checks of the strategy by which a party's processes train together, before the party joins."""

from typing import Any

from lightning.pytorch import Trainer
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
from pellm_lightning.trainer.isolation import callbacks_of
from pellm_lightning.trainer.party_parameters.choice import check_tried

_SHARDING: dict[str, type[Strategy]] = {
    "DTensor": ModelParallelStrategy,
    "FSDP1": FSDPStrategy,
    "DeepSpeed": DeepSpeedStrategy,
}
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
    name = type(strategy).__name__
    _check_kind(strategy, name, topology, factory)
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
    for other in callbacks_of(trainer):
        if isinstance(other, _WHOLE_ONLY):
            raise MisconfigurationException(
                f"{type(other).__name__} needs whole parameters in each process, and {name} keeps them in"
                f" shards. Leave out {type(other).__name__}, or use a single device or strategy='ddp' inside"
                " a party."
            )
    if not factory.parameters.save_frozen and vars(strategy).get("_save_distributed_checkpoint", False):
        raise MisconfigurationException(
            "save_frozen=False leaves parameters out of checkpoints, and a distributed checkpoint cannot be"
            f" loaded in part. Use {name}(save_distributed_checkpoint=False), or keep save_frozen=True."
        )


def is_sharding(strategy: Strategy) -> bool:
    """Return whether a strategy keeps parameters, or what its optimizer makes of them, in shards."""
    return isinstance(strategy, tuple(_SHARDING.values()))


def _check_kind(strategy: Any, name: str, topology: Topology, factory: AggregatorFactory) -> None:
    for kind, sharding in _SHARDING.items():
        if isinstance(strategy, sharding):
            try:
                check_tried(kind, experimental=factory.parameters.experimental)
                if kind == "DeepSpeed":
                    factory.check_out_of_reach(factory.aggregation, topology.num_parties)
            except ValueError as error:
                raise MisconfigurationException(f"Trainer(strategy={name}): {error}") from error
            return
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise MisconfigurationException(
            f"Trainer(strategy={name}) may shard or shadow a party's parameters in a way that rounds do not"
            " know, so a round's result could be lost by the next optimizer step. Use a single device,"
            " strategy='ddp' or ModelParallelStrategy inside a party."
        )
