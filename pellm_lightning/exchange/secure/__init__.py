"""Secure aggregation: masked sums, key agreement, signing keys and fixed-point numbers."""
