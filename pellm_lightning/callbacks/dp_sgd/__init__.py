"""DP-SGD inside a party: differential privacy of single records."""

from pellm_lightning.callbacks.dp_sgd.dp_sgd import RecordLevel

__all__ = ["RecordLevel"]
