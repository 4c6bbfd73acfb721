"""One round, top to bottom: meet, pack, exchange, vote, commit."""

import json
import logging
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import Aggregation, Capability, Part, RoundContext
from pellm_lightning.aggregation.deviation import Deviation
from pellm_lightning.aggregation.lora import LoraModule
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import (
    Collectives,
    ElasticFederation,
    FederationError,
    PartyLostError,
    Quorum,
    Version,
    resolve_quorum,
)
from pellm_lightning.engine import compatibility
from pellm_lightning.engine import outer_optimizer as outer
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues
from pellm_lightning.engine.compatibility import PartySpec
from pellm_lightning.engine.coordination import MAX_WEIGHT, Coordinator, Header, Purpose, meeting
from pellm_lightning.engine.global_state import GlobalState
from pellm_lightning.engine.lora_step import LoraResult
from pellm_lightning.engine.outer_optimizer import OptimizerFactory, SchedulerFactory
from pellm_lightning.engine.participants import ParticipantFilter, Shortage
from pellm_lightning.engine.state_transfer import send_state
from pellm_lightning.engine.updates import ReducedFlags
from pellm_lightning.exchange import Exchange
from pellm_lightning.exchange.base import as_exchange
from pellm_lightning.privacy.mechanism import GaussianMechanism
from pellm_lightning.privacy.processor import DPProcessor
from pellm_lightning.tensors.adapter_config import AdapterConfigs
from pellm_lightning.tensors.digest import bits_digest
from pellm_lightning.tensors.snapshot import SnapshotDir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundReport:
    """What a round did, seen from one party."""

    round: int
    """Index of the round, from 0."""
    parties: tuple[int, ...]
    """Parties that took part, by index in the federation."""
    active_parties: int
    """Parties whose parameters counted: weight above 0 and all values finite; 0 if nothing moved."""
    trained_parties: int
    """Parties that came to it with local steps of finite values; with fewer than a quorum nobody counts."""
    quorum: int
    """Parties that had to train for the round to move anything."""
    total_weight: float
    """Sum of the weights that counted."""
    weight: float
    """This party's weight, 0 if it did not count."""
    excluded: tuple[int, ...]
    """Parties left out because their parameters held NaN or infinity; the result has healed them."""
    loss: float | None
    """Mean of the parties' local training losses, weighted; None if no party gave one."""
    seconds: float
    """Seconds from the moment all parties had arrived until the parameters were written."""
    waited_seconds: float
    """Seconds this party waited for the others to arrive."""
    stalled_seconds: float
    """Seconds in which this party's training stood still: all of these, or with an overlap what is left."""
    bytes_sent: int
    """Bytes this party handed to the group."""
    update_norm: float
    """2-norm of this party's update: its parameters minus the anchor."""
    distance: float
    """2-norm of this party's parameters minus the aggregation's result."""
    deviation: Deviation | None
    """By how much the LoRA factors miss the mean of the products; None without LoRA, or if not measured."""
    epsilon: float | None = None
    """What differential privacy has cost so far, this round included; None without."""
    compression_error: float | None = None
    """2-norm of what this party's codes have lost, relative to what they say; None if nothing was encoded."""
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
    losses: tuple[float | None, ...] = ()
    """Mean training loss of each party that took part; empty where the exchange hides it, or with privacy."""
    distances: tuple[float | None, ...] = ()
    """``distance`` of each party that took part, in the round before; empty where losses are."""


@dataclass(frozen=True)
class ReduceResult:
    """What the exchange of a round has brought; nothing of it is applied yet."""

    weights: list[float]
    """Of the parties that met; 0 for who does not count."""
    trained: list[int]
    """Parties that have trained, by their place among those that met."""
    excluded: list[int]
    """Parties left out, by their place among those that met."""
    counting: RoundContext
    ballot: ReducedFlags
    update_norm: float
    """2-norm of this party's update."""
    total_weight: float
    combined: LoraResult | None
    """What the LoRA factors become; None without any, or if nobody counted."""


