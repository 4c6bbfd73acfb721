"""FederatedCLI: LightningCLI with the federation among its arguments."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from pellm_lightning.callbacks.federated_averaging import FederatedAveraging
from pellm_lightning.cli import commands, config_files, errors
from pellm_lightning.cli.doctor.facts import Rehearsal
from pellm_lightning.cli.saved_config import SaveNumberedConfig
from pellm_lightning.cli.usage import NO_TYPE_FITS, explained, refuse
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.topology import Topology
from pellm_lightning.comm.torchrun.store import launched
from pellm_lightning.trainer import isolation
from pellm_lightning.trainer.environment import PartyEnvironment, owns_terminal, set_rank_zero, topology_of
from pellm_lightning.trainer.resume import check_checkpoint

_LOADERS = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}
"""Of a command, what a module without a data module must have."""
_USAGE = "%(prog)s [--config run.yaml] [--option value ...]"


class CommandParser(LightningArgumentParser):
    """Parser that reports an error in a few lines; torchrun's summary shows it.

    Example:
        >>> parser = CommandParser(prog="pellm fit")
        >>> isinstance(parser, LightningArgumentParser)
        True
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("parser_mode", config_files.register())
        super().__init__(*args, **settings)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a part of a value is tried as one of several types
            super().error(message, ex)
        given = next((word for word in sys.argv[1:2] if word in FederatedCLI.subcommands()), None)
        parser = getattr(ex, "subcommand_parser", None)
        refuse(parser or self, message, None if parser or given in self.prog.split() else given)


class FederatedCLI(LightningCLI):
    """LightningCLI whose Trainer federates.

    ``--federated.*`` configures the rounds, ``--num_parties`` the parties.

    Launch it with ``torchrun --nproc-per-node N``. Every party writes below ``party-<k>/`` of
    ``trainer.default_root_dir`` and of each logger's ``save_dir``; ``{party}`` in ``--ckpt_path`` is its
    index. All else is LightningCLI as it always was.

    Example:
        >>> sorted(FederatedCLI.subcommands())
        ['doctor', 'fit', 'predict', 'test', 'validate']
    """

    failure: Exception | None = None
    """What the doctor's patient failed with as its classes were built."""

    def __init__(
        self,
        model_class: Any = None,
        datamodule_class: Any = None,
        *,
        args: ArgsType = None,
        **settings: Any,
    ) -> None:
        words = sys.argv[1:] if args is None else args
        every = self.subcommands()
        if isinstance(words, list) and words and words[0] in every:
            # To build a parser takes a second: only that of the command that runs is built.
            vars(self)["subcommands"] = lambda: {words[0]: every[words[0]]}
            given = settings.get("parser_kwargs") or {}
            settings["parser_kwargs"] = {k: v for k, v in given.items() if k == words[0] or k not in every}
        super().__init__(model_class, datamodule_class, args=args, **settings)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "doctor": set()}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        if self.parser_class is LightningArgumentParser:  # unless the user has given another
            self.parser_class = CommandParser
        try:
            return super().init_parser(**kwargs)
        except ModuleNotFoundError as error:
            raise ImportError(commands.NEEDS_JSONARGPARSE) from error

    @override
    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        for command in self.subcommands():  # the usage that lists every option has 70 lines
            subparser_kwargs.setdefault(command, {}).setdefault("usage", _USAGE)
        # Lightning takes a subcommand's arguments from the Trainer's method of that name.
        trainer_class = self.trainer_class
        if add_subcommands and "doctor" in self.subcommands():
            from lightning.pytorch.cli import class_from_function  # there with jsonargparse only

            given = trainer_class if isinstance(trainer_class, type) else class_from_function(trainer_class)
            self.trainer_class = type(given.__name__, (_OwnCommands, given), {})
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        self.trainer_class = trainer_class

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Before Lightning's, so that the help of a command begins with what is added to them.
        parser.add_argument(
            "--num_parties",
            type=int | None,
            default=None,
            help="Number of parties among the launched processes; null makes every process a party.",
        )
        parser.add_lightning_class_args(FederatedAveraging, "federated")
        super().add_default_arguments_to_parser(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list):
            config_files.check_encoding(words)
        super().parse_arguments(parser, args)
        command = self.config.get(str(self.config.get("subcommand")), {})
        if command.get("ckpt_path"):
            # Parties resume their own checkpoints, so the path may name the party as the data's may.
            party = _topology(command).party
            command["ckpt_path"] = command["ckpt_path"].replace("{party}", str(party))
            check_checkpoint(command["ckpt_path"])

    @override
    def instantiate_classes(self) -> None:
        if self.subcommand != "doctor":
            try:
                super().instantiate_classes()
            except ValueError as error:
                if NO_TYPE_FITS in str(error):
                    raise ValueError(explained(str(error))) from error
                raise
            return
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        try:
            super().instantiate_classes()
        except Exception as error:  # it is a finding of this party, and all shall hear of it
            self.failure = error

    @override
    def after_instantiate_classes(self) -> None:
        if self.subcommand == "doctor":
            self._examine()
            self.subcommand = None  # the Trainer cannot run it
        elif self.subcommand in _LOADERS and self.datamodule is None:
            self._check_loader(_LOADERS[self.subcommand])

    def _check_loader(self, name: str) -> None:
        """Check that the module has data of its own, where there is no data module."""
        if not is_overridden(name, self.model):
            raise errors.UsageError(
                f"There are no data: {type(self.model).__name__} has no {name}, and --data is not given. Add"
                " --data=CLASS and its arguments, or a section `data:` to the configuration."
            )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.save_config_callback is SaveConfigCallback:  # unless the user has given another, or none
            self.save_config_callback = SaveNumberedConfig
        trainer_config = self._built["trainer"]
        plugins = trainer_config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        environment = next((plugin for plugin in plugins if isinstance(plugin, PartyEnvironment)), None)
        federated = self._built["federated"]
        if environment is None:
            # The processes of a separate job are one party.
            num_parties = 1 if federated.jobs else self._built["num_parties"]
            environment = PartyEnvironment(num_parties, federated.timeout_s)
            if launched():
                kwargs["plugins"] = [*plugins, environment]
        topology = federated.jobs.topology() if federated.jobs else environment.topology
        if topology.num_parties > 1:
            root = trainer_config.get("default_root_dir") or os.getcwd()
            kwargs["default_root_dir"] = isolation.below(str(root), topology.party)
        if self.subcommand == "fit" and trainer_config.get("enable_progress_bar") is not False:
            callbacks = trainer_config.get("callbacks") or []
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            if not any(isinstance(callback, ProgressBar) for callback in callbacks):
                kwargs["callbacks"] = [*callbacks, *_live_view()]
        errors.set_place(
            f"party {topology.name}" if topology.num_parties > 1 else None,
            kwargs.get("default_root_dir") or trainer_config.get("default_root_dir") or os.getcwd(),
        )
        trainer = super().instantiate_trainer(**kwargs)
        if topology.num_parties > 1:
            # Before the fit: its first act is to create the loggers' files.
            isolation.separate_files(trainer, topology.party)
            set_rank_zero(topology.rank_in_party)
            if not owns_terminal(topology):
                isolation.silence(trainer)
        return trainer

    @property
    def _built(self) -> Any:
        """The configuration with its classes built, of the command if there is one."""
        return self.config_init.get(str(self.subcommand), self.config_init)

    def _examine(self) -> None:
        """Let the doctor look at what was built; exit with 1 if it finds an error."""
        from pellm_lightning.cli.doctor.command import examine

        command = self.config["doctor"]
        if self.failure is None:
            callback = self._built["federated"]
            jobs, topology, quorum = callback.jobs, topology_of(self.trainer), callback.quorum
            rehearsal = Rehearsal(self.trainer, self.model, self.datamodule, callback)
        else:
            jobs, topology, rehearsal = _jobs(command), _topology(command), None
            quorum = (command.get("federated") or {}).get("quorum", "majority")
        if not examine(jobs, topology, rehearsal, self.failure, wait_s=command["wait_s"], quorum=quorum):
            sys.exit(1)


