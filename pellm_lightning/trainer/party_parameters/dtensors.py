"""DTensorParameters: parameters in shards as FSDP2, tensor parallelism and meshes of both make them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from typing_extensions import override

from pellm_lightning.comm.party import Party
from pellm_lightning.tensors.sharding import reshard, whole
from pellm_lightning.trainer.party_parameters.base import GatheredParameters


class DTensorParameters(GatheredParameters):
    """Parameters of which some are DTensors.

    Args:
        party: The party's processes.
        module: The module whose parameters they are.
        parameters: The federated parameters by name, sharded or not.
    """

    def __init__(self, party: Party, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(party, parameters)
        self._module = module

    @override
    @torch.no_grad()
    def read_(self) -> None:
        reshard(self._module)
        for name, parameter in self._parameters.items():
            self._keep(name, whole(parameter))

    @override
    @torch.no_grad()
    def write_(self) -> None:
        reshard(self._module)  # else the next forward pass uses what was gathered for the last one
        for name, parameter in self._parameters.items():
            if isinstance(parameter, DTensor):
                value = self._received(name, parameter.device_mesh.device_type)
                parameter.to_local().copy_(_shard(value, parameter))
            else:
                parameter.copy_(self._received(name, parameter.device))

    @override
    def gathered(self) -> AbstractContextManager[None]:
        reshard(self._module)
        return nullcontext()

    @override
    def _whole(self, tensor: Tensor) -> Tensor:
        return whole(tensor)


def _shard(value: Tensor, like: DTensor) -> Tensor:
    """Return this process's part of a tensor that all processes hold; nothing is sent."""
    mesh = like.device_mesh
    replicated = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements).to_local()
