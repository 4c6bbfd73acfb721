"""Overlap: settings of rounds that overlap with local steps, or exchange one fragment at a time."""

from dataclasses import dataclass

from pellm_lightning.aggregation.base import Aggregation


@dataclass(frozen=True)
class Overlap:
    """Settings of rounds that overlap with local steps, or exchange one fragment of the parameters at a time.

    With a delay a party's parameters are copied when a round begins, and the round continues with the copies.
    ``delay_steps`` optimizer steps later its result is applied: ``x = mix * x + (1 - mix) * result``, as in
    Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512, where they are called tau and alpha). A round
    that is not complete by then is waited for.

    With K fragments the layers are dealt to K groups that take turns: each has a round as often as the
    schedule says, and each exchange is a K-th as large.

    Example:
        >>> Overlap(delay_steps=10, fragments=4)
        Overlap(delay_steps=10, mix=0.5, fragments=4)

    Args:
        delay_steps: Optimizer steps between the beginning of a round and the application of its result; 0
            lets training wait for it.
        mix: How much of the local parameters is kept when it is applied, in [0, 1). With 0 the steps made in
            the meantime are dropped, but for the state of the local optimizer. Without a delay it has no
            effect.
        fragments: Number K of groups of layers that take turns.

    Raises:
        ValueError: If an argument is out of its range.
    """

    delay_steps: int = 0
    mix: float = 0.5
    fragments: int = 1

    def __post_init__(self) -> None:
        delay, fragments = self.delay_steps, self.fragments
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise ValueError(
                f"Overlap(delay_steps={delay!r}) must be a whole number of optimizer steps, 0 or more."
            )
        if not 0 <= self.mix < 1:
            raise ValueError(
                f"Overlap(mix={self.mix!r}) must be at least 0 and below 1: with 1 a party would never take"
                " over a result."
            )
        if isinstance(fragments, bool) or not isinstance(fragments, int) or fragments < 1:
            raise ValueError(f"Overlap(fragments={fragments!r}) must be a whole number, 1 or more.")

    @property
    def in_background(self) -> bool:
        """Whether training continues while a round is under way."""
        return self.delay_steps > 0

    def check_schedule(self, every_n_steps: int | None, every_n_seconds: float | None) -> None:
        """Refuse a schedule in which fragments cannot take turns, or a result comes after the next round.

        Raises:
            ValueError: If it is one.
        """
        fragments = self.fragments
        if fragments > 1 and every_n_seconds is None:
            if every_n_steps is None:
                raise ValueError(
                    f"{fragments} fragments take turns between two rounds of one of them, and an epoch is not"
                    f" divided. Give every_n_steps, a multiple of {fragments}, or every_n_seconds."
                )
            if every_n_steps % fragments:
                raise ValueError(
                    f"{fragments} fragments take turns between two rounds of one of them, so every_n_steps="
                    f"{every_n_steps} must be a multiple of {fragments}; or give every_n_seconds."
                )
        if every_n_steps is not None and self.delay_steps >= every_n_steps // fragments:
            raise ValueError(
                f"{self!r} applies a round after the next one has begun, {every_n_steps // fragments}"
                " steps later. Choose a smaller delay_steps, or rounds that are further apart."
            )

    def check(self, rule: Aggregation) -> None:
        """Refuse a rule whose result cannot be applied later, or to one fragment at a time.

        Raises:
            ValueError: If it cannot.
        """
        takes_turns = rule.frozen_parts(0) != rule.frozen_parts(1)
        if self.in_background and rule.writes_base:
            raise ValueError(
                f"{rule!r} writes into the frozen weights, with which training continues during a round. Use"
                " another aggregation, or no overlap."
            )
        if self.in_background and takes_turns:
            raise ValueError(
                f"{rule!r} trains other factors after each round, but with an overlap nobody knows yet that"
                " the round is over. Use another aggregation, or no overlap."
            )
        if self.in_background and self.mix and rule.outer == "mean":
            raise ValueError(
                f"{rule!r} gives the factors other coordinates each round, so mix={self.mix:g} of the old"
                " ones has no meaning. Use Overlap(mix=0), aggregation=Mean(), or"
                " LowRankMean(factorization='procrustes')."
            )
        if self.fragments > 1 and takes_turns:
            raise ValueError(
                f"{rule!r} trains other factors after each round, but fragments have their rounds at"
                " different times. Use another aggregation, or fragments=1."
            )
