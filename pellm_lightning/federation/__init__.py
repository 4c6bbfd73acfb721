"""The only code that talks across parties."""

from pellm_lightning.federation.collectives import Collectives
from pellm_lightning.federation.elastic.federation import ElasticFederation
from pellm_lightning.federation.elastic.membership import Membership
from pellm_lightning.federation.elastic.plan import Plan, Version, Wants
from pellm_lightning.federation.errors import (
    FederationError,
    MismatchError,
    PartyLostError,
    TooFewPartiesError,
)
from pellm_lightning.federation.launch.group import Federation
from pellm_lightning.federation.quorum import Quorum, check_quorum, resolve_quorum
from pellm_lightning.federation.tls import TLS

__all__ = [
    "TLS",
    "Collectives",
    "ElasticFederation",
    "Federation",
    "FederationError",
    "Membership",
    "MismatchError",
    "PartyLostError",
    "Plan",
    "Quorum",
    "TooFewPartiesError",
    "Version",
    "Wants",
    "check_quorum",
    "resolve_quorum",
]
