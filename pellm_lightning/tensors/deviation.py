"""Deviation of an aggregated product: plain numbers, so that a report reads them without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Deviation:
    """Relative deviation ``|sum(w_i s_i B_i A_i) - s B A| / |sum(w_i s_i B_i A_i)|``, Frobenius norms.

    Example:
        >>> Deviation(total=0.01, worst=0.05, worst_module="encoder.q_proj.default").total
        0.01
    """

    total: float
    """Deviation of all adapted modules together."""
    worst: float
    """Largest deviation of a module."""
    worst_module: str
    """Name of that module's pair, with the expert if it has several."""
