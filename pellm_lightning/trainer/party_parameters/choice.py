"""The kind of PartyParameters that goes with how a module is sharded."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from pellm_lightning.comm.party import Party
from pellm_lightning.tensors.sharding import is_sharded, reshard
from pellm_lightning.trainer.party_parameters.base import LocalParameters, PartyParameters

# What a kind needs is imported where it is found: those that have not built it need not wait for it.


def party_parameters(
    party: Party,
    root: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    bases: Sequence[Any] = (),
) -> PartyParameters:
    """Return the parameters of a party, by how they lie in its processes; within ``gathered(root)``.

    Args:
        party: The party's processes; all of them call it.
        root: The module, as a strategy has wrapped it.
        parameters: The federated parameters by name.
        bases: Frozen weights that rounds change as well; only of a module that is not sharded.

    Raises:
        ValueError: If they cannot be read and written.
    """
    if any(is_sharded(p) for p in root.parameters()):
        from pellm_lightning.trainer.party_parameters.dtensors import DTensorParameters

        return DTensorParameters(party, root, parameters)
    if _has_fsdp1(root):
        from pellm_lightning.trainer.party_parameters.fsdp1 import FSDP1Parameters

        return FSDP1Parameters(party, root, parameters)
    if type(root).__name__ == "DeepSpeedEngine":
        from pellm_lightning.trainer.party_parameters.zero import ZeroParameters

        return ZeroParameters(party, root, parameters)
    return LocalParameters(party, parameters, bases)


def gathered(root: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which parameters have their names and whole shapes, or are DTensors that do.

    All processes of a party enter it. FSDP1 and ZeRO gather all parameters meanwhile.

    Args:
        root: The module, as a strategy has wrapped it.
    """
    reshard(root)
    if _has_fsdp1(root):
        from pellm_lightning.trainer.party_parameters import fsdp1

        return fsdp1.gathered(root, recurse=True, writes=False)
    if type(root).__name__ == "DeepSpeedEngine":
        from pellm_lightning.trainer.party_parameters import zero

        return zero.gathered(list(root.parameters()), writes=False)
    return nullcontext()


def _has_fsdp1(root: nn.Module) -> bool:
    return any(type(part).__name__ == "FullyShardedDataParallel" for part in root.modules())
