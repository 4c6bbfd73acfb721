"""Drift corrections: callbacks that correct local gradients for parties with heterogeneous data."""

from pellm_lightning.callbacks.drift.base import DriftCorrection
from pellm_lightning.callbacks.drift.feddyn import FedDyn
from pellm_lightning.callbacks.drift.fednova import FedNova
from pellm_lightning.callbacks.drift.fedprox import FedProx
from pellm_lightning.callbacks.drift.scaffold import SCAFFOLD

__all__ = ["SCAFFOLD", "DriftCorrection", "FedDyn", "FedNova", "FedProx"]
