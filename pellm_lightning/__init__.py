"""Federated fine-tuning as a drop-in addition to a Lightning Trainer."""

from pellm_lightning.callback import FederatedAveraging
from pellm_lightning.cli import FederatedCLI
from pellm_lightning.environment import PartyEnvironment
from pellm_lightning.federation import Federation, FederationError
from pellm_lightning.overlap import Overlap
from pellm_lightning.round import Aggregator, RoundReport

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
