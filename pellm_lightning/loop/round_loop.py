"""RoundLoop: when a round is due, what a party contributes, what the result changes."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import TooFewPartiesError
from pellm_lightning.comm.party import Party, signature
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.auxiliary import AuxiliaryValues
from pellm_lightning.engine.fragments import FragmentCursor, fragments_of
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.loop.local_training import LocalCorrection, LocalTraining
from pellm_lightning.loop.schedule import Clock
from pellm_lightning.tensors.flat_buffer import Layout
from pellm_lightning.trainer.file_names import unused
from pellm_lightning.trainer.party_parameters.base import PartyParameters

log = logging.getLogger(__name__)


@dataclass
class LocalProgress:
    """Progress of this process since the last round."""

    step: int = 0
    """Optimizer steps of the training at the last round."""
    samples: int = 0
    """Training samples consumed."""
    loss_sum: Tensor | float = 0.0
    """Training loss times samples, summed; a tensor, so that no step waits for the device."""
    loss_samples: int = 0
    """Samples behind ``loss_sum``."""

    def add_loss(self, loss: Tensor, samples: int, weight: int) -> None:
        """Add a batch's loss times a weight; one operation takes half as long as a product and a sum."""
        if not isinstance(self.loss_sum, Tensor):
            # Whatever the default dtype is: true half precisions change it.
            self.loss_sum = torch.tensor(self.loss_sum, dtype=torch.float32, device=loss.device)
        self.loss_sum.add_(loss.detach().view(()), alpha=weight)
        self.loss_samples += samples


class LocalResult(NamedTuple):
    """Contribution of a party to a round."""

    weight: float
    loss: float | None
    """Mean training loss since the last round."""
    contribution: AuxiliaryValues
    """Values of a drift correction."""
    cursor: FragmentCursor
    """Cursor of the fragments after the round."""
    steps_left: float
    """Optimizer steps left in the fit; NaN if unknown."""


class Started(NamedTuple):
    """Result of starting, for all processes of a party."""

    overwritten: bool
    """Whether its parameters were overwritten by another party's."""
    round: int
    """Index of the next round."""
    settings: dict[str, str | int | float | None]
    """Settings that all parties agreed on."""
    facts: dict[str, Any]
    """Facts of each party's fit, by party name."""


