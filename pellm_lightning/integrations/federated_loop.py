"""FederatedLoop: rounds in a training loop of one's own, in plain PyTorch, Fabric or another library."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self, override

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.join import join, launch_topology
from pellm_lightning.comm.session import PartySession
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop import arguments
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.loop.local_training import LocalTraining
from pellm_lightning.loop.round_loop import RoundLoop, Started
from pellm_lightning.loop.trainable import TrainableSet
from pellm_lightning.report.logs import log_round, log_start, show_log_lines, warn_of_share
from pellm_lightning.report.record import FILE_NAME, RunRecord, Start, Validation
from pellm_lightning.report.run_summary import RunSummary
from pellm_lightning.tensors.selection import plain_name
from pellm_lightning.tensors.sharding import storage_key, whole
from pellm_lightning.trainer import isolation
from pellm_lightning.trainer.environment import owns_terminal
from pellm_lightning.trainer.party_parameters.choice import gathered, party_parameters, unwrapped


class OwnTraining(LocalTraining):
    """Training loop of one's own, as ``FederatedLoop`` is informed of it.

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
        self.written: Sequence[Tensor] = ()
        """Frozen weights that rounds write into, which then belong to what was trained."""

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

    @property
    @override
    def should_stop(self) -> bool:
        return self.stopped

    @override
    def save(self, path: str, *, leads: bool) -> str:
        save_trained(
            self._module, path, step=self.steps, epoch=self.epochs, written=self.written, leads=leads
        )
        return (
            "It holds parameters without optimizers: begin anew from its torch.load(...)['parameters'], or"
            " resume from the last checkpoint of your own."
        )

    @override
    def check_new_start(self, signature: str, round: int) -> None:
        """Do nothing: where a loop of one's own keeps its checkpoints is not known here."""


def save_trained(
    module: nn.Module,
    path: str,
    *,
    step: int,
    epoch: int,
    written: Sequence[Tensor] = (),
    leads: bool = True,
) -> None:
    """Save a module's trained parameters by name; of a sharded module all processes of the party call it.

    Args:
        module: The module, as what shards it has wrapped it.
        path: Of the file.
        step: Optimizer steps made.
        epoch: Index of the epoch.
        written: Frozen weights that rounds have written into, to be saved as well.
        leads: Whether this process writes the file.
    """
    changed, parameters = {storage_key(tensor) for tensor in written}, {}
    with gathered(module):
        for name, p in unwrapped(module).named_parameters():
            if p.requires_grad or storage_key(p) in changed:
                value = whole(p)  # in which all processes take part
                if leads:
                    parameters[plain_name(name)] = value.to("cpu", copy=True)
    if leads:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": step, "epoch": epoch, "parameters": parameters}, path)


