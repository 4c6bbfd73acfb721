"""FederatedAveraging: its arguments, Lightning hooks in the order in which they run, and checkpoints."""

import itertools
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from pellm_lightning.aggregation import Aggregation
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.callbacks import arguments
from pellm_lightning.callbacks.aggregator_factory import AggregatorFactory
from pellm_lightning.callbacks.drift.base import DriftCorrection
from pellm_lightning.callbacks.fit_facts import FitFacts, warn_of_unequal_fits
from pellm_lightning.callbacks.fit_loop import FederatedLoop, LoopConfig
from pellm_lightning.callbacks.fit_state import (
    is_stopping,
    new_record,
    raise_if_terminated,
    unchanged_frozen,
    validates_in_fit,
    why_nothing_was_trained,
)
from pellm_lightning.callbacks.parameters import Parameters
from pellm_lightning.callbacks.schedule import ARGUMENTS, schedule
from pellm_lightning.callbacks.trainable import CURE, TrainableSet
from pellm_lightning.callbacks.weight_averaging import (
    begin_averaging,
    check_averaging,
    check_coordinates,
    warn_of_missed,
)
from pellm_lightning.comm import (
    Communicator,
    Federation,
    FederationError,
    Quorum,
    check_quorum,
)
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.topology import Topology
from pellm_lightning.comm.torchrun.store import launched, store_from_env
from pellm_lightning.engine import outer_optimizer
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.auxiliary import AuxiliaryTerms
from pellm_lightning.engine.optim import without_parser
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.exchange import Exchange
from pellm_lightning.exchange.base import as_exchange
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.report.logs import show_log_lines
from pellm_lightning.report.reporter import Reporter
from pellm_lightning.report.run_summary import RunSummary
from pellm_lightning.tensors.selection import load_compiled_, named_as_in
from pellm_lightning.trainer import isolation
from pellm_lightning.trainer.environment import (
    Party,
    describe_device,
    owns_terminal,
    set_rank_zero,
    topology_of,
)
from pellm_lightning.trainer.metrics import ValidationMetrics
from pellm_lightning.trainer.pickling import own_state
from pellm_lightning.trainer.resume import last_of_unfinished, precede_runs

log = logging.getLogger(__name__)
_NUMBERS = itertools.count()


