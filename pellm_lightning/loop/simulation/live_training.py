"""LiveTraining: the one module and its optimizers, into which each party's state is swapped."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pellm_lightning.loop.simulation.party_states import PartyState
from pellm_lightning.loop.simulation.slot import Slot


class LiveTraining:
    """Training module, optimizers and schedulers, which belong to one party at a time.

    A party's parameters lie in a ``Slot`` meanwhile, with the moments of its optimizers; all else that is its
    own is a ``PartyState``. The frozen parameters are everybody's.

    Args:
        module: The module.
        trainable: Its parameters that may be trained, by name.
        shared: Names of those that federate; the others are each party's own.
        optimizers: The optimizers.
        schedulers: Their schedulers.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        shared: set[str],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[LRScheduler],
    ) -> None:
        self._trainable = trainable
        self._buffers = dict(module.named_buffers())
        self._optimizers, self._schedulers = optimizers, schedulers
        self._own = sorted(trainable.keys() - shared)
        self._changed: set[str] = set()  # buffers that some party has changed
        self.initial: PartyState = {
            "own": {name: _copy(trainable[name]) for name in self._own},
            "buffers": {name: _copy(buffer) for name, buffer in self._buffers.items()},
            **self._options(),
        }
        """State of a party that has not trained yet."""

    @torch.no_grad()
    def load_(self, slot: Slot, state: PartyState) -> None:
        """Make it the training of a party, whose parameters and moments the slot has."""
        for name, parameter in self._trainable.items():
            parameter.copy_(slot.parameters[name])
            parameter.grad = None
        self._load_buffers_(state["buffers"])
        for optimizer, held in zip(self._optimizers, slot.optimizers, strict=True):
            optimizer.state.clear()
            for name, parameter in self._trainable.items():
                moments = held.state.pop(slot.parameters[name], None)
                if moments is not None:
                    optimizer.state[parameter] = _moved(moments, parameter.device)
        self._load_options_(state)

    @torch.no_grad()
    def save_(self, slot: Slot) -> PartyState:
        """Let the slot have the party's parameters and moments; return what else is its own."""
        for name, parameter in self._trainable.items():
            slot.parameters[name].copy_(parameter)
            parameter.grad = None
        for optimizer, held in zip(self._optimizers, slot.optimizers, strict=True):
            for name, parameter in self._trainable.items():
                if parameter in optimizer.state:
                    held.state[slot.parameters[name]] = _moved(optimizer.state.pop(parameter), "cpu")
            optimizer.state.clear()
        state = {"buffers": self._changed_buffers(), **self._options()}
        self._load_buffers_({})
        self._load_options_(self.initial)
        return state

    @torch.no_grad()
    def rest_(self, slot: Slot) -> None:
        """Make it nobody's: the global parameters, and of the rest what it began with."""
        for name, parameter in self._trainable.items():
            own = self.initial["own"].get(name)
            parameter.copy_(slot.parameters[name] if own is None else own)

    @property
    def changed(self) -> list[str]:
        """Names of buffers that some party has changed."""
        return sorted(self._changed)

    def resume(self, initial: PartyState, changed: Sequence[str]) -> None:
        """Restore what a party begins with, as it was before the module held a party's state."""
        self.initial, self._changed = initial, set(changed)

    # ---- buffers: those of a frozen base are many, and nobody changes them

    def _changed_buffers(self) -> dict[str, Tensor]:
        initial = self.initial["buffers"]
        changed = {name for name, b in self._buffers.items() if not torch.equal(b.cpu(), initial[name])}
        self._changed |= changed
        return {name: _copy(self._buffers[name]) for name in changed}

    def _load_buffers_(self, values: Mapping[str, Tensor]) -> None:
        for name in self._changed | values.keys():
            self._buffers[name].copy_(values.get(name, self.initial["buffers"][name]))

    # ---- options of the optimizers' groups, and the schedulers

    def _options(self) -> dict[str, Any]:
        groups = [
            [{key: value for key, value in group.items() if key != "params"} for group in o.param_groups]
            for o in self._optimizers
        ]
        schedulers = [scheduler.state_dict() for scheduler in self._schedulers]
        return copy.deepcopy({"groups": groups, "schedulers": schedulers})

    def _load_options_(self, state: PartyState) -> None:
        options = copy.deepcopy({key: state[key] for key in ("groups", "schedulers")})
        for optimizer, groups in zip(self._optimizers, options["groups"], strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
        for scheduler, saved in zip(self._schedulers, options["schedulers"], strict=True):
            scheduler.load_state_dict(saved)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _moved(moments: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return moments on a device; scalars, such as the count of steps, stay where the optimizer has them."""
    return {
        key: value.to(device) if isinstance(value, Tensor) and value.ndim else value
        for key, value in moments.items()
    }
