"""FederatedLoop: rounds in a training loop of one's own, in plain PyTorch, Fabric or another library."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self, override

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import Communicator, FederationError
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.join import join, launch_topology
from pellm_lightning.comm.party import Party
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop import arguments
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.loop.local_training import LocalTraining
from pellm_lightning.loop.round_loop import RoundLoop, Started
from pellm_lightning.loop.trainable import TrainableSet
from pellm_lightning.report.logs import log_round, log_start, show_log_lines
from pellm_lightning.report.record import FILE_NAME, RunRecord, Start, Validation
from pellm_lightning.report.run_summary import RunSummary
from pellm_lightning.trainer.environment import owns_terminal

log = logging.getLogger(__name__)


class OwnTraining(LocalTraining):
    """Training loop of one's own, as ``FederatedLoop`` is told of it.

    Args:
        module: The module that it trains.
        optimizers: The local optimizers.
        planned_steps: Optimizer steps after which it ends; NaN if unknown.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], planned_steps: float) -> None:
        self._module = module
        self._optimizers = optimizers
        self._planned_steps = planned_steps
        self.steps = self.epochs = 0
        self.stopped = False

    @property
    @override
    def step(self) -> int:
        return self.steps

    @property
    @override
    def epoch(self) -> int:
        return self.epochs

    @property
    @override
    def planned_steps(self) -> float:
        return self._planned_steps

    @property
    @override
    def optimizers(self) -> Sequence[Optimizer]:
        return self._optimizers

    @override
    def stop(self) -> None:
        self.stopped = True

    @override
    def save(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach() for name, p in self._module.named_parameters() if p.requires_grad}
        torch.save({"step": self.steps, "epoch": self.epochs, "parameters": trained}, path)

    @override
    def check_new_start(self, signature: str, round: int) -> None:
        """Do nothing: where a loop of one's own keeps its checkpoints is not known here."""


