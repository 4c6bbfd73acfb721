"""ZeroParameters: parameters of a DeepSpeed engine, whose optimizer keeps float32 masters in shards."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from pellm_lightning.comm.party import Party
from pellm_lightning.trainer.party_parameters.base import GatheredParameters


class ZeroParameters(GatheredParameters):
    """Parameters under DeepSpeed's ZeRO, stages 1 to 3.

    The optimizer steps float32 masters and writes them into the parameters after each step: what is written
    only into the parameters is lost, and what is written only into the masters is not seen before the next
    step. Rounds read the masters and write both.

    Args:
        party: The party's processes.
        engine: The DeepSpeed engine.
        parameters: The federated parameters by name, while all are gathered.

    Raises:
        ValueError: If DeepSpeed keeps no master of one.
    """

    reaches_optimizer = False

    def __init__(self, party: Party, engine: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(party, parameters, dtype=torch.float32)
        self._engine = engine
        for name, parameter in parameters.items():
            if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
                raise ValueError(
                    f"DeepSpeed keeps no float32 master of the parameter {name!r}, by which rounds read and"
                    " write it. Use ZeRO stage 1, 2 or 3 with an optimizer that trains it, in bf16 or fp32."
                )

    @override
    @torch.no_grad()
    def read_(self) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._parameters.items():
            self._keep(name, safe_get_full_fp32_param(parameter))

    @override
    @torch.no_grad()
    def write_(self) -> None:
        for name, parameter in self._parameters.items():
            value = self._received(name, parameter.device)
            self._set_master(parameter, value)
            with gathered([parameter], writes=True):
                parameter.copy_(value)

    def _set_master(self, parameter: Tensor, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_set_full_fp32_param,
            safe_set_local_fp32_param,
        )

        if not hasattr(parameter, "ds_id"):
            safe_set_full_fp32_param(parameter, value)
            return
        # Stage 3 pads the last piece, and cannot set whole a parameter that does not divide by the processes.
        topology, size = self._party.topology, safe_get_local_fp32_param(parameter).numel()
        flat = nn.functional.pad(value.flatten(), (0, size * topology.party_size - value.numel()))
        safe_set_local_fp32_param(parameter, flat.split(size)[topology.rank_in_party])

    @override
    def gathered(self) -> AbstractContextManager[Any]:
        return gathered(list(self._engine.parameters()), writes=False)


def gathered(parameters: Sequence[Tensor], *, writes: bool) -> AbstractContextManager[Any]:
    """Return a context in which ZeRO's parameters are whole in all processes; stages 1 and 2 keep them so.

    Args:
        parameters: Which.
        writes: Whether what the leader writes then goes into the shards.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        sharded, modifier_rank=0 if writes else None
    )
    return context
