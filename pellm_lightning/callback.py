"""FederatedAveraging: Lightning's hooks -> schedule -> round."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor, nn
from typing_extensions import override

from pellm_lightning import checks, isolation, outer
from pellm_lightning.aggregation import Aggregation, lora_modules
from pellm_lightning.aggregation.base import Parts
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.beside import Beside, Contribution
from pellm_lightning.drift.base import DriftCorrection, check_optimizer, drift_correction_of
from pellm_lightning.environment import (
    Party,
    describe_device,
    shares_terminal,
    speak_as,
    topology_of,
)
from pellm_lightning.exchange import Exchange
from pellm_lightning.exchange.base import chosen
from pellm_lightning.federation import (
    TLS,
    Collectives,
    ElasticFederation,
    Federation,
    FederationError,
    Membership,
    TooFewPartiesError,
)
from pellm_lightning.federation.elastic.job import Job
from pellm_lightning.federation.launch.store import launched, store_from_env
from pellm_lightning.fragments import FragmentedAggregator, Turns, check_rule, fragments_of
from pellm_lightning.layout import Layout
from pellm_lightning.overlap import Overlap, OverlappedAggregator
from pellm_lightning.parameters import frozen, select
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.report import record as records
from pellm_lightning.report.about import About
from pellm_lightning.report.lines import show_log_lines
from pellm_lightning.report.teller import Teller
from pellm_lightning.round import Aggregator, RoundReport, granted
from pellm_lightning.samples import samples_in
from pellm_lightning.schedule import Clock, schedule
from pellm_lightning.topology import Topology
from pellm_lightning.validation import ValidationMetrics

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class SinceRound:
    """What this process did since the last round."""

    step: int = 0
    """``trainer.global_step`` at the last round."""
    samples: int = 0
    """Training samples consumed."""
    loss_sum: Tensor | float = 0.0
    """Training loss times samples, summed; a tensor, so that no step waits for the device."""
    loss_samples: int = 0
    """Samples behind ``loss_sum``."""


class Brought(NamedTuple):
    """What a party brings to a round."""

    weight: float
    loss: float | None
    """Mean training loss since the last round."""
    contribution: Contribution
    """What a drift correction adds."""
    turns: Turns
    """Whose turn it is when the round is over."""


class Started(NamedTuple):
    """What a party's processes must know when it has started."""

    overwritten: bool
    """Whether its parameters are another party's now."""
    round: int
    """Index of the round that comes."""
    names: list[str]
    """Of all parties."""
    settings: dict[str, str | int | float | None]
    """What all parties have agreed on."""