class FederatedLoop:
    """Federation of a training loop of one's own: the rounds of ``FederatedAveraging`` without Lightning.

    Launched by ``torchrun`` each process is a party. A party of several processes has torch's default
    process group to itself, as Fabric makes it with ``PartyEnvironment``. As a context manager it joins and
    starts; at the end it runs the last, incomplete round and answers the other parties until all have
    finished; an error makes it leave at once, with the reason.

    Args:
        module: The module, with its adapter; only parameters with ``requires_grad=True`` leave the party.
        optimizers: The local optimizers, one or several.
        planned_steps: Optimizer steps after which the loop ends, if that is known.
        folder: Where this party writes: ``rounds.jsonl`` for ``pellm report``, the state between separate
            jobs, what was trained if a quorum is lost. Below it each of several parties has ``party-<k>``.
        record: Whether ``rounds.jsonl`` is written.
        jobs: Makes this process one party of several separate jobs. Default: the environment's.
        timeout_s: Seconds a party may be late before the others give up.
        communicator: The joined parties; None joins them as environment or ``jobs`` say.
        local: The training loop; None for one that calls ``after_step``.
        settings: Further arguments of ``FederatedAveraging``: ``every_n_steps``, ``every_n_epochs``,
            ``every_n_seconds``, ``weighting``, ``aggregation``, ``exchange``, ``privacy``, ``overlap``,
            ``parameters``, ``outer_optimizer``, ``outer_scheduler``, ``inner_optimizer_state``,
            ``on_nonfinite`` and ``quorum``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with FederatedLoop(model, optimizer, every_n_steps=2, record=False) as federated:
        ...     for x in torch.ones(4, 8, 2):
        ...         loss = model(x).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         federated.after_step(samples=len(x), loss=loss)
        >>> [report.round for report in federated.rounds]
        [0, 1]
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer] = (),
        *,
        planned_steps: float | None = None,
        folder: str | Path = ".",
        record: bool = True,
        jobs: SeparateJobs | None = None,
        timeout_s: float = 1800,
        communicator: Communicator | None = None,
        local: LocalTraining | None = None,
        **settings: Any,
    ) -> None:
        arguments.seconds("timeout_s", timeout_s)
        arguments.instance_of("jobs", jobs, SeparateJobs)
        self._factory = AggregatorFactory(**settings)
        self._jobs = SeparateJobs.from_env() if jobs is None else jobs
        if self._jobs is not None:
            self._jobs.membership.quorum(self._factory.quorum, self._jobs.roster)
        self._module = module
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self._own = OwnTraining(module, optimizers, math.nan if planned_steps is None else planned_steps)
        self._local = local or self._own
        self._timeout_s = timeout_s
        self._folder, self._records = str(folder), record
        self._device = next(module.parameters()).device
        self._communicator = communicator
        self._party: Party | None = None
        self._loop: RoundLoop | None = None
        self._trainable: TrainableSet | None = None
        self._record: RunRecord | None = None
        self._hooks: list[RemovableHandle] = []
        self._state: dict[str, Any] = {}
        self.rounds: list[RoundReport] = []
        """Reports of the rounds so far."""
        self.summary: RunSummary | None = None
        """Summary of the federation; None before it starts."""

    @property
    def should_stop(self) -> bool:
        """Whether the federation has ended, so that nothing that is trained from here on would count."""
        return self._own.stopped

    @property
    def topology(self) -> Topology:
        """Party and rank of this process, once it has joined."""
        return self._joined.topology

    # ---- what a loop calls

    def join(self) -> None:
        """Join the other parties; ``start`` does it too.

        Raises:
            PartyLostError: If the rendezvous or a party cannot be reached.
        """
        if self._party is not None:
            return
        topology = self._launched()
        party = Party(topology, self._device)

        def as_leader() -> Topology:
            if self._communicator is None:
                self._communicator = join(
                    topology, self._jobs, quorum=self._factory.quorum, timeout_s=self._timeout_s
                )
            joined = self._communicator
            return Topology(*joined.place, 0, topology.party_size, label=joined.name)

        known = party.on_leader(as_leader)
        own = Topology(known.party, known.num_parties, topology.rank_in_party, known.party_size, known.label)
        self._party = Party(own, self._device)

    def start(self) -> None:
        """Agree on what is shared and take one party's parameters, or resume from a loaded state.

        Raises:
            ValueError: If the aggregation cannot handle the parameters, or the state is another party's.
            MismatchError: If parties differ; no parameter was touched.
        """
        self.join()
        try:
            self._start()
        except BaseException as error:
            self.fail(error)
            raise
        self._state = {}  # it may be as large as the module

    def count(self, samples: int, loss: Tensor | None = None, parts: int = 1) -> None:
        """Count samples of a batch whose gradients are accumulated, without an optimizer step.

        Args:
            samples: How many.
            loss: Their mean loss, a scalar, or a part of it.
            parts: Of how many the loss is one.
        """
        self._running.count(samples, loss, parts)

    def after_step(self, samples: int = 0, loss: Tensor | None = None) -> None:
        """Count an optimizer step and its samples; run the round that is due.

        Args:
            samples: Samples of the last batch.
            loss: Their mean loss, a scalar.

        Raises:
            FederationError: As ``Aggregator.step``.
        """
        self._own.steps += 1
        self._check_trainable(everything=False)
        self._running.count(samples, loss)
        self.after_batch(epoch_ends=False)

    def after_batch(self, *, epoch_ends: bool) -> None:
        """Run the round that is due, after the ``local`` training has made a step.

        Args:
            epoch_ends: Whether it was the epoch's last.
        """
        self._running.after_batch(epoch_ends=epoch_ends)

    def after_epoch(self) -> None:
        """Run the epoch's round, if rounds go by epochs; call it at the end of each epoch."""
        self._check_trainable(everything=True)
        self._running.after_epoch()
        self._own.epochs += 1

    def mean(self, metrics: Mapping[str, float], samples: float = 1.0) -> dict[str, float]:
        """Return the means of metrics over the parties, equal at all.

        Args:
            metrics: This party's, by name.
            samples: Their weight, such as the number of validation samples.
        """
        mean = self._running.mean({name: (float(value), samples) for name, value in metrics.items()})
        if self._record is not None:
            step, epoch, last = self._local.step, self._local.epoch, len(self.rounds) - 1
            own = {name: float(value) for name, value in metrics.items()}
            self._record.validation(Validation(own, mean, last, step, epoch))
        return mean

    def close_round(self) -> None:
        """Run the last, incomplete round: all parties that end here have the same parameters."""
        self._running.close_round()

    def finish(self) -> None:
        """Run the last, incomplete round, and answer the other parties' until all have finished."""
        self._running.finish()
        if self._communicator is not None:
            self._communicator.close()
        self._end(None)

    def fail(self, error: BaseException) -> None:
        """Leave at once, so that the other parties fail in seconds with the reason."""
        said = str(error)
        why = type(error).__name__ + (f": {said}" if said else "")
        if self._communicator is not None:
            # Of a FederationError the others know already, from us or from the party that caused it.
            self._communicator.abort(None if isinstance(error, FederationError) else why)
        self._end(why)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
            return
        try:
            self.finish()
        except BaseException as failed:
            self.fail(failed)
            raise

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed loop needs to continue exactly, even in the middle of a round.

        Only the leader of a party has it; save it beside the module's and the optimizers' own.
        """
        if self._loop is None or not self._joined.topology.is_leader:
            return self._state
        summary = {} if self.summary is None else asdict(self.summary)
        own = {"step": self._own.steps, "epoch": self._own.epochs}
        return self._loop.state() | {"summary": summary, "own": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; call it before ``start``, with the module's parameters restored."""
        self._state = dict(state)
        if state:
            self._own.steps, self._own.epochs = state["own"]["step"], state["own"]["epoch"]

    # ---- small parts

    def _launched(self) -> Topology:
        given = self._communicator
        return launch_topology(self._jobs, None if given is None else given.num_parties)

    def _owns_terminal(self) -> bool:
        return owns_terminal(self._joined.topology)

    @property
    def _joined(self) -> Party:
        if self._party is None:
            raise RuntimeError("The parties have not joined yet. Call start(), or use the loop by `with`.")
        return self._party

    @property
    def _running(self) -> RoundLoop:
        if self._loop is None:
            raise RuntimeError("There are no rounds yet. Call start(), or use the loop by `with`.")
        return self._loop

    def _start(self) -> None:
        show_log_lines()
        factory, module, party = self._factory, self._module, self._joined
        arguments.warn_of_uncapped(factory.aggregation, factory.weight_by, factory.max_share)
        trainable = factory.parameters.select(module)
        plan = factory.plan(module, trainable, None)
        self._trainable = TrainableSet(module, factory.parameters.include, factory.parameters.exclude)
        self._loop = RoundLoop(
            self._local,
            party,
            factory,
            plan,
            trainable,
            shares_loss=True,
            drift=None,
            on_due=lambda: self._check_trainable(everything=False),
            on_round=self._report_round,
            stopped_path=self._path("stopped.ckpt"),
        )
        if self._state:
            self._loop.check_resumed(self._state)
        started = self._loop.start(lambda: self._make_aggregator(trainable, plan), self._state)
        names = party.on_leader(lambda: list(self._leading.roster))
        summary = RunSummary(names, started.settings, plan.rule.writes_base)
        self.summary = summary.resumed(self._state.get("summary", {}))
        self._drop_frozen_gradients(plan, trainable)
        if party.topology.is_leader:
            self._report_start(plan, trainable, started)

    @property
    def _leading(self) -> Communicator:
        if self._communicator is None:
            raise RuntimeError("Only the leader of a party communicates with other parties.")
        return self._communicator

    def _make_aggregator(self, trainable: Mapping[str, nn.Parameter], plan: Plan) -> Any:
        jobs = self._jobs
        state_dir = None if jobs is None else jobs.state_dir or self._path("federation")
        return self._factory.make(
            self._leading, self._module, trainable, plan, None, files=self._files(), state_dir=state_dir
        )

    def _check_trainable(self, *, everything: bool) -> None:
        if self._trainable is not None:
            self._trainable.check(self._local, self._module, everything=everything)

    def _drop_frozen_gradients(self, plan: Plan, trainable: Mapping[str, nn.Parameter]) -> None:
        """Drop the gradients of what a rule freezes in this round, before they are clipped if possible."""

        def drop(*_: Any) -> None:
            self._running.drop_gradients()

        if self._joined.topology.party_size == 1:  # else DDP still has to reduce them
            parts = [trainable[name] for name in sorted(plan.shared)]
            self._hooks += [p.register_post_accumulate_grad_hook(drop) for p in parts if p.is_leaf]
        self._hooks += [optimizer.register_step_pre_hook(drop) for optimizer in self._local.optimizers]

    def _path(self, name: str) -> str:
        topology = self._joined.topology
        parts = [f"party-{topology.party}"] if topology.num_parties > 1 else []
        return os.path.join(self._folder, *parts, name)

    def _files(self) -> list[str]:
        return [f"{os.uname().nodename}:{os.path.abspath(self._path(FILE_NAME))}"] if self._records else []

    def _report_start(self, plan: Plan, trainable: Mapping[str, nn.Parameter], started: Started) -> None:
        topology, module, factory = self._joined.topology, self._module, self._factory
        shared = {name: trainable[name] for name in sorted(plan.shared)}
        start = Start(
            party=topology.party,
            name=topology.name,
            parties=tuple(self._leading.roster),
            processes=topology.party_size,
            round=started.round,
            step=self._local.step,
            module=type(module).__qualname__,
            device=str(self._device),
            precision=str(next(iter(shared.values())).dtype).removeprefix("torch."),
            leaving=sum(p.numel() for p in shared.values()),
            parameters=sum(p.numel() for p in module.parameters()),
            lora_modules=len(plan.pairs),
            settings=started.settings,
            config=None,
        )
        if self._owns_terminal():
            log_start(start, module, plan, shared, factory.exchange, factory.privacy, {})
        if self._records:
            self._record = RunRecord(self._path(FILE_NAME))
            self._record.start(start)

    def _report_round(self, report: RoundReport, _: bool) -> None:
        self.rounds.append(report)
        if self.summary is not None:
            self.summary.count(report)
        if self._joined.topology.is_leader and self._owns_terminal():
            log_round(self._joined.topology, report)
        if self._record is not None:
            self._record.round(report, step=self._local.step, epoch=self._local.epoch)

    def _end(self, error: str | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._record is not None:
            self._record.end(error)
            self._record = None
