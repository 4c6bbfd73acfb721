"""Counters of the global state, which an attempt replaces as one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pellm_lightning.comm import Version
from pellm_lightning.comm.evidence.certificate import RoundStatement


@dataclass(frozen=True)
class Counters:
    """Counters of the global state; all that an attempt changes besides tensors, so that it can be undone.

    Args:
        short_rounds: By fragment, its rounds in a row, up to now, in which fewer than a quorum trained.
        round: Index of the next round.
        version: Which of the states of this round it is, between separate jobs; None before the first.
        distance: 2-norm of the parameters minus the result, in the last round.
        unwritten: Fragments whose parameters are still to be written.
        loaded: The state that this party has resumed from; None if it begins.
        statement: What was stated of the last round, where parties leave evidence.
        digest: Of the state of this version, as the parties have voted for it; "" before.

    Example:
        >>> Counters(short_rounds=(0,)).round
        0
    """

    short_rounds: tuple[int, ...]
    round: int = 0
    version: Version | None = None
    distance: float = math.nan
    unwritten: frozenset[int] = frozenset()
    loaded: Mapping[str, Any] | None = None
    statement: RoundStatement | None = None
    digest: str = ""
