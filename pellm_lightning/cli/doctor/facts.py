"""What a party tells of itself before training, and what it measures with the others: plain containers."""

import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from pellm_lightning.callbacks import arguments
from pellm_lightning.callbacks.federated_averaging import FederatedAveraging
from pellm_lightning.comm import Communicator
from pellm_lightning.comm.communicator import Difference, Intent, Metadata, QuorumResult, Version
from pellm_lightning.comm.tls import TLS
from pellm_lightning.engine.compatibility import PartySpec
from pellm_lightning.report.record import versions
from pellm_lightning.trainer.environment import describe_device, topology_of

log = logging.getLogger(__name__)
_UNREADABLE = "what it tells cannot be read: install the same version of pellm-lightning at all parties"
_NOBODY = "Nobody has come yet: there is nothing to exchange with."


@dataclass(frozen=True)
class Facts:
    """What one party is, and what it would bring to a fit."""

    host: str = field(default_factory=socket.gethostname)
    versions: dict[str, str] = field(default_factory=versions)
    processes: int = 1
    """Of the party."""
    device: str = "unknown"
    """Description of the training data."""
    accelerator: str | None = None
    """What tells its accelerator from all others; None for a CPU."""
    size_bytes: int = 0
    """Of the vector that would cross in a round, float32."""
    parameters: int = 0
    """That would leave the party."""
    of_parameters: int = 0
    """In the whole model."""
    party_spec: PartySpec | None = None
    """What an aggregator would show; None if it could not be made."""
    trouble: list[str] = field(default_factory=list)
    """What a fit would fail with here."""
    doubts: list[str] = field(default_factory=list)
    """What a fit may fail with here."""


@dataclass(frozen=True)
class Measured:
    """What one party measured together with the others."""

    latency_s: float | None = None
    """Seconds for a sum of one number."""
    bytes_per_s: float | None = None
    """Of a large vector that is summed over all: its bytes by the seconds."""
    summed_bytes: int = 0
    """Size of that vector."""
    rounds_s: list[float] = field(default_factory=list)
    """Seconds of each rehearsed round."""
    round_bytes: int = 0
    """What this party sent in a round."""
    refused: str | None = None
    """What a fit would refuse of the parties together."""
    trouble: str | None = None
    """What it failed with otherwise: the network, or another party."""


def heard_facts(value: Any) -> Facts:
    """Return what another party told; of what cannot be read, only that."""
    known = _known(Facts, value)
    return Facts(host="unknown", versions={}, trouble=[_UNREADABLE]) if known is None else Facts(**known)


def heard_measured(value: Any) -> Measured:
    """Return what another party told; of what cannot be read, only that."""
    known = _known(Measured, value)
    return Measured(trouble=_UNREADABLE) if known is None else Measured(**known)


def _known(kind: type[Facts] | type[Measured], value: Any) -> dict[str, Any] | None:
    """Return the fields of what a party told, None if one is missing: a party of another version."""
    names = [part.name for part in fields(kind)]
    if not isinstance(value, dict) or any(name not in value for name in names):
        return None
    return {name: value[name] for name in names}


class Roster(Communicator):
    """The parties before any of them has come: who they will be; nothing can be exchanged.

    Args:
        names: Names of all parties.
        party: Index of this party.
        tls: This party's certificate, if there is one.
    """

    timeout_s = 0.0
    bytes_sent = 0

    def __init__(self, names: list[str], party: int, tls: TLS | None) -> None:
        self.tls = tls
        self.names = self.roster = names
        self.quorum = len(names)
        self.party = party

    def enter(self, phase: str) -> None:
        """Tell nobody."""

    def gather_json(self, key: str, value: object) -> list[Any]:
        """Refuse."""
        raise RuntimeError(_NOBODY)

    def handshake(self, spec: PartySpec, digest: str, difference: Difference) -> dict[str, PartySpec]:
        """Refuse."""
        raise RuntimeError(_NOBODY)

    def party_specs(self) -> list[PartySpec]:
        """Refuse."""
        raise RuntimeError(_NOBODY)

    def join_quorum(self, intent: Intent, version: Version | None, metadata: Metadata) -> QuorumResult:
        """Refuse."""
        raise RuntimeError(_NOBODY)

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Refuse."""
        raise RuntimeError(_NOBODY)

    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        """Refuse."""
        raise RuntimeError(_NOBODY)

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        """Refuse."""
        raise RuntimeError(_NOBODY)

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Refuse."""
        raise RuntimeError(_NOBODY)

    def close(self) -> None:
        """Leave nobody."""

    def abort(self, reason: str | None = None) -> None:
        """Leave nobody."""


