"""DP-SGD callback: differential privacy of single records of a party."""

from pellm_lightning.callbacks.dp_sgd.dp_sgd import DPSGD

__all__ = ["DPSGD"]
