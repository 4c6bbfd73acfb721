"""SimulatedFit: one process's part in the fit of a simulation, from joining the others to leaving them."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from typing_extensions import Self

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.callbacks import arguments
from pellm_lightning.callbacks.fit import misconfigured, state_dir, stopped_path
from pellm_lightning.callbacks.lightning_training import LightningTraining, make_aggregator
from pellm_lightning.callbacks.simulation import checks
from pellm_lightning.comm import Communicator
from pellm_lightning.comm.party import Party
from pellm_lightning.comm.session import PartySession
from pellm_lightning.comm.simulated.communicator import SimulatedCommunicator
from pellm_lightning.comm.simulated.held_parties import HeldParties
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.compatibility import base_digests
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.loop.parameters import Parameters
from pellm_lightning.loop.simulation.live_training import LiveTraining
from pellm_lightning.loop.simulation.party_states import PartyStates
from pellm_lightning.loop.simulation.rounds import SimulatedRounds
from pellm_lightning.loop.simulation.settings import Simulation
from pellm_lightning.loop.simulation.slot import Slot
from pellm_lightning.loop.simulation.turns import RoundPlan, Turns
from pellm_lightning.loop.trainable import CURE, TrainableSet
from pellm_lightning.report.record import FILE_NAME, RunRecord
from pellm_lightning.report.reporter import Reporter
from pellm_lightning.report.run_summary import RunSummary
from pellm_lightning.tensors.frozen_state import frozen_state
from pellm_lightning.trainer import isolation
from pellm_lightning.trainer.metrics import ValidationMetrics


class SimulatedFit:
    """Fit of a simulation in one of its processes; ``FederatedAveraging`` calls it hook by hook.

    Each epoch of the Trainer is a round: the batches of the parties that were drawn, one party after another.

    Args:
        factory: The callback's arguments.
        simulation: Who takes part.
        trainer: The Trainer of the fit.
        module: The module to train, which may get its adapter later.
        topology: Index of this process among those of the launch.
        connect: Joins the other processes.
    """

    def __init__(
        self,
        factory: AggregatorFactory,
        simulation: Simulation,
        trainer: Trainer,
        module: LightningModule,
        topology: Topology,
        connect: Callable[[], Communicator],
    ) -> None:
        self._factory = factory
        self._simulation = simulation
        self._trainer = trainer
        self._module = module
        self._session = PartySession(topology, connect)
        self.validation = ValidationMetrics()
        self._held: HeldParties | None = None
        self._local: LightningTraining | None = None
        self._trainable: TrainableSet | None = None
        self._rounds: SimulatedRounds | None = None
        self._turns: Turns | None = None
        self._reporter: Reporter | None = None
        self._plan: RoundPlan | None = None
        self._frozen: list[Any] = []
        self._resumed: Mapping[str, Any] = {}
        self._ended = (-1, 0)  # the epoch whose round is over, and its batches

    @property
    def party(self) -> Party:
        """This process, as if it were a party of the launch."""
        return self._session.party

    # ---- before training

    def join(self) -> None:
        """Join the other processes of the launch.

        Raises:
            MisconfigurationException: If they are more than the parties of a round.
        """
        self._session.join()
        workers = self._session.leading
        workers.interrupt = self._raise_if_terminated
        with misconfigured():
            self._held = HeldParties(workers, self._simulation.num_parties, self._simulation.places)

    def check_trainer(self, callback: Callback) -> None:
        """Refuse a Trainer with which a simulation would not work.

        Raises:
            MisconfigurationException: If it is one.
        """
        arguments.trainer(self._trainer, callback)
        checks.check_trainer(self._trainer, self._module)
        checks.check_data(self._datamodule)
        if not self._factory.parameters.save_frozen:
            arguments.checkpoints(self._trainer)

    def check_module(self) -> None:
        """Refuse what the aggregation cannot handle; the module has its adapter by now.

        Raises:
            MisconfigurationException: If it cannot.
        """
        if self._factory.parameters.save_frozen:
            arguments.quantized_base(self._trainer, self._module)
        checks.check_plan(self._plan_of_rule())

    def batches(self, state: Mapping[str, Any]) -> "RoundBatches":
        """Return the batches of the epoch: those of its round's parties that this process holds.

        Args:
            state: As of ``state()``, if training has not started yet; empty to begin.

        Raises:
            MisconfigurationException: If a party's data has no length, or no batch.
        """
        if self._rounds is None and state:
            self._check_resumed(state)
            self._ended = tuple(state["ended"])
        if self._ended[0] == self._trainer.current_epoch:  # resumed behind its last batch
            return RoundBatches(self._ended[1], lambda: iter(()))
        of_checkpoint = state["aggregator"]["round"] if state else 0
        round = of_checkpoint if self._rounds is None else self._rounds.round
        with misconfigured():
            self._plan = RoundPlan.of(
                self._simulation,
                self._joined,
                round,
                self._datamodule.party_dataloader,
                self._factory.schedule,
            )
        return RoundBatches(self._counted_before(len(self._plan)) + len(self._plan), self._next_batches)

    def start(self, state: Mapping[str, Any], rounds: list[RoundReport], *, record: bool) -> RunSummary:
        """Agree with the other processes on what is shared, or resume; return the summary of the run.

        Args:
            state: As of ``state()``; empty to begin.
            rounds: Gets the report of each round.
            record: Whether the rounds are written down.

        Raises:
            MisconfigurationException: If this fit cannot take part.
            MismatchError: If the processes differ.
        """
        trainer, factory, topology = self._trainer, self._factory, self.party.topology
        checks.check_schedulers(trainer)
        plan = self._plan_of_rule()
        trainable = Parameters().select(self._module)
        self._trainable = TrainableSet(self._module, factory.parameters.include, factory.parameters.exclude)
        folder = state_dir(trainer, topology.party, None)
        stopped = stopped_path(trainer, topology.party, None)
        local = LightningTraining(trainer, topology.name, stopped, warns=factory.weight_by == "samples")
        live = LiveTraining(
            self._module,
            trainable,
            plan.shared,
            trainer.optimizers,
            [config.scheduler for config in trainer.lr_scheduler_configs],
        )
        places = [SimulatedCommunicator(self._joined, place) for place in self._joined.local]
        with misconfigured():
            slots = [Slot(place, factory, plan, trainable, local, shares_loss=True) for place in places]
        states = PartyStates(os.path.join(folder, "parties"), self._simulation.memory_gb * 1e9)
        self._local, self._rounds = local, SimulatedRounds(self._simulation, self._joined, slots, states)
        self._turns = Turns(self._simulation, self._rounds, live, self._module.device)
        frozen = base_digests(frozen_state(self._module)) if factory.parameters.check_frozen else {}
        with misconfigured():
            started = self._rounds.start(lambda slot: self._make_aggregator(slot, plan, frozen), state)
        if state:
            self._turns.resume(state["turns"], self._plan or RoundPlan({}, {}))
        names = list(places[0].roster)
        summary = RunSummary(names, started.settings, plan.rule.writes_base).resumed(state.get("summary", {}))
        of_all = replace(topology, num_parties=len(names))
        self._reporter = Reporter(trainer, of_all, summary, rounds, self._new_record() if record else None)
        self._report_start(plan, slots[0], started.round)
        return summary

    # ---- during training

    def drop_gradients(self) -> None:
        """Drop the gradients of parameters frozen in this round."""
        for parameter in self._frozen:
            parameter.grad = None

    def count(self, outputs: Any, batch: Any, batch_idx: int) -> Self:
        """Count a batch for the party whose turn it is."""
        if self._local is not None:
            self._running.count(*self._local.counted(outputs, batch, batch_idx))
        return self

    def after_batch(self, *, epoch_ends: bool) -> None:
        """End the party's turn if that was its last batch, and behind the last turn the round."""
        self._report(self._running.after_batch())

    def after_epoch(self) -> None:
        """End the round if it was cut short."""
        self._report(self._running.close_round())

    def check_trainable(self, *, everything: bool) -> None:
        """Refuse a parameter that trains although it was frozen at the start."""
        if self._trainable is not None and self._local is not None:
            with misconfigured():
                self._trainable.check(self._local, self._module, everything=everything)

    def start_validation(self) -> None:
        """Remember which metrics are older than now."""
        self.validation.start(self._trainer)

    def end_validation(self) -> None:
        """Average the validation's metrics over the processes."""
        local = self.validation.end(self._trainer, self.party)
        if self._rounds is not None and self._reporter is not None:
            self._reporter.validation(local, self._rounds.mean(local))

    # ---- the end

    def finish(self) -> None:
        """End a round that was cut short, and all rounds, with the other processes."""
        self.after_epoch()
        if self._rounds is not None:
            self._rounds.finish()
        self._session.close()
        if self._reporter is not None:
            self._reporter.end()

    def fail(self, error: BaseException) -> None:
        """Leave at once, so that the other processes fail in seconds with the reason."""
        why = self._session.fail(error)
        if self._rounds is not None:
            self._rounds.discard()
        if self._reporter is not None:
            self._reporter.end(why)

    def leave(self) -> None:
        """Leave the other processes, if training has never started."""
        if self._rounds is None:
            self._session.leave("its fit ended before it began")

    @property
    def evidence(self) -> str | None:
        """None: nobody signs what one process computes for all."""
        return None

    def state(self) -> dict[str, Any] | None:
        """Return what ``start`` resumes from; None before training."""
        if self._rounds is None or self._turns is None or self._reporter is None:
            return None
        return {
            **self._rounds.state(),
            "turns": self._turns.state(),
            "ended": list(self._ended),
            "summary": asdict(self._reporter.summary),
            "directory": os.getcwd(),
            "of": self._identity,
        }

    # ---- small parts

    def _counted_before(self, length: int) -> int:
        """Return how many batches of the round before Lightning counts as those of this epoch.

        It does where a checkpoint was saved after the last batch of an epoch, and the next one is longer.
        """
        loop: Any = self._trainer.fit_loop
        resumed = loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_train_batch_end
        return self._ended[1] if resumed and length > self._ended[1] else 0

    def _check_resumed(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other parties, or of another process.

        Raises:
            MisconfigurationException: If it is one.
        """
        found = state.get("of", {"simulate": None})
        unlike = [name for name, value in self._identity.items() if found.get(name, value) != value]
        if unlike:
            raise MisconfigurationException(
                f"The checkpoint is of a federation with {unlike[0]}={found[unlike[0]]!r:.200}, this fit has"
                f" {self._identity[unlike[0]]!r:.200}. Resume with the settings of the checkpoint, and each"
                " process of a simulation its own, as in ckpt_path='.../party-1/...'."
            )

    @property
    def _identity(self) -> dict[str, Any]:
        """Return what must be the same when a fit is resumed."""
        topology = self.party.topology
        simulate = repr(replace(self._simulation, memory_gb=0.0))
        return {"simulate": simulate, "processes": topology.num_parties, "process": topology.party}

    @property
    def _joined(self) -> HeldParties:
        if self._held is None:
            raise RuntimeError("A simulation has no parties before its processes have joined.")
        return self._held

    @property
    def _datamodule(self) -> Any:
        return vars(self._trainer).get("datamodule")

    @property
    def _running(self) -> Turns:
        if self._turns is None:
            raise RuntimeError("Parties take turns only while a fit trains.")
        return self._turns

    def _next_batches(self) -> Iterator[Any]:
        """Begin the round with its first batch: Lightning calls no hook of an epoch that it resumes."""
        assert self._plan is not None
        self._running.begin_round(self._plan)
        self._note_frozen()
        while True:
            yield self._running.next_batch()

    def _raise_if_terminated(self) -> None:
        if self._trainer.received_sigterm:
            raise SIGTERMException

    def _plan_of_rule(self) -> Plan:
        try:
            trainable = self._factory.parameters.select(self._module)
        except ValueError as error:
            cure = "" if any(p.requires_grad for p in self._module.parameters()) else f" {CURE}"
            raise MisconfigurationException(f"{error}{cure}") from error
        with misconfigured():
            return self._factory.plan(self._module, trainable, None)

    def _make_aggregator(self, slot: Slot, plan: Plan, frozen: Mapping[str, str]) -> Aggregator:
        return make_aggregator(
            self._factory,
            slot.communicator,
            self._trainer,
            self._module,
            slot.shared,
            plan,
            None,
            frozen=frozen,
            settings={"simulate": repr(self._simulation)},
        )

    def _note_frozen(self) -> None:
        """Note which of the module's parameters are frozen in this round."""
        slot, trainable = self._running.slot, Parameters().select(self._module)
        names = set() if slot is None else slot.loop.frozen_names()
        self._frozen = [trainable[name] for name in sorted(names)]

    def _report(self, report: RoundReport | None) -> None:
        if report is not None and self._reporter is not None and self._plan is not None:
            self._ended = self._trainer.current_epoch, len(self._plan)
            self._reporter.round(self._module, report, on_bar=True)

    def _new_record(self) -> RunRecord | None:
        if self._trainer.barebones or self.party.topology.party:
            return None
        return RunRecord(os.path.join(self._trainer.default_root_dir, FILE_NAME))

    def _report_start(self, plan: Plan, slot: Slot, round: int) -> None:
        assert self._reporter is not None
        self._reporter.start(
            self._module,
            plan,
            slot.shared,
            self._factory.exchange,
            self._factory.privacy,
            size=sum(p.numel() for p in self._module.parameters()),
            round=round,
            written={self.party.topology.name: isolation.written_paths(self._trainer)},
        )


class RoundBatches:
    """Batches of an epoch, which are those of one round.

    Args:
        length: How many.
        begin: Returns an iterator over them.
    """

    def __init__(self, length: int, begin: Callable[[], Iterator[Any]]) -> None:
        self._length = length
        self._begin = begin

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return self._begin()

    def state_dict(self) -> dict[str, int]:
        """Return nothing that is needed: the callback's state says where a fit resumes.

        Lightning warns where a loader has no such method.
        """
        return {"batches": self._length}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Do nothing, for the same reason."""
