"""Federated fine-tuning as a drop-in addition to a Lightning Trainer."""

from pellm_lightning.callbacks.federated_averaging import FederatedAveraging
from pellm_lightning.cli.federated_cli import FederatedCLI
from pellm_lightning.comm import Federation, FederationError
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.trainer.environment import PartyEnvironment

__version__ = "0.1.0"
__all__ = [
    "Aggregator",
    "FederatedAveraging",
    "FederatedCLI",
    "Federation",
    "FederationError",
    "Overlap",
    "PartyEnvironment",
    "RoundReport",
]
