"""Summary of a federation, for model cards; a checkpoint keeps it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pellm_lightning.engine.round_report import RoundReport


@dataclass
class RunSummary:
    """Counts over the rounds of a federation: who took part, and with which weight.

    Example::

        summary = RunSummary(["berlin", "oslo"], {"exchange": "Plain()"})
        summary.count(report)
        write_card(folder, asdict(summary), base)

    Args:
        parties: Names of all parties.
        settings: What they have agreed on.
        writes_base: Whether its rounds write into frozen weights, which an adapter does not hold.
        rounds: Rounds of the federation so far.
        took_part: Number of rounds that each party took part in, of those that this party has seen: one of
            separate jobs may join late. Empty before the first.
        weights: Sum of each party's weights over these, which with weighting="samples" is the number of
            training samples behind them; None once an exchange has hidden a weight.
        epsilon: Privacy budget spent; None without differential privacy.
        trained: Number of rounds by the number of parties that trained in them, as text.
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

    def count(self, report: RoundReport) -> None:
        """Add a round."""
        if not self.took_part:
            self.took_part, self.weights = [0] * len(self.parties), [0.0] * len(self.parties)
        if not report.weights:
            self.weights = None
        self.rounds = report.round + 1
        self.epsilon = report.epsilon
        number = str(report.trained_parties)
        self.trained[number] = self.trained.get(number, 0) + 1
        self.short_rounds += report.trained_parties < report.quorum
        for place, party in enumerate(report.parties):
            self.took_part[party] += 1
            if self.weights is not None:
                self.weights[party] += report.weights[place]

    def resumed(self, earlier: Mapping[str, Any]) -> "RunSummary":
        """Return this summary with the counts of ``asdict`` of an earlier fit's; empty for none."""
        if list(earlier.get("parties", ())) != list(self.parties):
            return self
        counted = ("rounds", "weights", "took_part", "epsilon", "trained", "short_rounds")
        return replace(self, **{name: earlier[name] for name in counted})
