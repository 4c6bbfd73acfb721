"""FederatedCallback: rounds in the training of transformers' Trainer, and of trainers that derive from it."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import Self, override

from pellm_lightning.comm import Communicator, FederationError
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.join import group_size, join, launch_topology
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.integrations.federated_loop import FederatedLoop
from pellm_lightning.loop import arguments
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.loop.local_training import LocalTraining
from pellm_lightning.report.logs import round_metrics
from pellm_lightning.trainer.environment import PartyEnvironment, owns_terminal
from pellm_lightning.trainer.samples import samples_in

log = logging.getLogger(__name__)

STATE_FILE = "federation.pt"
"""Name of the federated state in each of the Trainer's checkpoints."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_hidden: dict[str, str] = {}
"""Variables of the launcher that accelerate must not see."""
# What evaluate() returns besides metrics of the model.
_SPEEDS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class FederatedCallback(TrainerCallback):
    """Callback of transformers' ``Trainer`` that averages the trainable parameters over the parties.

    Make it **before** ``TrainingArguments``: it joins by the launcher's variables, then hides them, since
    accelerate would make one world of all parties, in which gradients cross at every step.

    Rounds come before the Trainer evaluates and saves. All that it writes lies in ``party-<k>`` below
    ``output_dir``, and ``train(resume_from_checkpoint=True)`` continues there exactly. Each evaluation's
    metrics are averaged: with ``metric_for_best_model="federated/loss"`` the best model is selected, and
    training stopped early, by the mean over all parties. For that the callback must stand before
    ``EarlyStoppingCallback``; ``attach(trainer)`` puts it there, and sends the rounds to the loggers.

    Args:
        num_parties: Parties of one launch; None makes each process a party.
        record: Whether ``rounds.jsonl`` is written into the output folder, for ``pellm report``.
        jobs: Makes this launch one party of several separate jobs. Default: the environment's.
        timeout_s: Seconds a party may be late before the others give up.
        communicator: The joined parties; None joins them as environment or ``jobs`` say.
        settings: As of ``FederatedLoop``: ``every_n_steps``, ``aggregation``, and so on.

    Raises:
        ValueError: If an argument is out of its range.
        FederationError: If accelerate has made one world of several parties already.

    Example:
        >>> federated = FederatedCallback(every_n_steps=50)
        >>> federated.topology.num_parties
        1
    """

    def __init__(
        self,
        *,
        num_parties: int | None = None,
        record: bool = True,
        jobs: SeparateJobs | None = None,
        timeout_s: float = 1800,
        communicator: Communicator | None = None,
        **settings: Any,
    ) -> None:
        arguments.seconds("timeout_s", timeout_s)
        arguments.instance_of("jobs", jobs, SeparateJobs)
        factory = AggregatorFactory(**settings)
        self._settings = settings
        self._record = record
        self._jobs = SeparateJobs.from_env() if jobs is None else jobs
        self._timeout_s = timeout_s
        self._communicator = communicator
        self._trainer: Trainer | None = None
        self._loop: FederatedLoop | None = None
        self._training: TransformersTraining | None = None
        self._hooks: list[RemovableHandle] = []
        self._logged = 0  # rounds
        if communicator is not None:
            self.topology = Topology(*communicator.place, label=communicator.name)
            self._shows = True
            return
        if self._jobs is None:
            os.environ.update(_hidden)  # of a callback before this one
        self.topology = self._join_as_launched(num_parties)
        self._shows = owns_terminal(self.topology)
        if self.topology.is_leader:
            self._communicator = join(self.topology, self._jobs, quorum=factory.quorum, timeout_s=timeout_s)
        if self._jobs is None:
            _show_as_party(self.topology)

    @property
    def rounds(self) -> list[RoundReport]:
        """Reports of the rounds of the present training, or of the last one."""
        return [] if self._loop is None else self._loop.rounds

    def attach(self, trainer: Trainer) -> Trainer:
        """Let rounds reach the Trainer's loggers, and come before its other callbacks; return the Trainer."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self._trainer = trainer
        if self._training is None:
            self._separate_files(trainer.args)
        return trainer

    # ---- events, in the order in which they come

    @override
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep this party's files apart from the others'."""
        self._separate_files(args)

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree on what is shared and take one party's parameters, or resume from the checkpoint."""
        try:
            self._begin(args, state, control, kwargs["model"], kwargs["optimizer"])
        except BaseException as error:
            self._fail(error)
            raise

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take note of the epoch."""
        self._present.epochs = math.floor((state.epoch or 0.0) + 1e-6)

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the round that is due, and the last, incomplete one; before evaluation and checkpoint."""
        loop = self._rounds_of(state, control)
        loop.after_batch(epoch_ends=False)
        if state.global_step >= state.max_steps or control.should_training_stop:
            loop.close_round()
        self._log_rounds(state)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the epoch's round, and the last one if training has been stopped."""
        loop = self._rounds_of(state, control)
        loop.after_epoch()
        if state.global_step >= state.max_steps or control.should_training_stop:
            loop.close_round()
        self._log_rounds(state)

    @override
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the metrics over the parties, and add the means to them."""
        metrics: dict[str, float] = kwargs.get("metrics") or {}
        if self._training is None:
            return  # evaluate() outside of training
        loop = self._rounds_of(state, control)
        local = {
            name: float(value)
            for name, value in metrics.items()
            if name.startswith("eval_") and not name.endswith(_SPEEDS) and isinstance(value, int | float)
        }
        means = loop.mean(local, samples=_evaluated(kwargs.get("eval_dataloader"), metrics))
        found = {f"eval_federated/{name.removeprefix('eval_')}": value for name, value in means.items()}
        metrics.update(found)
        self._log(state, found)

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the federated state beside the Trainer's own."""
        if self._training is None:
            return
        saved = self._rounds_of(state, control).state_dict()
        if self.topology.is_leader:
            torch.save(saved, _checkpoint(args, state) / STATE_FILE)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Answer the other parties' rounds until all have finished; the best model stays if it was loaded."""
        loop = self._rounds_of(state, control)
        best: dict[str, Tensor] = {}
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = {name: p.detach().clone() for name, p in _trained(kwargs["model"])}
        try:
            loop.finish()
        except BaseException as error:
            self._fail(error)
            raise
        with torch.no_grad():
            for name, parameter in _trained(kwargs["model"]) if best else ():
                parameter.copy_(best[name])
        self._log_rounds(state)
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the other parties of an error, of which the Trainer tells no callback."""
        if error is not None:
            self._fail(error)

    # ---- small parts

    def _join_as_launched(self, num_parties: int | None) -> Topology:
        if self._jobs is not None:
            return self._jobs.topology()
        if num_parties is None and group_size() > 1:
            raise FederationError(
                f"torch's default process group spans {group_size()} processes already, so gradients"
                " would cross between parties. Make FederatedCallback before TrainingArguments, which start"
                " that group; for parties of several processes also give num_parties."
            )
        topology = Topology.from_env(num_parties)
        if topology.party_size > 1:
            environment = PartyEnvironment(num_parties, self._timeout_s)
            environment.validate_settings(topology.party_size, 1)
            return replace(launch_topology(None, num_parties), label="")
        return topology

    def _separate_files(self, args: TrainingArguments) -> None:
        own = f"party-{self.topology.party}"
        if self.topology.num_parties > 1 and Path(str(args.output_dir)).name != own:
            args.output_dir = str(Path(str(args.output_dir)) / own)

    def _begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
    ) -> None:
        _check(args, self.topology)
        self._training = TransformersTraining(args, state, control, model, optimizer)
        self._loop = _PartyLoop(
            model,
            folder=str(args.output_dir),
            record=self._record,
            jobs=self._jobs,
            timeout_s=self._timeout_s,
            communicator=self._communicator,
            topology=self.topology,
            shows=self._shows,
            local=self._training,
            **self._settings,
        )
        if state.global_step > 0:
            self._loop.load_state_dict(_saved(args, state))
        self._loop.start()
        self._hooks = [model.register_forward_hook(self._count, with_kwargs=True)]
        self._logged = 0

    def _count(self, model: nn.Module, words: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        """Count the samples of a forward pass in training."""
        if not (model.training and torch.is_grad_enabled()) or self._loop is None or self._training is None:
            return
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        # The loss of a part of an accumulated batch is divided by the tokens of the whole.
        parts = self._training.accumulates if named.get("num_items_in_batch") is not None else 1
        known = loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
        self._loop.count(samples_in([*words, dict(named)]) or 1, known, parts)

    @property
    def _present(self) -> "TransformersTraining":
        if self._training is None:
            raise RuntimeError("Rounds belong to a training: on_train_begin has not run.")
        return self._training

    def _rounds_of(self, state: TrainerState, control: TrainerControl) -> FederatedLoop:
        training = self._present
        training.state, training.control = state, control
        if self._loop is None:
            raise RuntimeError("Rounds belong to a training: on_train_begin has not run.")
        return self._loop

    def _log_rounds(self, state: TrainerState) -> None:
        for report in self.rounds[self._logged :]:
            self._log(state, round_metrics(report))
        self._logged = len(self.rounds)

    def _log(self, state: TrainerState, metrics: dict[str, float]) -> None:
        if self._trainer is not None:
            self._trainer.log(metrics)
        else:
            state.log_history.append({**metrics, "epoch": state.epoch or 0.0, "step": state.global_step})

    def _fail(self, error: BaseException) -> None:
        if self._loop is not None:
            self._loop.fail(error)
        elif self._communicator is not None:
            self._communicator.abort(f"{type(error).__name__}: {error}")
        self._end()

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._training = [], None


class TransformersTraining(LocalTraining):
    """Training of transformers' ``Trainer``, as rounds see it.

    Args:
        args: The Trainer's arguments.
        state: Its progress.
        control: What stops it.
        model: What it trains.
        optimizer: Its optimizer, perhaps wrapped by accelerate.
    """

    def __init__(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
    ) -> None:
        self.state, self.control = state, control
        self.accumulates = args.gradient_accumulation_steps
        """Batches whose gradients are accumulated for a step."""
        self.epochs = 0
        self._model = model
        self._optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._output_dir = Path(str(args.output_dir))

    @property
    @override
    def step(self) -> int:
        return self.state.global_step

    @property
    @override
    def epoch(self) -> int:
        return self.epochs

    @property
    @override
    def planned_steps(self) -> float:
        return float(self.state.max_steps) if self.state.max_steps > 0 else math.nan

    @property
    @override
    def optimizers(self) -> Sequence[Optimizer]:
        return [self._optimizer]

    @override
    def stop(self) -> None:
        self.control.should_training_stop = True

    @override
    def save(self, path: str) -> None:
        self._model.save_pretrained(path)  # type: ignore[operator]

    @override
    def check_new_start(self, signature: str, round: int) -> None:
        for path in sorted(self._output_dir.glob(f"checkpoint-*/{STATE_FILE}")):
            if torch.load(path, weights_only=True).get("signature") == signature:
                raise FederationError(
                    f"This party starts at step 0 in a federation that is in round {round}, but has the"
                    f" checkpoint {path.parent} of it. Resume by train(resume_from_checkpoint=True), or move"
                    " the checkpoint away."
                )


class _PartyLoop(FederatedLoop):
    """Loop of a party that has joined and has a folder of its own."""

    def __init__(self, *positional: Any, topology: Topology, shows: bool, **named: Any) -> None:
        super().__init__(*positional, **named)
        self._given, self._shows_rounds = topology, shows

    @override
    def _launched(self) -> Topology:
        return self._given

    @override
    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    @override
    def _files(self) -> list[str]:
        return [f"{os.uname().nodename}:{os.path.abspath(self._folder)}"]

    @override
    def _owns_terminal(self) -> bool:
        return self._shows_rounds


def _show_as_party(topology: Topology) -> None:
    """Let accelerate see the party's processes only."""
    _hidden.update({name: os.environ[name] for name in _LAUNCHED if name in os.environ})
    if topology.party_size == 1:
        for name in _LAUNCHED:
            os.environ.pop(name, None)
        return
    own = {
        "RANK": topology.rank_in_party,
        "WORLD_SIZE": topology.party_size,
        "LOCAL_RANK": topology.local_rank(),
        "LOCAL_WORLD_SIZE": min(topology.party_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
    }
    os.environ.update({name: str(value) for name, value in own.items()})


def _check(args: TrainingArguments, topology: Topology) -> None:
    if args.world_size != topology.party_size:
        raise FederationError(
            f"The Trainer trains in a world of {args.world_size} processes, but a party has"
            f" {topology.party_size}: gradients would cross between parties. Make FederatedCallback before"
            " TrainingArguments, and give num_parties if a party has several processes."
        )
    for name, value in (("deepspeed", args.deepspeed), ("fsdp", args.fsdp)):
        if value:
            raise FederationError(
                f"TrainingArguments({name}=...) shards or shadows a party's parameters, so a round's result"
                " could be lost by the next optimizer step. Train a party without it."
            )
    if args.n_gpu > 1:
        raise FederationError(
            f"The Trainer would spread this party over {args.n_gpu} GPUs by DataParallel, which the other"
            " parties of this host use too. Set CUDA_VISIBLE_DEVICES per party, or give num_parties and"
            " launch a process for each GPU."
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _saved(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    folders = [_checkpoint(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if (folder / STATE_FILE).exists():
            saved: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True)
            return saved
    raise FederationError(
        f"The Trainer resumes at step {state.global_step}, but {' and '.join(map(str, folders))} has no"
        f" {STATE_FILE}: it was saved without rounds, or lies elsewhere. Resume from a checkpoint below this"
        " party's output_dir, or begin anew from its weights."
    )


def _evaluated(loader: Any, metrics: Mapping[str, float]) -> float:
    """Return how many samples were evaluated; 1 if nobody knows."""
    try:
        return float(len(loader.dataset))
    except (AttributeError, TypeError):
        seconds = next((value for name, value in metrics.items() if name.endswith("_runtime")), 0.0)
        rate = next((v for name, v in metrics.items() if name.endswith("_samples_per_second")), 0.0)
        return max(1.0, float(round(seconds * rate)))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
