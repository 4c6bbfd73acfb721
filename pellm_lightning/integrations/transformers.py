"""FederatedCallback: rounds in the training of transformers' Trainer, and of trainers that derive from it."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import Self, override

from pellm_lightning.comm import FederationError
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.join import group_size, join, launch_topology
from pellm_lightning.comm.session import PartySession
from pellm_lightning.comm.topology import Topology, hide_launch, launch_environ
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.integrations.federated_loop import FederatedLoop
from pellm_lightning.integrations.transformers_training import STATE_FILE, TransformersTraining
from pellm_lightning.loop import arguments
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.report.logs import round_metrics
from pellm_lightning.trainer import isolation
from pellm_lightning.trainer.environment import PartyEnvironment
from pellm_lightning.trainer.samples import samples_in

# What evaluate() returns besides metrics of the model.
_SPEEDS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class FederatedCallback(TrainerCallback):
    """Callback of transformers' ``Trainer`` that averages the trainable parameters over the parties.

    Make it **before** ``TrainingArguments``: it joins by the launcher's variables, then hides them, since
    accelerate would make one world of all parties, in which gradients cross at every step. It serves one
    ``train()``; make another for the next.

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
        session: This party's session with the others; None joins as launch or ``jobs`` say.
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
        session: PartySession | None = None,
        **settings: Any,
    ) -> None:
        factory = AggregatorFactory.of(**settings)
        _check_rule(factory)
        self._settings, self._record, self._timeout_s = settings, record, timeout_s
        self._jobs = arguments.separate_jobs(jobs, timeout_s, factory.quorum)
        self._trainer: Trainer | None = None
        self._loop: FederatedLoop | None = None
        self._training: TransformersTraining | None = None
        self._hooks: list[RemovableHandle] = []
        self._logged = 0  # rounds
        if session is None:
            launched = _launched(self._jobs, num_parties, timeout_s)
            connect = partial(join, launched, self._jobs, quorum=factory.quorum, timeout_s=timeout_s)
            session = PartySession(launched, connect)
        self._session = session
        if self._jobs is None:  # else a party's processes can tell each other only in training
            session.join()

    @property
    def topology(self) -> Topology:
        """Party and rank of this process."""
        return self._session.party.topology

    @property
    def rounds(self) -> list[RoundReport]:
        """Reports of the rounds so far."""
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
        with self._leaving_on_error():
            _check(args, self.topology)
            if self._loop is not None:
                raise FederationError(
                    "This FederatedCallback has served a training, after which its party left the others."
                    " Make a FederatedCallback for each train()."
                )
            training = TransformersTraining(args, state, control, kwargs["model"], kwargs["optimizer"])
            self._begin(args, state, training, kwargs["model"])

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the round that is due, and the last, incomplete one; before evaluation and checkpoint."""
        with self._rounds_of(state, control) as (loop, training):
            loop.count(*training.counted())
            loop.after_batch(epoch_ends=False)
            self._close_if_over(loop, state, control)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the epoch's round, and the last one if training has been stopped."""
        with self._rounds_of(state, control) as (loop, training):
            self._end_epoch(loop, training)
            self._close_if_over(loop, state, control)

    @override
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the metrics over the parties, and add the means to them."""
        metrics: dict[str, float] = kwargs.get("metrics") or {}
        if self._training is None:
            return  # evaluate() outside of training
        with self._rounds_of(state, control) as (loop, _):
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
        """Save the federated state next to the Trainer's own."""
        if self._training is None:
            return
        with self._rounds_of(state, control) as (loop, _):
            saved = loop.state_dict()
            if self.topology.is_leader:
                torch.save(saved, _checkpoint(args, state) / STATE_FILE)
            # Before 5.0 the Trainer loads the best model before it logs that training is over.
            self._close_if_over(loop, state, control)

    @override
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the last, incomplete round once training is over, before the best model is loaded.

        An evaluation at an epoch's end stops training after ``on_epoch_end``; then this is the only event.
        """
        if self._training is None:
            return
        with self._rounds_of(state, control) as (loop, _):
            self._close_if_over(loop, state, control, ended="train_runtime" in (kwargs.get("logs") or {}))

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Answer the other parties' rounds until all have finished; the best model stays if it was loaded."""
        best: dict[str, Tensor] = {}
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = {name: p.detach().clone() for name, p in _trained(kwargs["model"])}
        with self._rounds_of(state, control) as (loop, _):
            loop.finish()
            with torch.no_grad():
                for name, parameter in _trained(kwargs["model"]) if best else ():
                    parameter.copy_(best[name])
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the others of an error, which the Trainer tells no callback, or that nothing was trained."""
        if error is not None:
            self._fail(error)
        elif self._loop is None:
            self._session.leave("its training never began")

    # ---- small parts

    def _separate_files(self, args: TrainingArguments) -> None:
        if self.topology.num_parties > 1:
            args.output_dir = isolation.below(str(args.output_dir), self.topology.party)

    def _begin(
        self, args: TrainingArguments, state: TrainerState, training: TransformersTraining, model: nn.Module
    ) -> None:
        saved = _saved(args, state) if state.global_step > 0 else {}
        self._training = training
        loop = self._loop = FederatedLoop(
            model,
            folder=str(args.output_dir),
            record=self._record,
            jobs=self._jobs,
            timeout_s=self._timeout_s,
            session=self._session,
            local=training,
            **self._settings,
        )
        loop.load_state_dict(saved)
        training.epochs = saved["local"]["epoch"] if saved else 0
        loop.start()
        self._hooks = [model.register_forward_hook(self._count, with_kwargs=True)]
        while training.epochs < math.floor((state.epoch or 0.0) + 1e-6):
            self._end_epoch(
                loop, training
            )  # the checkpoint was saved after its last step, and before its end
        self._log_rounds(state)

    @staticmethod
    def _end_epoch(loop: FederatedLoop, training: TransformersTraining) -> None:
        loop.after_epoch()
        training.epochs += 1

    @staticmethod
    def _close_if_over(
        loop: FederatedLoop, state: TrainerState, control: TrainerControl, *, ended: bool = False
    ) -> None:
        if ended or control.should_training_stop or state.global_step >= state.max_steps:
            loop.close_round()

    def _count(self, model: nn.Module, words: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        """Count the samples of a forward pass in training."""
        if not (model.training and torch.is_grad_enabled()) or self._loop is None or self._training is None:
            return
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        known = loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
        samples = samples_in([*words, dict(named)]) or 1
        if named.get("num_items_in_batch") is None:
            self._loop.count(samples, known)
        else:
            self._training.add_part(samples, known)

    @contextmanager
    def _leaving_on_error(self) -> Iterator[None]:
        """Leave at once if an event fails, so that the other parties fail in seconds with the reason."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    @contextmanager
    def _rounds_of(
        self, state: TrainerState, control: TrainerControl
    ) -> Iterator[tuple[FederatedLoop, TransformersTraining]]:
        """Yield the rounds and the training that an event belongs to; log the rounds that it ran."""
        loop, training = self._loop, self._training
        if loop is None or training is None:
            raise RuntimeError("Rounds belong to a training: on_train_begin has not run.")
        training.state, training.control = state, control
        with self._leaving_on_error():
            yield loop, training
            self._log_rounds(state)

    def _log_rounds(self, state: TrainerState) -> None:
        while self._logged < len(self.rounds):
            self._logged += 1  # before logging, which is an event too
            self._log(state, round_metrics(self.rounds[self._logged - 1]))

    def _log(self, state: TrainerState, metrics: dict[str, float]) -> None:
        if self._trainer is not None:
            self._trainer.log(metrics)
        else:
            state.log_history.append({**metrics, "epoch": state.epoch or 0.0, "step": state.global_step})

    def _fail(self, error: BaseException) -> None:
        if self._loop is not None:
            self._loop.fail(error)
        else:  # of what is refused before training the others do not know, whatever the error
            self._session.leave(f"{type(error).__name__}: {error}")
        self._end()

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._training = [], None


