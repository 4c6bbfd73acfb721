"""Resumption of a party: resolves its checkpoint before Lightning does.

Lightning resolves ``ckpt_path="last"`` at the start of ``trainer.fit``, before any hook, so a party whose
folder is set in ``setup`` would not find its checkpoint, or find another party's.
"""

import functools
import inspect
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pellm_lightning.comm.errors import did_you_mean
from pellm_lightning.comm.party import signature
from pellm_lightning.tensors.snapshot import SnapshotDir
from pellm_lightning.trainer.isolation import checkpoint_dirs

_METADATA = "meta.pt"
"""File of a distributed checkpoint that holds everything but weights and optimizer states."""
_RUNS = ("fit", "validate", "test", "predict")


def precede_runs(act: Callable[[Trainer, Mapping[str, Any]], Any]) -> None:
    """Call ``act`` before each fit, validation, test and prediction of a Trainer.

    Lightning has no hook before it resolves ``ckpt_path`` and looks for data, so its public methods are
    wrapped, as by MLflow's autologging. Trainers that ``act`` ignores are not affected.

    Args:
        act: Gets the Trainer and the arguments by name, and returns the ``ckpt_path`` to use.
    """
    for name in _RUNS:
        setattr(Trainer, name, _preceded(getattr(Trainer, name), act))


def _preceded(
    method: Callable[..., Any], act: Callable[[Trainer, Mapping[str, Any]], Any]
) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def run(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(trainer, *args, **kwargs)
        ckpt_path = given.arguments.get("ckpt_path")
        resolved = act(trainer, given.arguments)
        if resolved is not ckpt_path:
            given.arguments["ckpt_path"] = resolved
        return method(*given.args, **given.kwargs)

    return run


def check_checkpoint(ckpt_path: Any) -> None:
    """Check that a checkpoint to resume is a whole file, before anything is built or joined.

    Torch's errors of damaged files are of many kinds, and none says what to do.

    Raises:
        MisconfigurationException: Names the file and what to do.
    """
    path = str(ckpt_path or "")
    if os.path.isfile(path) and not zipfile.is_zipfile(path):  # torch.save writes archives
        raise MisconfigurationException(
            f"ckpt_path={path!r} is no whole checkpoint ({os.path.getsize(path):,} bytes): it was written or"
            " copied only in part, or is another kind of file. Take it again, or an earlier one."
        )
    meant = "" if os.path.exists(path) else did_you_mean(path, ("last", "best", "hpc"))
    if meant and path not in ("last", "best", "hpc"):
        raise MisconfigurationException(f"ckpt_path={path!r} is no file in {os.getcwd()}.{meant}")


def last_of_unfinished(trainer: Trainer, party: int, state_dir: str, stopped: str) -> str | None:
    """Return the party's newest checkpoint of the unfinished federation of separate jobs.

    Unlike Lightning's "last", this also finds other names than ``last.ckpt``, and folders of the logger's
    earlier versions.

    Args:
        trainer: The Trainer of this process.
        party: Index of the party.
        state_dir: Snapshot directory of the job.
        stopped: As in ``newest_signed``.

    Returns:
        The path; None if no federation is unfinished, or it has no checkpoint of this party.

    Raises:
        DamagedError: If the snapshot is damaged.
    """
    state = SnapshotDir(state_dir).newest()
    mark = None if state is None else signature(state["version"][0], party)
    return None if mark is None else newest_signed(trainer, mark, stopped)


def unused_checkpoint_error(path: str, *, party: str, round: int) -> MisconfigurationException:
    """Return the error of a party that starts from scratch despite a checkpoint of the same federation."""
    return MisconfigurationException(
        f"Party {party} starts at step 0 in a federation that is in round {round}, but has the checkpoint"
        f" {path} of it. Its steps, epochs and optimizer state would be lost. Resume by trainer.fit(...,"
        f" ckpt_path='last'), or ckpt_path={path!r}. To start from scratch, move the checkpoint away."
    )


def newest_signed(trainer: Trainer, signature: str, stopped: str) -> str | None:
    """Return the newest checkpoint with a signature in this party's folders; None if there is none.

    Searched are the folders of the checkpoint callbacks and of the first logger's versions, and the
    checkpoint of a party that stopped for lack of others.

    Args:
        trainer: The Trainer of this process, with this party's folders.
        signature: The mark returned by ``signature``.
        stopped: Path of the checkpoint that a party saves when it stops for lack of others.
    """
    return max(
        (path for path in _candidates(trainer, stopped) if _holds(path, signature)),
        key=lambda path: get_filesystem(path).modified(path),
        default=None,
    )


def _candidates(trainer: Trainer, stopped: str) -> Iterator[str]:
    folders = [*checkpoint_dirs(trainer), os.path.join(trainer.default_root_dir, "checkpoints")]
    for logger in trainer.loggers[:1]:  # Lightning places checkpoints in the first logger's folder
        versions = _listed(os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name)))
        folders += [os.path.join(version, "checkpoints") for version in versions]
    for folder in dict.fromkeys(folders):
        yield from (path for path in _listed(folder) if path.endswith(ModelCheckpoint.FILE_EXTENSION))
    stem, suffix = os.path.splitext(os.path.basename(stopped))
    for path in _listed(os.path.dirname(stopped)):
        if os.path.basename(path).startswith(stem) and path.endswith(suffix):
            yield path


def _listed(folder: str) -> list[str]:
    """Return the paths in a folder, which may be a URL; none if it does not exist."""
    fs = get_filesystem(folder)
    if not fs.isdir(folder):
        return []
    return [fs.unstrip_protocol(path).removeprefix("file://") for path in fs.ls(folder, detail=False)]


def _holds(path: str, signature: str) -> bool:
    """Return whether a checkpoint contains a string.

    Its pickle is searched, not loaded, which skips the tensors and runs no code.
    """
    fs = get_filesystem(path)
    if fs.isdir(path):  # a distributed checkpoint, whose plain part is a file of its own
        path = os.path.join(path, _METADATA)
    if not fs.isfile(path):
        return False
    with fs.open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            return False  # truncated by a crash: it cannot be resumed
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(signature.encode() in archive.read(name) for name in pickles)
