"""The only code that talks across parties."""

from pellm_lightning.federation.collectives import Collectives
from pellm_lightning.federation.elastic import ElasticFederation
from pellm_lightning.federation.errors import (
    FederationError,
    MismatchError,
    PartyLostError,
    TooFewPartiesError,
)
from pellm_lightning.federation.group import Federation
from pellm_lightning.federation.membership import Membership
from pellm_lightning.federation.plan import Version, Wants
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
    "TooFewPartiesError",
    "Version",
    "Wants",
]
