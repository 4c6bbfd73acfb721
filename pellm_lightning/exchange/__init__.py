"""Exchanges: all-reduce of the parties' values, plain, compressed, or by secure aggregation."""

from pellm_lightning.exchange.base import Exchange, Plain
from pellm_lightning.exchange.compressed.exchanges import Cast, Quantized, TopK
from pellm_lightning.exchange.secure.secure_aggregation import SecureAggregation

__all__ = ["Cast", "Exchange", "Plain", "Quantized", "SecureAggregation", "TopK"]
