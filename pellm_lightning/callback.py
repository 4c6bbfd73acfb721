"""FederatedAveraging: Lightning's hooks -> schedule -> round."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from pellm_lightning import checks, isolation
from pellm_lightning.environment import Party, describe_device, is_launched, shares_terminal, speak_as, topology_of
from pellm_lightning.federation import Federation, FederationError
from pellm_lightning.federation.rendezvous import store_from_env
from pellm_lightning.layout import Layout
from pellm_lightning.parameters import frozen, select, share_outside_adapter
from pellm_lightning.round import Aggregator, RoundReport
from pellm_lightning.schedule import schedule
from pellm_lightning.topology import Topology

log = logging.getLogger(__name__)


class FederatedAveraging(Callback):
    """Averages the trainable parameters over all parties, round by round, while ``trainer.fit`` goes on.

    Each party runs its own Trainer on its own data; only parameters with ``requires_grad=True`` leave it. Launched by
    ``torchrun --nproc-per-node N`` every process is a party, or every G processes with ``PartyEnvironment``.

    Args:
        every_n_epochs: A round at the end of every n-th epoch, before that epoch's validation. Default: every epoch.
        every_n_steps: Instead, a round after every n optimizer steps (``trainer.global_step``).
        weighting: How much a party counts: "samples" by the training samples it consumed since the last round, all its
            processes together; "uniform" all alike; a number is this party's own fixed weight.
        include: Glob patterns over names of trainable parameters; only what matches one federates. Default: all.
        exclude: Glob patterns over names of trainable parameters that stay local.
        outer_optimizer: Optimizer of the global parameters, fed with the pseudo-gradient. ``SGD(lr=1)`` is FedAvg,
            ``SGD(lr=1, momentum=0.9)`` FedAvgM, ``Adam`` FedAdam, ``SGD(lr=0.7, momentum=0.9, nesterov=True)`` DiLoCo.
        inner_optimizer_state: "keep" lets the local optimizers go on with their moments after a round, "reset" clears
            them.
        on_nonfinite: A party whose parameters hold NaN or infinity is left out of the round and takes over its result
            ("exclude"), or all parties stop with an error ("raise").
        timeout_s: Seconds a party may be late before the others give up: more than the longest local training between
            two rounds of the slowest party minus that of the fastest.
        check_base: Compare a sample of every frozen parameter over the parties before training.
        save_frozen: Whether checkpoints hold the frozen parameters too. Without them a checkpoint is as small as the
            adapter, and is resumed on, or loaded onto, a freshly built base.
        federation: Makes an already joined Federation, for parties that do not meet by the launcher's environment.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        weighting: Literal["samples", "uniform"] | float = "samples",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        outer_optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1.0),
        inner_optimizer_state: Literal["keep", "reset"] = "keep",
        on_nonfinite: Literal["exclude", "raise"] = "exclude",
        timeout_s: float = 1800,
        check_base: bool = True,
        save_frozen: bool = True,
        federation: Callable[[], Federation] | None = None,
    ) -> None:
        self._schedule = schedule(every_n_epochs, every_n_steps)
        checks.weighting(weighting)
        checks.one_of("inner_optimizer_state", inner_optimizer_state, ("keep", "reset"))
        checks.one_of("on_nonfinite", on_nonfinite, ("exclude", "raise"))
        checks.patterns("include", include)
        checks.patterns("exclude", exclude)
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be positive, in seconds.")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.weighting = weighting
        self.include = include
        self.exclude = exclude
        self.outer_optimizer = outer_optimizer
        self.inner_optimizer_state = inner_optimizer_state
        self.on_nonfinite = on_nonfinite
        self.timeout_s = timeout_s
        self.check_base = check_base
        self.save_frozen = save_frozen
        self.federation = federation
        self._forget()

    # ---- hooks, in the order in which they run -------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the parties' files apart; for a fit also join the federation and refuse what cannot work."""
        self._forget()
        self._topology = topology_of(trainer)
        if stage == "fit":
            self._party = Party(self._topology, trainer.strategy)
            isolation.show_log_lines()
            self._join()
            checks.trainer(trainer, self, self._topology)
            # First in line: EarlyStopping and ModelCheckpoint then read what we log in the same hook.
            trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]
        speak_as(self._topology.rank_in_party)
        if self._topology.party > 0:
            # Party 0 keeps the user's paths: its logger's files exist already. Those of the others do not, since their
            # launcher's rank made them dummies until now.
            isolation.separate_files(trainer, self._topology.party)
            if shares_terminal(self._topology):
                isolation.hush(trainer)
        if not self.save_frozen:
            pl_module.strict_loading = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on what is shared and take over party 0's parameters, or go on from the checkpoint."""
        assert self._party is not None
        checks.samplers(trainer, self._topology)
        parameters = select(pl_module, self.include, self.exclude)
        checks.optimizers(trainer, parameters)
        self._party.speak(lambda: self._start(trainer, pl_module, parameters))
        self._layout = Layout(parameters)
        self._share_in_party()
        if self._restored is None:
            self._last_step = trainer.global_step
        self._announce(trainer, pl_module, parameters)
        self._restored = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what was consumed; run the round that is due, before Lightning validates and saves."""
        self._count(trainer, outputs, batch)
        if self._schedule.due(
            steps_since_round=trainer.global_step - self._last_step,
            epoch=trainer.current_epoch,
            epoch_ends=trainer.is_last_batch,
        ):
            self._run_round(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare to tell this validation's metrics from older ones; close the round first if training is over."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if trainer.should_stop and trainer.global_step > self._last_step:
            self._run_round(trainer, pl_module, on_bar=False)
        self._validation_samples = {}
        self._metrics_before = dict(trainer.callback_metrics)

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
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            counted = self._validation_samples.get(dataloader_idx, 0)
            self._validation_samples[dataloader_idx] = counted + _samples(batch, 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the validation metrics over the parties, before EarlyStopping and ModelCheckpoint read them."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        mean = self._mean_metrics(self._fresh_metrics(trainer))
        if mean:
            named = {f"federated/{name}": value for name, value in mean.items()}
            self._publish(trainer, named)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the epoch's round if its last batch did not (skipped, or cut short by max_steps or max_time)."""
        if self._schedule.due(
            steps_since_round=trainer.global_step - self._last_step, epoch=trainer.current_epoch, epoch_ends=True
        ):
            self._run_round(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the last, incomplete round; then answer the others' rounds until every party is through."""
        assert self._party is not None
        if trainer.global_step > self._last_step:
            self._run_round(trainer, pl_module, on_bar=False)
        while (report := self._party.speak(self._next_drained)) is not None:
            self._share_in_party()
            self._note(trainer, pl_module, report, on_bar=False)
        self._party.speak(self._part)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave at once, so that the others fail in seconds and can say why."""
        if self._joined is not None:
            # After a FederationError the others know already, from us or from the party that caused it.
            known = isinstance(exception, FederationError)
            self._joined.abort(None if known else f"{type(exception).__name__}: {exception}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave, and drop every reference to the module."""
        if stage != "fit":
            return
        if self._joined is not None:
            self._joined.abort("its fit ended before it began: max_epochs or max_steps was reached already")
        state = self.state_dict()
        self._forget()
        self._restored = state or None

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on exactly, in the middle of a round too."""
        if self._aggregator is None:
            return self._restored or {}
        return {
            "aggregator": self._aggregator.state_dict(),
            "last_step": self._last_step,
            "samples": self._samples,
            "loss_sum": float(self._loss_sum),
            "loss_weight": self._loss_weight,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts; the aggregator does not exist yet."""
        self._restored = state_dict or None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave frozen parameters out of the checkpoint if asked to."""
        if not self.save_frozen:
            for name, parameter in pl_module.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check what non-strict loading of a checkpoint without frozen parameters would let pass."""
        if not self.save_frozen:
            checks.trainable_checkpoint(pl_module, checkpoint["state_dict"])

    # ---- the parts of the hooks ----------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._topology = Topology()
        self._party: Party | None = None
        self._joined: Federation | None = None
        self._aggregator: Aggregator | None = None
        self._layout: Layout | None = None
        self._drained: Any = None
        self._restored: dict[str, Any] | None = None
        self._last_step = 0
        self._samples = 0
        self._loss_sum: Tensor | float = 0.0
        self._loss_weight = 0
        self._validation_samples: dict[int, int] = {}
        self._metrics_before: Mapping[str, Any] = {}

    def _join(self) -> None:
        assert self._party is not None
        if self.federation is None and not is_launched():
            log.warning(
                "[party 0] No launcher found, so this is a federation of one party. To federate N parties on this host"
                " run `torchrun --nproc-per-node N your_script.py`."
            )

        def join() -> None:
            if self.federation is not None:
                self._joined = self.federation()
            else:
                self._joined = Federation(
                    store_from_env(self.timeout_s),
                    self._topology.party,
                    self._topology.num_parties,
                    timeout_s=self.timeout_s,
                )

        self._party.speak(join)
        if self._joined is not None:
            self._topology = Topology(
                self._joined.party, self._joined.num_parties, self._topology.rank_in_party, self._topology.party_size
            )

    def _start(self, trainer: Trainer, pl_module: LightningModule, parameters: dict[str, nn.Parameter]) -> None:
        assert self._joined is not None
        self._aggregator = Aggregator(
            self._joined,
            parameters,
            outer_optimizer=self.outer_optimizer,
            frozen=frozen(pl_module) if self.check_base else None,
            config={
                "every_n_epochs": self.every_n_epochs,
                "every_n_steps": self.every_n_steps,
                "weighting": self.weighting if isinstance(self.weighting, str) else "a number",
                "on_nonfinite": self.on_nonfinite,
                "inner_optimizer_state": self.inner_optimizer_state,
            },
            files=isolation.written_paths(trainer),
            on_nonfinite=self.on_nonfinite,
        )
        if self._restored is not None:
            self._aggregator.load_state_dict(self._restored["aggregator"])
            self._last_step = self._restored["last_step"]
            self._samples = self._restored["samples"]
            self._loss_sum = self._restored["loss_sum"]
            self._loss_weight = self._restored["loss_weight"]
        self._aggregator.start()
        checks.devices(self._joined.all_gather_json("device", describe_device(trainer.strategy.root_device)))
        self._drained = self._aggregator.drain()

    def _count(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        samples = _samples(batch, None if self.weighting == "samples" else 1)
        self._samples += samples
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning hands over the loss divided by the accumulated batches.
            scale = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
            self._loss_sum = self._loss_sum + loss.detach() * (samples * scale)
            self._loss_weight += samples

    def _run_round(self, trainer: Trainer, pl_module: LightningModule, *, on_bar: bool = True) -> None:
        assert self._party is not None
        samples, loss_sum, loss_weight = self._party.sum([self._samples, float(self._loss_sum), self._loss_weight])
        weight = {"samples": samples, "uniform": 1.0}.get(str(self.weighting), self.weighting)
        loss = loss_sum / loss_weight if loss_weight else None
        report = self._party.speak(lambda: self._speaking.step(float(weight), loss))
        self._share_in_party()
        self._last_step = trainer.global_step
        self._samples, self._loss_sum, self._loss_weight = 0, 0.0, 0
        if self.inner_optimizer_state == "reset":
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        self._note(trainer, pl_module, report, on_bar=on_bar)

    @property
    def _speaking(self) -> Aggregator:
        if self._aggregator is None:
            raise RuntimeError("Only the party's first process aggregates, and only during a fit.")
        return self._aggregator

    def _next_drained(self) -> RoundReport | None:
        return next(self._drained, None)

    def _part(self) -> None:
        assert self._joined is not None
        self._joined.close()

    def _share_in_party(self) -> None:
        """Give the party's other processes what the speaker has just written into its parameters."""
        assert self._layout is not None
        if self._topology.party_size == 1:
            return
        assert self._party is not None
        vector = self._speaking.global_vector if self._topology.is_speaker else self._layout.new_vector()
        self._party.broadcast_(vector)
        if not self._topology.is_speaker:
            self._layout.unpack_(vector)

    def _fresh_metrics(self, trainer: Trainer) -> dict[str, float]:
        """Return the metrics that this validation has logged: the ones whose tensors are new."""
        return {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if value is not self._metrics_before.get(name) and not name.startswith("federated/")
        }

    def _mean_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return each metric's mean over all samples of all parties, the same at every process."""
        assert self._party is not None
        names = sorted(metrics)
        weights = [self._validation_weight(name) for name in names]
        sums = self._party.sum([metrics[n] * w if w else 0.0 for n, w in zip(names, weights, strict=True)] + weights)
        local = {
            name: (total / weight, weight)
            for name, total, weight in zip(names, sums[: len(names)], sums[len(names) :], strict=True)
            if weight
        }
        return self._party.speak(lambda: self._speaking.mean(local))

    def _validation_weight(self, name: str) -> float:
        """Return the samples behind a metric; Lightning appends the dataloader's index if there are several."""
        _, found, index = name.rpartition("/dataloader_idx_")
        return float(self._validation_samples.get(int(index), 0) if found else sum(self._validation_samples.values()))

    # ---- what the user sees --------------------------------------------------------------------------------------

    def _announce(self, trainer: Trainer, pl_module: LightningModule, parameters: dict[str, nn.Parameter]) -> None:
        if not self._topology.is_speaker:
            return
        trainable = sum(p.numel() for p in parameters.values())
        total = sum(p.numel() for p in pl_module.parameters())
        names = list(parameters)
        log.info(
            "[party %d] federation of %d %s; %s of %s parameters leave a party (%.3g %%), %s per round: %s%s",
            self._topology.party,
            self._topology.num_parties,
            "party" if self._topology.num_parties == 1 else "parties",
            f"{trainable:,}",
            f"{total:,}",
            100 * trainable / total,
            _megabytes(self._speaking.size_bytes),
            ", ".join(names[:3]),
            f" and {len(names) - 3} more" if len(names) > 3 else "",
        )
        outside = share_outside_adapter(parameters)
        if outside > 0.5 and total > trainable:
            log.warning(
                "[party %d] %.0f %% of what crosses each round lies in embeddings, heads or modules_to_save, not in the"
                " adapter. If that is not intended, name them in `exclude` (they stay local) or freeze them.",
                self._topology.party,
                100 * outside,
            )
        if self._topology.party > 0:
            for path in isolation.written_paths(trainer):
                log.info("[party %d] writes to %s", self._topology.party, path.split(":", 1)[1])

    def _note(self, trainer: Trainer, pl_module: LightningModule, report: RoundReport, *, on_bar: bool) -> None:
        """Put the round's figures into the loggers, the progress bar and the log."""
        figures = {
            "round": report.round,
            "active_parties": report.active_parties,
            "weight": report.weight,
            "total_weight": report.total_weight,
            "seconds": report.seconds,
            "waited_seconds": report.waited_seconds,
            "bytes_sent": report.bytes_sent,
            "update_norm": report.update_norm,
            "distance": report.distance,
        } | ({} if report.loss is None else {"loss": report.loss})
        named = {f"federated/{name}": float(value) for name, value in figures.items()}
        self._publish(trainer, named)
        if on_bar:  # self.log is refused where training has ended
            shown = {"round": float(report.round)} | ({} if report.loss is None else {"global_loss": report.loss})
            pl_module.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
        bar_shows_it = self._topology.party == 0 and trainer.progress_bar_callback is not None
        if self._topology.is_speaker and not bar_shows_it:
            log.info(
                "[party %d] round %d: loss %s, weight %g of %g, %s in %.2f s",
                self._topology.party,
                report.round,
                "unknown" if report.loss is None else f"{report.loss:.4f}",
                report.weight,
                report.total_weight,
                _megabytes(report.bytes_sent),
                report.seconds,
            )

    @staticmethod
    def _publish(trainer: Trainer, metrics: dict[str, float]) -> None:
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        # The step Lightning itself gives to what is logged at this moment, so that rows of a table line up.
        step = max(trainer.global_step - 1, 0)
        for logger in trainer.loggers:
            logger.log_metrics(metrics | {"epoch": trainer.current_epoch}, step=step)


def _samples(batch: Any, otherwise: int | None) -> int:
    """Return how many samples a batch holds; ``otherwise`` if that cannot be told (None: say what to do)."""
    try:
        return extract_batch_size(batch)
    except Exception as error:
        if otherwise is not None:
            return otherwise
        raise ValueError(
            f"weighting='samples' cannot tell how many samples a batch of type {type(batch).__name__} holds. Let the batch"
            " contain a tensor whose first dimension is the batch, or use weighting='uniform' or a number."
        ) from error


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"

