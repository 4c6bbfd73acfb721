"""What there is to say of a federation when it is over: for model cards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pellm_lightning.engine.round_report import RoundReport


@dataclass
class RunSummary:
    """Who took part in a federation, how, and with how much.

    Args:
        parties: Names of all parties.
        settings: What they have agreed on.
        writes_base: Whether its rounds write into frozen weights, and the adapter alone is not the result.
        rounds: Rounds of the federation so far.
        took_part: In how many rounds each party took part, of those that this party has seen: one of separate
            jobs may come late. Empty before the first.
        weights: Sum of each party's weights over these, which with weighting="samples" is the number of
            training samples behind them; None once an exchange has hidden a weight.
        epsilon: What differential privacy has cost, None without.
        trained: In how many rounds so many parties trained, by their number as text.
        short_rounds: Rounds that moved nothing, since fewer than a quorum trained in them.
    """

    parties: Sequence[str]
    settings: Mapping[str, str | int | float | None]
    writes_base: bool = False
    rounds: int = 0
    took_part: list[int] = field(default_factory=list)
    weights: list[float] | None = field(default_factory=list)
    epsilon: float | None = None
    trained: dict[str, int] = field(default_factory=dict)
    short_rounds: int = 0

    def count(self, done: RoundReport) -> None:
        """Add a round."""
        if not self.took_part:
            self.took_part, self.weights = [0] * len(self.parties), [0.0] * len(self.parties)
        if not done.weights:
            self.weights = None
        self.rounds = done.round + 1
        self.epsilon = done.epsilon
        number = str(done.trained_parties)
        self.trained[number] = self.trained.get(number, 0) + 1
        self.short_rounds += done.trained_parties < done.quorum
        for place, party in enumerate(done.parties):
            self.took_part[party] += 1
            if self.weights is not None:
                self.weights[party] += done.weights[place]

    def resumed(self, earlier: Mapping[str, Any]) -> "RunSummary":
        """Return the same, counting on from what ``asdict`` has kept of an earlier fit; empty for none."""
        if list(earlier.get("parties", ())) != list(self.parties):
            return self
        counted = ("rounds", "weights", "took_part", "epsilon", "trained", "short_rounds")
        return replace(self, **{name: earlier[name] for name in counted})
