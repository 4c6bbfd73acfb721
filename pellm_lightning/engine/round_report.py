"""RoundReport: the result of one round, as one party reports it to logs, records and callbacks."""

from dataclasses import dataclass

from pellm_lightning.tensors.deviation import Deviation


@dataclass(frozen=True)
class RoundReport:
    """Result of one round as seen from one party.

    Example:
        >>> import torch
        >>> from torch.distributed import HashStore
        >>> from pellm_lightning import Aggregator, Federation
        >>> federation = Federation(HashStore(), party=0, num_parties=1)
        >>> aggregator = Aggregator(federation, {"weight": torch.zeros(2)})
        >>> overwritten, report = aggregator.start(), aggregator.step(weight=8.0)
        >>> report.round, report.active_parties, report.total_weight
        (0, 1, 8.0)
        >>> federation.close()
    """

    round: int
    """Index of the round, from 0."""
    parties: tuple[int, ...]
    """Parties that took part, by index in the federation."""
    active_parties: int
    """Parties whose parameters counted: weight above 0 and all values finite; 0 if nothing moved."""
    trained_parties: int
    """Parties that had trained, with finite values; with fewer than a quorum nobody counts."""
    quorum: int
    """Parties that had to train for the round to move anything."""
    total_weight: float
    """Sum of the weights that counted."""
    weight: float
    """This party's weight, 0 if it did not count."""
    excluded: tuple[int, ...]
    """Parties left out because their parameters held NaN or infinity, or their update was absurd (as
    ``aggregation.influence.absurd`` says); they have received the result."""
    loss: float | None
    """Mean of the parties' local training losses, weighted; None if no party gave one."""
    seconds: float = 0.0
    """Seconds from the moment all parties had arrived until the parameters were written."""
    waited_seconds: float = 0.0
    """Seconds this party waited for the others to arrive."""
    stalled_seconds: float = 0.0
    """Seconds in which this party's training stood still: all of the round, or with an overlap a part."""
    bytes_sent: int = 0
    """Bytes this party sent."""
    update_norm: float = 0.0
    """2-norm of this party's update: its parameters minus the anchor."""
    distance: float = 0.0
    """2-norm of this party's parameters minus the aggregation's result."""
    deviation: Deviation | None = None
    """By how much the LoRA factors miss the mean of the products; None without LoRA, or if not measured."""
    epsilon: float | None = None
    """Privacy budget spent so far, this round included; None without differential privacy."""
    compression_error: float | None = None
    """2-norm of what lossy compression removed from this party's values, relative to what it sent; None if
    nothing was compressed."""
    clipping_norm: float | None = None
    """Norm to which the next round's updates are clipped; None without differential privacy."""
    outer_lr: float | None = None
    """Learning rate of the outer optimizer in this round; None if nobody counted, so that nothing moved."""
    last: bool = False
    """Whether no further round can move anything: the privacy budget is used up, or too few parties still
    train to make a quorum or to hide in a sum."""
    local_loss: float | None = None
    """Mean training loss of this party alone."""
    weights: tuple[float, ...] = ()
    """Of each party that took part, 0 if it did not count; empty where the exchange hides them."""
    influence: tuple[float, ...] = ()
    """Weight of each such party's update in the result, of sum 1 or less: its share of the weights, or what a
    robust rule has made of it; empty where the exchange hides it, or a rule combines single numbers."""
    losses: tuple[float | None, ...] = ()
    """Mean training loss of each party that took part; empty where the exchange hides it, or with privacy."""
    distances: tuple[float | None, ...] = ()
    """``distance`` of each party that took part, in the round before; empty where losses are."""
