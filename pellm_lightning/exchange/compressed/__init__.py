"""Exchanges that send fewer bytes."""
