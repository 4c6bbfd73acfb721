"""FederatedFit: one party's part in one fit, from joining the other parties to leaving them."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor, nn

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.callbacks import arguments
from pellm_lightning.callbacks.drift.base import check_optimizers, drift_correction
from pellm_lightning.callbacks.fit_facts import (
    FitFacts,
    expected_shares,
    expected_weight,
    warn_of_unequal_fits,
)
from pellm_lightning.callbacks.lightning_training import LightningTraining, make_aggregator
from pellm_lightning.callbacks.weight_averaging import (
    begin_averaging,
    check_averaging,
    check_coordinates,
    warn_of_missed,
)
from pellm_lightning.comm import Communicator
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.party import Party
from pellm_lightning.comm.session import PartySession
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.loop.arguments import warn_of_uncapped
from pellm_lightning.loop.round_loop import RoundLoop, Started
from pellm_lightning.loop.trainable import CURE, TrainableSet
from pellm_lightning.report.record import FILE_NAME, RunRecord
from pellm_lightning.report.reporter import Reporter
from pellm_lightning.report.run_summary import RunSummary
from pellm_lightning.trainer import isolation
from pellm_lightning.trainer.environment import describe_device
from pellm_lightning.trainer.metrics import ValidationMetrics
from pellm_lightning.trainer.party_parameters.choice import gathered, is_gathered_at_once, party_parameters
from pellm_lightning.trainer.samples import batch_copies

log = logging.getLogger(__name__)


class FederatedFit:
    """Federated fit of one party, in each of its processes; ``FederatedAveraging`` calls it hook by hook.

    It owns what a fit builds: the joined parties, the loop of rounds and the reporter.

    Args:
        factory: The callback's arguments.
        jobs: How this party joins separate jobs; None in one launch.
        trainer: The Trainer of the fit.
        module: The module to train, which may get its adapter later.
        topology: Party and rank of this process.
        connect: Joins the other parties; called by the leader only.
    """

    def __init__(
        self,
        factory: AggregatorFactory,
        jobs: SeparateJobs | None,
        trainer: Trainer,
        module: LightningModule,
        topology: Topology,
        connect: Callable[[], Communicator],
    ) -> None:
        self._factory = factory
        self._jobs = jobs
        self._trainer = trainer
        self._module = module
        self._session = PartySession(topology, connect)
        self.party.device = trainer.strategy.root_device
        self.validation = ValidationMetrics()
        self._drift = drift_correction(factory, trainer, module)
        self._auxiliary = None if self._drift is None else self._drift.auxiliary
        self._shares_loss = True
        self._trainable: TrainableSet | None = None
        self._local: LightningTraining | None = None
        self._loop: RoundLoop | None = None
        self._reporter: Reporter | None = None

    @property
    def party(self) -> Party:
        """This party's processes."""
        return self._session.party

    @property
    def loop(self) -> RoundLoop:
        """The loop of rounds, once training has started."""
        if self._loop is None:
            raise RuntimeError("A party takes part in rounds only while it trains.")
        return self._loop

    @property
    def reporter(self) -> Reporter:
        """The reporter of the rounds, once training has started."""
        if self._reporter is None:
            raise RuntimeError("There is nothing to report before training starts.")
        return self._reporter

    # ---- before training

    def join(self) -> None:
        """Join the other parties, and take this party's name from them."""
        self._session.join()
        if self._session.communicator is not None:
            self._session.communicator.interrupt = self._raise_if_terminated

    def check_trainer(self, callback: Callback) -> None:
        """Refuse a Trainer with which rounds would not work.

        Raises:
            MisconfigurationException: If it is one.
        """
        trainer, factory, joined = self._trainer, self._factory, self._session.communicator
        arguments.trainer(trainer, callback)
        check_averaging(
            trainer,
            factory.schedule,
            mixes=factory.is_staggered,
            separate=joined is not None and joined.may_lose_parties,
            saves_frozen=factory.parameters.save_frozen,
        )
        if not factory.parameters.save_frozen:
            arguments.checkpoints(trainer)
        self._shares_loss = not arguments.protects_records(trainer, factory.weight_by)

    def check_module(self) -> None:
        """Refuse what the aggregation cannot handle; the module has its adapter by now.

        Raises:
            MisconfigurationException: If it cannot.
        """
        if self._factory.parameters.save_frozen:
            arguments.quantized_base(self._trainer, self._module)
        # Where that would gather the whole model for it, `start` is early enough.
        if self._factory.aggregation is not None and not is_gathered_at_once(self._root):
            with gathered(self._root):
                self._plan(self._select())

    def start(self, state: Mapping[str, Any], rounds: list[RoundReport], *, record: bool) -> RunSummary:
        """Agree on what is shared and take party 0's parameters, or resume; return the summary of the run.

        Args:
            state: As of ``state()``; empty to begin.
            rounds: Gets the report of each round.
            record: Whether the rounds are written down.

        Raises:
            MisconfigurationException: If this party's fit cannot take part.
            MismatchError: If the parties differ.
        """
        trainer, factory, topology = self._trainer, self._factory, self.party.topology
        arguments.samplers(trainer, topology, batch_copies(trainer))
        with gathered(self._root):
            trainable = self._select()
            plan = self._plan(trainable)
            shared = {name: trainable[name] for name in sorted(plan.shared)}
            self._check_optimizers(plan, shared)
            size = sum(p.numel() for p in self._module.parameters())
            with misconfigured(f"Party {topology.name}: "):
                values = party_parameters(
                    self.party,
                    self._root,
                    shared,
                    plan.written_bases,
                    experimental=factory.parameters.experimental,
                )
        frozen = values.frozen_state(self._module) if factory.parameters.check_frozen else {}
        self._trainable = TrainableSet(self._module, factory.parameters.include, factory.parameters.exclude)
        stopped = stopped_path(trainer, topology.party, self._jobs)
        warns = factory.weight_by == "samples"
        self._local = LightningTraining(trainer, topology.name, stopped, warns=warns)
        with misconfigured():
            self._loop = RoundLoop(
                self._local,
                self.party,
                factory,
                plan,
                trainable,
                values,
                shares_loss=self._shares_loss,
                drift=self._drift,
                on_due=lambda: self.check_trainable(everything=False),
                on_round=self._report_round,
                stopped_path=stopped,
            )
            if state:
                self._loop.check_resumed(state)
        started = self._loop.start(lambda: self._make_aggregator(values.tensors, plan, frozen), state)
        if started.overwritten:
            begin_averaging(trainer, self._module)
        names = self.party.on_leader(self._roster)
        summary = RunSummary(names, started.settings, plan.rule.writes_base).resumed(state.get("summary", {}))
        self._reporter = Reporter(trainer, topology, summary, rounds, self._new_record() if record else None)
        if topology.is_leader:
            self._report_start(plan, values.tensors, size, started)
        return summary

    # ---- during training

    def drop_gradients(self) -> None:
        """Drop the gradients of parameters frozen in this round."""
        self.loop.drop_gradients()

    def count(self, outputs: Any, batch: Any, batch_idx: int) -> RoundLoop:
        """Count a batch; return the loop, of which a round may be due."""
        if self._local is not None:
            self.loop.count(*self._local.counted(outputs, batch, batch_idx))
        return self.loop

    def after_epoch(self) -> None:
        """Run the epoch's round if its last batch did not."""
        self.loop.after_epoch()

    def check_trainable(self, *, everything: bool) -> None:
        """Refuse a parameter that trains although the parties have not agreed on it."""
        if self._trainable is not None and self._local is not None:
            with misconfigured():
                self._trainable.check(self._local, self._module, everything=everything)

    def start_validation(self) -> None:
        """Close the round first if training is over; remember which metrics are older than now."""
        trainer = self._trainer
        free = trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (
            trainer.min_steps or 0
        )
        if trainer.should_stop and free:
            self.loop.close_round()
        self.validation.start(trainer)

    def end_validation(self) -> None:
        """Average the validation's metrics over the parties."""
        local = self.validation.end(self._trainer, self.party, batch_copies(self._trainer))
        self.reporter.validation(local, self.loop.mean(local))

    # ---- the end

    def finish(self) -> None:
        """Run the last, incomplete round, and answer the other parties' until all have finished."""
        warn_of_missed(self._trainer, self.loop.finish())
        self._session.close()
        self.reporter.end()

    def fail(self, error: BaseException) -> None:
        """Leave at once, so that the other parties fail in seconds with the reason."""
        why = self._session.fail(error)
        if self._reporter is not None:
            self._reporter.end(why)

    def leave(self) -> None:
        """Leave the other parties, if training has never started."""
        if self._session.communicator is not None and self._loop is None:
            why = _why_nothing_was_trained(self._trainer)
            log.warning("[party %s] Left the federation: %s.", self.party.topology.name, why)
            self._session.leave(why)

    @property
    def evidence(self) -> str | None:
        """Certificates of the rounds, signed by a quorum; None before training, and without."""
        return self.loop.evidence if self._has_state else None

    @property
    def _has_state(self) -> bool:
        """Whether training has started, and this process leads."""
        return self._loop is not None and self.party.topology.is_leader

    def state(self) -> dict[str, Any] | None:
        """Return what ``start`` resumes from; None before training, and in processes that do not lead."""
        if not self._has_state:
            return None
        state = self.loop.state()
        summary = {} if self._reporter is None else asdict(self._reporter.summary)
        # Paths among a module's hyperparameters are seen from there; `export` may be called elsewhere.
        return {
            **state,
            "summary": summary,
            "directory": os.getcwd(),
        }

    # ---- small parts

    def _raise_if_terminated(self) -> None:
        """Stop waiting for others when this process is to end; Lightning looks only between batches."""
        if self._trainer.received_sigterm:
            raise SIGTERMException

    @property
    def _root(self) -> nn.Module:
        """The module as the strategy has wrapped it."""
        wrapped = self._trainer.strategy.model
        return self._module if wrapped is None else wrapped

    def _select(self) -> dict[str, nn.Parameter]:
        try:
            return self._factory.parameters.select(self._module)
        except ValueError as error:
            cure = "" if any(p.requires_grad for p in self._module.parameters()) else f" {CURE}"
            raise MisconfigurationException(f"Party {self.party.topology.name}: {error}{cure}") from error

    def _plan(self, parameters: Mapping[str, nn.Parameter]) -> Plan:
        with misconfigured(f"Party {self.party.topology.name}: "):
            return self._factory.plan(self._module, parameters, self._auxiliary)

    def _check_optimizers(self, plan: Plan, shared: Mapping[str, nn.Parameter]) -> None:
        check_coordinates(self._trainer, plan)
        for_good = plan.named(plan.rule.frozen_parts(0) & plan.rule.frozen_parts(1))
        trained = {name: shared[name] for name in sorted(shared.keys() - for_good)}
        arguments.optimizers(self._trainer, trained)
        check_optimizers(self._factory, self._trainer, self._drift, shared)

    def _make_aggregator(
        self, tensors: Mapping[str, Tensor], plan: Plan, frozen: Mapping[str, Tensor | str]
    ) -> Aggregator:
        trainer, factory = self._trainer, self._factory
        processes = self.party.topology.party_size // batch_copies(trainer)
        weight = expected_weight(trainer, factory.weight_by, factory.schedule, processes)
        shares_steps = self._shares_loss and not factory.exchange.is_secure and factory.privacy is None
        return make_aggregator(
            factory,
            self._session.leading,
            trainer,
            self._module,
            tensors,
            plan,
            self._auxiliary,
            frozen=frozen,
            facts=asdict(FitFacts.of(trainer, self.validation.names, weight, shares_steps=shares_steps)),
            state_dir=state_dir(trainer, self.party.topology.party, self._jobs),
        )

    def _roster(self) -> list[str]:
        """Return the names of all parties, on the leader; warn of those that share an accelerator."""
        joined = self._session.leading
        if not joined.may_lose_parties:  # separate jobs are compared by their first quorum
            device = describe_device(self._trainer.strategy.root_device)
            arguments.devices(joined.gather_json("device", device))
        return list(joined.roster)

    def _new_record(self) -> RunRecord | None:
        """Return the record of the fit; None where the Trainer writes nothing."""
        if vars(self._trainer).get("fast_dev_run") or self._trainer.barebones:
            return None
        root, topology = self._trainer.default_root_dir, self.party.topology
        if topology.num_parties > 1:
            root = isolation.below(root, topology.party)
        return RunRecord(os.path.join(root, FILE_NAME))

    def _report_start(self, plan: Plan, shared: Mapping[str, Tensor], size: int, started: Started) -> None:
        factory, topology = self._factory, self.party.topology
        if topology.party == 0:
            quorum = int(started.settings["quorum"] or 1)
            warn_of_unequal_fits(topology.name, started.facts, factory.every_n_steps, quorum)
            warn_of_uncapped(factory.aggregation, factory.weight_by, factory.max_share)
        self.reporter.start(
            self._module,
            plan,
            shared,
            factory.exchange,
            factory.privacy,
            size=size,
            round=started.round,
            written=self._written(),
            shares=expected_shares(started.facts, factory.max_share),
        )
        self.reporter.show(self._session.leading.phases)

    def _written(self) -> dict[str, list[str]]:
        """Return where the parties of a launch write, by name; of separate jobs where this one does."""
        joined = self._session.leading
        if joined.may_lose_parties:
            return {self.party.topology.name: isolation.written_paths(self._trainer)}
        specs = zip(joined.names, joined.party_specs(), strict=True)
        return {name: list(spec["files"]) for name, spec in specs}

    def _report_round(self, report: RoundReport, on_bar: bool) -> None:
        self.reporter.round(self._module, report, on_bar=on_bar)


@contextmanager
def misconfigured(who: str = "") -> Iterator[None]:
    """Raise Lightning's error for settings that do not go together."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"{who}{error}") from error


def state_dir(trainer: Trainer, party: int, jobs: SeparateJobs | None) -> str:
    """Return the folder in which a party keeps the global state between separate jobs."""
    given = None if jobs is None else jobs.state_dir
    return given or os.path.join(isolation.below(trainer.default_root_dir, party), "federation")


def stopped_path(trainer: Trainer, party: int, jobs: SeparateJobs | None) -> str:
    """Return the path of the checkpoint of a party that has stopped below a quorum."""
    return os.path.join(os.path.dirname(state_dir(trainer, party, jobs)), "stopped.ckpt")


def _why_nothing_was_trained(trainer: Trainer) -> str:
    if trainer.limit_train_batches == 0 or trainer.num_training_batches == 0:
        return (
            "it has no training batches, so its fit ended before it began; give it data or start without it"
        )
    return "its fit ended before it began, since max_epochs or max_steps was reached already"