class FederatedAveraging(Callback):
    """Callback that averages the trainable parameters over the parties, round by round, in ``trainer.fit``.

    Each party runs its own Trainer on its own data; only parameters with ``requires_grad=True`` leave it.
    Launched by ``torchrun --nproc-per-node N`` every process is a party, or every G processes with
    ``PartyEnvironment``. Without a launcher it is a federation of one party.

    Args:
        every_n_epochs: A round at the end of every n-th epoch, before that epoch's validation. Default: every
            epoch.
        every_n_steps: Instead, a round after every n optimizer steps (``trainer.global_step``).
        every_n_seconds: Instead, a round whenever n seconds of training are over, counted from the end of the
            last exchange: all parties come at about the same time, however many steps each has made.
        weighting: How much a party counts: "samples" by the training samples it consumed since the last
            round, all its processes together; "uniform" all alike; a number is this party's own fixed weight.
        aggregation: What is computed from the parties' parameters, from ``pellm_lightning.aggregation``.
            Default: ``LowRankMean()`` for LoRA, the weighted mean for all else.
        exchange: How values are summed over the parties, from ``pellm_lightning.exchange``: ``Plain()``,
            ``SecureAggregation(...)`` so that nobody sees another's, or in fewer bytes ``Cast("bfloat16")``,
            ``Quantized(...)`` and ``TopK(...)``.
        privacy: Differential privacy of each party's updates, from ``pellm_lightning.privacy``. It needs
            weighting="uniform".
        overlap: Lets rounds run in the background while training continues, or exchange one fragment of the
            parameters at a time; see ``Overlap``. Default: training waits for each round of all parameters.
        parameters: Which trainable parameters federate, and what is checked and saved of the frozen ones; see
            ``Parameters``. Default: all trainable parameters.
        outer_optimizer: Optimizer of the global parameters, fed with the pseudo-gradient. ``SGD(lr=1)`` is
            FedAvg, ``SGD(lr=1, momentum=0.9)`` FedAvgM, ``Adam`` FedAdam, and ``SGD(lr=0.7, momentum=0.9,
            nesterov=True)`` DiLoCo.
        outer_scheduler: Learning rate of the outer optimizer by round: any scheduler of
            ``torch.optim.lr_scheduler`` that needs no metric, stepped once for each round in which a party
            counted. Its epochs are rounds.
        inner_optimizer_state: "keep" lets the local optimizers keep their moments after a round,
            "reset" clears them.
        on_nonfinite: A party whose parameters hold NaN or infinity is left out of the round, takes over its
            result and clears its local optimizers ("exclude"), or all parties stop with an error ("raise").
        quorum: Parties that must have trained in a round for it to move the global parameters: more than half
            of all ("majority"), or a number. When fewer still train, the federation ends for all with the
            last result of a quorum, so that nobody's data decides because it lasted longest. Separate jobs
            need as many to meet.
        timeout_s: Seconds a party may be late before the others give up: more than the time by which the
            slowest party's local steps outlast the fastest's.
        record: Whether each party writes what happens, round by round, into ``rounds.jsonl`` in the Trainer's
            ``default_root_dir`` (below ``party-<k>/`` if there are several), for
            ``python -m pellm_lightning report``. With ``fast_dev_run`` or ``barebones`` nothing is written.
        jobs: Makes this launch one party of several separate jobs; see ``SeparateJobs``. Default: the
            environment's ``PELLM_RENDEZVOUS``, ``PELLM_PARTY`` and so on; without them all parties come from
            one launch.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = FederatedAveraging(every_n_steps=50, weighting="uniform")
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[callback])
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every_n_seconds: float | None = None,
        weighting: Literal["samples", "uniform"] | float = "samples",
        aggregation: Aggregation | None = None,
        exchange: Exchange | None = None,
        privacy: GaussianMechanism | None = None,
        overlap: Overlap | None = None,
        parameters: Parameters | None = None,
        outer_optimizer: OptimizerCallable = outer_optimizer.sgd_one,
        outer_scheduler: LRSchedulerCallable | None = None,
        inner_optimizer_state: Literal["keep", "reset"] = "keep",
        on_nonfinite: Literal["exclude", "raise"] = "exclude",
        quorum: Quorum = "majority",
        timeout_s: float = 1800,
        record: bool = True,
        jobs: SeparateJobs | None = None,
    ) -> None:
        arguments.instance_of("aggregation", aggregation, Aggregation)
        arguments.instance_of("privacy", privacy, GaussianMechanism)
        arguments.instance_of("overlap", overlap, Overlap)
        arguments.instance_of("parameters", parameters, Parameters)
        arguments.instance_of("jobs", jobs, SeparateJobs)
        due = schedule(every_n_epochs, every_n_steps, every_n_seconds)
        self.overlap = overlap or Overlap()
        self.overlap.check_schedule(every_n_steps, every_n_seconds)
        self._schedule = due.shared_by(self.overlap.fragments)
        arguments.weighting(weighting)
        arguments.privacy(privacy, weighting)
        arguments.one_of("inner_optimizer_state", inner_optimizer_state, ("keep", "reset"))
        arguments.one_of("on_nonfinite", on_nonfinite, ("exclude", "raise"))
        check_quorum(quorum)
        arguments.seconds("timeout_s", timeout_s)
        arguments.outer(outer_optimizer, outer_scheduler)
        self.jobs = SeparateJobs.from_env() if jobs is None else jobs
        """How this party joins separate jobs; None if all parties come from one launch."""
        if self.jobs is not None:
            self.jobs.membership.quorum(quorum, self.jobs.roster)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.weighting = weighting
        self.aggregation = aggregation
        self.exchange: Exchange = as_exchange(exchange)
        self.privacy = privacy
        self.parameters = parameters or Parameters()
        self.outer_optimizer = without_parser(outer_optimizer)
        self.outer_scheduler = without_parser(outer_scheduler)
        self.inner_optimizer_state = inner_optimizer_state
        self.on_nonfinite = on_nonfinite
        self.quorum = quorum
        self.timeout_s = timeout_s
        self.record = record
        self.rounds: list[RoundReport] = []
        """Reports of the rounds of the present fit, or of the last one."""
        self.summary: RunSummary | None = None
        """Summary of its federation; None before training starts."""
        self._is_set_up = False
        # What a fit builds; all of it is dropped when the fit ends.
        self._topology = Topology()
        self._party: Party | None = None
        self._joined: Communicator | None = None
        self._drift: DriftCorrection | None = None
        self._shares_loss = True
        self._loop: FederatedLoop | None = None
        self._trainable: TrainableSet | None = None
        self._reporter: Reporter | None = None
        self._validation = ValidationMetrics()
        self._renaming: RemovableHandle | None = None
        # The state of a checkpoint that was loaded, or of the fit that has ended.
        self._state: dict[str, Any] = {}

    @property
    def writes_base(self) -> bool:
        """Whether rounds write into frozen weights, which then belong to what was trained."""
        return self.aggregation is not None and self.aggregation.writes_base

    @property
    def _connects_itself(self) -> bool:
        return type(self).connect is not FederatedAveraging.connect

    @property
    def factory(self) -> AggregatorFactory:
        """Factory of aggregators as a fit's."""
        return AggregatorFactory(
            aggregation=self.aggregation,
            exchange=self.exchange,
            privacy=self.privacy,
            overlap=self.overlap,
            outer_optimizer=self.outer_optimizer,
            outer_scheduler=self.outer_scheduler,
            on_nonfinite=self.on_nonfinite,
            quorum=self.quorum,
            check_frozen=self.parameters.check_frozen,
            inner_optimizer_state=self.inner_optimizer_state,
            schedule={name: getattr(self, name) for name in ARGUMENTS},
            weighting=self.weighting,
        )

    @property
    @override
    def state_key(self) -> str:
        """Key of the state in checkpoints.

        Until ``setup`` it is another one each time. Lightning's Trainer would refuse two callbacks of one key
        when it is made, with an error that does not help; ``setup`` refuses them with ours.
        """
        key = FederatedAveraging.__qualname__  # of derived classes too, whose connect() is another
        return key if self._is_set_up else f"{key}@{next(_NUMBERS)}"

    def connect(self) -> Communicator:
        """Join the other parties; called once per fit, by the party's first process.

        Override it for parties that meet neither by a launcher's environment nor at a rendezvous::

            class Threads(FederatedAveraging):
                def connect(self):
                    return Federation(store, party, num_parties)

        Raises:
            PartyLostError: If the rendezvous or a party cannot be reached.
        """
        if self.jobs is not None:
            return self.jobs.join(self.quorum)
        party, num_parties = self._topology.party, self._topology.num_parties
        return Federation(store_from_env(self.timeout_s), party, num_parties, timeout_s=self.timeout_s)

    # ---- hooks, in the order in which they run

    def before_run(self, trainer: Trainer, ckpt_path: Any) -> Any:
        """Separate the parties' files before Lightning looks for ``ckpt_path``; return which to resume."""
        if self._connects_itself:
            return ckpt_path  # which party this is will be known when it has joined
        self._topology = topology_of(trainer)
        set_rank_zero(self._topology.rank_in_party)
        if self._topology.party > 0:
            isolation.separate_files(trainer, self._topology.party)
        if self._topology.is_leader:
            isolation.keep_metrics(trainer)
        if self.jobs is None or ckpt_path != "last":
            return ckpt_path
        state, stopped = self._state_path(trainer), self._stopped_path(trainer)
        return last_of_unfinished(trainer, self._topology.party, state, stopped) or ckpt_path

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Separate the parties' files; for a fit also join the federation and refuse what cannot work."""
        self._is_set_up = True
        self._topology = topology_of(trainer)
        if stage == "fit":
            # Of an earlier fit, which may have failed.
            self._state, self._loop, self._reporter = {}, None, None
            self.rounds, self.summary = [], None
            self._validation = ValidationMetrics()
            self._drift = self.factory.drift_correction(trainer, pl_module)
            self._party = Party(self._topology, trainer.strategy)
            show_log_lines()
            self._join(trainer)
            arguments.trainer(trainer, self, self._topology)
            check_averaging(
                trainer,
                self._schedule,
                mixes=self.factory.is_staggered,
                separate=self._joined is not None and self._joined.may_lose_parties,
                saves_frozen=self.parameters.save_frozen,
            )
            if not self.parameters.save_frozen:
                arguments.checkpoints(trainer)
            # First in line: EarlyStopping and ModelCheckpoint then read what we log in the same hook.
            isolation.put_first(trainer, self)
            self._shares_loss = not arguments.protects_records(trainer, self.weighting)
        else:
            arguments.only_one(trainer, self)
        set_rank_zero(self._topology.rank_in_party)
        if self._topology.party > 0:
            # Party 0 keeps the user's paths, since its loggers' files exist already. Those of the others do
            # not: their launcher's rank made them dummies until now.
            isolation.separate_files(trainer, self._topology.party)
            if not owns_terminal(self._topology):
                isolation.silence(trainer)
        if not self.parameters.save_frozen:
            pl_module.strict_loading = False
        self._stop_renaming()  # of a fit that has failed
        self._renaming = pl_module.register_load_state_dict_pre_hook(load_compiled_)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what the aggregation cannot handle; the module has its adapter by now."""
        if self.aggregation is not None:
            self._plan(pl_module, self._select(pl_module))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on what is shared and take party 0's parameters, or resume from the checkpoint."""
        arguments.samplers(trainer, self._topology)
        trainable = self._select(pl_module)
        self._trainable = TrainableSet(pl_module, self.parameters.include, self.parameters.exclude)
        plan = self._plan(pl_module, trainable)
        shared = {name: trainable[name] for name in sorted(plan.shared)}
        check_coordinates(trainer, plan)
        for_good = plan.named(plan.rule.frozen_parts(0) & plan.rule.frozen_parts(1))
        arguments.optimizers(trainer, {name: shared[name] for name in sorted(shared.keys() - for_good)})
        self.factory.check_optimizers(trainer, self._drift, shared)

        def on_round(done: RoundReport, on_bar: bool) -> None:
            self._reporting.round(pl_module, done, on_bar=on_bar)

        self._loop = FederatedLoop(
            trainer,
            self._running_party,
            plan,
            trainable,
            LoopConfig(
                self._schedule,
                self.overlap,
                self.weighting,
                resets_inner=self.inner_optimizer_state == "reset",
                shares_loss=self._shares_loss,
            ),
            drift=self._drift,
            on_round=on_round,
            stopped_path=self._stopped_path(trainer),
        )

        shares_steps = self._shares_loss and not self.exchange.is_secure and self.privacy is None

        def make_aggregator() -> Aggregator:
            return self.factory.make(
                self._communicator,
                trainer,
                pl_module,
                trainable,
                self._auxiliary,
                plan=plan,
                facts=FitFacts.of(trainer, self._validation.names, shares_steps=shares_steps).to_json(),
                state_dir=self._state_path(trainer),
            )

        started = self._loop.start(make_aggregator, self._state)
        if started.overwritten:
            begin_averaging(trainer, pl_module)
        names = self._running_party.on_leader(lambda: self._roster(trainer))
        summary = RunSummary(names, started.settings, self.writes_base)
        if self._topology.is_leader and self._topology.party == 0:
            quorum = int(started.settings["quorum"] or 1)
            warn_of_unequal_fits(self._topology.name, started.facts, self.every_n_steps, quorum)
        self.summary = summary.resumed(self._state.get("summary", {}))
        self._reporter = Reporter(
            trainer,
            self._topology,
            self.summary,
            self.rounds,
            new_record(trainer, self._topology) if self.record else None,
        )
        if self._topology.is_leader:
            self._reporter.start(
                pl_module,
                plan,
                shared,
                self.exchange,
                self.privacy,
                round=started.round,
                written=self._written(trainer),
            )
            if self._joined is not None:
                self._reporter.show(self._joined.phases)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the gradients of parameters frozen in this round, before they are clipped or applied."""
        self._check_trainable(trainer, pl_module, everything=False)
        self._running_loop.drop_gradients()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; run the round that is due, before Lightning validates and saves."""
        self._check_trainable(trainer, pl_module, everything=trainer.is_last_batch)
        self._running_loop.after_batch(outputs, batch, batch_idx)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the round first if training is over; remember which metrics are older than now."""
        if not validates_in_fit(trainer):
            return
        if is_stopping(trainer):
            self._running_loop.close_round()
        self._validation.start(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the validation samples, which weight this party's metrics."""
        if validates_in_fit(trainer):
            self._validation.count(trainer, batch, batch_idx, dataloader_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the metrics over the parties before EarlyStopping and ModelCheckpoint read them."""
        if trainer.sanity_checking:
            self._validation.check(trainer)
        if validates_in_fit(trainer):
            local = self._validation.end(trainer, self._running_party)
            self._reporting.validation(local, self._running_loop.mean(local))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the epoch's round if its last batch did not: skipped, or cut short by max_steps."""
        self._running_loop.after_epoch()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the last, incomplete round; then answer the other parties' rounds until all have finished."""
        self._running_loop.close_round()
        before = len(self.rounds)
        self._running_loop.finish()
        warn_of_missed(trainer, len(self.rounds) - before)
        if self._joined is not None:
            self._joined.close()
        self._reporting.end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave at once, so that the other parties fail in seconds with the reason."""
        said = str(exception)  # nothing, of a KeyboardInterrupt
        why = type(exception).__name__ + (f": {said}" if said else "")
        if self._joined is not None:
            # Of a FederationError the others know already, from us or from the party that caused it.
            known = isinstance(exception, FederationError)
            self._joined.abort(None if known else why)
        if self._reporter is not None:
            self._reporter.end(why)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave, if that has not happened yet, and drop every reference to the module."""
        self._stop_renaming()
        if stage != "fit":
            return
        if self._joined is not None and self._loop is None:
            why = why_nothing_was_trained(trainer)
            log.warning("[party %s] Left the federation: %s.", self._topology.name, why)
            self._joined.abort(why)
        self._state = self.state_dict()
        self._party = self._joined = self._drift = self._loop = self._reporter = None
        self._trainable = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave what a fit has built out of a pickled callback or a copy: it belongs to this process."""
        built = ("_party", "_joined", "_drift", "_loop", "_trainable", "_reporter")
        return own_state(self, **dict.fromkeys(built))

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue exactly, even in the middle of a round."""
        if self._loop is None or not self._topology.is_leader:
            return self._state
        summary = {} if self.summary is None else asdict(self.summary)
        state = self._loop.state()
        # Paths among a module's hyperparameters are seen from there; `export` may be called elsewhere.
        return {"party": self._topology.party, **state, "summary": summary, "directory": os.getcwd()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: the aggregator does not exist yet."""
        self._state = state_dict

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave frozen parameters out of the checkpoint if asked to, unless rounds write into them."""
        if not self.parameters.save_frozen:
            for name in set(checkpoint["state_dict"]) & self._unsaved(pl_module):
                del checkpoint["state_dict"][name]

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check what non-strict loading of a checkpoint without frozen parameters would let pass."""
        if not self.parameters.save_frozen:
            state_dict = named_as_in(pl_module, checkpoint["state_dict"])
            arguments.trainable_checkpoint(pl_module, state_dict, self._unsaved(pl_module))

    # ---- the parts of the hooks

    def _stop_renaming(self) -> None:
        if self._renaming is not None:
            self._renaming.remove()
            self._renaming = None

    def _join(self, trainer: Trainer) -> None:
        if self._topology.is_leader and not (self._connects_itself or self.jobs or launched()):
            log.warning(
                "[party 0] No launcher found, so this is a federation of one party. To federate N parties on"
                " this host run `torchrun --nproc-per-node N your_script.py`%s.",
                f"; the {self._topology.party_size} processes of this Trainer are that one party"
                if self._topology.party_size > 1
                else "",
            )
        self._running_party.on_leader(self._connect_as_leader)
        if self._joined is not None:
            known = self._topology
            self._topology = Topology(
                *self._joined.place, known.rank_in_party, known.party_size, label=self._joined.name
            )
            self._party = Party(self._topology, trainer.strategy)
            self._joined.interrupt = lambda: raise_if_terminated(trainer)

    def _connect_as_leader(self) -> None:
        self._joined = self.connect()

    def _unsaved(self, module: LightningModule) -> set[str]:
        return unchanged_frozen(module, writes_base=self.writes_base)

    def _select(self, module: LightningModule) -> dict[str, nn.Parameter]:
        try:
            return self.parameters.select(module)
        except ValueError as error:
            cure = "" if any(p.requires_grad for p in module.parameters()) else f" {CURE}"
            raise MisconfigurationException(f"Party {self._topology.name}: {error}{cure}") from error

    def _check_trainable(self, trainer: Trainer, module: LightningModule, *, everything: bool) -> None:
        if self._trainable is not None:
            self._trainable.check(trainer, module, everything=everything)

    def _plan(self, module: LightningModule, parameters: Mapping[str, nn.Parameter]) -> Plan:
        try:
            return self.factory.plan(module, parameters, self._auxiliary)
        except ValueError as error:
            raise MisconfigurationException(f"Party {self._topology.name}: {error}") from error

    def _roster(self, trainer: Trainer) -> list[str]:
        """Return the names of all parties, on the leader; warn of those that share an accelerator."""
        if self._joined is None:
            return []
        if not self._joined.may_lose_parties:  # separate jobs are compared by their first quorum
            device = describe_device(trainer.strategy.root_device)
            arguments.devices(self._joined.gather_json("device", device))
        return list(self._joined.roster)

    def _written(self, trainer: Trainer) -> dict[str, list[str]]:
        """Return where the parties of a launch write, by name; of separate jobs where this one does."""
        if self._joined is None or self._joined.may_lose_parties:
            return {self._topology.name: isolation.written_paths(trainer)}
        return {
            name: list(spec["files"])
            for name, spec in zip(self._joined.names, self._joined.party_specs(), strict=True)
        }

    def _state_path(self, trainer: Trainer) -> str:
        root = isolation.below(trainer.default_root_dir, self._topology.party)
        kept = None if self.jobs is None else self.jobs.state_dir
        return kept or os.path.join(root, "federation")

    def _stopped_path(self, trainer: Trainer) -> str:
        return os.path.join(os.path.dirname(self._state_path(trainer)), "stopped.ckpt")

    @property
    def _auxiliary(self) -> AuxiliaryTerms | None:
        return None if self._drift is None else self._drift.auxiliary

    @property
    def _running_party(self) -> Party:
        if self._party is None:
            raise RuntimeError("The party is known only during a fit.")
        return self._party

    @property
    def _communicator(self) -> Communicator:
        if self._joined is None:
            raise RuntimeError("Training starts without a joined federation: setup('fit') has not run.")
        return self._joined

    @property
    def _running_loop(self) -> FederatedLoop:
        if self._loop is None:
            raise RuntimeError("A party takes part in rounds only while it trains.")
        return self._loop

    @property
    def _reporting(self) -> Reporter:
        if self._reporter is None:
            raise RuntimeError("There is nothing to report before training starts.")
        return self._reporter


def _before_run(trainer: Trainer, ckpt_path: Any) -> Any:
    for callback in isolation.callbacks_of(trainer):
        if isinstance(callback, FederatedAveraging):
            ckpt_path = callback.before_run(trainer, ckpt_path)
    return ckpt_path


precede_runs(_before_run)