class RoundLoop:
    """Loop of rounds within one party's training, in each of its processes; who runs the training drives it.

    Args:
        local: The training loop.
        party: This party's processes. Only the leader communicates with other parties.
        factory: The callback's arguments.
        plan: The aggregation, applied to the module's parameters.
        trainable: The parameters that may federate, by name.
        values: Those that federate, as rounds read and write them.
        shares_loss: Whether other parties may know the training loss.
        drift: Drift correction of local gradients, if any.
        on_round: Called with the report of each round, and whether the progress bar should show it.
        stopped_path: Path of a checkpoint if the party has to stop below a quorum.
        on_due: Called when a round is due after a batch, before this party takes part.

    Raises:
        ValueError: If the rounds would need what the party's optimizer keeps to itself.
    """

    def __init__(
        self,
        local: LocalTraining,
        party: Party,
        factory: AggregatorFactory,
        plan: Plan,
        trainable: Mapping[str, nn.Parameter],
        values: PartyParameters,
        *,
        shares_loss: bool,
        drift: LocalCorrection | None,
        on_round: Callable[[RoundReport, bool], None],
        stopped_path: str,
        on_due: Callable[[], None] = lambda: None,
    ) -> None:
        if not values.reaches_optimizer:
            factory.check_out_of_reach(plan.rule, party.topology.num_parties)
        self._local = local
        self._party = party
        self._plan = plan
        self._trainable = trainable
        self._values = values
        self._weighting = factory.weight_by
        self._overlap = factory.overlap
        self._run_due = self._begin_round if self._overlap.in_background else self.run_round
        self._schedule = factory.schedule
        self._resets_inner = factory.inner_optimizer_state == "reset"
        self._shares_loss = shares_loss
        self._drift = drift
        self._on_due, self._on_round = on_due, on_round
        self._stopped_path = stopped_path
        self._shared = {name: trainable[name] for name in sorted(plan.shared)}
        groups = fragments_of(self._shared, self._overlap.fragments)
        self._fragments = [set(names) for names in groups]  # by turn
        self._frozen: set[nn.Parameter] = set()
        self._aggregator: Aggregator | None = None  # on the leader
        self._remaining: Iterator[RoundReport] = iter(())
        self._progress = LocalProgress(local.step)
        self._cursor = FragmentCursor.from_step(self._overlap.fragments, local.step)
        self._pending_since: int | None = None  # step at which the round in the background began
        self._last_round_at = 0.0  # by the clock of time.monotonic

    def start(self, make: Callable[[], Aggregator], state: Mapping[str, Any]) -> Started:
        """Agree with the other parties on what is shared, and begin, or resume from a checkpoint.

        Args:
            make: Makes the aggregator of the parameters; called by the leader only.
            state: As of ``state()``; empty to begin.
        """
        if state:
            self._progress = LocalProgress(**state["progress"])
            self._cursor = FragmentCursor(**state["cursor"])
            self._pending_since = state["under_way_since"]
        self._values.read_()
        started = self._party.on_leader(lambda: self._start_on_leader(make, state))
        if started.overwritten:  # resumed in the middle of a round, each process has its own already
            self._values.write_()
            step, self._pending_since = self._local.step, None
            self._progress = LocalProgress(step)
            self._cursor = FragmentCursor.from_step(len(self._fragments), step, started.round)
        if self._drift is not None:
            resumed = bool(state) and not started.overwritten
            self._drift.begin(self._shared, self._carried(), resumed=resumed)
        self._freeze_parts(started.round)
        self._last_round_at = time.monotonic()
        return started

    def check_resumed(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of another party, or one that does not go with the overlap.

        Raises:
            ValueError: If it is such.
        """
        party = self._party.topology.party
        if "party" not in state:
            raise ValueError(
                "The checkpoint is of a simulation, whose processes hold parties in turn. Resume with the"
                " simulate=Simulation(...) of the checkpoint, or begin anew from its weights."
            )
        if state["party"] != party:
            raise ValueError(
                f"Party {party} resumes a checkpoint that party {state['party']} has saved: the state of its"
                " optimizer and what it counted since the last round belong to that party. Give each party"
                f" its own, as in ckpt_path='.../party-{party}/...'; on the command line {{party}} stands for"
                " the index."
            )
        saved, fragments = len(state["cursor"]["steps"]), self._overlap.fragments
        if saved != fragments:
            raise ValueError(
                f"The checkpoint's federated state is of fragments={saved}, now it is fragments={fragments}."
                " Resume with the fragments of the checkpoint, or begin anew from its weights."
            )
        begun = state["under_way_since"]
        if begun is not None and not self._overlap.in_background:
            raise ValueError(
                f"The checkpoint was saved while a round was under way, begun at step {begun}. Resume with"
                " the overlap of the checkpoint; a checkpoint of another step may be resumed without."
            )

    @property
    def evidence(self) -> str | None:
        """Certificates of the rounds, as ``Aggregator.evidence``; on the leader only."""
        return self._leading.evidence

    def state(self) -> dict[str, Any]:
        """Return what ``start`` needs to resume exactly, even within a round; on the leader only."""
        aggregator = self._leading.state_dict()  # waits for the round under way, which may fail only now
        party = self._party.topology.party
        lost = self._pending_since is not None and self._leading.background.failed
        return {
            "party": party,
            "aggregator": aggregator,
            "progress": asdict(self._progress) | {"loss_sum": float(self._progress.loss_sum)},
            "cursor": asdict(self._cursor),
            "under_way_since": None if lost else self._pending_since,
            "signature": signature(self._leading.run_id, party),
        }

    # ---- during training

    def drop_gradients(self) -> None:
        """Drop the gradients of parameters frozen in this round, before they are clipped or applied.

        Without a gradient an optimizer leaves a parameter and its state alone, weight decay included.
        """
        for parameter in self._frozen:
            parameter.grad = None

    def drop_gradient(self, parameter: nn.Parameter) -> None:
        """Drop a parameter's gradient if it is frozen in this round."""
        if parameter in self._frozen:
            parameter.grad = None

    def frozen_names(self) -> set[str]:
        """Return the names of the parameters that are frozen in this round."""
        return {name for name, parameter in self._trainable.items() if parameter in self._frozen}

    def frozen_at_times(self) -> list[nn.Parameter]:
        """Return the parameters that are frozen in some rounds, or in all."""
        rule = self._plan.rule
        return [
            self._trainable[name] for name in self._plan.named(rule.frozen_parts(0) | rule.frozen_parts(1))
        ]

    def count(self, samples: int, loss: Tensor | None, parts: int = 1) -> None:
        """Count samples that were trained on, and their mean loss if it is known.

        Args:
            samples: How many.
            loss: Their mean loss, or a part of it, as trainers divide it that accumulate gradients.
            parts: Of how many the loss is one.
        """
        self._progress.samples += samples
        if loss is not None:
            self._progress.add_loss(loss, samples, samples * parts)

    def after_batch(self, *, epoch_ends: bool) -> None:
        """Run the round if it is due."""
        if self._may_apply():
            self._apply(on_bar=True)
        if self._is_due(epoch_ends=epoch_ends):
            self._on_due()
            self._run_due()

    def after_epoch(self) -> None:
        """Run the epoch's round if its last batch did not: skipped, or cut short by max_steps."""
        if self._is_due(epoch_ends=True):
            self._run_due()

    def mean(self, local: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Return the mean over the parties of each named (value, weight)."""
        with self._saved_below_quorum():
            return self._party.on_leader(Aggregator.mean, self._leading, local)

    def run_round(self, *, on_bar: bool = True) -> None:
        """Run a round now, whatever the schedule says, while training waits."""
        self._apply(on_bar=on_bar)
        local = self._local_result()
        weight, loss, contribution = local.weight, local.loss, local.contribution
        self._values.read_()
        with self._saved_below_quorum():
            report = self._party.on_leader(
                Aggregator.step, self._leading, weight, loss, contribution, steps_left=local.steps_left
            )
        self._progress = LocalProgress(self._local.step)
        self._cursor = local.cursor.aligned(report.round + 1)
        self._last_round_at = time.monotonic()
        self._finish_round(report, on_bar=on_bar)

    def answer_round(self) -> bool:
        """Take part in the other parties' next round without having trained; return whether there is one."""
        report = self._party.on_leader(lambda: next(self._remaining, None))
        if report is not None:
            self._finish_round(report, on_bar=False)
        return report is not None

    def close_round(self) -> None:
        """Run the last, incomplete round of each fragment; all parties end with the same parameters."""
        while self._cursor.is_behind(self._local.step):
            self.run_round(on_bar=False)
        self._apply(on_bar=False)

    def finish(self) -> int:
        """Close the round, then answer the other parties' until every party has finished; return how many."""
        self.close_round()
        answered = 0
        try:
            while self.answer_round():
                answered += 1
        except TooFewPartiesError as error:
            log.warning("[party %s] Ends without the other parties. %s", self._party.topology.name, error)
        return answered

    # ---- running a round

    def _start_on_leader(self, make: Callable[[], Aggregator], state: Mapping[str, Any]) -> Started:
        aggregator = self._aggregator = make()
        if state:
            aggregator.load_state_dict(state["aggregator"])
        overwritten = aggregator.start()
        mark = signature(aggregator.run_id, self._party.topology.party)
        if mark is not None and not state:
            self._local.check_new_start(mark, aggregator.round)
        self._remaining = aggregator.drain()
        return Started(overwritten, aggregator.round, dict(aggregator.settings), aggregator.facts())

    def _is_due(self, *, epoch_ends: bool) -> bool:
        clock = Clock(
            steps=self._local.step - self._progress.step,
            seconds=time.monotonic() - self._last_round_at,
            epoch=self._local.epoch,
            epoch_ends=epoch_ends,
        )
        if self._schedule.unit == "seconds":
            return self._party.on_leader(self._schedule.due, clock)  # clocks differ
        return self._schedule.due(clock)

    def _begin_round(self) -> None:
        """Start a round in the background."""
        self._apply(on_bar=True)
        local = self._local_result()
        self._values.read_()
        self._party.on_leader(
            Aggregator.begin, self._leading, local.weight, local.loss, steps_left=local.steps_left
        )
        self._progress, self._cursor = LocalProgress(self._local.step), local.cursor
        self._pending_since = self._local.step
        if self._may_apply():
            self._apply(on_bar=True)

    def _may_apply(self) -> bool:
        """Return whether the background round is to be applied: its delay is over, or it has failed."""
        if self._pending_since is None or not self._overlap.in_background:
            return False
        alone = self._party.topology.party_size == 1  # else all processes of the party must decide alike
        failed = alone and self._leading.background.failed
        return failed or self._local.step - self._pending_since >= self._overlap.delay_steps

    def _apply(self, *, on_bar: bool) -> None:
        """Wait for the round in the background, if there is one, and apply its result."""
        if self._pending_since is None:
            return
        last = self._local.step == self._pending_since  # nothing was learned since to be mixed
        self._values.read_()  # the round's result is mixed into what was learned meanwhile
        with self._saved_below_quorum():
            try:
                report = self._party.on_leader(Aggregator.apply, self._leading, last=last)
            except Exception:  # the round is lost; if only the waiting was interrupted, it is not
                self._pending_since = None
                raise
        self._pending_since = None
        self._cursor = self._cursor.aligned(report.round + 1)
        if self._party.topology.is_leader:
            self._last_round_at = self._leading.background.completed
        self._finish_round(report, on_bar=on_bar)

    def _local_result(self) -> LocalResult:
        """Return this party's contribution to a round."""
        progress = self._progress
        sums = self._party.sum([progress.samples, float(progress.loss_sum), progress.loss_samples])
        samples, loss_sum, loss_samples = (total / self._local.batch_copies for total in sums)
        cursor = self._cursor.advanced(samples, self._local.step)
        samples += self._cursor.samples[self._cursor.next]
        weight = {"samples": samples, "uniform": 1.0}.get(str(self._weighting), self._weighting)
        loss = loss_sum / loss_samples if loss_samples and self._shares_loss else None
        auxiliary = AuxiliaryValues() if self._drift is None else self._drift.contribution()
        steps_left = self._local.planned_steps - self._local.step
        return LocalResult(float(weight), loss, auxiliary, cursor, steps_left)

    @contextmanager
    def _saved_below_quorum(self) -> Iterator[None]:
        """Save this party's own steps since the last round before it stops for want of a quorum."""
        try:
            yield
        except TooFewPartiesError as error:
            path = self._party.on_leader(unused, self._stopped_path)
            cure = self._local.save(path, leads=self._party.topology.is_leader)
            raise TooFewPartiesError(
                f"{error} Its own steps since the last round are in {path}. {cure}"
            ) from error

    # ---- applying its result

    def _finish_round(self, report: RoundReport, *, on_bar: bool) -> None:
        """Finish a round whose result is in this party's parameters."""
        self._values.write_()
        if self._drift is not None:
            self._drift.end_round(self._carried(), counted=report.weight > 0)
        # What made parameters NaN has made the moments NaN as well, and the next step would bring it back.
        if self._resets_inner or self._party.topology.party in report.excluded:
            for optimizer in self._local.optimizers:
                optimizer.state.clear()
        # Moments in coordinates that are no more.
        for parameter in [self._trainable[name] for name in sorted(self.basis_changed(report))]:
            for optimizer in self._local.optimizers:
                optimizer.state.pop(parameter, None)
        self._freeze_parts(report.round + 1)
        if report.last:
            self._local.stop()
        self._on_round(report, on_bar)

    def basis_changed(self, report: RoundReport) -> set[str]:
        """Return the parameters that a round has given another basis, in which moments mean nothing."""
        changed = self._plan.named(self._plan.rule.basis_changed(report.active_parties))
        if report.weight:  # else the party may have taken over more than the round's fragment
            changed &= self._fragments[report.round % self._overlap.fragments]
        return changed

    def _carried(self) -> dict[str, Tensor]:
        """Return the mean of the parties' auxiliary vectors, in every process of the party."""
        if self._drift is None or not self._drift.auxiliary.vector:
            return {}
        vector = self._layout.new_vector()
        if self._aggregator is not None:
            for name, part in self._aggregator.carried.items():
                self._layout.view(vector, name).copy_(part)
        self._party.broadcast_(vector)
        return self._layout.views(vector)

    def _freeze_parts(self, round: int) -> None:
        frozen_parts = self._plan.named(self._plan.rule.frozen_parts(round))
        self._frozen = {self._trainable[name] for name in frozen_parts}

    # ---- small parts

    @cached_property
    def _layout(self) -> Layout:
        """Layout of a drift correction's vectors between a party's processes."""
        return Layout(self._shared)

    @property
    def _leading(self) -> Aggregator:
        """The aggregator, which only the leader has; ``Party.on_leader`` does not use it in the others."""
        return cast(Aggregator, self._aggregator)
