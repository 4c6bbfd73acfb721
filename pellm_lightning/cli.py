"""FederatedCLI: LightningCLI with the federation among its arguments."""

import os
import sys
from importlib.util import find_spec
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from pellm_lightning import commands, isolation
from pellm_lightning.callback import FederatedAveraging
from pellm_lightning.environment import PartyEnvironment, shares_terminal, speak_as
from pellm_lightning.federation.elastic.job import Job
from pellm_lightning.federation.launch.store import launched
from pellm_lightning.topology import Topology


class FederatedCLI(LightningCLI):
    """LightningCLI whose Trainer federates.

    ``--federated.*`` configures the rounds, ``--num_parties`` the parties.

    Launch it with ``torchrun --nproc-per-node N``. Every party writes below ``party-<k>/`` of
    ``trainer.default_root_dir`` and of each logger's ``save_dir``; ``{party}`` in ``--ckpt_path`` is its
    index. All else is LightningCLI as it always was.
    """

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        try:
            return super().init_parser(**kwargs)
        except ModuleNotFoundError as error:
            raise ImportError(commands.NEEDS_JSONARGPARSE) from error

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_parties",
            type=int | None,
            default=None,
            help="Number of parties among the launched processes; null makes every process a party.",
        )
        parser.add_lightning_class_args(FederatedAveraging, "federated")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        command = self.config.get(str(self.config.get("subcommand")), {})
        if command.get("ckpt_path"):
            # Parties resume their own checkpoints, so the path may name the party as the data's may.
            party = _topology(command).party
            command["ckpt_path"] = command["ckpt_path"].replace("{party}", str(party))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer_config = self._get(self.config_init, "trainer")
        plugins = trainer_config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        environment = next((plugin for plugin in plugins if isinstance(plugin, PartyEnvironment)), None)
        federated = self._get(self.config_init, "federated")
        if environment is None:
            # The processes of a separate job are one party.
            num_parties = 1 if federated.job else self._get(self.config_init, "num_parties")
            environment = PartyEnvironment(num_parties, federated.timeout_s)
            if launched():
                kwargs["plugins"] = [*plugins, environment]
        topology = federated.job.topology() if federated.job else environment.topology
        if topology.num_parties > 1:
            root = trainer_config.get("default_root_dir") or os.getcwd()
            kwargs["default_root_dir"] = isolation.below(str(root), topology.party)
        if self.subcommand == "fit" and trainer_config.get("enable_progress_bar") is not False:
            callbacks = trainer_config.get("callbacks") or []
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            if not any(isinstance(callback, ProgressBar) for callback in callbacks):
                kwargs["callbacks"] = [*callbacks, *_live_view()]
        trainer = super().instantiate_trainer(**kwargs)
        if topology.num_parties > 1:
            # Before the fit: its first act is to create the loggers' files.
            isolation.separate_files(trainer, topology.party)
            speak_as(topology.rank_in_party)
            if topology.party > 0 and shares_terminal(topology):
                isolation.hush(trainer)
        return trainer


def _live_view() -> list[Callback]:
    """Return the live view of the federation; nothing where rich is not installed."""
    if find_spec("rich") is None:
        return []
    from pellm_lightning.report.bar import FederationProgressBar  # an optional dependency

    return [FederationProgressBar()]


def _topology(command: Any) -> Topology:
    """Return where this process stands, before anything is built of the configuration."""
    federated = command.get("federated") or {}
    rendezvous, name, roster = (federated.get(key) for key in ("rendezvous", "name", "roster"))
    job = Job.configured(rendezvous, name, roster)
    return job.topology() if job else Topology.from_env(command.get("num_parties"))


def main() -> None:
    """Run the command line: ``python -m pellm_lightning fit --config run.yaml``, or one of ``COMMANDS``."""
    if sys.argv[1:2] and sys.argv[1] in commands.COMMANDS:
        commands.main()
    else:
        # The ready tasks configure their own optimizers, so the CLI needs not replace them.
        FederatedCLI(auto_configure_optimizers=False)
