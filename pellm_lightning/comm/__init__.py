"""Communication between parties: joining, collectives, commit."""

from pellm_lightning.comm.collectives import Collectives
from pellm_lightning.comm.communicator import Communicator, Intent, QuorumResult, Version
from pellm_lightning.comm.elastic.federation import ElasticFederation
from pellm_lightning.comm.elastic.membership import Membership
from pellm_lightning.comm.errors import (
    FederationError,
    MismatchError,
    PartyLostError,
    TooFewPartiesError,
)
from pellm_lightning.comm.quorum import Quorum, check_quorum, resolve_quorum
from pellm_lightning.comm.tls import TLS
from pellm_lightning.comm.torchrun.federation import Federation

__all__ = [
    "TLS",
    "Collectives",
    "Communicator",
    "ElasticFederation",
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
