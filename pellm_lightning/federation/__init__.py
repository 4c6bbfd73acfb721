"""The only code that talks across parties."""

from pellm_lightning.federation.errors import FederationError, MismatchError, PartyLostError
from pellm_lightning.federation.group import Federation

__all__ = ["Federation", "FederationError", "MismatchError", "PartyLostError"]