class FederatedAveraging(Callback):
    """Averages the trainable parameters over all parties, round by round, while ``trainer.fit`` goes on.

    Each party runs its own Trainer on its own data; only parameters with ``requires_grad=True`` leave it.
    Launched by ``torchrun --nproc-per-node N`` every process is a party, or every G processes with
    ``PartyEnvironment``. Without a launcher it is a federation of one party.

    Args:
        every_n_epochs: A round at the end of every n-th epoch, before that epoch's validation. Default: every
            epoch.
        every_n_steps: Instead, a round after every n optimizer steps (``trainer.global_step``).
        every_n_seconds: Instead, a round whenever n seconds of training are over, counted from the end of the
            last exchange: all parties come at about the same time, however many steps each has made.
        fragments: Number of groups of layers that take turns: each has a round as often as the schedule says,
            and at each exchange only a K-th of the parameters crosses.
        overlap: Lets rounds run in the background while training goes on; see ``Overlap``. Default: training
            stands still for a round.
        weighting: How much a party counts: "samples" by the training samples it consumed since the last
            round, all its processes together; "uniform" all alike; a number is this party's own fixed weight.
        aggregation: What is computed from the parties' parameters, from ``pellm_lightning.aggregation``.
            Default: ``LowRankMean()`` for LoRA, the weighted mean for all else.
        measure_deviation: Report each round by how much the result misses the mean of the LoRA products. It
            takes half as many bytes again as averaging the factors, and other parties see these. Default:
            where the exchange does not hide them, nor would have to send them for it alone to be compressed.
        exchange: How values are summed over the parties, from ``pellm_lightning.exchange``: ``Plain()``,
            ``Masked(...)`` so that nobody sees another's, or in fewer bytes ``Cast("bfloat16")``,
            ``Quantized(...)`` and ``TopK(...)``.
        privacy: Differential privacy of each party's updates, from ``pellm_lightning.privacy``. It needs
            weighting="uniform".
        include: Glob patterns over names of trainable parameters; only what matches one federates. Default:
            all.
        exclude: Glob patterns over names of trainable parameters that stay local.
        outer_optimizer: Optimizer of the global parameters, fed with the pseudo-gradient. ``SGD(lr=1)`` is
            FedAvg, ``SGD(lr=1, momentum=0.9)`` FedAvgM, ``Adam`` FedAdam, and ``SGD(lr=0.7, momentum=0.9,
            nesterov=True)`` DiLoCo.
        outer_scheduler: Learning rate of the outer optimizer by round: any scheduler of
            ``torch.optim.lr_scheduler`` that needs no metric, stepped once for each round in which a party
            counted. Its epochs are rounds.
        inner_optimizer_state: "keep" lets the local optimizers go on with their moments after a round,
            "reset" clears them.
        on_nonfinite: A party whose parameters hold NaN or infinity is left out of the round, takes over its
            result and clears its local optimizers ("exclude"), or all parties stop with an error ("raise").
        timeout_s: Seconds a party may be late before the others give up: more than the time by which the
            slowest party's local steps outlast the fastest's.
        check_base: Compare a sample of every frozen parameter over the parties before training.
        save_frozen: Whether checkpoints hold the frozen parameters too. Without them a checkpoint is as small
            as the adapter, and is resumed on, or loaded onto, a freshly built base.
        record: Whether each party writes what happens, round by round, into ``rounds.jsonl`` in the Trainer's
            ``default_root_dir`` (below ``party-<k>/`` if there are several), for
            ``python -m pellm_lightning report``. With ``fast_dev_run`` nothing is written.
        federation: Makes an already joined Federation, for parties that do not meet by the launcher's
            environment variables. Called once per fit.
        rendezvous: Makes this launch one party of several separate jobs, which join at "tcp://host:port"
            (``python -m pellm_lightning rendezvous``) or "etcd://host:port". Default: ``PELLM_RENDEZVOUS``.
        name: Name of this party among separate jobs. Default: ``PELLM_PARTY``.
        roster: Names of all parties, in the same order everywhere. Default: ``PELLM_ROSTER``, with commas.
        listen: "host:port" at which the other parties reach this one. Default: ``PELLM_LISTEN``, or this host
            only.
        advertise: "host:port" to tell them instead, where an address is translated on the way. Default:
            ``PELLM_ADVERTISE``.
        tls: This party's certificate and the federation's authority. Default: ``PELLM_TLS_CERT``,
            ``PELLM_TLS_KEY`` and ``PELLM_TLS_CA``; without any, nothing is encrypted.
        membership: How many parties a round of separate jobs needs, how long to wait for whom, and whether to
            go on without a lost one.
        state_dir: Where separate jobs keep the global state through their own death. Default: ``federation/``
            below the Trainer's ``default_root_dir/party-<k>``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every_n_seconds: float | None = None,
        fragments: int = 1,
        overlap: Overlap | None = None,
        weighting: Literal["samples", "uniform"] | float = "samples",
        aggregation: Aggregation | None = None,
        measure_deviation: bool | None = None,
        exchange: Exchange | None = None,
        privacy: GaussianMechanism | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        outer_optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1.0),
        outer_scheduler: LRSchedulerCallable | None = None,
        inner_optimizer_state: Literal["keep", "reset"] = "keep",
        on_nonfinite: Literal["exclude", "raise"] = "exclude",
        timeout_s: float = 1800,
        check_base: bool = True,
        save_frozen: bool = True,
        record: bool = True,
        federation: Callable[[], Federation | ElasticFederation] | None = None,
        rendezvous: str | None = None,
        name: str | None = None,
        roster: Sequence[str] = (),
        listen: str | None = None,
        advertise: str | None = None,
        tls: TLS | None = None,
        membership: Membership | None = None,
        state_dir: str | None = None,
    ) -> None:
        checks.fragments(fragments, every_n_steps, every_n_seconds)
        checks.overlap(overlap, every_n_steps, fragments)
        self._schedule = schedule(every_n_epochs, every_n_steps, every_n_seconds).shared_by(fragments)
        checks.weighting(weighting)
        checks.privacy(privacy, weighting)
        checks.one_of("inner_optimizer_state", inner_optimizer_state, ("keep", "reset"))
        checks.one_of("on_nonfinite", on_nonfinite, ("exclude", "raise"))
        checks.patterns("include", include)
        checks.patterns("exclude", exclude)
        checks.seconds("timeout_s", timeout_s)
        checks.outer(outer_optimizer, outer_scheduler)
        self.job = Job.configured(rendezvous, name, roster, listen, advertise, tls, membership)
        """How this party joins separate jobs; None if all parties come from one launch."""
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.fragments = fragments
        self.overlap = overlap
        self.weighting = weighting
        self.aggregation = aggregation
        self.measure_deviation = measure_deviation
        self.exchange: Exchange = chosen(exchange)
        self.privacy = privacy
        self.include = include
        self.exclude = exclude
        self.outer_optimizer = outer_optimizer
        self.outer_scheduler = outer_scheduler
        self.inner_optimizer_state = inner_optimizer_state
        self.on_nonfinite = on_nonfinite
        self.timeout_s = timeout_s
        self.check_base = check_base
        self.save_frozen = save_frozen
        self.record = record
        self.federation = federation
        self.rendezvous = rendezvous
        self.name = name
        self.roster = roster
        self.listen = listen
        self.advertise = advertise
        self.tls = tls
        self.membership = membership
        self.state_dir = state_dir
        self.rounds: list[RoundReport] = []
        """Reports of the rounds of the present fit, or of the last one."""
        self.about: About | None = None
        """What there is to say of its federation; None before training starts."""
        # What a fit builds; all of it is dropped when the fit ends.
        self._topology = Topology()
        self._party: Party | None = None
        self._drift: DriftCorrection | None = None
        self._joined: Federation | ElasticFederation | None = None
        self._aggregator: Aggregator | FragmentedAggregator | None = None
        self._plan: Plan | None = None
        self._trainable: dict[str, nn.Parameter] = {}
        self._layout: Layout | None = None
        self._resting: list[nn.Parameter] = []
        self._drained: Iterator[RoundReport] = iter(())
        self._since = SinceRound()
        self._turns = Turns.from_step(fragments, 0)
        self._dealt: list[set[str]] = []  # what crosses in which turn
        self._exchanged_at = 0.0  # by the clock of time.monotonic
        self._under_way_since: int | None = None  # step at which the round in the background began
        self._tells_loss = True
        self._teller: Teller | None = None
        self._validation = ValidationMetrics()
        # The state of a checkpoint that was loaded, or of the fit that has ended.
        self._state: dict[str, Any] = {}

    @property
    def writes_base(self) -> bool:
        """Whether rounds write into frozen weights, which then belong to what was trained."""
        return self.aggregation is not None and self.aggregation.writes_base

    # ---- hooks, in the order in which they run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the parties' files apart; for a fit also join the federation and refuse what cannot work."""
        self._topology = topology_of(trainer)
        if stage == "fit":
            # Of an earlier fit, which may have failed.
            self._state, self._aggregator, self._teller = {}, None, None
            self.rounds, self.about = [], None
            self._drift = self._drift_correction(trainer, pl_module)
            self._party = Party(self._topology, trainer.strategy)
            show_log_lines()
            self._join(trainer)
            checks.trainer(trainer, self, self._topology)
            if not self.save_frozen:
                checks.checkpoints(trainer)
            # First in line: EarlyStopping and ModelCheckpoint then read what we log in the same hook.
            isolation.put_first(trainer, self)
            self._tells_loss = not checks.protects_records(trainer, self.weighting)
        speak_as(self._topology.rank_in_party)
        if self._topology.party > 0:
            # Party 0 keeps the user's paths, since its loggers' files exist already. Those of the others do
            # not: their launcher's rank made them dummies until now.
            isolation.separate_files(trainer, self._topology.party)
            if shares_terminal(self._topology):
                isolation.hush(trainer)
        if not self.save_frozen:
            pl_module.strict_loading = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what the aggregation cannot handle; the module has its adapter by now."""
        if self.aggregation is not None:
            self._apply_rule(pl_module, self._select(pl_module))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on what is shared and take over party 0's parameters, or go on from the checkpoint."""
        checks.samplers(trainer, self._topology)
        trainable = self._select(pl_module)
        self._plan = self._apply_rule(pl_module, trainable)
        parameters = {name: trainable[name] for name in sorted(self._plan.shared)}
        for_good = self._plan.rule.resting(0) & self._plan.rule.resting(1)
        trained = parameters.keys() - self._plan.named(for_good)
        checks.optimizers(trainer, {name: parameters[name] for name in sorted(trained)})
        self._check_drift(trainer, parameters)
        self._since = SinceRound(**self._state["since"]) if self._state else SinceRound(trainer.global_step)
        self._dealt = [set(names) for names in fragments_of(parameters, self.fragments)]
        self._turns = Turns.from_step(self.fragments, self._since.step)
        if "turns" in self._state:
            self._turns = Turns(**self._state["turns"])
        self._under_way_since = self._state.get("under_way_since")
        self._trainable = trainable
        self._layout = Layout(parameters)
        started = self._in_party.speak(lambda: self._start(trainer, pl_module, trainable))
        resumed = bool(self._state) and not started.overwritten
        if started.overwritten:  # resumed in the middle of a round, each process has its own already
            self._share_in_party()
            self._since, self._under_way_since = SinceRound(trainer.global_step), None
            self._turns = Turns.from_step(self.fragments, trainer.global_step)
        if self._drift is not None:
            self._drift.begin(parameters, self._carried(), resumed=resumed)
        self._resting = self._parameters(self._plan.rule.resting(started.round))
        self._exchanged_at = time.monotonic()
        self.about = About(started.names, started.settings, self.writes_base).resumed(
            self._state.get("about", {})
        )
        self._teller = Teller(trainer, self._topology, self.about, self.rounds, self._new_record(trainer))
        if self._topology.is_speaker:
            self._teller.began(
                pl_module, self._plan, parameters, self.exchange, self.privacy, round=started.round
            )
            if self._joined is not None:
                self._teller.show(self._joined.phases)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the gradients of what rests in this round, before they are clipped or applied.

        Without a gradient an optimizer leaves a parameter and its state alone, weight decay included.
        """
        for parameter in self._resting:
            parameter.grad = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what was consumed; run the round that is due, before Lightning validates and saves."""
        self._count(trainer, outputs, batch)
        if self._may_land(trainer):
            self._land(trainer, pl_module, on_bar=True)
        if self._is_due(trainer, epoch_ends=trainer.is_last_batch):
            if self.overlap is None:
                self._run_round(trainer, pl_module)
            else:
                self._begin_round(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the round first if training is over; remember which metrics are older than now."""
        if not _validates_in_fit(trainer):
            return
        if _is_stopping(trainer):
            self._close_round(trainer, pl_module)
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
        if _validates_in_fit(trainer):
            self._validation.count(batch, dataloader_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the metrics over the parties before EarlyStopping and ModelCheckpoint read them."""
        if _validates_in_fit(trainer):
            local = self._validation.end(trainer, self._in_party)
            mean = self._in_party.speak(lambda: self._or_why_not(lambda: self._speaking.mean(local)))
            if isinstance(mean, str):
                self._stop_for_lack_of_parties(trainer, mean)
            self._telling.validated(local, mean)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the epoch's round if its last batch did not: skipped, or cut short by max_steps."""
        if self._is_due(trainer, epoch_ends=True):
            self._run_round(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the last, incomplete round; then answer the others' rounds until every party is through."""
        self._close_round(trainer, pl_module)

        def drained() -> RoundReport | str | None:
            return self._or_why_not(lambda: next(self._drained, None))

        while (done := self._in_party.speak(drained)) is not None:
            if isinstance(done, str):
                log.warning("[party %s] Ends without the others. %s", self._topology.name, done)
                break
            self._took_over(trainer, pl_module, done, on_bar=False)
        if self._joined is not None:
            self._joined.close()
        self._telling.ended()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave at once, so that the others fail in seconds and can say why."""
        if self._joined is not None:
            # Of a FederationError the others know already, from us or from the party that caused it.
            known = isinstance(exception, FederationError)
            self._joined.abort(None if known else f"{type(exception).__name__}: {exception}")
        if self._teller is not None:
            self._teller.ended(f"{type(exception).__name__}: {exception}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave, if that has not happened yet, and drop every reference to the module."""
        if stage != "fit":
            return
        if self._joined is not None and self._aggregator is None:
            why = _why_nothing_was_trained(trainer)
            log.warning("[party %s] Left the federation: %s.", self._topology.name, why)
            self._joined.abort(why)
        self._state = self.state_dict()
        self._party = self._joined = self._aggregator = self._layout = self._plan = self._drift = None
        self._teller = None
        self._trainable, self._resting = {}, []
        self._drained = iter(())

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on exactly, in the middle of a round too."""
        if self._aggregator is None:
            return self._state
        aggregator = self._aggregator.state_dict()
        lost = self._under_way_since is not None and self._overlapped.failed
        return {
            "party": self._topology.party,
            "aggregator": aggregator,
            "since": asdict(self._since) | {"loss_sum": float(self._since.loss_sum)},
            "turns": asdict(self._turns),
            "under_way_since": None if lost else self._under_way_since,
            "about": {} if self.about is None else asdict(self.about),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: the aggregator does not exist yet."""
        self._state = state_dict

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave frozen parameters out of the checkpoint if asked to, unless rounds write into them."""
        if not self.save_frozen:
            for name in set(checkpoint["state_dict"]) & self._left_out(pl_module):
                del checkpoint["state_dict"][name]

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check what non-strict loading of a checkpoint without frozen parameters would let pass."""
        if not self.save_frozen:
            checks.trainable_checkpoint(pl_module, checkpoint["state_dict"], self._left_out(pl_module))

    # ---- the parts of the hooks

    def _join(self, trainer: Trainer) -> None:
        if self.federation is None and self.job is None and not launched():
            log.warning(
                "[party 0] No launcher found, so this is a federation of one party. To federate N parties on"
                " this host run `torchrun --nproc-per-node N your_script.py`."
            )
        self._in_party.speak(self._join_as_speaker)
        if self._joined is not None:
            known = self._topology
            self._topology = Topology(
                *self._joined.place, known.rank_in_party, known.party_size, label=self._joined.name
            )
        if isinstance(self._joined, ElasticFederation):
            self._joined.interrupt = lambda: _raise_if_terminated(trainer)

    def _join_as_speaker(self) -> None:
        if self.federation is not None:
            self._joined = self.federation()
        elif self.job is not None:
            self._joined = self.job.join()
        else:
            party, num_parties = self._topology.party, self._topology.num_parties
            store = store_from_env(self.timeout_s)
            self._joined = Federation(store, party, num_parties, timeout_s=self.timeout_s)

    def _left_out(self, module: LightningModule) -> set[str]:
        """Return the names of the frozen parameters that are as they were before the fit."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        kept: set[int] = set()
        if self.writes_base:
            bases = [lora.base for lora in lora_modules(module).values()]
            kept = {base.data_ptr() for base in bases if base is not None}
        return {name for name, p in parameters.items() if not p.requires_grad and p.data_ptr() not in kept}

    def _select(self, module: LightningModule) -> dict[str, nn.Parameter]:
        try:
            return select(module, self.include, self.exclude)
        except ValueError as error:
            raise MisconfigurationException(f"Party {self._topology.name}: {error}") from error

    def _apply_rule(self, module: LightningModule, parameters: Mapping[str, nn.Parameter]) -> Plan:
        try:
            plan = Plan(
                self.aggregation,
                parameters,
                lora_modules(module),
                granted=granted(self.exchange, self.privacy, self._beside),
            )
            if self.overlap is not None:
                self.overlap.check(plan.rule)
            if self.fragments > 1:
                check_rule(plan.rule)
                fragments_of(plan.shared, self.fragments)
            return plan
        except ValueError as error:
            raise MisconfigurationException(f"Party {self._topology.name}: {error}") from error

    def _start(
        self, trainer: Trainer, pl_module: LightningModule, parameters: dict[str, nn.Parameter]
    ) -> Started:
        """Start as the speaker."""
        if self._joined is None:
            raise RuntimeError("Training starts without a joined federation: setup('fit') has not run.")
        self._aggregator = self._made(
            self._joined,
            trainer,
            pl_module,
            parameters,
            overlap=self.overlap,
            state_dir=self._state_path(trainer),
        )
        if self._state:
            checks.own_checkpoint(self._state["party"], self._topology.party)
            checks.same_turns(len(self._turns.steps), self.fragments)
            checks.can_land(self._under_way_since, self.overlap)
            self._aggregator.load_state_dict(self._state["aggregator"])
        overwritten = self._aggregator.start()
        if isinstance(self._joined, Federation):
            device = describe_device(trainer.strategy.root_device)
            checks.devices(self._joined.all_gather_json("device", device))
        self._drained = self._aggregator.drain()
        aggregator = self._aggregator
        return Started(overwritten, aggregator.round, list(self._joined.roster), dict(aggregator.settings))

    def rehearsal(
        self,
        federation: Collectives,
        trainer: Trainer,
        module: LightningModule,
        parameters: Mapping[str, Tensor],
    ) -> Aggregator | FragmentedAggregator:
        """Return an aggregator as a fit's, of other tensors; it keeps nothing on disk, no round overlaps.

        Args:
            federation: Who takes part.
            trainer: What the fit will be run by.
            module: The module, whole: its adapter is there.
            parameters: Stand for the module's, by the names of ``parameters.select``.

        Raises:
            ValueError, MisconfigurationException: As the fit would.
        """
        self._drift = self._drift_correction(trainer, module)
        return self._made(federation, trainer, module, parameters, overlap=None, state_dir=None)

    def _made(
        self,
        federation: Collectives,
        trainer: Trainer,
        module: LightningModule,
        parameters: Mapping[str, Tensor],
        *,
        overlap: Overlap | None,
        state_dir: str | None,
    ) -> Aggregator | FragmentedAggregator:
        """Return the aggregator that the arguments describe."""
        whole: Callable[..., Aggregator] = Aggregator
        if overlap is not None:
            whole = partial(OverlappedAggregator, overlap=overlap)
        make: Callable[..., Aggregator | FragmentedAggregator] = whole
        if self.fragments > 1:
            make = partial(FragmentedAggregator, fragments=self.fragments, make=whole)
        return make(
            federation,
            parameters,
            aggregation=self.aggregation,
            lora=lora_modules(module),
            measure_deviation=self.measure_deviation,
            exchange=self.exchange,
            privacy=self.privacy,
            beside=self._beside,
            outer_optimizer=self.outer_optimizer,
            outer_scheduler=self.outer_scheduler,
            frozen=frozen(module) if self.check_base else None,
            config={
                "every_n_epochs": self.every_n_epochs,
                "every_n_steps": self.every_n_steps,
                "every_n_seconds": self.every_n_seconds,
                "fragments": self.fragments,
                "overlap": repr(self.overlap),
                "weighting": self.weighting if isinstance(self.weighting, str) else "a number",
                "on_nonfinite": self.on_nonfinite,
                "inner_optimizer_state": self.inner_optimizer_state,
            },
            files=isolation.written_paths(trainer),
            on_nonfinite=self.on_nonfinite,
            state_dir=state_dir,
        )

    def _new_record(self, trainer: Trainer) -> records.Record | None:
        if not self.record or vars(trainer).get("fast_dev_run"):
            return None
        root = trainer.default_root_dir
        if self._topology.num_parties > 1:
            root = isolation.below(root, self._topology.party)
        return records.Record(os.path.join(root, records.NAME))

    def _state_path(self, trainer: Trainer) -> str:
        root = isolation.below(trainer.default_root_dir, self._topology.party)
        return self.state_dir or os.path.join(root, "federation")

    def _count(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        samples = samples_in(batch, otherwise=None if self.weighting == "samples" else 1)
        self._since.samples += samples
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning hands over the loss divided by the number of batches that it accumulates (which is 1
            # with manual optimization).
            weight = samples * trainer.accumulate_grad_batches
            self._since.loss_sum = self._since.loss_sum + loss.detach().float() * weight
            self._since.loss_samples += samples

    def _is_due(self, trainer: Trainer, *, epoch_ends: bool) -> bool:
        clock = Clock(
            steps=trainer.global_step - self._since.step,
            seconds=time.monotonic() - self._exchanged_at,
            epoch=trainer.current_epoch,
            epoch_ends=epoch_ends,
        )
        if self.every_n_seconds is None:
            return self._schedule.due(clock)
        return self._in_party.speak(lambda: self._schedule.due(clock))  # clocks differ

    def _run_round(self, trainer: Trainer, pl_module: LightningModule, *, on_bar: bool = True) -> None:
        """Run a round while training stands still."""
        self._land(trainer, pl_module, on_bar=on_bar)
        brought = self._brought(trainer)
        done = self._in_party.speak(
            lambda: self._or_why_not(
                lambda: self._speaking.step(brought.weight, brought.loss, brought.contribution)
            )
        )
        if isinstance(done, str):
            self._stop_for_lack_of_parties(trainer, done)
        self._since, self._turns = SinceRound(trainer.global_step), brought.turns
        self._exchanged_at = time.monotonic()
        self._took_over(trainer, pl_module, done, on_bar=on_bar)

    def _close_round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the last, incomplete round of each fragment; all parties end with the same parameters."""
        while self._turns.behind(trainer.global_step):
            self._run_round(trainer, pl_module, on_bar=False)
        self._land(trainer, pl_module, on_bar=False)

    def _begin_round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a round run in the background."""
        self._land(trainer, pl_module, on_bar=True)
        brought = self._brought(trainer)
        self._in_party.speak(lambda: self._overlapped.begin(brought.weight, brought.loss))
        self._since, self._turns = SinceRound(trainer.global_step), brought.turns
        self._under_way_since = trainer.global_step
        if self._may_land(trainer):
            self._land(trainer, pl_module, on_bar=True)

    def _may_land(self, trainer: Trainer) -> bool:
        """Tell whether the round in the background has had its time, or has failed."""
        if self._under_way_since is None or self.overlap is None:
            return False
        alone = self._topology.party_size == 1  # else all processes of the party must decide alike
        failed = alone and self._overlapped.failed
        return failed or trainer.global_step - self._under_way_since >= self.overlap.delay_steps

    def _land(self, trainer: Trainer, pl_module: LightningModule, *, on_bar: bool) -> None:
        """Wait for the round in the background, if there is one, and take over its result."""
        if self._under_way_since is None:
            return
        last = trainer.global_step == self._under_way_since  # nothing was learned since that could be mixed
        try:
            done = self._in_party.speak(lambda: self._or_why_not(lambda: self._overlapped.land(last=last)))
        except Exception:  # the round is lost; if only the waiting was interrupted, it is not
            self._under_way_since = None
            raise
        self._under_way_since = None
        if isinstance(done, str):
            self._stop_for_lack_of_parties(trainer, done)
        if self._topology.is_speaker:
            self._exchanged_at = self._overlapped.completed
        self._took_over(trainer, pl_module, done, on_bar=on_bar)

    def _brought(self, trainer: Trainer) -> Brought:
        """Return what this party brings to a round: its weight, its loss, what a drift correction adds."""
        since = self._since
        samples, loss_sum, loss_samples = self._in_party.sum(
            [since.samples, float(since.loss_sum), since.loss_samples]
        )
        turns = self._turns.passed_on(samples, trainer.global_step)
        samples += self._turns.samples[self._turns.next]
        weight = {"samples": samples, "uniform": 1.0}.get(str(self.weighting), self.weighting)
        loss = loss_sum / loss_samples if loss_samples and self._tells_loss else None
        given = Contribution() if self._drift is None else self._drift.contribution()
        return Brought(float(weight), loss, given, turns)

    @staticmethod
    def _or_why_not(meet: Callable[[], T]) -> T | str:
        """Return what ``meet`` returns; in words, why it could not for lack of others."""
        try:
            return meet()
        except TooFewPartiesError as error:
            return str(error)

    def _stop_for_lack_of_parties(self, trainer: Trainer, why: str) -> NoReturn:
        """Keep this party's own steps since the last round, then stop."""
        path = os.path.join(os.path.dirname(self._state_path(trainer)), "stopped.ckpt")
        trainer.save_checkpoint(path)
        raise TooFewPartiesError(
            f"{why} Its own steps since the last round are in {path}; resume it from there."
        )

    def _took_over(
        self, trainer: Trainer, pl_module: LightningModule, done: RoundReport, *, on_bar: bool
    ) -> None:
        """Finish a round that has written this party's parameters."""
        self._share_in_party()
        if self._drift is not None:
            self._drift.end_round(self._carried(), counted=done.weight > 0)
        # What made parameters NaN has made the moments NaN as well, and the next step would bring it back.
        if self.inner_optimizer_state == "reset" or self._topology.party in done.excluded:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        # Moments in coordinates that are no more.
        regauged = self._planned.named(self._planned.rule.regauged(done.active_parties))
        crossed = self._dealt[done.round % self.fragments]
        for parameter in [self._trainable[name] for name in sorted(regauged & crossed)]:
            for optimizer in trainer.optimizers:
                optimizer.state.pop(parameter, None)
        self._resting = self._parameters(self._planned.rule.resting(done.round + 1))
        if done.last:
            trainer.should_stop = True
        self._telling.round(pl_module, done, on_bar=on_bar)

    def _share_in_party(self) -> None:
        """Give the party's other processes what the speaker has just written into its parameters."""
        if self._topology.party_size == 1 or self._layout is None:
            return
        vector = self._layout.pack_(self._layout.new_vector())
        self._in_party.broadcast_(vector)
        self._layout.unpack_(vector)
        for base in self._planned.written_bases:
            self._in_party.broadcast_(base)

    def _carried(self) -> dict[str, Tensor]:
        """Return the mean of what the parties carried beside their updates, in every process of the party."""
        if self._layout is None or self._beside is None or not self._beside.vector:
            return {}
        vector = self._layout.new_vector()
        if self._aggregator is not None:
            for name, part in self._aggregator.carried.items():
                self._layout.view(vector, name).copy_(part)
        self._in_party.broadcast_(vector)
        return {name: self._layout.view(vector, name) for name in self._layout.names}

    def _drift_correction(self, trainer: Trainer, module: LightningModule) -> DriftCorrection | None:
        """Return the Trainer's drift correction; refuse what it cannot go with."""
        drift = drift_correction_of(trainer, module)
        if drift is not None:
            optimizer = self.outer_optimizer([nn.Parameter(torch.zeros(1))])
            lands = outer.always_lands(optimizer, scheduled=self.outer_scheduler is not None)
            if self.overlap is not None or self.fragments > 1:
                raise MisconfigurationException(
                    f"{drift.beside.method} corrects each local step by what the last round gave for all"
                    " parameters, which with an overlap or fragments is not there yet. Leave out one of them."
                )
            try:
                drift.beside.check(private=self.privacy is not None, lands=lands)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from error
        return drift

    def _check_drift(self, trainer: Trainer, parameters: Mapping[str, nn.Parameter]) -> None:
        """Refuse optimizers with which the drift correction would be wrong."""
        if self._drift is None:
            return
        for optimizer in trainer.optimizers:
            check_optimizer(trainer, optimizer, self._drift)
            self._drift.check(optimizer, parameters, resets=self.inner_optimizer_state == "reset")

    @property
    def _overlapped(self) -> OverlappedAggregator | FragmentedAggregator:
        if not isinstance(self._aggregator, OverlappedAggregator | FragmentedAggregator):
            raise RuntimeError("Only the party's first process aggregates, and only during a fit.")
        return self._aggregator

    @property
    def _beside(self) -> Beside | None:
        return None if self._drift is None else self._drift.beside

    def _parameters(self, parts: Parts) -> list[nn.Parameter]:
        """Return this party's parameters that are such parts."""
        return [self._trainable[name] for name in self._planned.named(parts)]

    @property
    def _planned(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("The aggregation is applied to the parameters only during a fit.")
        return self._plan

    @property
    def _in_party(self) -> Party:
        if self._party is None:
            raise RuntimeError("The party is known only during a fit.")
        return self._party

    @property
    def _telling(self) -> Teller:
        if self._teller is None:
            raise RuntimeError("There is nothing to tell of before training starts.")
        return self._teller

    @property
    def _speaking(self) -> Aggregator | FragmentedAggregator:
        if self._aggregator is None:
            raise RuntimeError("Only the party's first process aggregates, and only during a fit.")
        return self._aggregator


def _validates_in_fit(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _is_stopping(trainer: Trainer) -> bool:
    """Whether training ends at this batch: it was told to stop, and is free to."""
    free = trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (
        trainer.min_steps or 0
    )
    return trainer.should_stop and free


def _raise_if_terminated(trainer: Trainer) -> None:
    """Stop waiting for others when this process is told to end; Lightning looks only between batches."""
    if trainer.received_sigterm:
        raise SIGTERMException


def _why_nothing_was_trained(trainer: Trainer) -> str:
    if trainer.limit_train_batches == 0 or trainer.num_training_batches == 0:
        return (
            "it has no training batches, so its fit ended before it began; give it data or start without it"
        )
    return "its fit ended before it began, since max_epochs or max_steps was reached already"
