"""Entry point of the command line: ``pellm`` and ``python -m pellm_lightning``."""

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from pellm_lightning import __version__
from pellm_lightning.cli import errors, noise
from pellm_lightning.comm.errors import did_you_mean

COMMANDS = {
    "Train (options and YAML as of LightningCLI)": {
        "fit": ("federated_cli", "train one adapter together, each party on its own data"),
        "validate": ("federated_cli", "validate a checkpoint"),
        "test": ("federated_cli", "test a checkpoint"),
        "predict": ("federated_cli", "predict with a checkpoint"),
    },
    "Use the result": {
        "evaluate": ("results", "compare adapters on the held-out data of each party"),
        "export": ("results", "make a PEFT adapter folder, or a merged model, of a checkpoint"),
        "verify": ("verify", "check an exported adapter's signed evidence, offline"),
        "report": ("commands", "write one HTML page that shows a fit"),
    },
    "Set up": {
        "new": ("commands", "write a script, a configuration and small data to start from"),
        "doctor": ("federated_cli", "check a launch before training, with all parties"),
        "rendezvous": ("commands", "host the rendezvous where separate jobs meet"),
        "certs": ("commands", "make all keys and certificates on one machine, for a trial"),
        "keys": ("commands", "make this party's key; sign or revoke certificates"),
    },
}
"""By group of the help: of each command the module of ``cli`` whose ``main`` runs it, and a summary."""

MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
"""Of each command, in the order of the help."""

_USAGE = """\
usage: pellm COMMAND [options]    (or: python -m pellm_lightning COMMAND ...)

Federated fine-tuning of language models: several parties train one adapter;
their data stay where they are.
"""

_EPILOG = """\
Options of a command: pellm COMMAND --help
Three parties on this machine:
  torchrun --nproc-per-node 3 -m pellm_lightning fit --config run.yaml
Read on in the repository:
  README.md              first fit
  docs/configuration.md  all options
  docs/separate_jobs.md  parties on machines of their own
  examples/README.md     configurations that run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status.

    Args:
        argv: The command and its arguments; None takes those of the process.

    Raises:
        SystemExit: If the command failed, which has been reported, or ended by itself.
    """
    noise.quieten()
    with errors.reported():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if command == "--version":
        print(f"pellm_lightning {__version__}")
        return 0
    # Options before the command are LightningCLI's, such as --config with a section for each command.
    is_any = any(word in MODULES or word.partition("=")[0] in ("-c", "--config") for word in words)
    if command not in MODULES and not (command.startswith("-") and is_any):
        errors.print_error(_unknown(command))
        return errors.USAGE
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as by `python -m`, so that a configuration may name a script here
    module = _import(f"pellm_lightning.cli.{MODULES.get(command, 'federated_cli')}")
    noise.quieten_loggers()
    module.main(words)
    return 0


def _import(name: str) -> ModuleType:
    """Import a module without the garbage collector: a sixth of the time, and there is nothing to collect."""
    if name in sys.modules:
        return sys.modules[name]
    collects = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        if collects:  # who calls main() in a process of its own may have switched it off
            gc.enable()


def help_text() -> str:
    """Return the help that lists all commands."""
    lines = [_USAGE]
    for title, group in COMMANDS.items():
        lines += [f"{title}:\n", *(f"  {name:<12}{summary}\n" for name, (_, summary) in group.items()), "\n"]
    return "".join([lines[0], "\n", *lines[1:], _EPILOG])


def _unknown(command: str) -> str:
    if command.startswith("-"):
        return f"{command} stands where a command should: pellm COMMAND {command}. All commands: pellm --help"
    return f"pellm has no command {command!r}.{did_you_mean(command, MODULES)} All commands: pellm --help"
