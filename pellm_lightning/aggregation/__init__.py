"""Aggregation rules: what a round computes from the parties' parameters."""

from pellm_lightning.aggregation.base import Aggregation
from pellm_lightning.aggregation.base_writing import ResidualMean, Stacking
from pellm_lightning.aggregation.heterogeneous_rank import HeterogeneousRank
from pellm_lightning.aggregation.lora import LoraModule, lora_modules
from pellm_lightning.aggregation.low_rank import LowRankMean
from pellm_lightning.aggregation.mean import Alternating, FrozenA, Mean, ShareA
from pellm_lightning.aggregation.robust import (
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NormBound,
    TrimmedMean,
)
from pellm_lightning.tensors.deviation import Deviation

__all__ = [
    "Aggregation",
    "Alternating",
    "Deviation",
    "FrozenA",
    "GeometricMedian",
    "HeterogeneousRank",
    "Krum",
    "LoraModule",
    "LowRankMean",
    "Mean",
    "Median",
    "MultiKrum",
    "NormBound",
    "ResidualMean",
    "ShareA",
    "Stacking",
    "TrimmedMean",
    "lora_modules",
]
