"""A party's part in the rounds of one fit: what it brings to each, and what it takes over from it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from lightning.pytorch import Trainer
from torch import Tensor, nn

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.callbacks import arguments
from pellm_lightning.callbacks.drift.base import DriftCorrection
from pellm_lightning.callbacks.fit_facts import planned_steps
from pellm_lightning.callbacks.schedule import Clock, EverySeconds, Schedule
from pellm_lightning.comm import TooFewPartiesError
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.auxiliary import AuxiliaryValues
from pellm_lightning.engine.fragments import FragmentCursor, fragments_of
from pellm_lightning.engine.overlap import Overlap, OverlappedAggregator
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.tensors.flat_buffer import Layout
from pellm_lightning.trainer import resume
from pellm_lightning.trainer.environment import Party
from pellm_lightning.trainer.file_names import unused
from pellm_lightning.trainer.samples import SampleCounter

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class LoopConfig:
    """How a party takes part."""

    schedule: Schedule
    """When a round is due."""
    overlap: Overlap
    """How rounds overlap with local steps, and how many fragments take turns."""
    weighting: Literal["samples", "uniform"] | float
    """How much the party counts."""
    resets: bool
    """Whether local optimizers are cleared after each round."""
    tells_loss: bool
    """Whether others may know the training loss."""


@dataclass
class LocalProgress:
    """What this process did since the last round."""

    step: int = 0
    """``trainer.global_step`` at the last round."""
    samples: int = 0
    """Training samples consumed."""
    loss_sum: Tensor | float = 0.0
    """Training loss times samples, summed; a tensor, so that no step waits for the device."""
    loss_samples: int = 0
    """Samples behind ``loss_sum``."""


class LocalResult(NamedTuple):
    """What a party brings to a round."""

    weight: float
    loss: float | None
    """Mean training loss since the last round."""
    contribution: AuxiliaryValues
    """What a drift correction adds."""
    turns: FragmentCursor
    """Whose turn it is when the round is over."""
    steps_left: float
    """Optimizer steps that the fit still has to make; NaN if nobody knows."""


class Started(NamedTuple):
    """What a party's processes must know when it has started."""

    overwritten: bool
    """Whether its parameters are another party's now."""
    round: int
    """Index of the round that comes."""
    settings: dict[str, str | int | float | None]
    """What all parties have agreed on."""
    facts: dict[str, Any]
    """What each party has said of its fit, by name."""


