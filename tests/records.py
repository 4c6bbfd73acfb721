"""Records of federations that never were, written as a fit writes them."""

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pellm_lightning.aggregation.deviation import Deviation
from pellm_lightning.report.record import Record
from pellm_lightning.round import RoundReport


class Clocked(Record):
    """A Record whose clock is set by hand."""

    def at(self, seconds: float) -> "Clocked":
        self._begun = time.monotonic() - seconds
        return self


def start(record: Record, party: int, names: Sequence[str], **facts: Any) -> None:
    """Write a party's start; ``facts`` change what it says."""
    record.start(
        **{
            "party": party,
            "name": names[party],
            "parties": list(names),
            "processes": 1,
            "round": 0,
            "step": 0,
            "module": "CausalLM",
            "device": "cpu",
            "precision": "32-true",
            "leaving": 50_000,
            "parameters": 1_000_000,
            "lora_modules": 12,
            "settings": {"every_n_steps": 10, "fragments": 1, "exchange": "Plain()", "privacy": "None"},
            "config": None,
        }
        | facts
    )


def done(index: int, parties: Sequence[int], **facts: Any) -> RoundReport:
    """Return the report of a round in which each party has weight 1; ``facts`` change what it says."""
    known: dict[str, Any] = {
        "round": index,
        "parties": tuple(parties),
        "active_parties": len(parties),
        "total_weight": float(len(parties)),
        "weight": 1.0,
        "excluded": (),
        "loss": 1.0,
        "seconds": 0.5,
        "waited_seconds": 1.0,
        "stalled_seconds": 1.5,
        "bytes_sent": 1000,
        "update_norm": 2.0,
        "distance": 3.0,
        "deviation": None,
        "local_loss": 1.0,
        "weights": (1.0,) * len(parties),
        "losses": (1.0,) * len(parties),
        "distances": (None,) * len(parties),
    }
    return RoundReport(**known | facts)


def federation(
    folder: Path,
    names: Sequence[str],
    rounds: int,
    *,
    away: Callable[[int, int], bool] = lambda party, index: False,
    broken: Callable[[int, int], bool] = lambda party, index: False,
    of: Sequence[int] | None = None,
    validate_every: int = 1,
    private: bool = True,
) -> None:
    """Write the records of parties that come and go.

    Args:
        folder: Gets ``party-<k>/rounds.jsonl``.
        names: Of all parties.
        rounds: How many.
        away: Tells whether a party misses a round.
        broken: Tells whether it is left out of one.
        of: Parties that record; all by default.
        validate_every: Rounds from validation to validation.
        private: Whether epsilon is told.
    """
    chance = random.Random(7)
    records = {
        party: Clocked(folder / f"party-{party}" / "rounds.jsonl") for party in of or range(len(names))
    }
    for party, record in records.items():
        start(record.at(0), party, names)
    before: dict[int, float] = {}
    for index in range(rounds):
        here = [party for party in range(len(names)) if not away(party, index)]
        falling = 1 + 2 * math.exp(-4 * index / rounds)
        losses = {p: falling + 0.12 * p + 0.05 * chance.random() for p in here}
        weights = {p: 0.0 if broken(p, index) else 64.0 * (1 + p % 3) for p in here}
        distances = {p: (1 + 0.2 * p) * falling + 0.1 * chance.random() for p in here}
        total = sum(weights.values())
        waited = {p: 4.0 + chance.random() + (p % 4) for p in here}
        for party, record in records.items():
            if party not in here:
                continue
            report = done(
                index,
                here,
                active_parties=sum(w > 0 for w in weights.values()),
                total_weight=total,
                weight=weights[party],
                excluded=tuple(p for p in here if broken(p, index)),
                loss=sum(losses[p] * weights[p] for p in here) / total,
                local_loss=losses[party],
                seconds=0.8 + 0.2 * chance.random(),
                waited_seconds=waited[party],
                stalled_seconds=waited[party] + 0.9,
                bytes_sent=299_896 + 10_000 * (len(names) - len(here)),
                update_norm=1.1 * distances[party],
                distance=distances[party],
                deviation=Deviation(0.02 + 0.01 / (index + 1), 0.09, "model.layers.1.q_proj"),
                weights=tuple(weights.values()),
                losses=tuple(losses.values()),
                distances=tuple(before.get(p) for p in here),
                epsilon=0.4 * math.sqrt(index + 1) if private else None,
                clipping_norm=1.0 / (1 + index / rounds) if private else None,
                outer_lr=0.7 * (1 - 0.5 * index / rounds),
            )
            record.at(25.0 * (index + 1)).round(report, step=10 * (index + 1), epoch=0)
            if index % validate_every == 0:
                mean = {"val_loss": falling + 0.2, "val_accuracy": 1 - 0.25 * falling}
                local = {name: value + 0.03 * party for name, value in mean.items()}
                record.validation(local, mean, round=index + 1, step=10 * (index + 1), epoch=0)
        before = distances
    for record in records.values():
        record.end(None)
