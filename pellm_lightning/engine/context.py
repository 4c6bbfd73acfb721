"""EngineContext: what one aggregator works with, checked and settled once, before its first round."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pellm_lightning.aggregation.base import Aggregation, Capability
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.aggregation.robust import CoordinatewiseRule, SenderNormBound, WeighingRule
from pellm_lightning.comm import Communicator, Quorum, resolve_quorum
from pellm_lightning.engine import outer_optimizer as outer
from pellm_lightning.engine.auxiliary import AuxiliaryTerms
from pellm_lightning.engine.outer_optimizer import OptimizerFactory, SchedulerFactory
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.engine.sender_bounds import SenderBounds
from pellm_lightning.exchange import Exchange
from pellm_lightning.privacy.mechanism import GaussianMechanism
from pellm_lightning.privacy.processor import DPProcessor

log = logging.getLogger(__name__)

OnNonfinite: TypeAlias = Literal["exclude", "raise"]
Settings: TypeAlias = Mapping[str, str | int | float | None]


@dataclass(frozen=True)
class EngineContext:
    """Configuration and collaborators of one aggregator; made once from its arguments, read by each part.

    The parts are the ``GlobalState`` with its ``UpdateReducer`` per fragment, the ``ParticipantFilter`` and
    the ``LoraAggregator``. What changes from round to round is in the global state.
    """

    federation: Communicator
    plan: Plan
    exchange: Exchange
    privacy: DPProcessor | None = None
    auxiliary: AuxiliaryTerms | None = None
    outer_optimizer: OptimizerFactory = outer.sgd_one
    outer_scheduler: SchedulerFactory | None = None
    is_plain_averaging: bool = True
    """Whether every round gives the aggregation's result itself."""
    measures_deviation: bool = False
    """Whether rounds measure the deviation of the LoRA products."""
    on_nonfinite: OnNonfinite = "exclude"
    quorum: int = 1
    """Parties that must have trained in a round for it to move anything."""
    max_share: float | None = None
    """Cap on a party's share of the weights; None for none."""
    fragments: int = 1
    settings: Settings = field(default_factory=dict)
    """What all parties must agree on, by name."""

    @property
    def min_participants(self) -> int:
        """Fewest parties that may add up their values, so that none can be inferred from the sum."""
        return max(
            self.exchange.min_participants, 1 if self.privacy is None else self.privacy.min_participants
        )

    @property
    def robust_rule(self) -> WeighingRule | CoordinatewiseRule | None:
        """The rule, if it needs the parties' single updates."""
        rule = self.plan.rule
        return rule if isinstance(rule, WeighingRule | CoordinatewiseRule) else None

    def new_sender_bounds(self) -> SenderBounds | None:
        """Return the bounds that a party applies to what it sends itself; None where the others can."""
        norm_factor = self.plan.rule.factor if isinstance(self.plan.rule, SenderNormBound) else None
        # With differential privacy all weights are equal, and a norm would be sent without noise.
        wanted = norm_factor is not None or self.max_share is not None
        if not self.exchange.is_secure or self.privacy is not None or not wanted:
            return None
        return SenderBounds(norm_factor, self.max_share)

    @property
    def shares_figures(self) -> bool:
        """Whether parties may tell each other their losses, distances and steps."""
        return not self.exchange.is_secure and self.privacy is None


def make_context(
    federation: Communicator,
    plan: Plan,
    exchange: Exchange,
    *,
    privacy: GaussianMechanism | None,
    auxiliary: AuxiliaryTerms | None,
    outer_optimizer: OptimizerFactory,
    outer_scheduler: SchedulerFactory | None,
    on_nonfinite: OnNonfinite,
    quorum: Quorum,
    max_share: float | None,
    overlap: Overlap,
    config: Settings,
) -> EngineContext:
    """Check the arguments of an ``Aggregator``, described there, against each other.

    Raises:
        ValueError: If two of them do not go together.
    """
    scheduled = outer_scheduler is not None
    optimizer = outer.make_prototype(outer_optimizer)
    needed = resolve_quorum(quorum, federation.max_parties)
    measures = _measures(plan.rule, exchange, private=privacy is not None)
    _check_privacy(privacy, exchange)
    _check_federation(federation, plan.rule, needed)
    _check_robust(plan.rule, federation.max_parties, max_share)
    _warn_of_unmanaged(federation, plan)
    outer.check(plan.rule, optimizer, scheduled=scheduled)
    # One subtraction then, which has the same bits at all parties; more is compared.
    is_plain = outer.is_plain_averaging(optimizer, scheduled=scheduled)
    if auxiliary is not None:
        auxiliary.check(private=privacy is not None, plain=is_plain)
    overlap.check(plan.rule)
    _check_overlap(overlap, privacy, auxiliary)
    settings: dict[str, Any] = {
        "on_nonfinite": on_nonfinite,
        "quorum": needed,
        "max_share": max_share,
        "fragments": overlap.fragments,
        "overlap": repr(overlap) if overlap.in_background else None,
        "outer_optimizer": outer.describe(optimizer),
        "outer_scheduler": outer.describe_schedule(outer_optimizer, outer_scheduler),
        "aggregation": repr(plan.rule),
        "measure_deviation": measures,
        "exchange": repr(exchange),
        "privacy": repr(privacy),
        "drift correction": None if auxiliary is None else auxiliary.method,
    }
    return EngineContext(
        federation,
        plan,
        exchange,
        privacy=None if privacy is None else DPProcessor(privacy),
        auxiliary=auxiliary,
        outer_optimizer=outer_optimizer,
        outer_scheduler=outer_scheduler,
        is_plain_averaging=is_plain,
        measures_deviation=measures,
        on_nonfinite=on_nonfinite,
        quorum=needed,
        max_share=max_share,
        fragments=overlap.fragments,
        settings=settings | dict(config),
    )