class _OwnCommands:
    """The subcommands that Lightning's Trainer has not; ``FederatedCLI`` runs them."""

    def doctor(self, wait_s: float = 30) -> None:
        """Check a launch before training: who is there, what differs, how fast the parties reach each other.

        Args:
            wait_s: Seconds to wait for a party; one that does not come is a finding.
        """
        raise NotImplementedError("FederatedCLI runs this command.")


def _live_view() -> list[Callback]:
    """Return the live view of the federation; nothing where rich is not installed."""
    if find_spec("rich") is None:
        return []
    from pellm_lightning.report.bar import FederationProgressBar  # an optional dependency

    return [FederationProgressBar()]


def _topology(command: Any) -> Topology:
    """Return where this process stands, before anything is built of the configuration."""
    jobs = _jobs(command)
    return jobs.topology() if jobs else Topology.from_env(command.get("num_parties"))


def _jobs(command: Any) -> SeparateJobs | None:
    """Return how this party joins separate jobs, before anything is built of the configuration."""
    jobs = (command.get("federated") or {}).get("jobs")
    # A file of its own leaves its path among the keys.
    return SeparateJobs.from_config(None if jobs is None else jobs.clone(with_meta=False).as_dict())


def main(words: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test``, ``predict`` or ``doctor``."""
    # The ready tasks configure their own optimizers, so the CLI needs not replace them. What the process was
    # started with is left to LightningCLI, which warns of words that come from anywhere else.
    args = None if list(words) == sys.argv[1:] else list(words)
    FederatedCLI(auto_configure_optimizers=False, parser_kwargs={"prog": "pellm"}, args=args)