def _launched(jobs: SeparateJobs | None, num_parties: int | None, timeout_s: float) -> Topology:
    """Return party and rank of this process, and let accelerate see nothing but this party."""
    if jobs is not None:
        return jobs.topology()  # accelerate makes its group
    if num_parties is None and group_size() > 1:
        raise FederationError(
            f"torch's default process group spans {group_size()} processes already, so gradients"
            " would cross between parties. Make FederatedCallback before TrainingArguments, which start"
            " that group; for parties of several processes also give num_parties."
        )
    topology = Topology.from_env(num_parties)
    see_own_gpus(topology)
    if topology.party_size > 1:
        PartyEnvironment(num_parties, timeout_s).validate_settings(topology.party_size, 1)
        topology = launch_topology(None, num_parties)
    hide_launch(topology)
    return topology


def see_own_gpus(topology: Topology) -> None:
    """Let this process see the GPUs of its party only: the Trainer would use all, or those of another party.

    Args:
        topology: Party and rank of this process, one of several that a launcher has started on this host.
    """
    launched = launch_environ()
    if "LOCAL_RANK" not in launched or torch.cuda.is_initialized():
        return
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = range(torch.cuda.device_count()) if given is None else [n for n in given.split(",") if n]
    if len(names) < 2:
        return
    first = int(launched["LOCAL_RANK"]) - topology.local_rank()
    count = min(topology.party_size, int(launched.get("LOCAL_WORLD_SIZE", 1)))
    own = dict.fromkeys(str(names[(first + index) % len(names)]) for index in range(count))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)