def capabilities(
    exchange: Exchange, privacy: GaussianMechanism | None, auxiliary: AuxiliaryTerms | None = None
) -> Capability:
    """Return what an aggregation rule may get of the parties' values."""
    if privacy is not None or (auxiliary is not None and auxiliary.sums):
        return "means"
    return exchange.supports


def _measures(rule: Aggregation, exchange: Exchange, *, private: bool) -> bool:
    """Return whether rounds measure the deviation, for which the parties' own factors are needed."""
    asked, is_secure = rule.measure_deviation, exchange.is_secure or private
    if asked and is_secure:
        raise ValueError(
            "measure_deviation=True needs the parties' own factors, which secure aggregation and differential"
            " privacy hide. Leave it out."
        )
    if asked and exchange.supports == "sparse":
        raise ValueError(
            f"measure_deviation=True needs the parties' whole factors, which {exchange!r} does not send."
            " Leave it out."
        )
    if asked is not None:
        return asked
    # What compression saves is not spent on measuring; rules that gather factors have them anyway.
    return not is_secure and (exchange.exact or rule.requires == "parties")


def _warn_of_unmanaged(federation: Communicator, plan: Plan) -> None:
    for name, reason in plan.unsupported.items():
        log.warning(
            "[party %s] The factors of the LoRA module %r are averaged one by one, since %s.",
            federation.name,
            name,
            reason,
        )


def _check_privacy(privacy: GaussianMechanism | None, exchange: Exchange) -> None:
    if privacy is None or not privacy.distributed or exchange.is_secure:
        return
    if privacy.noise_multiplier > 0:
        raise ValueError(
            f"{privacy!r} lets the parties' noise add up, so each update alone has too little. Hide them with"
            " exchange.SecureAggregation(...), or let each party add all of the noise with distributed=False."
        )


def _check_federation(federation: Communicator, rule: Aggregation, quorum: int) -> None:
    """Refuse what separate jobs, which may be lost and come back, cannot do, or do otherwise."""
    if not federation.may_lose_parties:
        return
    if rule.writes_base:
        raise ValueError(
            f"{rule!r} writes into the frozen weights, which a party that comes back cannot be given. Between"
            " separate jobs use LowRankMean() or another rule, or launch all parties by one torchrun."
        )
    if federation.quorum != quorum:
        raise ValueError(
            f"The federation lets {federation.quorum} of its {federation.max_parties} parties meet, but a"
            f" round would need quorum={quorum}. Give both the same quorum."
        )


def _check_robust(rule: Aggregation, max_parties: int, max_share: float | None) -> None:
    """Refuse a robust rule that would protect nobody; a party alone may try its script."""
    if max_share is not None and not 0 < max_share <= 1:
        raise ValueError(f"max_share={max_share!r} must be above 0 and at most 1.")
    if isinstance(rule, WeighingRule | CoordinatewiseRule) and 1 < max_parties < rule.min_parties:
        raise ValueError(
            f"{rule!r} protects {rule.min_parties} parties or more, and these are {max_parties}. Expect fewer"
            " malicious parties, or use Mean(), which leaves out what is not finite."
        )


def _check_overlap(
    overlap: Overlap, privacy: GaussianMechanism | None, auxiliary: AuxiliaryTerms | None
) -> None:
    if overlap.fragments > 1 and (privacy is not None or auxiliary is not None):
        raise ValueError(
            "Differential privacy and drift corrections look at all parameters at once. Set fragments=1."
        )
    if overlap.in_background and auxiliary is not None:
        raise ValueError("A drift correction needs the last round's result at once: use no overlap.")
