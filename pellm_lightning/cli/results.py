"""The commands that make something of a trained adapter."""

import logging
import sys
from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pellm_lightning.cli import evaluate, export


def main(words: Sequence[str]) -> None:
    """Run ``export`` or ``evaluate`` as the command line asks; print errors without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("lightning.pytorch", "lightning.fabric", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell the devices for each of many runs
    command, *rest = words
    try:
        {"export": export.main, "evaluate": evaluate.main}[command](rest)
    except (ValueError, OSError, MisconfigurationException) as error:
        sys.exit(str(error))
