"""Secure aggregation: sums that reveal nothing but themselves."""
