"""Records of federations that never were, written as a fit writes them."""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.report.record import RunRecord, Start, Validation
from pellm_lightning.tensors.deviation import Deviation


class Clocked(RunRecord):
    """A RunRecord whose clock is set by hand."""

    def at(self, seconds: float) -> "Clocked":
        self._started_at = time.monotonic() - seconds
        return self


def start(record: RunRecord, party: int, names: Sequence[str], **facts: Any) -> None:
    """Write a party's start; ``facts`` change what it says."""
    known: dict[str, Any] = {
        "party": party,
        "name": names[party],
        "parties": tuple(names),
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
    record.start(Start(**known | facts))


def done(index: int, parties: Sequence[int], **facts: Any) -> RoundReport:
    """Return the report of a round in which each party has weight 1; ``facts`` change what it says."""
    known: dict[str, Any] = {
        "round": index,
        "parties": tuple(parties),
        "active_parties": len(parties),
        "trained_parties": len(parties),
        "quorum": len(parties) // 2 + 1,
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
    reports: dict[int, RoundReport] = {}
    for index in range(rounds):
        here = [party for party in range(len(names)) if not away(party, index)]
        left_out = [party for party in here if broken(party, index)]
        reports = _reports(index, rounds, here, left_out, reports, chance)
        for party, record in records.items():
            if party not in here:
                continue
            told = reports[party] if private else replace(reports[party], epsilon=None, clipping_norm=None)
            record.at(25.0 * (index + 1)).round(told, step=10 * (index + 1), epoch=0)
            if index % validate_every == 0:
                falling = _falling(index / rounds)
                mean = {"val_loss": falling + 0.2, "val_accuracy": 1 - 0.25 * falling}
                local = {name: value + 0.03 * party for name, value in mean.items()}
                record.validation(Validation(local, mean, round=index, step=10 * (index + 1), epoch=0))
    for record in records.values():
        record.end(None)


def _falling(progress: float) -> float:
    """Return what a loss does, from 3 towards 1."""
    return 1 + 2 * math.exp(-4 * progress)


def _reports(
    index: int,
    rounds: int,
    here: Sequence[int],
    left_out: Sequence[int],
    before: Mapping[int, RoundReport],
    chance: random.Random,
) -> dict[int, RoundReport]:
    """Return what each party that is here reports of a round; ``before`` is what they reported last."""
    progress, falling = index / rounds, _falling(index / rounds)
    losses = {p: falling + 0.12 * p + 0.05 * chance.random() for p in here}
    weights = {p: 0.0 if p in left_out else 64.0 * (1 + p % 3) for p in here}
    distances = {p: (1 + 0.2 * p) * falling + 0.1 * chance.random() for p in here}
    waited = {p: 4.0 + chance.random() + (p % 4) for p in here}
    total = sum(weights.values())
    return {
        party: done(
            index,
            here,
            active_parties=sum(w > 0 for w in weights.values()),
            total_weight=total,
            weight=weights[party],
            excluded=tuple(left_out),
            loss=sum(losses[p] * weights[p] for p in here) / total,
            local_loss=losses[party],
            seconds=0.8 + 0.2 * chance.random(),
            waited_seconds=waited[party],
            stalled_seconds=waited[party] + 0.9,
            bytes_sent=300_000,
            update_norm=1.1 * distances[party],
            distance=distances[party],
            deviation=Deviation(0.02 + 0.01 / (index + 1), 0.09, "model.layers.1.q_proj"),
            weights=tuple(weights.values()),
            losses=tuple(losses.values()),
            distances=tuple(before[p].distance if p in before else None for p in here),
            epsilon=0.4 * math.sqrt(index + 1),
            clipping_norm=1.0 / (1 + progress),
            outer_lr=0.7 * (1 - 0.5 * progress),
        )
        for party in here
    }