class Rehearsal:
    """A fit up to its first step: the model is built as it would build it, nothing runs, no file is made.

    Args:
        trainer: The Trainer.
        module: The module.
        data: The data, if they are a data module.
        callback: The callback that would federate them.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        data: LightningDataModule | None,
        callback: FederatedAveraging,
    ) -> None:
        self.trainer, self.module, self.data, self.callback = trainer, module, data, callback
        self._built = False

    def facts(self, names: list[str], party: int, shared: Mapping[str, Any]) -> Facts:
        """Build the model and return what there is to say about it; what fails is among it.

        Args:
            names: Names of all parties.
            party: Index of this party.
            shared: Further settings that must be the same at all parties.
        """
        device = self.trainer.strategy.root_device
        known: dict[str, Any] = {
            "processes": topology_of(self.trainer).party_size,
            "device": _described(device),
            "accelerator": describe_device(device),
        }
        trouble: list[str] = []
        doubts: list[str] = []
        tls = None if self.callback.jobs is None else self.callback.jobs.tls
        try:
            self._prepare_data(doubts)
            self._build()
            parameters = self.callback.parameters.select(self.module)
            aggregator = self.callback.factory.rehearsal(
                Roster(names, party, tls),
                self.trainer,
                self.module,
                parameters,
            )
            party_spec = aggregator.party_spec()
            leaving = [parameters[name] for name, *_ in party_spec["schema"]]
            known |= {
                "size_bytes": aggregator.size_bytes,
                "parameters": sum(p.numel() for p in leaving),
                "of_parameters": sum(p.numel() for p in self.module.parameters()),
                "party_spec": party_spec | {"config": party_spec["config"] | shared},
            }
        except Exception as error:
            trouble.append(in_words(error))
        try:
            arguments.trainer(self.trainer, self.callback, topology_of(self.trainer))
        except Exception as error:
            trouble.append(in_words(error))
        return Facts(**known, trouble=trouble, doubts=doubts)

    def copies(self) -> dict[str, Tensor]:
        """Return copies of what would leave the party, on the device that it would train on."""
        parameters = self.callback.parameters.select(self.module)
        device = self.trainer.strategy.root_device
        return {name: p.detach().clone().to(device) for name, p in parameters.items()}

    def _prepare_data(self, doubts: list[str]) -> None:
        """Read the data as the fit would, but for ``prepare_data``, which writes files."""
        if self.data is None:
            return
        self.data.trainer = self.trainer
        try:
            self.data.setup("fit")
        except Exception as error:
            doubts.append(in_words(error))

    def _build(self) -> None:
        """Do what ``Trainer.fit`` does to a module before it is trained."""
        trainer, module = self.trainer, self.module
        trainer.strategy.connect(module)
        module.trainer = trainer
        module.setup("fit")
        with trainer.strategy.tensor_init_context(), trainer.precision_plugin.module_init_context():
            module.configure_model()
        trainer.precision_plugin.convert_module(module)


def in_words(error: BaseException) -> str:
    """Return an error in one line."""
    words = " ".join(str(error).split())
    return words if words and type(error).__name__ in _OURS else f"{type(error).__name__}: {words}"


_OURS = ("ValueError", "MisconfigurationException", "MismatchError", "PartyLostError", "FederationError")


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {os.cpu_count()} cores" if device.type == "cpu" else str(device)
