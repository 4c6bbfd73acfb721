"""Checks a launch before training: ``python -m pellm_lightning doctor``."""
