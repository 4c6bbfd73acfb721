"""Isolation of parties on one host: separate files, and terminal output of party 0 only."""

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
    """Return the Trainer's callbacks; the attribute is invisible to type checkers."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def separate_files(trainer: Trainer, party: int) -> None:
    """Redirect this party's loggers, checkpoints and profiler to ``party-<k>/`` below their paths.

    Lightning's local loggers are replaced by ones that save there; checkpoint callbacks and the profiler get
    another directory. A path with a ``party-<k>`` component is not changed.
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
    """Return ``path/party-<k>``, or ``path`` itself if it has a ``party-<k>`` component."""
    return path if f"party-{party}" in Path(path).parts else os.path.join(path, f"party-{party}")


def written_paths(trainer: Trainer) -> list[str]:
    """Return the output directories of this party as "host:path", for comparison between parties."""
    paths = [logger.log_dir for logger in trainer.loggers if logger.log_dir]
    paths += checkpoint_dirs(trainer)
    here = socket.gethostname()
    return sorted({f"{here}:{path if '://' in path else os.path.abspath(path)}" for path in paths})


def checkpoint_dirs(trainer: Trainer) -> list[str]:
    """Return the directories of the checkpoint callbacks, as far as they are resolved."""
    return [str(checkpoint.dirpath) for checkpoint in _checkpoints(trainer) if checkpoint.dirpath is not None]


def keep_metrics(trainer: Trainer) -> None:
    """Rename the metrics file of an earlier run, which a CSVLogger of the same folder would delete.

    Call it in one process of the party, before its loggers are used.
    """
    for logger in trainer.loggers:
        # Once the logger is used, the file belongs to this run.
        if isinstance(logger, CSVLogger) and logger._experiment is None:
            path = os.path.join(logger.log_dir, "metrics.csv")
            fs = get_filesystem(path)
            if fs.exists(path):
                kept = unused(path, fs.exists)
                fs.mv(path, kept)
                log.info("Moved the metrics of an earlier run to %s.", kept)


def put_first(trainer: Trainer, callback: Callback) -> None:
    """Move a callback to the front, in a new list, since Lightning may be iterating over the old one."""
    rest = [c for c in callbacks_of(trainer) if c is not callback]
    trainer.callbacks = [callback, *rest]  # type: ignore[attr-defined]


def silence(trainer: Trainer) -> None:
    """Silence this party in a shared terminal: no progress bar, model summary or info lines of Lightning."""
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.disable()
    trainer.callbacks = [c for c in callbacks_of(trainer) if not isinstance(c, ModelSummary)]  # type: ignore[attr-defined]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.WARNING))


def _checkpoints(trainer: Trainer) -> list[Any]:
    """Return the callbacks that save checkpoints into a directory."""
    return [c for c in callbacks_of(trainer) if isinstance(c, Checkpoint) and hasattr(c, "dirpath")]


def _separated_logger(logger: Logger, party: int) -> Logger:
    save_dir = below(logger.save_dir or ".", party)
    if not isinstance(logger, CSVLogger | TensorBoardLogger) or save_dir == logger.save_dir:
        return logger
    _remove_empty_events(logger)
    version = None if _is_automatic_version(logger) else logger.version
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


def _is_automatic_version(logger: CSVLogger | TensorBoardLogger) -> bool:
    """Return whether a logger's version is the next free number of its folder, not set by the user.

    The folder is shared by all parties; the number is determined again in the party's own folder.
    """
    if logger._version is None:
        return True
    return logger.version == type(logger)(logger.save_dir, logger.name).version


def _remove_empty_events(logger: Logger) -> None:
    """Remove the empty event file of a logger that DDP in the party has started before the redirection."""
    if not isinstance(logger, TensorBoardLogger) or logger._experiment is None:
        return
    # Only this writer's file: on a shared disk, another host's process may have the same number.
    written = getattr(logger.experiment.file_writer.event_writer, "_file_name", None)
    logger.experiment.close()
    if written is not None:  # tensorboardX does not expose it; an empty file remains
        # The folder stays, since party 0's logger may be about to create its first file there.
        Path(written).unlink()
