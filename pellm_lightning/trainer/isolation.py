"""Keep parties on one host apart: no two write the same file, and one terminal stays readable."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from pellm_lightning.trainer.file_names import unused

log = logging.getLogger(__name__)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks; Lightning sets the attribute where type checkers do not see it."""
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    return callbacks


def separate_files(trainer: Trainer, party: int) -> None:
    """Move what this party writes below ``party-<k>/`` of the path it was given.

    Loggers of Lightning that write locally are replaced by ones that save there, checkpoint callbacks and the
    profiler get their directory there. A path that has a ``party-<k>`` component already is left alone.
    """
    trainer.loggers = [_separated_logger(logger, party) for logger in trainer.loggers]
    first = trainer.loggers[0] if trainer.loggers else None
    follow_logger = isinstance(first, CSVLogger | TensorBoardLogger)
    for checkpoint in _checkpoints(trainer):
        if checkpoint.dirpath is not None:
            checkpoint.dirpath = below(str(checkpoint.dirpath), party)
        elif not follow_logger:
            checkpoint.dirpath = os.path.join(below(trainer.default_root_dir, party), "checkpoints")
    profiler: Any = getattr(trainer, "profiler", None)
    if profiler is not None and profiler.dirpath is not None:
        profiler.dirpath = below(str(profiler.dirpath), party)


def below(path: str, party: int) -> str:
    """Return ``path/party-<k>``, or ``path`` itself if it lies below a ``party-<k>`` already."""
    return path if f"party-{party}" in Path(path).parts else os.path.join(path, f"party-{party}")


def written_paths(trainer: Trainer) -> list[str]:
    """Return the directories this party writes to, as "host:path", so that the parties can compare them."""
    paths = [logger.log_dir for logger in trainer.loggers if logger.log_dir]
    paths += checkpoint_dirs(trainer)
    here = socket.gethostname()
    return sorted({f"{here}:{path if '://' in path else os.path.abspath(path)}" for path in paths})


def checkpoint_dirs(trainer: Trainer) -> list[str]:
    """Return the directories of the callbacks that save checkpoints, as far as they are known yet."""
    return [str(checkpoint.dirpath) for checkpoint in _checkpoints(trainer) if checkpoint.dirpath is not None]


def keep_metrics(trainer: Trainer) -> None:
    """Give the metrics of an earlier run another name, which a CSVLogger of the same folder would delete.

    This is for one process of the party, before its loggers are used.
    """
    for logger in trainer.loggers:
        # Once it is used, the file is of this run.
        if isinstance(logger, CSVLogger) and logger._experiment is None:
            path = os.path.join(logger.log_dir, "metrics.csv")
            fs = get_filesystem(path)
            if fs.exists(path):
                kept = unused(path, fs.exists)
                fs.mv(path, kept)
                log.info("The metrics of an earlier run are in %s now.", kept)


def put_first(trainer: Trainer, callback: Callback) -> None:
    """Make a callback the first in each hook; in a new list, since Lightning may be walking the old one."""
    vars(trainer)["callbacks"] = [callback, *(c for c in callbacks_of(trainer) if c is not callback)]


def silence(trainer: Trainer) -> None:
    """Leave the terminal to party 0: no progress bar, no model summary, no routine lines of Lightning."""
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.disable()
    kept = [c for c in callbacks_of(trainer) if not isinstance(c, ModelSummary)]
    vars(trainer)["callbacks"] = kept
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _checkpoints(trainer: Trainer) -> list[Any]:
    """Return the callbacks that save checkpoints into a directory of their own."""
    return [c for c in callbacks_of(trainer) if isinstance(c, Checkpoint) and hasattr(c, "dirpath")]


def _separated_logger(logger: Logger, party: int) -> Logger:
    save_dir = below(logger.save_dir or ".", party)
    if not isinstance(logger, CSVLogger | TensorBoardLogger) or save_dir == logger.save_dir:
        return logger
    _withdraw(logger)
    version = None if _is_counted(logger) else logger.version
    if isinstance(logger, CSVLogger):
        return CSVLogger(
            save_dir,
            logger.name,
            version,
            logger._prefix,
            flush_logs_every_n_steps=logger._flush_logs_every_n_steps,
        )
    return TensorBoardLogger(
        save_dir,
        logger.name,
        version,
        bool(logger._log_graph),
        logger._default_hp_metric,
        logger._prefix,
        logger._sub_dir,
        **logger._kwargs,
    )


def _is_counted(logger: CSVLogger | TensorBoardLogger) -> bool:
    """Tell whether a logger's version is the next free number of its folder, and not the user's own.

    That folder is the one that all parties share; the number is counted anew where the logger is moved to.
    """
    if logger._version is None:
        return True
    return logger.version == type(logger)(logger.save_dir, logger.name).version


def _withdraw(logger: Logger) -> None:
    """Remove the empty event file of a logger that DDP inside the party let start before its path was set."""
    if not isinstance(logger, TensorBoardLogger) or logger._experiment is None:
        return
    # This writer's own file: in a folder on a shared disk, another host's process may have the same number.
    written = getattr(logger.experiment.file_writer.event_writer, "_file_name", None)
    logger.experiment.close()
    if written is None:  # tensorboardX does not tell; an empty file remains
        return
    # The folder stays: party 0's logger may be about to write its first file there.
    Path(written).unlink()
