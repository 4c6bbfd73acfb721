"""Communication between parties: joining, collectives, commit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pellm_lightning.comm.collectives import Collectives
    from pellm_lightning.comm.communicator import Communicator, Intent, QuorumResult, Version
    from pellm_lightning.comm.elastic.federation import ElasticFederation
    from pellm_lightning.comm.elastic.membership import Membership
    from pellm_lightning.comm.errors import (
        FaultyPartyError,
        FederationError,
        MismatchError,
        PartyLostError,
        TooFewPartiesError,
    )
    from pellm_lightning.comm.quorum import Quorum, check_quorum, resolve_quorum
    from pellm_lightning.comm.tls import TLS
    from pellm_lightning.comm.torchrun.federation import Federation

_MODULES = {
    "TLS": "tls",
    "Collectives": "collectives",
    "Communicator": "communicator",
    "ElasticFederation": "elastic.federation",
    "FaultyPartyError": "errors",
    "Federation": "torchrun.federation",
    "FederationError": "errors",
    "Intent": "communicator",
    "Membership": "elastic.membership",
    "MismatchError": "errors",
    "PartyLostError": "errors",
    "Quorum": "quorum",
    "QuorumResult": "communicator",
    "TooFewPartiesError": "errors",
    "Version": "communicator",
    "check_quorum": "quorum",
    "resolve_quorum": "quorum",
}

__all__ = [
    "TLS",
    "Collectives",
    "Communicator",
    "ElasticFederation",
    "FaultyPartyError",
    "Federation",
    "FederationError",
    "Intent",
    "Membership",
    "MismatchError",
    "PartyLostError",
    "Quorum",
    "QuorumResult",
    "TooFewPartiesError",
    "Version",
    "check_quorum",
    "resolve_quorum",
]


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for: a rendezvous needs no torch (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names and what is imported already."""
    return sorted({*globals(), *__all__})
