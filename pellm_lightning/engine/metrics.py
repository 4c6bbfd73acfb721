"""Weighted means of metrics over the parties, equal on all of them."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pellm_lightning.comm import Collectives, FaultyPartyError
from pellm_lightning.exchange import Exchange

log = logging.getLogger(__name__)

MAX_WEIGHT = float(1 << 53)
"""No party counts more: whole numbers up to here are exact in float64, and a sum of many is finite."""
# A sum of many is finite.
_MAX_SUMMAND = 1e300
_SAME_VERSION = "Install the same version of pellm-lightning at all parties."


def mean_of(
    of_parties: Sequence[Mapping[str, tuple[float, float]]], federation: Collectives
) -> dict[str, float]:
    """Return the weighted mean over the parties of each named (value, weight) that all have sent.

    A value that is not finite is left out, and its party named; where no party has a finite one the mean is
    NaN.

    Args:
        of_parties: What each party has, in their order.
        federation: The members.
    """
    missing = _warn_of_nonfinite([names_of(metrics) for metrics in of_parties], federation)
    totals: dict[str, list[float]] = {}
    for metrics in of_parties:
        for name in names_of(metrics)["finite"]:
            value, weight = metrics[name]
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += value * weight
            total[1] += weight
    return dict(sorted((missing | {name: total / w for name, (total, w) in totals.items()}).items()))


def secure_mean(
    values: Mapping[str, tuple[float, float]],
    names: Sequence[Mapping[str, list[str]]],
    federation: Collectives,
    exchange: Exchange,
    revealing: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return what ``mean_of`` does, of the metrics that enough parties have; no party tells its own values.

    Args:
        values: What this party has.
        names: Names of what each party has, in their order, as ``names_of`` says.
        federation: The members.
        exchange: How sums are formed.
        revealing: As in ``Exchange.open``.
    """
    missing = _warn_of_nonfinite(names, federation)
    having = Counter(name for of_party in names for name in of_party["finite"])
    few = sorted(name for name, count in having.items() if count < exchange.min_participants)
    if few:
        log.warning(
            "[party %s] No mean of %s: fewer than %d parties have them at this moment, and each would see"
            " what the others have. Let all parties validate at the same rounds.",
            federation.name,
            ", ".join(few),
            exchange.min_participants,
        )
    enough = sorted(having.keys() - few)
    if not enough:
        return missing
    sums = torch.zeros(len(enough), 2, dtype=torch.float64)
    for row, name in enumerate(enough):
        if name in names[federation.party]["finite"] and name in values:
            value, weight = values[name]
            sums[row] = torch.tensor([value * weight, weight], dtype=torch.float64)
    sums_of = exchange.open(federation, revealing, view=json.dumps(["metrics", [*map(dict, names)]]))
    sums_of.all_reduce_each_([sums.view(-1)])
    return missing | {
        name: total / w for name, (total, w) in zip(enough, sums.tolist(), strict=True) if w > 0
    }


def names_of(values: Mapping[str, tuple[float, float]]) -> dict[str, list[str]]:
    """Return the names of the metrics that a party has: of finite values, and of others."""
    having = {metric: _can_be_summed(*both) for metric, both in sorted(values.items()) if both[1] != 0}
    return {
        "finite": [metric for metric, finite in having.items() if finite],
        "other": [metric for metric, finite in having.items() if not finite],
    }


def _can_be_summed(value: float, weight: float) -> bool:
    return 0 <= weight <= MAX_WEIGHT and abs(value * weight) <= _MAX_SUMMAND


def _warn_of_nonfinite(names: Sequence[Mapping[str, list[str]]], federation: Collectives) -> dict[str, float]:
    """Warn of the parties whose metrics are not finite; return NaN for each metric that is finite nowhere."""
    by_metric: dict[str, list[int]] = {}
    for party, of_party in enumerate(names):
        for metric in of_party["other"]:
            by_metric.setdefault(metric, []).append(party)
    finite = {metric for of_party in names for metric in of_party["finite"]}
    for metric, parties in sorted(by_metric.items()):
        log.warning(
            "[party %s] %s is no finite number (or its weight none) at party %s, so its mean is %s.",
            federation.name,
            metric,
            federation.called(parties),
            "that of the others" if metric in finite else "NaN",
        )
    return dict.fromkeys(sorted(by_metric.keys() - finite), math.nan)


def read_names(name: str, said: Any) -> dict[str, list[str]]:
    """Return the names of the metrics that a peer has, or raise."""
    said = said or {"finite": [], "other": []}
    if (
        not isinstance(said, Mapping)
        or said.keys() != {"finite", "other"}
        or not all(isinstance(names, list) for names in said.values())
        or not all(isinstance(metric, str) for names in said.values() for metric in names)
    ):
        raise FaultyPartyError(
            f"Party {name} sent {said!r:.200} for the names of its metrics. {_SAME_VERSION}", parties=(name,)
        )
    return dict(said)


def read_metrics(name: str, said: Any) -> dict[str, tuple[float, float]]:
    """Return the metrics that a peer has sent, or raise."""
    try:
        return {str(metric): (float(value), float(weight)) for metric, (value, weight) in said.items()}
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise FaultyPartyError(
            f"Party {name} sent {said!r:.200} for its metrics, which are no pairs of a value and a weight."
            f" {_SAME_VERSION}",
            parties=(name,),
        ) from error
