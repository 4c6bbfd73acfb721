"""RoundRunner: one round, top to bottom: meet, reduce the updates, apply the result, commit."""

import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from pellm_lightning.aggregation.base import RoundContext
from pellm_lightning.comm import Collectives, PartyLostError
from pellm_lightning.engine import evidence
from pellm_lightning.engine import outer_optimizer as outer
from pellm_lightning.engine.auxiliary import AuxiliaryValues
from pellm_lightning.engine.context import EngineContext
from pellm_lightning.engine.coordination import Coordinator, Header, Purpose
from pellm_lightning.engine.evidence import EvidenceKeeper
from pellm_lightning.engine.global_state import GlobalState
from pellm_lightning.engine.lora_step import LoraResult
from pellm_lightning.engine.participants import ParticipantFilter, Participants, Shortage
from pellm_lightning.engine.robust import RobustReducer
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.engine.shared_updates import ReducedFlags
from pellm_lightning.engine.state_transfer import send_state
from pellm_lightning.tensors.deviation import Deviation


@dataclass(frozen=True)
class LocalInput:
    """Input of this party to a round: how much it counts, and what it tells.

    Args:
        weight: How much it counts; 0 receives only.
        loss: Mean training loss since the last round.
        contribution: What it gives besides its update, for methods that correct drift.
        steps_left: Optimizer steps that it still has to make; NaN if unknown.

    Example:
        >>> LocalInput(weight=8.0, loss=0.7).contribution is None
        True
    """

    weight: float = 0.0
    loss: float | None = None
    contribution: AuxiliaryValues | None = None
    steps_left: float = math.nan


@dataclass(frozen=True)
class ReduceResult:
    """Result of summing the updates of a round; nothing of it is applied yet."""

    participants: Participants
    shares: RoundContext
    flags: ReducedFlags
    update_norm: float
    """2-norm of this party's update."""
    total_weight: float
    lora: LoraResult | None
    """Results for the LoRA factors; None without any, or if nobody counted."""
    influence: Sequence[float]
    """Weight of each member's update in the result; empty where it is hidden, or has none."""