class FederatedLoop:
    """Federation of a training loop of one's own: the rounds of ``FederatedAveraging`` without Lightning.

    Launched by ``torchrun`` each process is a party. A party of several processes has torch's default
    process group to itself, as Fabric makes it with ``PartyEnvironment``. As a context manager it joins and
    starts; at the end it runs the last, incomplete round and answers the other parties until all have
    finished; an error makes it leave at once, with the reason.

    Args:
        module: The module, with its adapter; only parameters with ``requires_grad=True`` leave the party. Of
            FSDP1 or DeepSpeed it is the wrapped one.
        optimizers: The local optimizers, one or several.
        planned_steps: Optimizer steps after which the loop ends, if that is known.
        folder: Where this party writes: ``rounds.jsonl`` for ``pellm report``, the state between separate
            jobs, what was trained if a quorum is lost. Below it each of several parties has ``party-<k>``.
        record: Whether ``rounds.jsonl`` is written.
        jobs: Makes this process one party of several separate jobs. Default: the environment's.
        num_parties: Parties of one launch; None takes it from torch's default process group, without which
            each process is a party.
        timeout_s: Seconds a party may be late before the others give up.
        session: This party's session with the others; None joins as launch or ``jobs`` say.
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
        num_parties: int | None = None,
        timeout_s: float = 1800,
        session: PartySession | None = None,
        local: LocalTraining | None = None,
        **settings: Any,
    ) -> None:
        self._factory = AggregatorFactory.of(**settings)
        self._jobs = arguments.separate_jobs(jobs, timeout_s, self._factory.quorum)
        self._num_parties, self._timeout_s = num_parties, timeout_s
        self._root, self._module = module, unwrapped(module)
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self._own = OwnTraining(module, optimizers, math.nan if planned_steps is None else planned_steps)
        self._local = self._own if local is None else local
        self._folder, self._records = str(folder), record
        self._session = session
        self._loop: RoundLoop | None = None
        self._trainable: TrainableSet | None = None
        self._record: RunRecord | None = None
        self._hooks: list[RemovableHandle] = []
        self._state: dict[str, Any] = {}
        self._next_round = 0
        self._warned_of_share = False
        self.rounds: list[RoundReport] = []
        """Reports of the rounds so far."""
        self.summary: RunSummary | None = None
        """Summary of the federation; None before it starts."""

    @property
    def should_stop(self) -> bool:
        """Whether the federation has ended, so that nothing that is trained from here on would count."""
        return self._local.should_stop

    @property
    def topology(self) -> Topology:
        """Party and rank of this process, once it has joined."""
        return self._joined.party.topology

    # ---- what a loop calls

    def join(self) -> None:
        """Join the other parties; ``start`` does it too.

        Raises:
            PartyLostError: If the rendezvous or a party cannot be reached.
        """
        if self._session is None:
            launched = launch_topology(self._jobs, self._num_parties)
            quorum, timeout_s = self._factory.quorum, self._timeout_s
            connect = partial(join, launched, self._jobs, quorum=quorum, timeout_s=timeout_s)
            self._session = PartySession(launched, connect)
        self._session.join()

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

    def count(self, samples: int, loss: Tensor | None = None) -> None:
        """Count samples of a batch whose gradients are accumulated, without an optimizer step.

        Args:
            samples: How many.
            loss: Their mean loss, a scalar.
        """
        self._running.count(samples, loss)

    def after_step(self, samples: int = 0, loss: Tensor | None = None) -> None:
        """Count an optimizer step and its samples; run the round that is due.

        Args:
            samples: Samples of the last batch.
            loss: Their mean loss, a scalar.

        Raises:
            ValueError: If a parameter trains that did not when the parties agreed on what they share.
            FederationError: As ``Aggregator.step``.
        """
        self._running.count(samples, loss)
        self._own.steps += 1
        self.after_batch(epoch_ends=False)

    def after_batch(self, *, epoch_ends: bool) -> None:
        """Run the round that is due, after the ``local`` training has made a step.

        Args:
            epoch_ends: Whether it was the epoch's last.
        """
        self._check_trainable(everything=False)
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
            step, epoch = self._local.step, self._local.epoch
            own = {name: float(value) for name, value in metrics.items()}
            self._record.validation(Validation(own, mean, self._next_round - 1, step, epoch))
        return mean

    def close_round(self) -> None:
        """Run the last, incomplete round: all parties that end here have the same parameters."""
        self._running.close_round()

    def finish(self) -> None:
        """Run the last, incomplete round, and answer the other parties' until all have finished."""
        self._running.finish()
        self._joined.close()
        self._end(None)

    def fail(self, error: BaseException) -> None:
        """Leave at once, so that the other parties fail in seconds with the reason."""
        if self._session is not None:
            self._end(self._session.fail(error))

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

        Only the leader of a party has it; save it with the module's and the optimizers' own.
        """
        if self._loop is None or not self.topology.is_leader:
            return self._state
        summary = {} if self.summary is None else asdict(self.summary)
        local = {"step": self._local.step, "epoch": self._local.epoch}
        return self._loop.state() | {"summary": summary, "local": local}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; call it before ``start``, with the module's parameters restored."""
        self._state = dict(state)
        if state:
            self._own.steps, self._own.epochs = state["local"]["step"], state["local"]["epoch"]

    # ---- small parts

    @property
    def _joined(self) -> PartySession:
        if self._session is None:
            raise RuntimeError("The parties have not joined yet. Call start(), or use the loop by `with`.")
        return self._session

    @property
    def _running(self) -> RoundLoop:
        if self._loop is None:
            raise RuntimeError("There are no rounds yet. Call start(), or use the loop by `with`.")
        return self._loop

    def _start(self) -> None:
        show_log_lines()
        factory, module, party = self._factory, self._module, self._joined.party
        arguments.warn_of_uncapped(factory.aggregation, factory.weight_by, factory.max_share)
        with gathered(self._root):
            trainable = factory.parameters.select(module)
            party.device = next(iter(trainable.values())).device
            plan = factory.plan(module, trainable, None)
            size = sum(p.numel() for p in module.parameters())
            shared = {name: trainable[name] for name in sorted(plan.shared)}
            experimental = factory.parameters.experimental
            values = party_parameters(
                party, self._root, shared, plan.written_bases, experimental=experimental
            )
        self._own.written = plan.written_bases
        frozen = values.frozen_state(module) if factory.parameters.check_frozen else {}
        self._trainable = TrainableSet(module, factory.parameters.include, factory.parameters.exclude)
        self._loop = RoundLoop(
            self._local,
            party,
            factory,
            plan,
            trainable,
            values,
            shares_loss=True,
            drift=None,
            on_round=self._report_round,
            stopped_path=self._path("stopped.ckpt"),
        )
        if self._state:
            self._loop.check_resumed(self._state)
        started = self._loop.start(lambda: self._make_aggregator(values.tensors, plan, frozen), self._state)
        self._next_round = started.round
        names = party.on_leader(lambda: list(self._joined.leading.roster))
        summary = RunSummary(names, started.settings, plan.rule.writes_base)
        self.summary = summary.resumed(self._state.get("summary", {}))
        self._drop_frozen_gradients(self._loop)
        if party.topology.is_leader:
            self._report_start(plan, values.tensors, size, started)

    def _make_aggregator(
        self, tensors: Mapping[str, Tensor], plan: Plan, frozen: Mapping[str, Tensor | str]
    ) -> Aggregator:
        jobs = self._jobs
        return self._factory.make(
            self._joined.leading,
            self._module,
            tensors,
            plan,
            None,
            frozen=frozen,
            files=[f"{os.uname().nodename}:{os.path.abspath(self._path())}"],
            state_dir=None if jobs is None else jobs.state_dir or self._path("federation"),
        )

    def _check_trainable(self, *, everything: bool) -> None:
        if self._trainable is not None:
            self._trainable.check(self._local, self._module, everything=everything)

    def _drop_frozen_gradients(self, loop: RoundLoop) -> None:
        """Drop the gradients of what a rule freezes in a round, before they are clipped if possible."""
        frozen = loop.frozen_at_times()
        if not frozen:
            return
        if self.topology.party_size == 1:  # else DDP still has to reduce them
            parts = [p for p in frozen if p.is_leaf]
            self._hooks += [p.register_post_accumulate_grad_hook(loop.drop_gradient) for p in parts]
        for optimizer in self._local.optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_: loop.drop_gradients()))

    def _path(self, name: str = "") -> str:
        """Return the path of a file in this party's folder, or of the folder."""
        several = self.topology.num_parties > 1
        folder = isolation.below(self._folder, self.topology.party) if several else self._folder
        return os.path.join(folder, name)

    def _report_start(self, plan: Plan, shared: Mapping[str, Tensor], size: int, started: Started) -> None:
        module, factory, session = self._module, self._factory, self._joined
        start = Start.of(
            self.topology,
            module,
            plan,
            shared,
            parameters=size,
            parties=tuple(session.leading.roster),
            round=started.round,
            step=self._local.step,
            device=str(session.party.device),
            precision=str(next(iter(shared.values())).dtype).removeprefix("torch."),
            settings=started.settings,
            config=None,
        )
        if owns_terminal(self.topology):
            log_start(start, module, plan, shared, factory.exchange, factory.privacy, {})
        if self._records:
            self._record = RunRecord(self._path(FILE_NAME))
            self._record.start(start)

    def _report_round(self, report: RoundReport, _: bool) -> None:
        self.rounds.append(report)
        self._next_round = report.round + 1
        if self.summary is not None:
            self.summary.count(report)
        if self.topology.is_leader and owns_terminal(self.topology):
            self._log_round(report)
        if self._record is not None:
            self._record.round(report, step=self._local.step, epoch=self._local.epoch)

    def _log_round(self, report: RoundReport) -> None:
        log_round(self.topology, report)
        if not self._warned_of_share and self.summary is not None:
            self._warned_of_share = warn_of_share(self.topology, self.summary.parties, report)

    def _end(self, error: str | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._record is not None:
            self._record.end(error)
            self._record = None