def _check_rule(factory: AggregatorFactory) -> None:
    if factory.aggregation is not None and factory.aggregation.writes_base:
        raise ValueError(
            f"aggregation={factory.aggregation!r} writes into the frozen base, which the Trainer's"
            " checkpoints do not hold: its result would be lost. Take another rule, or FederatedAveraging."
        )


def _check(args: TrainingArguments, topology: Topology) -> None:
    if args.world_size != topology.party_size:
        raise FederationError(
            f"The Trainer trains in a world of {args.world_size} processes, but a party has"
            f" {topology.party_size}: gradients would cross between parties. Make FederatedCallback before"
            " TrainingArguments, and give num_parties if a party has several processes."
        )
    # Accelerate sets the variables, too: where `accelerate launch` has chosen, the arguments say nothing.
    for name, value in (("deepspeed", args.deepspeed or args.deepspeed_plugin), ("fsdp", args.fsdp)):
        variable = f"ACCELERATE_USE_{name.upper()}"
        if value or os.environ.get(variable, "").lower() in ("true", "1", "yes", "on"):
            raise FederationError(
                f"{f'TrainingArguments({name}=...)' if value else variable} shards or shadows a party's"
                " parameters, so a round's result could be lost by the next optimizer step. Train a party"
                " without it."
            )
    if args.auto_find_batch_size:
        raise FederationError(
            "TrainingArguments(auto_find_batch_size=True) would begin this party's training anew in the"
            " middle of a federation. Set per_device_train_batch_size to what fits into memory."
        )
    loads_best = args.load_best_model_at_end and args.save_strategy == "best"
    if loads_best and transformers.__version__.startswith("4."):
        raise FederationError(
            "save_strategy='best' with load_best_model_at_end=True needs transformers 5: version"
            f" {transformers.__version__} loads the best model before the last round, which would then change"
            " it. Set save_strategy to eval_strategy, or update transformers."
        )
    if args.n_gpu > 1:
        raise FederationError(
            f"The Trainer would spread this party over {args.n_gpu} GPUs by DataParallel, which the other"
            " parties of this host use too. Make FederatedCallback before anything uses CUDA, set"
            " CUDA_VISIBLE_DEVICES per party, or give num_parties and launch a process for each GPU."
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _saved(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Return the federated state of the checkpoint that the Trainer resumes."""
    folder = _checkpoint(args, state)
    if not (folder / STATE_FILE).exists():
        raise FederationError(
            f"The Trainer resumes at step {state.global_step}, but {folder} has no {STATE_FILE}: it was saved"
            " without rounds, or lies elsewhere. Resume from a checkpoint below this party's output_dir, or"
            " begin anew from its weights."
        )
    # The arguments of train() are not known here, only what it has loaded.
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    if json.dumps(history) != json.dumps(state.log_history):
        raise FederationError(
            f"The Trainer resumes at step {state.global_step} of another run than that of {folder}, so its"
            f" {STATE_FILE} does not belong to it. Resume from a checkpoint below this party's output_dir."
        )
    saved: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True)
    return saved


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
