"""Differential privacy: of a party by clipping and noise, of a record by DP-SGD, and what they cost."""

from pellm_lightning.privacy.adaptive import AdaptiveClipping
from pellm_lightning.privacy.gaussian import GaussianMechanism
from pellm_lightning.privacy.ledger import Ledger, noise_multiplier_for
from pellm_lightning.privacy.noise import Noise
from pellm_lightning.privacy.record_level import RecordLevel

__all__ = ["AdaptiveClipping", "GaussianMechanism", "Ledger", "Noise", "RecordLevel", "noise_multiplier_for"]
