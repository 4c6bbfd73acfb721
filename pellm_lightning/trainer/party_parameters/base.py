"""PartyParameters: the interface by which rounds read and write a party's parameters, and its plain kind."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from typing_extensions import override

from pellm_lightning.comm.party import Party
from pellm_lightning.tensors.digest import tensor_digest
from pellm_lightning.tensors.flat_buffer import Layout
from pellm_lightning.tensors.frozen_state import frozen_state


class PartyParameters(ABC):
    """Federated parameters of one party, which its leader holds as whole tensors.

    What aggregates reads and writes ``tensors`` at the leader, and never learns of shards. All processes of
    the party call ``read_`` before it and ``write_`` after it, each as often as the others.
    """

    reaches_optimizer = True
    """Whether a party reaches its optimizer's moments, and gradients before they are applied."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The whole tensors by name, at the leader; in the other processes whatever they have."""

    @abstractmethod
    def read_(self) -> None:
        """Copy the parameters, as training has left them, into ``tensors``."""

    @abstractmethod
    def write_(self) -> None:
        """Write the leader's ``tensors`` into the parameters of all the party's processes."""

    @abstractmethod
    def frozen_state(self, module: nn.Module) -> Mapping[str, Tensor | str]:
        """Return what must be equal at all parties, by name: tensors, or the digests of sharded ones."""


class LocalParameters(PartyParameters):
    """Parameters that each process of a party holds whole: of a single process, or under DDP.

    Args:
        party: The party's processes.
        parameters: The federated parameters by name; rounds read and write them themselves.
        bases: Frozen weights that rounds change as well, contiguous.

    Example:
        >>> from pellm_lightning.comm.topology import Topology
        >>> layer = nn.Linear(2, 1)
        >>> parameters = LocalParameters(Party(Topology()), dict(layer.named_parameters()))
        >>> parameters.tensors["bias"] is layer.bias
        True
    """

    def __init__(self, party: Party, parameters: Mapping[str, Tensor], bases: Sequence[Tensor] = ()) -> None:
        self._party = party
        self._parameters = dict(parameters)
        self._bases = bases
        self._layout: Layout | None = None

    @property
    @override
    def tensors(self) -> Mapping[str, Tensor]:
        return self._parameters

    @override
    def read_(self) -> None:
        """Do nothing: the parameters are the tensors."""

    @override
    @torch.no_grad()
    def write_(self) -> None:
        if self._party.topology.party_size == 1:
            return
        layout = self._layout = self._layout or Layout(self._parameters)
        vector = layout.pack_(layout.new_vector())
        self._party.broadcast_(vector)
        layout.unpack_(vector)
        for base in self._bases:
            self._party.broadcast_(base)

    @override
    def frozen_state(self, module: nn.Module) -> Mapping[str, Tensor | str]:
        return frozen_state(module)


class GatheredParameters(PartyParameters):
    """Parameters in shards over a party's processes; the leader keeps whole copies in CPU memory.

    On its accelerator there may be no room for all of them. They are gathered and given back a few at a time.

    Args:
        party: The party's processes.
        parameters: The federated parameters by name, in their whole shapes.
        dtype: Data type of the whole tensors; None for the parameters' own.
    """

    def __init__(
        self, party: Party, parameters: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> None:
        self._party = party
        self._parameters = dict(sorted(parameters.items()))
        self._kinds = {name: (p.shape, dtype or p.dtype) for name, p in self._parameters.items()}
        self._tensors: dict[str, Tensor] = {}
        if party.topology.is_leader:
            self._tensors = {name: self._empty(name) for name in self._parameters}

    @property
    @override
    def tensors(self) -> Mapping[str, Tensor]:
        return self._tensors

    @override
    @torch.no_grad()
    def frozen_state(self, module: nn.Module) -> Mapping[str, Tensor | str]:
        state: dict[str, Tensor | str] = {}
        with self.gathered():
            for name, tensor in frozen_state(module).items():
                whole = self._whole(tensor)
                if self._party.topology.is_leader:
                    state[name] = str(tensor_digest(whole))
        return state

    @abstractmethod
    def gathered(self) -> AbstractContextManager[object]:
        """Return a context in which ``_whole`` finds frozen tensors; all processes enter it."""

    def _whole(self, tensor: Tensor) -> Tensor:
        """Return a frozen tensor, whole, while the module is gathered."""
        return tensor

    def _keep(self, name: str, whole: Tensor) -> None:
        """Copy a parameter into the leader's tensor."""
        if name in self._tensors:
            self._tensors[name].copy_(whole)

    def _received(self, name: str, device: torch.device | str) -> Tensor:
        """Return the leader's tensor on a device, in every process."""
        value = self._tensors[name] if self._tensors else self._empty(name)
        return self._party.broadcast_(value.to(device))

    def _empty(self, name: str) -> Tensor:
        shape, dtype = self._kinds[name]
        return torch.empty(shape, dtype=dtype)
