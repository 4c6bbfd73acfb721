"""Differential privacy of parties: clipping, Gaussian noise, and accounting."""

from pellm_lightning.privacy.accountant import PrivacyAccountant, noise_multiplier_for
from pellm_lightning.privacy.adaptive_clipping import AdaptiveClipping
from pellm_lightning.privacy.mechanism import GaussianMechanism
from pellm_lightning.privacy.noise import Noise

__all__ = ["AdaptiveClipping", "GaussianMechanism", "Noise", "PrivacyAccountant", "noise_multiplier_for"]
