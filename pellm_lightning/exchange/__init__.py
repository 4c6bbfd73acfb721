"""How sums over the parties come about: openly, in few bytes, or so that nobody sees another's values."""

from pellm_lightning.exchange.base import Exchange, Plain
from pellm_lightning.exchange.compressed.exchanges import Cast, Quantized, TopK
from pellm_lightning.exchange.secure.secure_aggregation import SecureAggregation

__all__ = ["Cast", "Exchange", "Plain", "Quantized", "SecureAggregation", "TopK"]
