"""Federated fine-tuning as a drop-in addition to a Lightning Trainer."""

from pellm_lightning.callbacks.federated_averaging import FederatedAveraging
from pellm_lightning.callbacks.parameters import Parameters
from pellm_lightning.cli.federated_cli import FederatedCLI
from pellm_lightning.comm.elastic.membership import Membership
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.errors import (
    FederationError,
    MismatchError,
    PartyLostError,
    TooFewPartiesError,
)
from pellm_lightning.comm.tls import TLS
from pellm_lightning.comm.torchrun.federation import Federation
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.trainer.environment import PartyEnvironment

__version__ = "0.1.0"
__all__ = [
    "TLS",
    "Aggregator",
    "FederatedAveraging",
    "FederatedCLI",
    "Federation",
    "FederationError",
    "Membership",
    "MismatchError",
    "Overlap",
    "Parameters",
    "PartyEnvironment",
    "PartyLostError",
    "RoundReport",
    "SeparateJobs",
    "TooFewPartiesError",
]
