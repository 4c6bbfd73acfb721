"""DP-SGD inside a party: differential privacy of single records."""

from pellm_lightning.callbacks.dp_sgd.dp_sgd import DPSGD

__all__ = ["DPSGD"]