class Aggregator:
    """Average named tensors over a federation, round by round, in place.

    The update of party i is exchanged as ``w_i / sum(w) * (anchor - x_i)`` in float32; the sum over the
    parties is the pseudo-gradient, and one step of the outer optimizer on the global vector (float32) gives
    what all parties write back. With ``SGD(lr=1)`` that is FedAvg, ``x = sum(w_i x_i) / sum(w)`` (McMahan et
    al. 2017, arXiv:1602.05629): test_weighted_mean_equals_float64. What no party moved keeps its bits.

    After a round the global vector has the same bits at all parties, whatever their processors and numbers of
    threads (test_all_hold_the_same_bits_after_each_round): sums come from one party each; what every party
    computes for itself consists of operations that IEEE 754 fixes to the bit (``portable``), or is compared,
    and where it differs the first party's is taken.

    Every party must own one, call ``start()``, then ``step()`` once a round; a party that is through calls
    ``drain()`` so that the others can go on. A failed round leaves the parameters as they were.

    In an ``ElasticFederation`` a round is tried again without a party that was lost, and is everybody's or
    nobody's: each makes the result durable, then all agree that it stands, then it is written. Who comes
    late, or back, takes over the newest global state and counts 0 in that round.

    Args:
        federation: The joined parties.
        parameters: Named floating-point tensors on one device; the same names, shapes and dtypes at every
            party.
        aggregation: What is computed from the parties' parameters; None chooses ``LowRankMean()`` for LoRA
            pairs, which are recognised by PEFT's names, and the weighted mean for all else.
        lora: What the modules of the LoRA pairs say, from ``lora_modules(model)``; scaling 1 without.
        measure_deviation: Whether each round measures by how much the result misses the mean of the LoRA
            products. It takes half as many bytes again as averaging the factors, and the parties' factors:
            None measures where the exchange does not hide these, and with a compressed exchange only where
            the rule gathers them anyway.
        exchange: How values are summed over the parties; None is ``exchange.Plain()``.
        privacy: Differential privacy of each party's updates. Every weight must be 1 or 0 then; no training
            loss is exchanged.
        auxiliary: What a method that corrects drift carries beside the updates, for example
            ``drift.SCAFFOLD().beside``.
        outer_optimizer: Makes the optimizer of the global vector, one flat float32 parameter of shape (D,).
            It must move each element by its own gradients.
        outer_scheduler: Makes a torch scheduler of that optimizer's learning rate, stepped once for each
            round in which a party counted.
        frozen: Named tensors that stay local but must be the same everywhere, from ``frozen_state(model)``;
            every value is compared, by digests that are made once.
        adapters: PEFT configurations that must be the same everywhere, from ``adapter_configs(model)``.
        config: Settings that must be equal at all parties, by name; compared at the start.
        files: Paths this party writes to ("host:path"), which no other party may share.
        facts: What else the others may want to know of this party, in plain containers; not compared.
        on_nonfinite: What to do when a party's parameters hold NaN or infinity: leave it out of the round
            (the result heals it), or raise at every party.
        quorum: Parties that must have trained in a round for it to move the global parameters: more than half
            of all ("majority"), or a number. With fewer, all go back to the last result of a quorum; if the
            others are through, or it happens twice in a row, that is the end (``RoundReport.last``).
        state_dir: Where a party of an ``ElasticFederation`` keeps the global state through its own death;
            None keeps it in memory only.

    Raises:
        ValueError: If the parameters cannot be laid out as one float32 vector, the aggregation cannot handle
            them or the outer optimizer, or the exchange hides what it needs.
    """

    def __init__(
        self,
        federation: Collectives,
        parameters: Mapping[str, Tensor],
        *,
        aggregation: Aggregation | None = None,
        lora: Mapping[str, LoraModule] | None = None,
        measure_deviation: bool | None = None,
        exchange: Exchange | None = None,
        privacy: GaussianMechanism | None = None,
        auxiliary: AuxiliaryTerms | None = None,
        outer_optimizer: OptimizerFactory = outer.sgd_one,
        outer_scheduler: SchedulerFactory | None = None,
        frozen: Mapping[str, Tensor] | None = None,
        adapters: AdapterConfigs | None = None,
        config: Mapping[str, str | int | float | None] | None = None,
        files: Iterable[str] = (),
        facts: Mapping[str, Any] | None = None,
        on_nonfinite: Literal["exclude", "raise"] = "exclude",
        quorum: Quorum = "majority",
        state_dir: str | Path | None = None,
    ) -> None:
        self.federation = federation
        needed = resolve_quorum(quorum, federation.max_parties)
        self._exchange = as_exchange(exchange)
        self._exchange.check(federation)
        self._meeting = meeting(
            federation, self._exchange, None if state_dir is None else SnapshotDir(state_dir)
        )
        self._plan = plan = Plan(
            aggregation, parameters, lora, capabilities=capabilities(self._exchange, privacy, auxiliary)
        )
        is_secure = self._exchange.is_secure or privacy is not None
        measures = _measures(measure_deviation, is_secure, self._exchange, plan.rule)
        tried = outer.tried(outer_optimizer)
        scheduled = outer_scheduler is not None
        _check_privacy(privacy, self._exchange)
        _check_rejoining(self._meeting, plan.rule)
        _check_quorum(federation, needed)
        outer.check(plan.rule, tried, scheduled=scheduled)
        # One subtraction then, which has the same bits at all parties; more is compared.
        self._plain = outer.is_plain_averaging(tried, scheduled=scheduled)
        if auxiliary is not None:
            auxiliary.check(private=privacy is not None, plain=self._plain)
        for name, words in plan.unsupported.items():
            log.warning(
                "[party %s] The factors of the LoRA module %r are averaged one by one, since %s.",
                federation.name,
                name,
                words,
            )
        self._parameters = {name: parameters[name] for name in sorted(plan.shared)}
        self._frozen = frozen
        self._base: dict[str, str] | None = None
        self._adapters = adapters or {}
        self._files = list(files)
        self._facts = dict(facts or {})
        self._private = None if privacy is None else DPProcessor(privacy)
        self._who = ParticipantFilter(federation, self._exchange, self._private, on_nonfinite, needed)
        self._auxiliary = auxiliary
        self._weight = 0.0
        self._contribution: AuxiliaryValues | None = None
        self._steps_left = math.nan
        self._tag = secrets.token_hex(8)
        self._exposed: tuple[str, ...] = ()
        self._told_of_metrics = False
        self._started = False
        self._global_state = GlobalState(
            federation,
            plan,
            self._parameters,
            exchange=self._exchange,
            private=self._private,
            auxiliary=auxiliary,
            optimizer=outer_optimizer,
            scheduler=outer_scheduler,
            measures=measures,
        )
        self._config = {
            "on_nonfinite": on_nonfinite,
            "quorum": needed,
            "outer_optimizer": outer.describe(tried),
            "outer_scheduler": outer.described_schedule(outer_optimizer, outer_scheduler),
            "aggregation": repr(plan.rule),
            "measure_deviation": measures,
            "exchange": repr(self._exchange),
            "privacy": repr(privacy),
            "drift correction": None if auxiliary is None else auxiliary.method,
            **(config or {}),
        }

    @property
    def round(self) -> int:
        """Index of the round that comes."""
        return self._global_state.round

    @property
    def run_id(self) -> str | None:
        """Name of a federation of separate jobs, the same at all and through restarts; None in one launch."""
        version = self._global_state.version
        return None if version is None else version.run_id or None

    @property
    def size_bytes(self) -> int:
        """Bytes of the vector that each round exchanges."""
        return 4 * self._global_state.layout.size

    @property
    def settings(self) -> Mapping[str, str | int | float | None]:
        """What all parties have agreed on, by name."""
        return self._config

    @property
    def global_vector(self) -> Tensor:
        """The global vector of shape (D,), float32: what every party's parameters hold after a round."""
        return self._global_state.updates.global_

    @property
    def global_parameters(self) -> dict[str, Tensor]:
        """Views of the global vector by parameter, each of the parameter's shape, float32."""
        return self._global_state.layout.views(self.global_vector)

    @property
    def carried(self) -> dict[str, Tensor]:
        """The mean of what the parties carried beside their updates, by parameter, float32; empty if nothing.

        These are views of the global state, zero before the first round.
        """
        carried = self._global_state.updates.carried
        return {} if carried is None else self._global_state.layout.views(carried)

    # ---- what a party calls

    def handshake(self) -> None:
        """Compare what all parties must share, which ``start`` does, too.

        Raises:
            MismatchError: If parties differ.
        """
        self._meeting.handshake(self.party_spec())

    @torch.no_grad()
    def start(self) -> bool:
        """Compare what all parties must share, then take over the parameters of one of them.

        With a loaded state, every party keeps its own parameters instead and goes on from there. In an
        ``ElasticFederation`` that is under way, it takes over the newest global state with the next round.

        Returns:
            Whether the parameters were overwritten.

        Raises:
            MismatchError: If parties differ; no parameter was touched.
        """
        self.federation.enter("starting")
        self.handshake()
        if self._meeting.rejoins:
            had = self._global_state.version
            self._resume()
            self._started = True
            self._next(Purpose.JOIN)
            return self._global_state.version != had
        self._know_products()
        if self._global_state.loaded is None:
            self._global_state.take_over()
            self._global_state.write_()
        self._started = True
        self.federation.enter("training")
        return self._global_state.loaded is None

    @torch.no_grad()
    def step(
        self,
        weight: float,
        loss: float | None = None,
        contribution: AuxiliaryValues | None = None,
        *,
        steps_left: float = math.nan,
    ) -> RoundReport:
        """Run one round with all parties.

        Args:
            weight: How much this party counts, 0 to 2^53; 0 sends zeros, yet receives the result.
            loss: Mean training loss of this party since the last round, for the report.
            contribution: What this party gives beside its update, if a method asks for it.
            steps_left: Optimizer steps that this party still has to make, for the others' messages if the
                federation ends without them; NaN if nobody knows.

        Raises:
            ValueError: If the weight is out of range, or the contribution is not what the method asks for.
            MismatchError: If a party is in another round.
            PartyLostError: If a party is gone or too late, and the federation is not elastic.
            FederationError: If no party counts.
        """
        if not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(
                f"Party {self.federation.name} has weight={weight}; it must be 0 to {MAX_WEIGHT:g} (2^53), so"
                " that sums of weights are exact and finite."
            )
        if self._private is not None and weight not in (0.0, 1.0):
            raise ValueError(
                f"Party {self.federation.name} has weight={weight}, but with differential privacy all parties"
                " must count alike: a weight would be a factor of what one party can change. Use"
                " weighting='uniform', which is the weight 1."
            )
        if self._auxiliary is not None and weight > 0:
            who = f"Party {self.federation.name} comes to round {self.round}"
            self._auxiliary.check_contribution(contribution, self._global_state.layout.shapes, who)
        self._contribution, self._steps_left = contribution, steps_left
        try:
            report = self._next(Purpose.ROUND, weight, loss)
        finally:
            self._contribution, self._steps_left = None, math.nan
        if report is None:
            raise FederationError(f"Party {self.federation.name} came to a round, but none was run.")
        return report

    @torch.no_grad()
    def drain(self) -> Iterator[RoundReport]:
        """Answer the others' rounds with weight 0 until no party is active; yield each round's report.

        Call it when this party has made its last step, and exhaust it: all parties end with the same
        parameters.
        """
        while (report := self._next(Purpose.DONE)) is not None:
            yield report
        self._meeting.finished(self._global_state.version)

    def mean(self, values: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Return the weighted mean over the parties of each named (value, weight), equal on all parties.

        A party that is elsewhere (in a round, or done) counts 0, and so does one that lacks a name. A value
        that is not finite is left out and its party named; the mean is NaN where no party has a finite one.
        """
        self._check_started()
        if values and self._private is not None and not self._told_of_metrics:
            self._told_of_metrics = True
            log.warning(
                "[party %s] Metrics are averaged as they are, and epsilon does not cover them. Log none of"
                " private data, or on data that may be seen.",
                self.federation.name,
            )
        return self._meeting.mean(values, self.round, self._global_state.version)

    def party_spec(self) -> PartySpec:
        """Return what this party shows the others at the start: what must agree, in plain containers."""
        plan, loaded = self._plan, self._global_state.loaded
        if self._frozen is not None and self._base is None:
            self._base = compatibility.base_digests(self._frozen)
        schema = self._global_state.layout.schema
        if plan.rule.ranks_may_differ:
            schema = _without_ranks(schema, plan.named((Part.A,)), plan.named((Part.B,)))
        return {
            "protocol": compatibility.PROTOCOL,
            "schema": schema,
            "lora": {
                pair.name: [self._parameters[pair.a].shape[0], plan.module(pair).scaling]
                for pair in plan.products
            },
            "ranks_may_differ": plan.rule.ranks_may_differ,
            "config": self._config,
            "adapters": self._adapters,
            "base": self._base,
            "round": self.round,
            "checksum": None if loaded is None else bits_digest(loaded["global"]),
            "files": self._files,
            "facts": self._facts,
        }

    def facts(self) -> dict[str, Any]:
        """Return the ``facts`` of the parties that met last, by name; a peer may have said anything."""
        party_specs = self._meeting.party_specs()
        return {
            name: shown.get("facts") for name, shown in zip(self.federation.names, party_specs, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain containers; resuming from it is exact."""
        return self._global_state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; call it before ``start()``.

        Raises:
            ValueError: If the state is of other parameters, of fragments, or of a round that has not landed.
        """
        if "fragments" in state or state.get("pending") is not None:
            raise ValueError(
                "The federated state is of an OverlappedAggregator with a round under way, or of a"
                " FragmentedAggregator. Resume with the overlap and the fragments with which it was saved."
            )
        self._global_state.load_state_dict(state)

    # ---- coming back

    def _resume(self) -> None:
        """Go on from the state that this party made durable in an earlier life, if it is the newest."""
        kept = self._meeting.restored()
        if kept is None:
            return
        version = Version(*kept["version"])
        if self._global_state.version is None or version > self._global_state.version:
            self._global_state.loaded = None
            self._global_state.load_state(kept)
            log.info(
                "[party %s] goes on from round %d of an unfinished federation",
                self.federation.name,
                self.round,
            )

    def _know_products(self) -> None:
        if not self._plan.products:
            return
        told = [of_party["lora"] for of_party in self._meeting.party_specs()]
        loaded = self._global_state.loaded if self._meeting.rejoins else None
        self._global_state.know_products(told, None if loaded is None else loaded.get("lora"))

    def _bring_up_to_date(self, headers: list[Header]) -> None:
        """Hand the newest global state to those who lack it."""
        behind = [header.behind for header in headers]
        if any(behind):
            send_state(
                self.federation,
                behind,
                self._global_state.state,
                self._global_state.load_state,
                self.size_bytes,
            )

    # ---- the round

    def _next(self, purpose: Purpose, weight: float = 0.0, loss: float | None = None) -> RoundReport | None:
        """Come to the next round; return its report, or None if there was none: all are through, or begin."""
        came, sent_before = self._now()
        while True:
            headers = self._meet(purpose, weight, loss)
            if all(header.purpose is Purpose.DONE for header in headers):
                return None
            arrived, _ = self._now()
            try:
                report = self._attempt(headers, loss)
            except PartyLostError as error:
                if not self._meeting.again(error):
                    raise
                continue
            self._tag, self._exposed = secrets.token_hex(8), ()
            if self._private is not None:
                self._private.releases = 0
            if report is not None:
                through = time.perf_counter()
                return replace(
                    report,
                    seconds=through - arrived,
                    waited_seconds=arrived - came,
                    stalled_seconds=through - came,
                    bytes_sent=self.federation.bytes_sent - sent_before,
                )
            if purpose is Purpose.JOIN:
                return None

    def _attempt(self, headers: list[Header], loss: float | None) -> RoundReport | None:
        """Make one attempt at a round, which stands at all parties or at none."""
        report, global_state = None, self._global_state
        if global_state.error_feedback is not None:
            global_state.error_feedback.discard()  # of an attempt that failed
        with global_state.reversible() if self._meeting.rejoins else nullcontext():
            self._prepare(headers)
            if any(header.purpose is Purpose.ROUND for header in headers):
                report = self._round(headers, loss)
            if self._meeting.rejoins:
                self._meeting.commit(self.round, global_state.state())
        if global_state.error_feedback is not None:
            global_state.error_feedback.commit()
        if global_state.stale:
            global_state.write_()
        self.federation.enter(f"training after round {self.round - 1}" if self.round else "training")
        return report

    def _prepare(self, headers: list[Header]) -> None:
        """Bring all to the same global state: the newest, or if there is none, that of one of them."""
        if not self._meeting.rejoins:
            return
        if any(header.behind for header in headers):
            self._bring_up_to_date(headers)
        self._know_products()
        if self._global_state.version is None:
            self._global_state.take_over()
            self._global_state.version = self._meeting.version(0)
            self._global_state.stale = True

    def _round(self, headers: list[Header], loss: float | None) -> RoundReport:
        """Run one round: first all that is sent and received, then all that is applied."""
        global_state, schedule = self._global_state, self._global_state.updates.schedule
        schedule.check(self.round)
        crossed = self._cross(headers, loss)
        outer_lr = schedule.lr if crossed.counting.num_participants else None
        distance, deviation = self._apply_(crossed)
        global_state.distance = distance
        shortage = self._shortage(headers, crossed)
        global_state.short_rounds = shortage.rounds
        report = RoundReport(
            round=self.round,
            parties=tuple(self.federation.members),
            active_parties=crossed.counting.num_participants,
            trained_parties=len(crossed.trained),
            quorum=self._who.quorum,
            total_weight=crossed.total_weight,
            weight=self._weight if crossed.weights[self.federation.party] > 0 else 0.0,
            excluded=tuple(self.federation.members[party] for party in crossed.excluded),
            loss=crossed.ballot.loss,
            seconds=0.0,
            waited_seconds=0.0,
            stalled_seconds=0.0,
            bytes_sent=0,
            update_norm=crossed.update_norm,
            distance=distance,
            deviation=deviation,
            epsilon=None if self._private is None else self._private.epsilon,
            compression_error=None
            if global_state.error_feedback is None
            else global_state.error_feedback.error,
            clipping_norm=None if self._private is None else self._private.max_norm,
            outer_lr=outer_lr,
            last=self._who.none_after(headers, self.round, shortage),
            local_loss=loss,
            weights=() if self._exchange.is_secure else tuple(crossed.weights),
            losses=tuple(_finite(header.loss) for header in headers) if self._tells else (),
            distances=tuple(_finite(header.distance) for header in headers) if self._tells else (),
        )
        global_state.round += 1
        global_state.version = self._meeting.version(self.round)
        return report

    def _cross(self, headers: list[Header], loss: float | None) -> ReduceResult:
        """Send this party's update and receive the mean; parameters and global vector stay what they are.

        What it cost in privacy is entered at once, whatever comes of the round.
        """
        global_state, updates = self._global_state, self._global_state.updates
        weights = self._who.weights(headers, self.round)
        global_state.read_()
        excluded = [party for party, header in enumerate(headers) if not header.fine]
        if excluded:
            weights = self._without(excluded, weights)
        failed = max(header.releases for header in headers)
        said, weights = weights, self._who.sendable(headers, weights, self.round)
        trained = self._who.trained(headers, said, weights, excluded)
        weights = self._who.allowed(weights, trained, self.round, failed)
        releases = self._releases
        sums = self._open(headers, weights)
        counting = self._counting(sums, weights)
        update_norm, ballot = self._average(counting, loss)
        if not excluded:
            excluded = [party for party, fine in enumerate(ballot.fine) if not fine and weights[party] > 0]
            if excluded:
                weights = self._without(excluded, weights)
                if self._exchange.is_secure:  # the difference of two sums would be what was left out
                    raise FederationError(
                        f"Round {self.round}: an update of party {self.federation.called(excluded)} exceeds"
                        " float32. No parameter was changed. Lower that party's learning rate."
                    )
                trained = [party for party in trained if party not in excluded]
                weights = self._who.in_quorum(weights, trained)
                counting = self._counting(sums, weights)
                if counting.num_participants:
                    _, ballot = self._average(counting, loss)
                else:
                    updates.drop_()
        total_weight = sum(weights)
        if self._exchange.is_secure and counting.num_participants:
            counting, total_weight = self._who.scaled(counting, ballot.total_weight), ballot.total_weight
            updates.divide_(total_weight)
        if counting.num_participants:
            updates.finish_(counting, ballot.effective_steps)
        if self._private is not None:
            releases = self._releases - releases
            self._private.end_round(failed + releases, ballot.clipping_bit if releases else None)
        combined = None
        if global_state.products is not None and counting.num_participants:
            combined = global_state.products.combine(
                global_state.layout, updates.global_, updates.pseudo_gradient, counting
            )
        return ReduceResult(weights, trained, excluded, counting, ballot, update_norm, total_weight, combined)

    def _shortage(self, headers: list[Header], crossed: ReduceResult) -> Shortage:
        """Return whether too few parties trained in a round."""
        rounds = 0 if len(crossed.trained) >= self._who.quorum else self._global_state.short_rounds + 1
        steps_left = [header.steps_left for header in headers]
        steps_left[self.federation.party] = self._steps_left  # known here even where others must not know
        return Shortage(rounds, crossed.trained, crossed.excluded, steps_left)

    def _open(self, headers: list[Header], weights: list[float]) -> Collectives:
        """Return the sums of this attempt, which all parties see alike: the round, and whose values count."""
        valued = [
            header.values_of(name) if weight > 0 else ""
            for header, name, weight in zip(headers, self.federation.names, weights, strict=True)
        ]
        view = json.dumps([self.round, valued])
        return self._exchange.open(
            self.federation, lambda: self._reveal(valued), view, self._global_state.error_feedback
        )

    def _apply_(self, crossed: ReduceResult) -> tuple[float, Deviation | None]:
        """Step the global vector, and write it; return the parameters' distance from the mean, and LoRA's.

        What each party computes for itself, an outer optimizer's step or frozen weights, the parties agree
        on; nothing else crosses here.
        """
        global_state, combined = self._global_state, crossed.combined
        updates, products = global_state.updates, global_state.products
        moves = crossed.counting.num_participants > 0
        if moves:
            updates.keep_(crossed.counting)
        if products is not None and combined is not None:
            plain = outer.is_plain_sgd(updates.optimizer)
            products.put_(
                global_state.layout, updates.global_, updates.pseudo_gradient, combined.replaced, plain=plain
            )
        distance = updates.advance(writes=not self._meeting.rejoins, moves=moves)
        if moves and not self._plain and self.federation.num_parties > 1:
            global_state.agree()
        if self._meeting.rejoins:
            global_state.stale = True  # the result may be given up yet, so it is written when it is settled
        else:
            global_state.put_back_()
        if products is None or combined is None:
            return distance, None
        if combined.terms is None:
            return distance, combined.deviation
        return distance, products.write_base_(global_state.layout, updates.global_, combined.terms)

    def _meet(self, purpose: Purpose, weight: float, loss: float | None) -> list[Header]:
        self._check_started()
        self._weight, fine = weight, True
        if self._exchange.is_secure:  # NaN has no place in a masked sum, so it must be known before
            self._global_state.read_()
            fine = weight == 0 or self._global_state.layout.first_nonfinite() is None
        if weight > 0 and self._contribution is not None:  # once summed it would be in the global state
            fine = fine and self._contribution.first_nonfinite() is None
        if self._exchange.is_secure:
            weight = float(weight > 0 and fine)
        header = Header(purpose, self.round, weight, fine, self._tag, self._exposed, self._releases)
        if self._tells:
            known = math.nan if loss is None else loss
            header = replace(
                header, loss=known, distance=self._global_state.distance, steps_left=self._steps_left
            )
        return self._meeting.meet(header, self._global_state.version)

    @property
    def _tells(self) -> bool:
        """Whether parties may tell each other figures of their own."""
        return not self._exchange.is_secure and self._private is None

    def _check_started(self) -> None:
        if not self._started:
            raise FederationError(
                f"Party {self.federation.name} comes to a round before the parties have agreed on what they"
                " share. Call start() first, at every party."
            )

    def _without(self, excluded: list[int], weights: list[float]) -> list[float]:
        first = self._global_state.layout.first_nonfinite()
        if first is None and self._contribution is not None:
            first = self._contribution.first_nonfinite()
        return self._who.without(excluded, weights, self.round, first)

    def _counting(self, sums: Collectives, weights: list[float]) -> RoundContext:
        if self._global_state.error_feedback is not None:
            self._global_state.error_feedback.begin(self.round, [weight > 0 for weight in weights])
        return self._who.counting(sums, weights, self._weight, self.round)

    def _average(self, counting: RoundContext, loss: float | None) -> tuple[float, ReducedFlags]:
        if counting.num_participants and not self._exchange.is_secure:
            self._release()
        return self._global_state.updates.average(counting, loss, self._contribution)

    def _reveal(self, valued: list[str]) -> None:
        """Note that a sum is about to become readable, and whose values are in it."""
        if valued[self.federation.party]:
            self._exposed = tuple(filter(None, valued))
        if any(valued):
            self._release()

    def _release(self) -> None:
        if self._private is not None:
            self._private.releases += 1

    @property
    def _releases(self) -> int:
        return 0 if self._private is None else self._private.releases

    # ---- small parts

    def _now(self) -> tuple[float, int]:
        return time.perf_counter(), self.federation.bytes_sent


def capabilities(
    exchange: Exchange, privacy: GaussianMechanism | None, auxiliary: AuxiliaryTerms | None = None
) -> Capability:
    """Return what an aggregation may have of the parties."""
    if privacy is not None or (auxiliary is not None and auxiliary.sums):
        return "means"
    return exchange.supports


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _measures(asked: bool | None, is_secure: bool, exchange: Exchange, rule: Aggregation) -> bool:
    """Return whether rounds measure the deviation, which takes the parties' own factors."""
    if asked and is_secure:
        raise ValueError(
            "measure_deviation=True needs the parties' own factors, which a masked exchange or"
            " differential privacy hides. Leave it out."
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


def _check_privacy(privacy: GaussianMechanism | None, exchange: Exchange) -> None:
    if privacy is None or not privacy.distributed or exchange.is_secure:
        return
    if privacy.noise_multiplier > 0:
        raise ValueError(
            f"{privacy!r} lets the parties' noise add up, so each update alone has too little. Hide them with"
            " exchange.SecureAggregation(...), or let each party add all of the noise with distributed=False."
        )


def _check_rejoining(meeting: Coordinator, rule: Aggregation) -> None:
    if meeting.rejoins and rule.writes_base:
        raise ValueError(
            f"{rule!r} writes into the frozen weights, which a party that comes back cannot be given. Between"
            " separate jobs use LowRankMean() or another rule, or launch all parties by one torchrun."
        )


def _check_quorum(federation: Collectives, quorum: int) -> None:
    """Refuse another quorum than that of separate jobs that must meet."""
    if isinstance(federation, ElasticFederation) and federation.quorum != quorum:
        raise ValueError(
            f"The federation lets {federation.quorum} of its {federation.max_parties} parties meet, but a"
            f" round would need quorum={quorum}. Give both the same quorum."
        )


def _without_ranks(schema: list[list[Any]], a: set[str], b: set[str]) -> list[list[Any]]:
    """Return the schema without what may differ: the first dimension of factors A, the second of B."""
    free = dict.fromkeys(a, 0) | dict.fromkeys(b, 1)
    return [
        [name, ["rank" if dim == free.get(name) else size for dim, size in enumerate(shape)], dtype]
        for name, shape, dtype in schema
    ]