class RoundRunner:
    """Runner of one party's rounds: from the headers with which the parties meet to the written parameters.

    Args:
        context: What the aggregator works with.
        coordinator: How the parties meet and commit.
        state: The global state, which each round advances.
        evidence: What states, signs and keeps what a round was.
    """

    def __init__(
        self, context: EngineContext, coordinator: Coordinator, state: GlobalState, evidence: EvidenceKeeper
    ) -> None:
        self._context = context
        self.federation = context.federation
        self._coordinator = coordinator
        self._state = state
        self._evidence = evidence
        self._filter = ParticipantFilter(context)
        self._robust = None if context.robust_rule is None else RobustReducer(context.robust_rule)
        self._tag = secrets.token_hex(8)
        self._exposed: tuple[str, ...] = ()

    # ---- a round, top to bottom

    @torch.no_grad()
    def run(self, purpose: Purpose, local: LocalInput) -> RoundReport | None:
        """Take part in the next round; return its report, or None without one: all are done, or just join."""
        came, sent_before = self._now()
        while True:
            mine = self._header(purpose, local)
            headers = self._coordinator.meet(mine, self._state.version, self._state.digest)
            self._evidence.hear(dict(zip(self.federation.names, headers, strict=True)))
            if all(header.purpose is Purpose.DONE for header in headers):
                return None
            arrived, _ = self._now()
            report = None
            try:
                with self._attempt(headers):
                    if any(header.purpose is Purpose.ROUND for header in headers):
                        self._state.updates.schedule.check(self._state.round)
                        reduced = self._reduce(headers, local)
                        report = self._end_round(headers, local, reduced)
            except PartyLostError as error:
                if not self.federation.abort_attempt(error):
                    raise
                continue
            self._end_attempts()
            if report is not None:
                through, sent = self._now()
                return replace(
                    report,
                    seconds=through - arrived,
                    waited_seconds=arrived - came,
                    stalled_seconds=through - came,
                    bytes_sent=sent - sent_before,
                )
            if purpose is Purpose.JOIN:
                return None

    def _header(self, purpose: Purpose, local: LocalInput) -> Header:
        """Return what this party says of itself as it meets the others."""
        state, weight, fine = self._state, local.weight, True
        if weight > 0:
            fine = state.updates.prepare(local.loss)
        is_secure = self._context.exchange.is_secure
        if is_secure:  # NaN has no place in a secure sum, so it must be known before
            state.read_()
            fine = weight == 0 or state.updates.layout.first_nonfinite() is None
        if weight > 0 and local.contribution is not None:  # once summed it would be in the global state
            fine = fine and local.contribution.first_nonfinite() is None
        if is_secure:
            weight = float(weight > 0 and fine)
        said = purpose, state.round, weight, fine, self._tag, self._exposed, self._releases
        shown = self._evidence.shown()
        if not self._context.shares_figures:
            return Header(*said, evidence=shown)
        loss = math.nan if local.loss is None else local.loss
        return Header(*said, loss, state.distance, local.steps_left, shown)

    @contextmanager
    def _attempt(self, headers: list[Header]) -> Iterator[None]:
        """Let what is done in the meantime stand at all parties or at none."""
        state, may_lose_parties = self._state, self.federation.may_lose_parties
        signatures: Mapping[str, Any] = {}
        state.discard_residuals()  # of an attempt that failed
        with state.reversible() if may_lose_parties else nullcontext():
            if may_lose_parties:
                self._prepare(headers)
            yield
            if may_lose_parties:
                signature = self._evidence.sign(state.statement)
                statement = state.statement.text if state.statement is not None and signature else ""
                committed = self._coordinator.commit(state.round, state.state(), signature, statement)
                state.digest, signatures = committed.digest, committed.signatures
        state.commit_residuals()
        state.write_()
        self._evidence.record(state.statement, signatures)
        self.federation.enter(f"training after round {state.round - 1}" if state.round else "training")

    def _prepare(self, headers: list[Header]) -> None:
        """Bring all parties to the same global state: the newest, or without one that of one party."""
        state = self._state
        if any(header.behind for header in headers):
            self._bring_up_to_date(headers)
        if self._evidence.is_on:
            self._exchange_evidence(headers)
        self.set_lora_specs()
        if state.version is None:
            state.begin(self.federation.version(state.round))
        self._evidence.begin(state.statement, state.layout, state.vector)

    def _reduce(self, headers: list[Header], local: LocalInput) -> ReduceResult:
        """Send this party's update and receive the mean; parameters and global vector stay what they are.

        The privacy budget that it costs is spent at once, whatever comes of the round.
        """
        state, updates, privacy = self._state, self._state.updates, self._context.privacy
        state.read_()
        failed, released_before = self._failed_releases(headers), self._releases

        def first_nonfinite() -> str | None:
            first = updates.layout.first_nonfinite()
            if first is None and local.contribution is not None:
                return local.contribution.first_nonfinite()
            return first

        selected = participants = self._filter.select(headers, self._state.round, failed, first_nonfinite)
        sums = self._open(headers, participants.weights)
        shares = self._round_context(local, sums, participants.weights)
        self._note_release(shares)
        update_norm, flags = updates.average(shares, local.loss, local.contribution)
        participants = self._filter.exclude(
            selected, flags.fine, self._state.round, first_nonfinite, flags.norms
        )
        if participants is not selected:
            shares = self._round_context(local, sums, participants.weights)
            if shares.num_participants:
                self._note_release(shares)
                _, flags = updates.average(shares, local.loss, local.contribution)
            else:
                updates.drop_()
        total_weight = sum(participants.weights)
        if self._context.exchange.is_secure and shares.num_participants:
            shares, total_weight = self._filter.normalized(shares, flags.total_weight), flags.total_weight
            updates.divide_(total_weight)
            if updates.bounds is not None:
                updates.bounds.end_round(total_weight, flags.mean_norm)
        if shares.num_participants:
            updates.apply_auxiliary_(shares, flags.effective_steps)
        if privacy is not None:
            released = self._releases - released_before
            privacy.end_round(failed + released, flags.clipping_bit if released else None)
        influence: Sequence[float] = () if self._context.exchange.is_secure else shares.shares
        lora = None
        if self._robust is not None and shares.num_participants:
            influence, lora = self._robust.reduce_(updates, state.lora, shares)
        elif state.lora is not None and shares.num_participants and state.lora.has_pairs(updates):
            lora = state.lora.combine(updates, shares)
        return ReduceResult(participants, shares, flags, update_norm, total_weight, lora, influence)

    def _end_round(self, headers: list[Header], local: LocalInput, reduced: ReduceResult) -> RoundReport:
        """Apply what was received, and advance to the next round."""
        state, schedule = self._state, self._state.updates.schedule
        outer_lr = schedule.lr if reduced.shares.num_participants else None
        distance, deviation = self._apply_(reduced)
        shortage = self._shortage(headers, reduced.participants, local)
        report = self._report(headers, local, reduced, shortage)
        state.end_round(
            self.federation.version(state.round + 1),
            distance,
            short_rounds=shortage.rounds,
            written=not self.federation.may_lose_parties,
        )
        version = state.version
        if self._evidence.is_on and version is not None:
            stated = reduced.participants, version, report.epsilon, state.layout, state.vector
            state.note_statement(self._evidence.state_round(state.statement, *stated))
        return replace(report, distance=distance, deviation=deviation, outer_lr=outer_lr)

    def _apply_(self, reduced: ReduceResult) -> tuple[float, Deviation | None]:
        """Step the global vector, and write it; return the parameters' distance from the mean, and LoRA's.

        What each party computes for itself, an outer optimizer's step or frozen weights, the parties agree
        on; nothing else is sent here.
        """
        context, state, updates = self._context, self._state, self._state.updates
        moves = reduced.shares.num_participants > 0
        if moves:
            updates.keep_carried_(reduced.shares)
        if state.lora is not None and reduced.lora is not None:
            plain = outer.is_plain_sgd(updates.optimizer)
            state.lora.write_results_(updates, reduced.lora.replaced, plain=plain)
        # Where parties may be lost the result may be given up yet, so it is written after the commit.
        distance = updates.advance(writes=not self.federation.may_lose_parties, moves=moves)
        if moves and not context.is_plain_averaging and self.federation.num_parties > 1:
            state.agree()
        if not self.federation.may_lose_parties:
            state.write_padded_(updates)
        if state.lora is None or reduced.lora is None:
            return distance, None
        if reduced.lora.terms is None:
            return distance, reduced.lora.deviation
        return distance, state.lora.write_base_(updates, reduced.lora.terms)

    def _shortage(self, headers: list[Header], participants: Participants, local: LocalInput) -> Shortage:
        """Return whether too few parties trained in a round."""
        enough = len(participants.trained) >= self._context.quorum
        steps_left = [header.steps_left for header in headers]
        steps_left[self.federation.party] = local.steps_left  # known here even where others must not know
        rounds = 0 if enough else self._state.short_rounds + 1
        return Shortage(rounds, participants.trained, participants.excluded, steps_left)

    def _report(
        self, headers: list[Header], local: LocalInput, reduced: ReduceResult, shortage: Shortage
    ) -> RoundReport:
        """Return the report of a round; what is known only later is still missing."""
        context, participants = self._context, reduced.participants
        privacy, feedback = context.privacy, self._state.updates.error_feedback
        counted = participants.weights[self.federation.party] > 0
        return RoundReport(
            round=self._state.round,
            parties=tuple(self.federation.members),
            active_parties=reduced.shares.num_participants,
            trained_parties=len(participants.trained),
            quorum=context.quorum,
            total_weight=reduced.total_weight,
            weight=self._own_weight(local, reduced) if counted else 0.0,
            excluded=tuple(self.federation.members[party] for party in participants.excluded),
            loss=reduced.flags.loss,
            update_norm=reduced.update_norm,
            epsilon=None if privacy is None else privacy.epsilon,
            compression_error=None if feedback is None else feedback.error,
            clipping_norm=None if privacy is None else privacy.max_norm,
            last=self._filter.is_last(headers, self._state.round, shortage),
            local_loss=local.loss,
            weights=() if context.exchange.is_secure else tuple(participants.weights),
            influence=tuple(reduced.influence),
            losses=tuple(_finite(h.loss) for h in headers) if context.shares_figures else (),
            distances=tuple(_finite(h.distance) for h in headers) if context.shares_figures else (),
        )

    def _own_weight(self, local: LocalInput, reduced: ReduceResult) -> float:
        """Return the weight that this party had, which may be capped."""
        if not self._context.exchange.is_secure:
            return reduced.participants.weights[self.federation.party]
        capped = self._context.max_share is not None
        return reduced.shares.shares[self.federation.party] * reduced.total_weight if capped else local.weight

    # ---- sums

    def _open(self, headers: list[Header], weights: Sequence[float]) -> Collectives:
        """Return the sums of this attempt, of which all parties have one view: the round, and who counts."""
        valued = [
            header.values_of(name) if weight > 0 else ""
            for header, name, weight in zip(headers, self.federation.names, weights, strict=True)
        ]
        feedback = self._state.updates.error_feedback
        view = json.dumps([self._state.round, valued])
        return self._context.exchange.open(self.federation, lambda: self._reveal(valued), view, feedback)

    def _round_context(self, local: LocalInput, sums: Collectives, weights: Sequence[float]) -> RoundContext:
        feedback = self._state.updates.error_feedback
        if feedback is not None:
            feedback.begin(self._state.round, [weight > 0 for weight in weights])
        weight, bounds = local.weight, self._state.updates.bounds
        if bounds is not None:
            weight = bounds.weight(weight if weights[sums.party] else 0.0, sum(w > 0 for w in weights))
        return self._filter.round_context(sums, weights, weight, self._state.round)

    def _note_release(self, shares: RoundContext) -> None:
        """Count the noisy release that an open sum is; that of a secure sum is counted by ``_reveal``."""
        if shares.num_participants and not self._context.exchange.is_secure:
            self._release()

    def _reveal(self, valued: list[str]) -> None:
        """Note that a sum is about to become readable, and whose values are in it."""
        if valued[self.federation.party]:
            self._exposed = tuple(filter(None, valued))
        if any(valued):
            self._release()

    def _release(self) -> None:
        if self._context.privacy is not None:
            self._context.privacy.releases += 1

    @property
    def _releases(self) -> int:
        return 0 if self._context.privacy is None else self._context.privacy.releases

    def _failed_releases(self, headers: Sequence[Header]) -> int:
        """Return how many noisy releases the failed attempts at this round have made, as the parties report.

        Each has made two at most; what a party reports above that is not believed.
        """
        version = self._state.version
        before = version.attempt if version is not None and self._state.round else 0
        attempts = max(0, self._coordinator.attempt - before - 1)
        return min(max(header.releases for header in headers), 2 * attempts)

    def _end_attempts(self) -> None:
        """Forget what the attempts at a round have revealed, since the next round has other values."""
        self._tag, self._exposed = secrets.token_hex(8), ()
        if self._context.privacy is not None:
            self._context.privacy.releases = 0

    # ---- joining

    def set_lora_specs(self) -> None:
        """Take note of the LoRA pairs of the parties that meet."""
        if not self._context.plan.products:
            return
        loaded = self._state.loaded if self.federation.may_lose_parties else None
        specs = [spec["lora"] for spec in self._coordinator.party_specs()]
        self._state.set_lora_specs(specs, None if loaded is None else loaded.get("lora"))

    def _bring_up_to_date(self, headers: list[Header]) -> None:
        """Send the newest global state to those who lack it."""
        behind, state = [header.behind for header in headers], self._state
        holders = [party for party, lacks in enumerate(behind) if not lacks]
        send_state(
            self.federation,
            behind,
            state.state,
            state.load_state,
            4 * state.layout.size,
            state.free_memory,
            source=holders[self._coordinator.attempt % len(holders)],  # another one if this one's is wrong
            digest=self._coordinator.newest_state,
        )

    def _exchange_evidence(self, headers: list[Header]) -> None:
        """Send certificates to those who lack some; who has received the state checks it by them."""
        state, by_name = self._state, dict(zip(self.federation.names, headers, strict=True))
        identities = [spec.get("identity") for spec in self._coordinator.party_specs()]
        received = by_name[self.federation.name].behind
        result = evidence.digest(state.layout, state.vector) if received and state.statement else None
        self._evidence.synchronize(by_name, identities, state.statement, result)

    def _now(self) -> tuple[float, int]:
        return time.perf_counter(), self.federation.bytes_sent


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
