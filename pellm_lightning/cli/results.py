"""The commands that make something of a trained adapter; their help needs neither Lightning nor torch."""

import argparse
import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from pellm_lightning.cli.usage import Parser, refuse

_MISSPELT = 0.85
"""Ratio above which a word is taken for a misspelt option; --num_parties and --model, of `fit`, are below."""


def main(words: Sequence[str]) -> None:
    """Run ``export`` or ``evaluate``."""
    command, *rest = words
    parser = {"export": export_parser, "evaluate": evaluate_parser}[command]()
    _refuse_misspelt(parser, rest)
    options, rest = parser.parse_known_args(rest)

    from pellm_lightning.cli import evaluate, export

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("lightning.pytorch", "lightning.fabric", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell the devices for each of many runs
    {"export": export.main, "evaluate": evaluate.main}[command](options, rest)


def _refuse_misspelt(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse words that are almost an option of the command, before they are taken for one of `fit`."""
    own = [option for action in parser._actions for option in action.option_strings]
    for word in words:
        name = word.partition("=")[0]
        is_other = name.startswith("--") and name not in own
        if is_other and difflib.get_close_matches(name, own, n=1, cutoff=_MISSPELT):
            refuse(parser, f"unrecognized arguments: {word}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 1 or more")
    return int(text)


def export_parser() -> argparse.ArgumentParser:
    """Return the parser of ``export``; what it leaves over is of the module."""
    made = Parser(
        prog="pellm export",
        description="Make a PEFT adapter folder, or a merged model, of a checkpoint of a federated fit.",
        epilog="All else is as of `fit` and tells how to build the module: --config run.yaml, --model.x ... "
        "Checkpoints of a module that the command line has built need none of it.",
        allow_abbrev=False,
    )
    made.add_argument("checkpoint", type=Path, help="written by Lightning in a federated fit, of any party")
    made.add_argument("--out", type=Path, required=True, help="folder to make")
    made.add_argument("--module", help="import path of the module's class, if a script has built it")
    made.add_argument("--merged", action="store_true", help="write the whole model, adapter merged")
    made.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="CLASS",
        help="import path of a class that the hyperparameters in the checkpoint hold, to be built as it is",
    )
    made.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    return made


def evaluate_parser() -> argparse.ArgumentParser:
    """Return the parser of ``evaluate``; what it leaves over is of module and data."""
    made = Parser(
        prog="pellm evaluate",
        description="Evaluate the base model and adapters on each party's held-out data, in this process.",
        epilog="All else is as of `fit`: --config run.yaml, --data.batch_size 8, ... The data module must say"
        " what each party's data are, by {party} in its paths or by asking the federation. Modules with a"
        " test_step are tested, others validated.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--adapters",
        nargs="*",
        default=[],
        metavar="NAME=FOLDER",
        help="adapter folders; NAME={party} alone=runs/alone-{party}/adapter names one for each party",
    )
    made.add_argument("--parties", type=_positive, required=True, help="how many parties there are")
    made.add_argument("--names", nargs="+", help="what the parties are called; default: their indices")
    made.add_argument("--no-base", action="store_true", help="leave the base model out")
    made.add_argument("--out", type=Path, help="write the numbers into this JSON file")
    return made
