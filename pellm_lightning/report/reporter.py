"""The reporter of a fit: passes its rounds to log lines, loggers, the progress bar and the record."""

from collections.abc import Callable, Mapping, Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.exchange import Exchange
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.report.logs import (
    log_round,
    log_shares,
    log_start,
    publish,
    round_metrics,
    show_on_bar,
    warn_of_share,
)
from pellm_lightning.report.record import RunRecord, Start, Validation
from pellm_lightning.report.run_summary import RunSummary
from pellm_lightning.report.run_view import LiveView, RunView
from pellm_lightning.trainer.environment import owns_terminal
from pellm_lightning.trainer.isolation import callbacks_of


class Reporter:
    """Reporter of one fit of a party.

    Example::

        reporter = Reporter(trainer, topology, summary, rounds=[], record=RunRecord("rounds.jsonl"))
        reporter.start(module, plan, parameters, Plain(), None, size=6, round=0, written={})
        reporter.round(module, report, on_bar=True)
        reporter.end()

    Args:
        trainer: Of this process.
        topology: Of this process.
        summary: Of the federation; each round is added.
        rounds: Gets the report of each round.
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
        self._warned_of_share = False

    def show(self, phases: Callable[[], dict[str, str]]) -> None:
        """Let the progress bar show the federation, if it can.

        Args:
            phases: Returns what each party is doing, by name.
        """
        bar: object = self._trainer.progress_bar_callback
        if isinstance(bar, LiveView):
            bar.watch(RunView(self._topology.party, self.summary.parties, self._rounds, phases))

    def start(
        self,
        module: LightningModule,
        plan: Plan,
        parameters: Mapping[str, Tensor],
        exchange: Exchange,
        privacy: GaussianMechanism | None,
        *,
        size: int,
        round: int,
        written: Mapping[str, Sequence[str]],
        shares: Mapping[str, float] | None = None,
    ) -> None:
        """Report that the fit begins, and which parameters will leave this party; for its leader only.

        Args:
            module: The module to train.
            plan: The aggregation applied to the parameters.
            parameters: Those that take part in the rounds.
            exchange: How they are sent.
            privacy: The mechanism that makes them private.
            size: Scalars of all the module's parameters, whole.
            round: Index of the next round.
            written: Where parties write, as "host:path", by name.
            shares: The parties' shares of the weights as expected, by name; empty or None if unknown.
        """
        trainer, self._next_round = self._trainer, round
        start = Start.of(
            self._topology,
            module,
            plan,
            parameters,
            parameters=size,
            parties=tuple(self.summary.parties),
            round=round,
            step=trainer.global_step,
            device=str(trainer.strategy.root_device),
            precision=trainer.precision,
            settings=self.summary.settings,
            config=_config_of(trainer),
        )
        if owns_terminal(self._topology):
            log_start(start, module, plan, parameters, exchange, privacy, written)
            log_shares(self._topology, shares or {})
        if self._record is not None:
            self._record.start(start)

    def round(self, module: LightningModule, report: RoundReport, *, on_bar: bool) -> None:
        """Report a round; with ``on_bar`` on the progress bar also."""
        trainer, bar = self._trainer, self._trainer.progress_bar_callback
        self._rounds.append(report)
        self.summary.count(report)
        self._next_round = report.round + 1
        publish(trainer, round_metrics(report))
        if on_bar and bar is not None:
            show_on_bar(module, report)
        if self._topology.is_leader and self._logs_rounds(bar):
            log_round(self._topology, report)
        if owns_terminal(self._topology) and not self._warned_of_share:
            self._warned_of_share = warn_of_share(self._topology, self.summary.parties, report)
        if self._record is not None:
            self._record.round(report, step=trainer.global_step, epoch=trainer.current_epoch)

    def validation(self, local: Mapping[str, tuple[float, float]], mean: Mapping[str, float]) -> None:
        """Report a validation: each metric of this party with its weight, and the means of all parties."""
        trainer = self._trainer
        publish(trainer, {f"federated/{name}": value for name, value in mean.items()})
        if self._record is not None:
            own = {name: value for name, (value, _) in local.items()}
            step, epoch = trainer.global_step, trainer.current_epoch
            self._record.validation(Validation(own, dict(mean), self._next_round - 1, step, epoch))

    def end(self, error: str | None = None) -> None:
        """Report that the fit is over, and the error if it failed."""
        if self._record is not None:
            self._record.end(error)
            self._record = None

    def _logs_rounds(self, bar: object) -> bool:
        """Whether each round is a line of this party's log."""
        if not owns_terminal(self._topology):
            return False  # that is party 0's, which shows the round
        if isinstance(bar, LiveView):
            return bar.quiet
        return bar is None or self._topology.party > 0


def _config_of(trainer: Trainer) -> str | None:
    """Return the configuration of the command line as YAML; None for a script."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, SaveConfigCallback):
            text: str = callback.parser.dump(callback.config, skip_none=False)
            return text
    return None
