"""Where a fit's rounds go: log lines, loggers, the progress bar, the record."""

from collections.abc import Callable, Mapping

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from torch import nn

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.exchange import Exchange
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.report.lines import announce, figures, publish, put_on_bar, say_round
from pellm_lightning.report.record import RunRecord
from pellm_lightning.report.run_summary import RunSummary
from pellm_lightning.report.run_view import LiveView, RunView
from pellm_lightning.trainer.isolation import callbacks_of


class Reporter:
    """Tells the user of a fit what happens.

    Args:
        trainer: Of this process.
        topology: Where this process stands.
        summary: What is known of the federation; each round is added.
        rounds: Where the reports of the rounds are gathered.
        record: Where it is written down; None writes nothing.
    """

    def __init__(
        self,
        trainer: Trainer,
        topology: Topology,
        summary: RunSummary,
        rounds: list[RoundReport],
        record: RunRecord | None,
    ) -> None:
        self._trainer = trainer
        self._topology = topology
        self.summary = summary
        self._rounds = rounds
        self._record = record if topology.is_leader else None
        self._next_round = 0

    def show(self, phases: Callable[[], dict[str, str]]) -> None:
        """Let the progress bar show the federation, if it can.

        Args:
            phases: Returns what each party does, by name.
        """
        bar: object = self._trainer.progress_bar_callback
        if isinstance(bar, LiveView):
            bar.watch(RunView(self._topology.party, self.summary.parties, self._rounds, phases))

    def began(
        self,
        module: LightningModule,
        plan: Plan,
        parameters: Mapping[str, nn.Parameter],
        exchange: Exchange,
        privacy: GaussianMechanism | None,
        *,
        round: int,
    ) -> None:
        """Tell what will leave this party; only its speaker calls this.

        Args:
            module: What is trained.
            plan: The aggregation applied to the parameters.
            parameters: What leaves.
            exchange: How.
            privacy: How it is made private.
            round: Index of the round that comes.
        """
        trainer, self._next_round = self._trainer, round
        announce(trainer, module, self._topology, plan, parameters, exchange, privacy)
        if self._record is not None:
            self._record.start(
                party=self._topology.party,
                name=self._topology.name,
                parties=list(self.summary.parties),
                processes=self._topology.party_size,
                round=round,
                step=trainer.global_step,
                module=type(module).__qualname__,
                device=str(trainer.strategy.root_device),
                precision=trainer.precision,
                leaving=sum(p.numel() for p in parameters.values()),
                parameters=sum(p.numel() for p in module.parameters()),
                lora_modules=len(plan.pairs),
                settings=self.summary.settings,
                config=_config_of(trainer),
            )

    def round(self, module: LightningModule, done: RoundReport, *, on_bar: bool) -> None:
        """Tell of a round; with ``on_bar`` on the progress bar, too."""
        trainer, bar = self._trainer, self._trainer.progress_bar_callback
        self._rounds.append(done)
        self.summary.count(done)
        self._next_round = done.round + 1
        publish(trainer, figures(done))
        if on_bar and bar is not None:
            put_on_bar(module, done)
        if self._topology.is_leader and self._says(bar):
            say_round(self._topology, done)
        if self._record is not None:
            self._record.round(done, step=trainer.global_step, epoch=trainer.current_epoch)

    def validated(self, local: Mapping[str, tuple[float, float]], mean: Mapping[str, float]) -> None:
        """Tell of a validation: each metric of this party with its weight, and the means of all."""
        trainer = self._trainer
        publish(trainer, {f"federated/{name}": value for name, value in mean.items()})
        if self._record is not None:
            self._record.validation(
                {name: value for name, (value, _) in local.items()},
                mean,
                round=self._next_round,
                step=trainer.global_step,
                epoch=trainer.current_epoch,
            )

    def ended(self, why: str | None = None) -> None:
        """Tell that the fit is over; ``why`` it failed, None if it did not."""
        if self._record is not None:
            self._record.end(why)
            self._record = None

    def _says(self, bar: object) -> bool:
        """Whether each round is a line of this party's log."""
        if isinstance(bar, LiveView):
            return bar.quiet  # else one is shown in this terminal, here or by party 0
        return bar is None or self._topology.party > 0


def _config_of(trainer: Trainer) -> str | None:
    """Return the configuration of the command line as YAML; None for a script."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, SaveConfigCallback):
            text: str = callback.parser.dump(callback.config, skip_none=False)
            return text
    return None