class FederatedLoop:
    """Comes to the rounds of one fit, in each process of a party.

    Args:
        trainer: What the fit is run by.
        party: This party's processes. Only the speaker talks to other parties.
        plan: The aggregation, applied to the module's parameters.
        trainable: The parameters that may federate, by name.
        manner: How the party takes part.
        drift: What corrects local gradients; None does not.
        told: Called with the report of each round and whether the progress bar should show it.
        stopped_path: Where a checkpoint goes if the party has to stop because others are lacking.
    """

    def __init__(
        self,
        trainer: Trainer,
        party: Party,
        plan: Plan,
        trainable: Mapping[str, nn.Parameter],
        manner: LoopConfig,
        *,
        drift: DriftCorrection | None,
        told: Callable[[RoundReport, bool], None],
        stopped_path: str,
    ) -> None:
        self._trainer = trainer
        self._party = party
        self._plan = plan
        self._trainable = trainable
        self._manner = manner
        self._drift = drift
        self._told = told
        self._stopped_path = stopped_path
        self._shared = {name: trainable[name] for name in sorted(plan.shared)}
        groups = fragments_of(self._shared, manner.overlap.fragments)
        self._dealt = [set(names) for names in groups]  # by turn
        self._resting: list[nn.Parameter] = []
        self._aggregator: Aggregator | None = None  # of the speaker
        self._drained: Iterator[RoundReport] = iter(())
        self._since = LocalProgress(trainer.global_step)
        self._samples = SampleCounter(warns=manner.weighting == "samples")
        self._turns = FragmentCursor.from_step(manner.overlap.fragments, trainer.global_step)
        self._under_way_since: int | None = None  # step at which the round in the background began
        self._exchanged_at = 0.0  # by the clock of time.monotonic

    def start(self, make: Callable[[], Aggregator], state: Mapping[str, Any]) -> Started:
        """Agree with the other parties on what is shared, and begin, or go on from a checkpoint.

        Args:
            make: Makes the aggregator of the parameters; only the speaker calls it.
            state: As of ``state()``; empty to begin.
        """
        if state:
            self._since = LocalProgress(**state["since"])
            self._turns = FragmentCursor.from_step(self._manner.overlap.fragments, self._since.step)
            self._turns = FragmentCursor(**state["turns"]) if "turns" in state else self._turns
            self._under_way_since = state.get("under_way_since")
        started = self._party.on_leader(lambda: self._start_on_leader(make, state))
        if started.overwritten:  # resumed in the middle of a round, each process has its own already
            self._share_in_party()
            self._since, self._under_way_since = LocalProgress(self._trainer.global_step), None
            self._turns = FragmentCursor.from_step(
                self._manner.overlap.fragments, self._trainer.global_step, started.round
            )
        if self._drift is not None:
            resumed = bool(state) and not started.overwritten
            self._drift.begin(self._shared, self._carried(), resumed=resumed)
        self._rest_in(started.round)
        self._exchanged_at = time.monotonic()
        return started

    def state(self) -> dict[str, Any]:
        """Return what ``start`` needs to go on exactly, in the middle of a round too; only of the speaker."""
        aggregator = self._on_leader.state_dict()  # waits for the round under way, which may fail only now
        party = self._party.topology.party
        lost = self._under_way_since is not None and self._overlapped.failed
        return {
            "aggregator": aggregator,
            "since": asdict(self._since) | {"loss_sum": float(self._since.loss_sum)},
            "turns": asdict(self._turns),
            "under_way_since": None if lost else self._under_way_since,
            "signature": resume.signature(self._on_leader.run_id, party),
        }

    # ---- while training goes on

    def drop_gradients(self) -> None:
        """Drop the gradients of what rests in this round, before they are clipped or applied.

        Without a gradient an optimizer leaves a parameter and its state alone, weight decay included.
        """
        for parameter in self._resting:
            parameter.grad = None

    def after_batch(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count what was consumed; come to the round that is due."""
        self._count(outputs, batch, batch_idx)
        if self._may_apply():
            self._apply(on_bar=True)
        if self._is_due(epoch_ends=self._trainer.is_last_batch):
            if not self._manner.overlap.in_background:
                self._run_round()
            else:
                self._begin_round()

    def after_epoch(self) -> None:
        """Come to the epoch's round if its last batch did not: skipped, or cut short by max_steps."""
        if self._is_due(epoch_ends=True):
            self._run_round()

    def mean(self, local: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Return the mean over the parties of each named (value, weight)."""
        mean = self._party.on_leader(lambda: _or_why_not(lambda: self._on_leader.mean(local)))
        if isinstance(mean, str):
            self._stop_for_lack_of_parties(mean)
        return mean

    def close_round(self) -> None:
        """Run the last, incomplete round of each fragment; all parties end with the same parameters."""
        while self._turns.is_behind(self._trainer.global_step):
            self._run_round(on_bar=False)
        self._apply(on_bar=False)

    def finish(self) -> None:
        """Close the round, then answer the others' until every party is through."""
        self.close_round()

        def drained() -> RoundReport | str | None:
            return _or_why_not(lambda: next(self._drained, None))

        while (done := self._party.on_leader(drained)) is not None:
            if isinstance(done, str):
                log.warning("[party %s] Ends without the others. %s", self._party.topology.name, done)
                break
            self._take_over(done, on_bar=False)

    # ---- coming to a round

    def _start_on_leader(self, make: Callable[[], Aggregator], state: Mapping[str, Any]) -> Started:
        aggregator = self._aggregator = make()
        if state:
            arguments.own_checkpoint(state["party"], self._party.topology.party)
            arguments.same_turns(len(self._turns.steps), self._manner.overlap.fragments)
            arguments.can_apply(self._under_way_since, self._manner.overlap)
            aggregator.load_state_dict(state["aggregator"])
        overwritten = aggregator.start()
        if not state:
            self._check_nothing_is_left_behind(aggregator)
        self._drained = aggregator.drain()
        return Started(overwritten, aggregator.round, dict(aggregator.settings), aggregator.facts())

    def _check_nothing_is_left_behind(self, aggregator: Aggregator) -> None:
        """Refuse to begin anew in a federation in which this party has trained, and saved, before."""
        signature = resume.signature(aggregator.run_id, self._party.topology.party)
        if signature is not None:
            path = resume.newest_signed(self._trainer, signature, self._stopped_path)
            if path is not None:
                raise resume.unused_checkpoint_error(
                    path, party=self._party.topology.name, round=aggregator.round
                )

    def _count(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        module = self._trainer.lightning_module
        # Lightning skips the step if the batch or the loss is None; manual optimization need not return any.
        if loss is None and (batch is None or module.automatic_optimization):
            return
        samples = self._samples.count(batch, self._trainer.train_dataloader, batch_idx)
        self._since.samples += samples
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning hands over the loss divided by the number of batches that it accumulates (which is 1
            # with manual optimization).
            weight = samples * self._trainer.accumulate_grad_batches
            self._since.loss_sum = self._since.loss_sum + loss.detach().float() * weight
            self._since.loss_samples += samples

    def _is_due(self, *, epoch_ends: bool) -> bool:
        schedule = self._manner.schedule
        clock = Clock(
            steps=self._trainer.global_step - self._since.step,
            seconds=time.monotonic() - self._exchanged_at,
            epoch=self._trainer.current_epoch,
            epoch_ends=epoch_ends,
        )
        if isinstance(schedule, EverySeconds):
            return self._party.on_leader(lambda: schedule.due(clock))  # clocks differ
        return schedule.due(clock)

    def _run_round(self, *, on_bar: bool = True) -> None:
        """Run a round while training stands still."""
        self._apply(on_bar=on_bar)
        brought = self._brought()
        done = self._party.on_leader(
            lambda: _or_why_not(
                lambda: self._on_leader.step(
                    brought.weight, brought.loss, brought.contribution, steps_left=brought.steps_left
                )
            )
        )
        if isinstance(done, str):
            self._stop_for_lack_of_parties(done)
        self._since = LocalProgress(self._trainer.global_step)
        self._turns = brought.turns.aligned(done.round + 1)
        self._exchanged_at = time.monotonic()
        self._take_over(done, on_bar=on_bar)

    def _begin_round(self) -> None:
        """Let a round run in the background."""
        self._apply(on_bar=True)
        brought = self._brought()
        self._party.on_leader(
            lambda: self._overlapped.begin(brought.weight, brought.loss, steps_left=brought.steps_left)
        )
        self._since, self._turns = LocalProgress(self._trainer.global_step), brought.turns
        self._under_way_since = self._trainer.global_step
        if self._may_apply():
            self._apply(on_bar=True)

    def _may_apply(self) -> bool:
        """Tell whether the round in the background has had its time, or has failed."""
        overlap = self._manner.overlap
        if self._under_way_since is None or not overlap.in_background:
            return False
        alone = self._party.topology.party_size == 1  # else all processes of the party must decide alike
        failed = alone and self._overlapped.failed
        return failed or self._trainer.global_step - self._under_way_since >= overlap.delay_steps

    def _apply(self, *, on_bar: bool) -> None:
        """Wait for the round in the background, if there is one, and take over its result."""
        if self._under_way_since is None:
            return
        last = self._trainer.global_step == self._under_way_since  # nothing was learned since to be mixed
        try:
            done = self._party.on_leader(lambda: _or_why_not(lambda: self._overlapped.apply(last=last)))
        except Exception:  # the round is lost; if only the waiting was interrupted, it is not
            self._under_way_since = None
            raise
        self._under_way_since = None
        if isinstance(done, str):
            self._stop_for_lack_of_parties(done)
        self._turns = self._turns.aligned(done.round + 1)
        if self._party.topology.is_leader:
            self._exchanged_at = self._overlapped.completed
        self._take_over(done, on_bar=on_bar)

    def _brought(self) -> LocalResult:
        """Return what this party brings to a round: its weight, its loss, what a drift correction adds."""
        since, weighting = self._since, self._manner.weighting
        samples, loss_sum, loss_samples = self._party.sum(
            [since.samples, float(since.loss_sum), since.loss_samples]
        )
        turns = self._turns.advanced(samples, self._trainer.global_step)
        samples += self._turns.samples[self._turns.next]
        weight = {"samples": samples, "uniform": 1.0}.get(str(weighting), weighting)
        loss = loss_sum / loss_samples if loss_samples and self._manner.tells_loss else None
        given = AuxiliaryValues() if self._drift is None else self._drift.contribution()
        steps_left = planned_steps(self._trainer) - self._trainer.global_step
        return LocalResult(float(weight), loss, given, turns, steps_left)

    def _stop_for_lack_of_parties(self, why: str) -> NoReturn:
        """Keep this party's own steps since the last round, then stop."""
        path = self._party.on_leader(lambda: unused(self._stopped_path))
        self._trainer.save_checkpoint(path)
        raise TooFewPartiesError(
            f"{why} Its own steps since the last round are in {path}; resume it from there."
        )

    # ---- taking over its result

    def _take_over(self, done: RoundReport, *, on_bar: bool) -> None:
        """Finish a round that has written this party's parameters."""
        self._share_in_party()
        if self._drift is not None:
            self._drift.end_round(self._carried(), counted=done.weight > 0)
        # What made parameters NaN has made the moments NaN as well, and the next step would bring it back.
        if self._manner.resets or self._party.topology.party in done.excluded:
            for optimizer in self._trainer.optimizers:
                optimizer.state.clear()
        # Moments in coordinates that are no more.
        basis_changed = self._plan.named(self._plan.rule.basis_changed(done.active_parties))
        if done.weight:  # else the party may have taken over more than the round's fragment
            basis_changed &= self._dealt[done.round % self._manner.overlap.fragments]
        for parameter in [self._trainable[name] for name in sorted(basis_changed)]:
            for optimizer in self._trainer.optimizers:
                optimizer.state.pop(parameter, None)
        self._rest_in(done.round + 1)
        if done.last:
            self._trainer.should_stop = True
        self._told(done, on_bar)

    def _share_in_party(self) -> None:
        """Give the party's other processes what the speaker has just written into its parameters."""
        if self._party.topology.party_size == 1:
            return
        vector = self._layout.pack_(self._layout.new_vector())
        self._party.broadcast_(vector)
        self._layout.unpack_(vector)
        for base in self._plan.written_bases:
            self._party.broadcast_(base)

    def _carried(self) -> dict[str, Tensor]:
        """Return the mean of what the parties carried beside their updates, in every process of the party."""
        if self._drift is None or not self._drift.auxiliary.vector:
            return {}
        vector = self._layout.new_vector()
        if self._aggregator is not None:
            for name, part in self._aggregator.carried.items():
                self._layout.view(vector, name).copy_(part)
        self._party.broadcast_(vector)
        return self._layout.views(vector)

    def _rest_in(self, round: int) -> None:
        frozen_parts = self._plan.named(self._plan.rule.frozen_parts(round))
        self._resting = [self._trainable[name] for name in frozen_parts]

    # ---- small parts

    @cached_property
    def _layout(self) -> Layout:
        """Layout of what is sent between a party's processes; that of the rounds is the aggregator's."""
        return Layout(self._shared)

    @property
    def _on_leader(self) -> Aggregator:
        if self._aggregator is None:
            raise RuntimeError("Only the party's first process aggregates, and only after start().")
        return self._aggregator

    @property
    def _overlapped(self) -> OverlappedAggregator:
        if not isinstance(self._aggregator, OverlappedAggregator):
            raise RuntimeError("Only the party's first process aggregates, and here not in the background.")
        return self._aggregator


def _or_why_not(meet: Callable[[], T]) -> T | str:
    """Return what ``meet`` returns; in words, why it could not for lack of others."""
    try:
        return meet()
    except TooFewPartiesError as error:
        return str(error)
