"""FederatedAveraging: its arguments, Lightning hooks in the order in which they run, and checkpoints."""

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from pellm_lightning.aggregation import Aggregation
from pellm_lightning.callbacks import arguments as checks
from pellm_lightning.callbacks.fit import FederatedFit, state_dir, stopped_path
from pellm_lightning.callbacks.simulation.checks import unsupported_arguments
from pellm_lightning.callbacks.simulation.data import offer, offered_anew
from pellm_lightning.callbacks.simulation.fit import SimulatedFit
from pellm_lightning.callbacks.strategies import check_strategy, is_sharding
from pellm_lightning.comm import Communicator, Quorum
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.join import join
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine import outer_optimizer
from pellm_lightning.engine.optim import without_parser
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.exchange import Exchange
from pellm_lightning.exchange.base import as_exchange
from pellm_lightning.loop import arguments
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.loop.parameters import Parameters
from pellm_lightning.loop.simulation.settings import Simulation
from pellm_lightning.loop.weighting import Weighting
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.report.logs import show_log_lines
from pellm_lightning.report.run_summary import RunSummary
from pellm_lightning.tensors.selection import load_compiled_, named_as_in, plain_name
from pellm_lightning.trainer import isolation
from pellm_lightning.trainer.environment import check_party_size, owns_terminal, set_rank_zero, topology_of
from pellm_lightning.trainer.pickling import own_state
from pellm_lightning.trainer.resume import check_checkpoint, last_of_unfinished, precede_runs

