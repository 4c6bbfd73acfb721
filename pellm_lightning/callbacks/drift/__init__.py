"""Corrections of local gradients, so that parties with unlike data do not drift apart between rounds."""

from pellm_lightning.callbacks.drift.base import DriftCorrection
from pellm_lightning.callbacks.drift.feddyn import FedDyn
from pellm_lightning.callbacks.drift.fednova import FedNova
from pellm_lightning.callbacks.drift.fedprox import FedProx
from pellm_lightning.callbacks.drift.scaffold import SCAFFOLD

__all__ = ["SCAFFOLD", "DriftCorrection", "FedDyn", "FedNova", "FedProx"]
