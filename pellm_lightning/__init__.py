"""Federated fine-tuning as a drop-in addition to a Lightning Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pellm_lightning.callbacks.federated_averaging import FederatedAveraging
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
    from pellm_lightning.integrations.federated_loop import FederatedLoop
    from pellm_lightning.loop.parameters import Parameters
    from pellm_lightning.loop.simulation.settings import Simulation
    from pellm_lightning.loop.weighting import Weighting
    from pellm_lightning.trainer.environment import PartyEnvironment

__version__ = "0.1.0"

_MODULES = {
    "TLS": "comm.tls",
    "Aggregator": "engine.aggregator",
    "FederatedAveraging": "callbacks.federated_averaging",
    "FederatedCLI": "cli.federated_cli",
    "FederatedLoop": "integrations.federated_loop",
    "Federation": "comm.torchrun.federation",
    "FederationError": "comm.errors",
    "Membership": "comm.elastic.membership",
    "MismatchError": "comm.errors",
    "Overlap": "engine.overlap",
    "Parameters": "loop.parameters",
    "PartyEnvironment": "trainer.environment",
    "PartyLostError": "comm.errors",
    "RoundReport": "engine.round_report",
    "SeparateJobs": "comm.elastic.separate_jobs",
    "Simulation": "loop.simulation.settings",
    "TooFewPartiesError": "comm.errors",
    "Weighting": "loop.weighting",
}

__all__ = [
    "TLS",
    "Aggregator",
    "FederatedAveraging",
    "FederatedCLI",
    "FederatedLoop",
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
    "Simulation",
    "TooFewPartiesError",
    "Weighting",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first asked for: commands that train nothing start at once."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names and what is imported already."""
    return sorted({*globals(), *__all__})