log = logging.getLogger(__name__)
_NUMBERS = itertools.count()
_SAVED = "pellm_lightning saved"
"""Key of a checkpoint: the names of what it holds of the module, if frozen parameters are left out."""


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
            ``Weighting`` also caps the share of each party.
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
        on_nonfinite: A party whose parameters hold NaN or infinity, or whose update has a thousand times the
            median norm of the others', is left out of the round, takes over its
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
        simulate: Lets the launch's processes train many parties in turn on the one module that each holds;
            see ``Simulation``. The data module's ``party_dataloader(party)`` gives a party's batches, and
            each epoch of the Trainer is a round.

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
        weighting: Literal["samples", "uniform"] | float | Weighting = "samples",
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
        simulate: Simulation | None = None,
    ) -> None:
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.weighting = weighting
        self.aggregation = aggregation
        self.exchange = as_exchange(exchange)
        self.privacy = privacy
        self.overlap = Overlap() if overlap is None else overlap
        self.parameters = Parameters() if parameters is None else parameters
        self.outer_optimizer = without_parser(outer_optimizer)
        self.outer_scheduler = without_parser(outer_scheduler)
        self.inner_optimizer_state = inner_optimizer_state
        self.on_nonfinite = on_nonfinite
        self.quorum = quorum
        self.timeout_s = timeout_s
        self.record = record
        self.jobs = arguments.separate_jobs(jobs, timeout_s, self.factory.quorum)
        """How this party joins separate jobs; None if all parties come from one launch."""
        self.simulate = simulate
        self._check_simulation()
        self.rounds: list[RoundReport] = []
        """Reports of the rounds of the present fit, or of the last one."""
        self.summary: RunSummary | None = None
        """Summary of its federation; None before training starts."""
        self._is_set_up = False
        self._topology = Topology()
        self._fit: FederatedFit | SimulatedFit | None = None
        self._batches: Callable[[], object] = _do_nothing
        self._withdraw_data: Callable[[], None] = _do_nothing
        self._renaming: RemovableHandle | None = None
        # The state of a checkpoint that was loaded, or of the fit that has ended.
        self._state: dict[str, Any] = {}

    @property
    def factory(self) -> AggregatorFactory:
        """Factory of aggregators as a fit's."""
        return AggregatorFactory(**{arg.name: getattr(self, arg.name) for arg in fields(AggregatorFactory)})

    @property
    def writes_base(self) -> bool:
        """Whether rounds write into frozen weights, which then belong to what was trained."""
        return self.aggregation is not None and self.aggregation.writes_base

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
        return join(self._topology, self.jobs, quorum=self.quorum, timeout_s=self.timeout_s)

    # ---- hooks, in the order in which they run

    def before_run(self, trainer: Trainer, ckpt_path: Any) -> Any:
        """Separate the parties' files before Lightning looks for ``ckpt_path``; return which to resume."""
        check_checkpoint(ckpt_path)
        if type(self).connect is not FederatedAveraging.connect:
            return ckpt_path  # which party this is will be known when it has joined
        self._separate(trainer, topology_of(trainer))
        if self._topology.is_leader:
            isolation.keep_metrics(trainer)
        if self.jobs is None or ckpt_path != "last":
            return ckpt_path
        party = self._topology.party
        folder, stopped = state_dir(trainer, party, self.jobs), stopped_path(trainer, party, self.jobs)
        return last_of_unfinished(trainer, party, folder, stopped) or ckpt_path

    def offer_data(self, run: Mapping[str, Any]) -> None:
        """Let the data module of a run give the batches of a simulation's parties.

        Args:
            run: Arguments of the Trainer's method, by name.
        """
        self._withdraw_data()
        if self.simulate is not None:
            self._withdraw_data = offer(run, lambda: self._batches())

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Separate the parties' files; for a fit also join the federation and refuse what cannot work."""
        self._is_set_up = True
        self._topology = topology_of(trainer)
        if stage == "fit":
            if self.jobs is not None:  # of one launch the check of the strategy says more
                check_party_size(self._topology, trainer.num_devices, trainer.num_nodes)
            self._state, self.rounds, self.summary = {}, [], None
            check_strategy(trainer, self._topology, self.factory)
            self._fit = self._new_fit(trainer, pl_module)
            show_log_lines()
            self._fit.join()
            self._fit.check_trainer(self)
            if self.simulate is not None:
                self._withdraw_data = offered_anew(trainer, self._withdraw_data)
            # First in line: EarlyStopping and ModelCheckpoint then read what we log in the same hook.
            isolation.put_first(trainer, self)
            self._topology = self._fit.party.topology
        else:
            checks.only_one(trainer, self)
        # Party 0 keeps the user's paths, since its loggers' files exist already. Those of the others do not:
        # their launcher's rank made them dummies until now.
        self._separate(trainer, self._topology)
        if self._topology.party > 0 and not owns_terminal(self._topology):
            isolation.silence(trainer)
        if not self.parameters.save_frozen:
            pl_module.strict_loading = False
        self._stop_renaming()  # of a fit that has failed
        self._renaming = pl_module.register_load_state_dict_pre_hook(load_compiled_)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what the aggregation cannot handle; the module has its adapter by now."""
        self._running.check_module()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on what is shared and take party 0's parameters, or resume from the checkpoint."""
        self.summary = self._running.start(self._state, self.rounds, record=self.record)
        self._state = {}  # it may be as large as the model

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the gradients of parameters frozen in this round, before they are clipped or applied."""
        running = self._running
        running.check_trainable(everything=False)
        running.drop_gradients()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; run the round that is due, before Lightning validates and saves."""
        running = self._running
        if trainer.is_last_batch:
            running.check_trainable(everything=True)
        loop = running.count(outputs, batch, batch_idx)
        loop.after_batch(epoch_ends=trainer.is_last_batch)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the round first if training is over; remember which metrics are older than now."""
        if _validates_in_fit(trainer):
            self._running.start_validation()

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
        if _validates_in_fit(trainer):
            self._running.validation.count(trainer, batch, batch_idx, dataloader_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the metrics over the parties before EarlyStopping and ModelCheckpoint read them."""
        if trainer.sanity_checking:
            self._running.validation.check(trainer)
        elif _validates_in_fit(trainer):
            self._running.end_validation()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the epoch's round if its last batch did not: skipped, or cut short by max_steps."""
        self._running.after_epoch()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the last, incomplete round; then answer the other parties' rounds until all have finished."""
        self._running.finish()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave at once, so that the other parties fail in seconds with the reason."""
        self._withdraw_data()
        if self._fit is not None:
            self._fit.fail(exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave, if that has not happened yet, and drop every reference to the module."""
        self._stop_renaming()
        self._withdraw_data()
        if stage == "fit" and self._fit is not None:
            self._fit.leave()
            self._state, self._fit = self.state_dict(), None

    def __getstate__(self) -> dict[str, Any]:
        """Leave what a fit has built out of a pickled callback or a copy: it belongs to this process."""
        return own_state(self, _fit=None, _withdraw_data=_do_nothing, _batches=_do_nothing)

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue exactly, even in the middle of a round."""
        running = None if self._fit is None else self._fit.state()
        return self._state if running is None else running

    @property
    def evidence(self) -> str | None:
        """Certificates of the rounds, signed by a quorum, as ``Aggregator.evidence``; None without."""
        running = None if self._fit is None else self._fit.evidence
        of_state: str | None = self._state.get("aggregator", {}).get("evidence")
        return of_state if running is None else running

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: the aggregator does not exist yet."""
        self._state = state_dict

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave frozen parameters out of the checkpoint if asked to, unless rounds write into them."""
        if self.parameters.save_frozen:
            return
        unsaved, saved = {plain_name(name) for name in self._unsaved(pl_module)}, checkpoint["state_dict"]
        for name in [name for name in saved if plain_name(name) in unsaved]:
            del saved[name]
        if is_sharding(trainer.strategy):  # which loads the module's state before it tells what there was
            checkpoint[_SAVED] = list(saved)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check what non-strict loading of a checkpoint without frozen parameters would let pass."""
        if not self.parameters.save_frozen:
            saved = checkpoint.get("state_dict") or dict.fromkeys(checkpoint.get(_SAVED, ()))
            state_dict = named_as_in(pl_module, saved)
            checks.trainable_checkpoint(pl_module, state_dict, self._unsaved(pl_module))

    # ---- small parts

    @property
    def _running(self) -> FederatedFit | SimulatedFit:
        if self._fit is None:
            raise RuntimeError("Rounds belong to a fit: setup('fit') has not run.")
        return self._fit

    def _check_simulation(self) -> None:
        """Refuse arguments that do not go with ``simulate``.

        Raises:
            ValueError: If there is one.
        """
        arguments.instance_of("simulate", self.simulate, Simulation)
        if self.simulate is not None:
            for reason in unsupported_arguments(self.factory, separate_jobs=self.jobs is not None):
                raise ValueError(f"simulate={self.simulate!r:.200}: {reason}.")

    def _new_fit(self, trainer: Trainer, module: LightningModule) -> FederatedFit | SimulatedFit:
        factory, topology = self.factory, self._topology
        if self.simulate is None:
            return FederatedFit(factory, self.jobs, trainer, module, topology, self.connect)
        fit = SimulatedFit(factory, self.simulate, trainer, module, topology, self.connect)
        self._batches = lambda: fit.batches(self._state)
        return fit

    def _separate(self, trainer: Trainer, topology: Topology) -> None:
        """Let Lightning take the party for its whole world, and keep its files apart from the others'."""
        self._topology = topology
        set_rank_zero(topology.rank_in_party)
        if topology.party > 0:
            isolation.separate_files(trainer, topology.party)

    def _unsaved(self, module: LightningModule) -> set[str]:
        return self.parameters.unsaved(module, writes_base=self.writes_base)

    def _stop_renaming(self) -> None:
        if self._renaming is not None:
            self._renaming.remove()
            self._renaming = None


def _do_nothing() -> None:
    """Stand for what a simulation gives and takes back, before there is one."""


def _validates_in_fit(trainer: Trainer) -> bool:
    """Return whether the running validation belongs to a fit, and is no sanity check."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _before_run(trainer: Trainer, run: Mapping[str, Any]) -> Any:
    ckpt_path = run.get("ckpt_path")
    for callback in isolation.callbacks_of(trainer):
        if isinstance(callback, FederatedAveraging):
            callback.offer_data(run)
            ckpt_path = callback.before_run(trainer, ckpt_path)
    return ckpt_path


precede_runs(_before_run)
