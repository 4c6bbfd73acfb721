"""How sums over the parties come about: openly, or so that nobody sees another's values."""

from pellm_lightning.exchange.base import Exchange, Plain
from pellm_lightning.exchange.masked import Masked

__all__ = ["Exchange", "Masked", "Plain"]
