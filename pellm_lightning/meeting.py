"""How parties meet: each says why it comes, in a header of a fixed size, before anything else crosses."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch

from pellm_lightning.federation import Federation


class Purpose(IntEnum):
    """Why a party comes to meet the others."""

    ROUND = 1
    METRICS = 2
    DONE = 3


@dataclass(frozen=True)
class Header:
    """What a party says before anything else crosses; the same few numbers whatever follows."""

    purpose: Purpose
    round: int
    weight: float


def meet(federation: Federation, mine: Header) -> list[Header]:
    """Wait for all parties and learn why each came; help those that came for metrics first.

    Parties are uneven: one validates while another is already in its next round. Every header has the same
    size, so they can meet anywhere, and whoever came for something else meets again afterwards.
    """
    while True:
        federation.enter(f"meeting for round {mine.round}")
        headers = _exchanged(federation, mine)
        if mine.purpose is Purpose.METRICS or all(h.purpose is not Purpose.METRICS for h in headers):
            federation.enter(f"in round {mine.round}")
            return headers
        mean(federation, {})


def mean(federation: Federation, values: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the weighted mean over the parties of each named (value, weight), equal on all parties."""
    known = federation.all_gather_json("metrics", sorted(values))
    names = sorted({name for party_names in known for name in party_names})
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for row, name in enumerate(names):
        value, weight = values.get(name, (0.0, 0.0))
        if weight > 0:
            sums[row] = torch.tensor([value * weight, weight], dtype=torch.float64)
    federation.all_reduce_(sums)
    return {name: total / w for name, (total, w) in zip(names, sums.tolist(), strict=True) if w > 0}


def _exchanged(federation: Federation, mine: Header) -> list[Header]:
    rows = torch.zeros(federation.num_parties, 3, dtype=torch.float64)
    rows[federation.party] = torch.tensor([mine.purpose, mine.round, mine.weight], dtype=torch.float64)
    federation.all_reduce_(rows)
    return [Header(Purpose(int(purpose)), int(number), weight) for purpose, number, weight in rows.tolist()]
