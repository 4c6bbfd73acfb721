"""Facts of a party before training, and measurements with the others: what the preflight check compares."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from pellm_lightning.callbacks import arguments
from pellm_lightning.callbacks.federated_averaging import FederatedAveraging
from pellm_lightning.callbacks.lightning_training import rehearse
from pellm_lightning.callbacks.strategies import check_strategy, is_sharding
from pellm_lightning.comm import Federation
from pellm_lightning.engine.compatibility import PartySpec
from pellm_lightning.report.record import parse, versions
from pellm_lightning.trainer.environment import describe_device, topology_of

_UNREADABLE = "what it sent cannot be read: install the same version of pellm-lightning at all parties"


@dataclass(frozen=True)
class Facts:
    """What one party is, and what it would bring to a fit.

    Example::

        Facts(processes=2, device="cpu, 8 cores")
    """

    host: str = field(default_factory=socket.gethostname)
    versions: Mapping[str, str] = field(default_factory=versions)
    processes: int = 1
    """Of the party."""
    device: str = "unknown"
    """Description of what it trains on."""
    accelerator: str | None = None
    """What distinguishes its accelerator from all others; None for a CPU."""
    size_bytes: int = 0
    """Of the vector that would cross in a round, float32."""
    parameters: int = 0
    """That would leave the party."""
    of_parameters: int = 0
    """In the whole model."""
    party_spec: PartySpec | None = None
    """What an aggregator would show; None if it could not be made."""
    trouble: tuple[str, ...] = ()
    """What a fit would fail with here."""
    doubts: tuple[str, ...] = ()
    """What a fit may fail with here."""


@dataclass(frozen=True)
class Measured:
    """What one party measured together with the others.

    Example::

        Measured(latency_s=0.002, bytes_per_s=5e7, summed_bytes=8 << 20)
    """

    latency_s: float | None = None
    """Seconds for a sum of one number."""
    bytes_per_s: float | None = None
    """Of a large vector that is summed over all: its bytes by the seconds."""
    summed_bytes: int = 0
    """Size of that vector."""
    rounds_s: tuple[float, ...] = ()
    """Seconds of each rehearsed round."""
    round_bytes: int = 0
    """What this party sent in a round."""
    refused: str | None = None
    """What a fit would refuse of the parties together."""
    trouble: str | None = None
    """What it failed with otherwise: the network, or another party."""
    relayed: tuple[str, ...] = ()
    """Parties with which it was connected by the relay, not directly."""


UNREADABLE_FACTS = Facts(host="unknown", versions={}, trouble=(_UNREADABLE,))
UNREADABLE_MEASURED = Measured(trouble=_UNREADABLE)

T = TypeVar("T")


def read(value: object, otherwise: T) -> T:
    """Return what another party sent, as an object of the class of ``otherwise``; that if it does not fit."""
    try:
        parsed: T = parse(type(otherwise), value)
    except ValueError:  # of another version
        return otherwise
    return parsed


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

    def facts(self, names: list[str], party: int, shared: Mapping[str, Any]) -> Facts:
        """Build the model and return its facts, errors included.

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
            aggregator = rehearse(
                self.callback.factory,
                Federation.unjoined(names, party, tls),
                self.trainer,
                self.module,
                parameters,
            )
            party_spec = aggregator.party_spec()
            leaving = [parameters[name] for name in party_spec["schema"][0]]
            known |= {
                "size_bytes": aggregator.size_bytes,
                "parameters": sum(p.numel() for p in leaving),
                "of_parameters": sum(p.numel() for p in self.module.parameters()),
                "party_spec": party_spec | {"config": party_spec["config"] | shared},
            }
        except Exception as error:
            trouble.append(error_text(error))
        try:
            check_strategy(self.trainer, topology_of(self.trainer), self.callback.factory)
            arguments.trainer(self.trainer, self.callback)
        except Exception as error:
            trouble.append(error_text(error))
        return Facts(**known, trouble=tuple(trouble), doubts=tuple(doubts))

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
            doubts.append(error_text(error))

    def _build(self) -> None:
        """Do what ``Trainer.fit`` does to a module before it is trained."""
        trainer, module = self.trainer, self.module
        if is_sharding(trainer.strategy):
            raise ValueError(
                f"Trainer(strategy={type(trainer.strategy).__name__}) shards the module over the party's"
                " processes, and the preflight check is one. Check with strategy='auto' and devices=1, and"
                " a configure_model that shards only where it has a device mesh."
            )
        trainer.strategy.connect(module)
        module.trainer = trainer
        module.setup("fit")
        with trainer.strategy.tensor_init_context(), trainer.precision_plugin.module_init_context():
            module.configure_model()
        trainer.precision_plugin.convert_module(module)


def error_text(error: BaseException) -> str:
    """Return an error in one line."""
    words = " ".join(str(error).split())
    return words if words and type(error).__name__ in _OURS else f"{type(error).__name__}: {words}"


_OURS = ("ValueError", "MisconfigurationException", "MismatchError", "PartyLostError", "FederationError")


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {os.cpu_count()} cores" if device.type == "cpu" else str(device)
