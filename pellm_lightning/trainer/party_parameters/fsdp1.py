"""FSDP1Parameters: parameters in the flat shards of torch's first FullyShardedDataParallel."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from typing_extensions import override

from pellm_lightning.comm.party import Party
from pellm_lightning.trainer.party_parameters.base import GatheredParameters


class FSDP1Parameters(GatheredParameters):
    """Parameters under FSDP1 with ``use_orig_params=True``, which are gathered one unit at a time.

    What is written while a unit is gathered goes into its shards, which the optimizer steps.

    Args:
        party: The party's processes.
        root: The outermost FSDP module.
        parameters: The federated parameters by name, while all are gathered: outside, their shapes are those
            of this process's pieces.
    """

    def __init__(self, party: Party, root: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(party, parameters)
        self._root = root
        self._units = [(unit, _own_ids(unit)) for unit in FSDP.fsdp_modules(root)]

    @override
    @torch.no_grad()
    def read_(self) -> None:
        for unit, names in self._by_unit():
            with gathered(unit, recurse=False, writes=False):
                for name in names:
                    self._keep(name, self._parameters[name])

    @override
    @torch.no_grad()
    def write_(self) -> None:
        for unit, names in self._by_unit():
            with gathered(unit, recurse=False, writes=True):
                for name in names:
                    parameter = self._parameters[name]
                    parameter.copy_(self._received(name, parameter.device))

    @override
    def gathered(self) -> AbstractContextManager[None]:
        return gathered(self._root, recurse=True, writes=False)

    def _by_unit(self) -> Iterator[tuple[nn.Module, list[str]]]:
        for unit, ids in self._units:
            names = [name for name, p in self._parameters.items() if id(p) in ids]
            if names:
                yield unit, names


def gathered(module: nn.Module, *, recurse: bool, writes: bool) -> AbstractContextManager[None]:
    """Return a context in which an FSDP1 module's parameters are whole in all processes.

    Args:
        module: The FSDP1 module.
        recurse: Whether those of nested FSDP1 modules are, too.
        writes: Whether what is written then goes into the shards; all processes write the same.
    """
    context: AbstractContextManager[None] = FSDP.summon_full_params(module, recurse=recurse, writeback=writes)
    return context


def _own_ids(unit: nn.Module) -> set[int]:
    """Return the ids of a unit's parameters, without those of the units nested in it."""
    found: set[int] = set()
    parts = list(unit.children())
    while parts:
        part = parts.pop()
        if not isinstance(part, FSDP):
            found |= {id(p) for p in part.parameters(recurse=False)}
            parts += list(part.children())
    return found
