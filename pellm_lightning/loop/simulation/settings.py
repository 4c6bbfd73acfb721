"""Simulation: how many parties there are, and which of them take part in a round."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

# What each stream of random numbers is for, so that none repeats another.
_SAMPLE, _FAIL, _AVAILABLE, _PARTY = range(4)


@dataclass(frozen=True)
class Draw:
    """Draw of the parties of a round.

    Args:
        parties: Those that take part, by index, in order; always as many.
        training: Those of them that train. The others have failed, or were drawn in place of parties that
            are not available: they count 0.

    Example:
        >>> Draw((3, 8), frozenset({8})).training
        frozenset({8})
    """

    parties: tuple[int, ...]
    training: frozenset[int]


@dataclass(frozen=True)
class Simulation:
    """Settings of a simulation, in which each process of the launch holds sampled parties in turn.

    Who takes part in a round depends on these settings and the round's index only: not on the number of
    processes, nor on what was drawn before.

    Args:
        num_parties: Number of parties.
        sampled: Parties drawn for each round, without replacement: a number, or if it is a ``float`` a share
            of all, of which 1.0 takes all.
        seed: Seed of the draws, and of each party's random numbers.
        weights: Of each party, how likely it is drawn relative to the others. Default: all alike.
        availability: Probability that a party can be drawn for a round at all.
        failure_rate: Probability that a party which was drawn fails before it has trained.
        memory_gb: What the parties' own states may take in a process's memory; those that were not drawn for
            longest lie on disk beyond that, below the Trainer's ``default_root_dir``.

    Raises:
        ValueError: If one is out of its range.

    Example:
        >>> simulation = Simulation(num_parties=1000, sampled=3, seed=1)
        >>> simulation.draw(round=0).parties == simulation.draw(round=0).parties
        True
    """

    num_parties: int
    sampled: int | float = 1.0
    seed: int = 0
    weights: Sequence[float] | None = None
    availability: float = 1.0
    failure_rate: float = 0.0
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        if self.num_parties < 1:
            raise ValueError(f"num_parties={self.num_parties} must be at least 1.")
        most = 1 if isinstance(self.sampled, float) else self.num_parties
        if not 0 < self.sampled <= most:
            raise ValueError(
                f"sampled={self.sampled!r} must be a number of parties, 1 to {self.num_parties}, or a share"
                " of them above 0 and at most 1.0."
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0.")
        if not 0 < self.availability <= 1:
            raise ValueError(f"availability={self.availability} must be above 0 and at most 1.")
        if not 0 <= self.failure_rate < 1:
            raise ValueError(f"failure_rate={self.failure_rate} must be at least 0 and below 1.")
        if not self.memory_gb >= 0:
            raise ValueError(f"memory_gb={self.memory_gb} must be at least 0.")
        self._check_weights()

    def _check_weights(self) -> None:
        weights = self.weights
        if weights is None:
            return
        if len(weights) != self.num_parties:
            raise ValueError(f"weights has {len(weights)} numbers for num_parties={self.num_parties}.")
        if not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError("weights must be finite numbers of at least 0.")
        positive = sum(weight > 0 for weight in weights)
        if positive < self.places:
            raise ValueError(
                f"weights has {positive} numbers above 0, and each round draws {self.places} parties."
            )

    @property
    def places(self) -> int:
        """Number of parties that are drawn for a round."""
        if isinstance(self.sampled, float):
            return max(1, round(self.sampled * self.num_parties))
        return self.sampled

    def draw(self, round: int) -> Draw:
        """Return who takes part in a round, of whom at least one trains; a pure function of its index."""
        return next(drawn for attempt in count() if (drawn := self._draw(round, attempt)).training)

    def party_seed(self, party: int) -> int:
        """Return the seed of a party's random numbers, as for ``torch.manual_seed``."""
        return int(self._random(_PARTY, party).integers(1 << 32))

    def _draw(self, *index: int) -> Draw:
        order = self._order(*index)
        there = self._random(_AVAILABLE, *index).random(self.num_parties) < self.availability
        failed = self._random(_FAIL, *index).random(self.num_parties) < self.failure_rate
        available = [party for party in order if there[party]][: self.places]
        missing = [party for party in order if not there[party]][: self.places - len(available)]
        training = frozenset(party for party in available if not failed[party])
        return Draw(tuple(sorted([*available, *missing])), training)

    def _order(self, *index: int) -> list[int]:
        """Return the parties that can be drawn, first those that are: with weights, by exponential races."""
        keys = self._random(_SAMPLE, *index).exponential(size=self.num_parties)
        if self.weights is None:
            return [int(party) for party in np.argsort(keys)]
        weights = np.asarray(self.weights, dtype=np.float64)
        keys = np.divide(keys, weights, out=np.full_like(keys, np.inf), where=weights > 0)
        return [int(party) for party in np.argsort(keys) if weights[party] > 0]

    def _random(self, purpose: int, *index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, *index])
