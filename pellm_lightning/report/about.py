"""What there is to say of a federation when it is over: for model cards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pellm_lightning.round import RoundReport


@dataclass
class About:
    """Who took part in a federation, how, and with how much.

    Args:
        parties: Names of all parties.
        settings: What they have agreed on.
        rounds: Rounds so far.
        weights: Sum of each party's weights over these rounds, which with weighting="samples" is the number
            of training samples behind them; None once an exchange has hidden a weight.
        took_part: In how many of these rounds each party took part.
        epsilon: What differential privacy has cost, None without.
    """

    parties: Sequence[str]
    settings: Mapping[str, str | int | float | None]
    rounds: int = 0
    weights: list[float] | None = None
    took_part: list[int] | None = None
    epsilon: float | None = None

    def count(self, done: RoundReport) -> None:
        """Add a round."""
        if self.rounds == 0 or self.took_part is None:
            self.took_part, self.weights = [0] * len(self.parties), [0.0] * len(self.parties)
        if not done.weights:
            self.weights = None
        self.rounds += 1
        self.epsilon = done.epsilon
        for place, party in enumerate(done.parties):
            self.took_part[party] += 1
            if self.weights is not None:
                self.weights[party] += done.weights[place]

    def resumed(self, earlier: Mapping[str, Any]) -> "About":
        """Return the same, counting on from what ``asdict`` has kept of an earlier fit; empty for none."""
        if list(earlier.get("parties", ())) != list(self.parties):
            return self
        counted = ("rounds", "weights", "took_part", "epsilon")
        return replace(self, **{name: earlier[name] for name in counted})
