"""Corrections of local gradients, so that parties with unlike data do not drift apart between rounds."""

from pellm_lightning.drift.base import DriftCorrection
from pellm_lightning.drift.feddyn import FedDyn
from pellm_lightning.drift.fednova import FedNova
from pellm_lightning.drift.fedprox import FedProx
from pellm_lightning.drift.scaffold import SCAFFOLD

__all__ = ["SCAFFOLD", "DriftCorrection", "FedDyn", "FedNova", "FedProx"]
