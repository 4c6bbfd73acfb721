"""The kind of PartyParameters that goes with how a module is sharded, and what is refused of each."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pellm_lightning.comm.party import Party
from pellm_lightning.tensors.frozen_state import quantization_state
from pellm_lightning.tensors.sharding import is_sharded, reshard
from pellm_lightning.trainer.party_parameters.base import LocalParameters, PartyParameters

# What a kind needs is imported where it is found: those that have not built it need not wait for it.

# The oldest torch with which the tests of parties in shards pass, of those tried: with 2.7 they do not.
OLDEST_TORCH = "2.13"

_FSDP1, _ENGINE = "FullyShardedDataParallel", "DeepSpeedEngine"
_WRAPPERS = (_FSDP1, _ENGINE, "DistributedDataParallel", "_FabricModule")
# What FSDP1, ZeRO 3 and ZeRO 1 and 2 leave at the parameters of which they, or their optimizer, have shards.
_MARKS = ("_fsdp_flattened", "ds_id", "_hp_mapping")


def party_parameters(
    party: Party,
    root: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    bases: Sequence[Any] = (),
    *,
    experimental: bool = False,
) -> PartyParameters:
    """Return the parameters of a party, by how they lie in its processes; within ``gathered(root)``.

    Args:
        party: The party's processes; all of them call it.
        root: The module, as a strategy has wrapped it.
        parameters: The federated parameters by name.
        bases: Frozen weights that rounds change as well; only of a module that is not sharded.
        experimental: Whether a kind may be taken that has not been tried.

    Raises:
        ValueError: If they cannot be read and written.
    """
    kind = _kind(root)
    if kind == "local":
        return LocalParameters(party, parameters, bases)
    check_tried(kind, experimental=experimental)
    _check_frozen(root, bases)
    if kind == "DTensor":
        from pellm_lightning.trainer.party_parameters.dtensors import DTensorParameters

        return DTensorParameters(party, root, parameters)
    if kind == "FSDP1":
        from pellm_lightning.trainer.party_parameters.fsdp1 import FSDP1Parameters

        return FSDP1Parameters(party, root, parameters)
    from pellm_lightning.trainer.party_parameters.zero import ZeroParameters

    return ZeroParameters(party, root, parameters)


def gathered(root: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which parameters have their names and whole shapes, or are DTensors that do.

    All processes of a party enter it.

    Args:
        root: The module, as a strategy has wrapped it.

    Raises:
        ValueError: If what shards its parameters is not in it.
    """
    reshard(root)
    kind = _kind(root)
    if kind == "FSDP1":
        from pellm_lightning.trainer.party_parameters import fsdp1

        return fsdp1.gathered(root, recurse=True, writes=False)
    if kind == "DeepSpeed":
        from pellm_lightning.trainer.party_parameters import zero

        return zero.gathered(list(root.parameters()), writes=False)
    return nullcontext()


def is_gathered_at_once(root: nn.Module) -> bool:
    """Return whether ``gathered(root)`` has all parameters whole in each process: of FSDP1 and DeepSpeed."""
    return _kind(root) in ("FSDP1", "DeepSpeed")


def unwrapped(root: nn.Module) -> nn.Module:
    """Return a module without what DDP, FSDP1, DeepSpeed and Fabric wrap around it, and add to its names."""
    while type(root).__name__ in _WRAPPERS:
        inner: nn.Module = root.module  # type: ignore[assignment]
        root = inner
    return root


def check_tried(kind: str, *, experimental: bool) -> None:
    """Refuse parties in shards of a kind that has not been tried, without the user's consent.

    Args:
        kind: "DTensor", "FSDP1" or "DeepSpeed".
        experimental: Whether the user consents.

    Raises:
        ValueError: If it has not.
    """
    if experimental or (kind == "DTensor" and torch.__version__ >= OLDEST_TORCH):
        return
    why = "have not been run in a federation on accelerators yet"
    if kind == "DTensor":
        why = f"were tried with torch {OLDEST_TORCH} and newer, and this is torch {torch.__version__}"
    raise ValueError(
        f"Parties in shards by {kind} {why}. Use"
        f" {'a newer torch' if kind == 'DTensor' else 'FSDP2, tensor parallelism'}, DDP or a single device"
        " inside a party; or set parameters=Parameters(experimental=True) to try it."
    )


def _kind(root: nn.Module) -> Literal["local", "DTensor", "FSDP1", "DeepSpeed"]:
    """Return how a module's parameters lie in the processes of a party.

    Raises:
        ValueError: If they lie in shards of a wrapper that is not in the module, or that cannot be read.
    """
    wrappers = {name: [p for p in root.modules() if type(p).__name__ == name] for name in (_FSDP1, _ENGINE)}
    reachable = {id(p) for parts in wrappers.values() for part in parts for p in part.parameters()}
    for name, parameter in root.named_parameters():
        if id(parameter) not in reachable and any(hasattr(parameter, mark) for mark in _MARKS):
            raise ValueError(
                f"FSDP1 or DeepSpeed keeps shards of the parameter {name!r} outside of this"
                f" {type(root).__name__}: what a round writes into it would be lost. Give the module as"
                " FSDP1, DeepSpeed or Fabric has wrapped it, not the one inside."
            )
        if hasattr(parameter, "_is_flat_param"):
            raise ValueError(
                f"FSDP1 has made the flat parameter {name!r} of several. Wrap the module with"
                " use_orig_params=True, or use FSDP2."
            )
    if any(map(is_sharded, root.parameters())):
        return "DTensor"
    if wrappers[_FSDP1]:
        return "FSDP1"
    return "DeepSpeed" if wrappers[_ENGINE] else "local"


def _check_frozen(root: nn.Module, bases: Sequence[Tensor]) -> None:
    """Refuse frozen weights that shards do not let be compared, or written."""
    in_shards = any(is_sharded(p) or any(hasattr(p, mark) for mark in _MARKS[:2]) for p in root.parameters())
    if in_shards and (quantised := quantization_state(root)):
        raise ValueError(
            f"The base model is quantised ({sorted(quantised)[0]!r}) and sharded over the party's processes,"
            " which has been tried nowhere: its quantisation state is not in the shards. Shard a base in"
            " bf16, or train a quantised one on a single device or by DDP."
        )
    if bases:
        raise ValueError(
            f"The aggregation writes into {len(bases)} frozen base weight(s), which rounds cannot reach under"
            " FSDP1 or DeepSpeed. Use a rule that leaves the base as it is, such as LowRankMean(), or DDP"
            " inside a party."
        )
