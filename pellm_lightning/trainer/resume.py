"""Which checkpoint a party resumes: looked for in its own folder, and never left unseen there.

Lightning resolves ``ckpt_path="last"`` as the first act of ``trainer.fit``, before it calls any hook. A party
whose folder were known to it only from ``setup`` on would not find its checkpoint, or find another party's.
"""

import functools
import inspect
import os
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pellm_lightning.tensors.snapshot import SnapshotDir
from pellm_lightning.trainer.isolation import checkpoint_dirs

_RUNS = ("fit", "validate", "test", "predict")


def precede_runs(act: Callable[[Trainer, Any], Any]) -> None:
    """Call ``act`` as the first thing of each fit, validation, test and prediction of a Trainer.

    Lightning has no hook before it resolves ``ckpt_path``, so its public methods are wrapped, as MLflow's
    autologging does it. A Trainer that ``act`` does nothing with is not affected.

    Args:
        act: Is given the Trainer and its ``ckpt_path``, and returns which one shall be used.
    """
    for name in _RUNS:
        setattr(Trainer, name, _preceded(getattr(Trainer, name), act))


def _preceded(method: Callable[..., Any], act: Callable[[Trainer, Any], Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def run(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(trainer, *args, **kwargs)
        asked = given.arguments.get("ckpt_path")
        chosen = act(trainer, asked)
        if chosen is not asked:
            given.arguments["ckpt_path"] = chosen
        return method(*given.args, **given.kwargs)

    return run


def last_of_unfinished(trainer: Trainer, party: int, state_dir: str, stopped: str) -> str | None:
    """Return the newest checkpoint of the unfinished federation that a separate job has taken part in.

    It is found where "last" of Lightning does not look: under another name than ``last.ckpt``, and in the
    folder of an earlier version of the logger.

    Args:
        trainer: Of this process.
        party: Index of the party.
        state_dir: Where the job keeps the global state.
        stopped: As in ``newest_signed``.

    Returns:
        The path; None if no federation is unfinished, or the party had saved nothing in it.

    Raises:
        DamagedError: If the kept state is damaged.
    """
    kept = SnapshotDir(state_dir).newest()
    of = None if kept is None else signature(kept["version"][0], party)
    return None if of is None else newest_signed(trainer, of, stopped)


def left_behind(path: str, *, party: str, round: int) -> MisconfigurationException:
    """Return the error of a party that began anew although it has a checkpoint of the same federation."""
    return MisconfigurationException(
        f"Party {party} begins at step 0 in a federation that is in round {round}, although it has trained in"
        f" it before: its checkpoint is {path}. Its own steps, epochs and optimizer state would be lost."
        f" Resume it by trainer.fit(..., ckpt_path='last'), or ckpt_path={path!r}. To begin anew on purpose,"
        " move the checkpoint away."
    )


def signature(run_id: str | None, party: int) -> str | None:
    """Return what marks the checkpoints of a party in a federation of separate jobs; None in one launch.

    Args:
        run_id: Name of the federation, the same through all restarts of its parties.
        party: Index of the party.
    """
    return None if not run_id else f"party {party} of {run_id}"


def newest_signed(trainer: Trainer, signature: str, stopped: str) -> str | None:
    """Return the newest checkpoint with a signature where this party saves them; None if none is there.

    Looked at are the folders of the checkpoint callbacks, those of earlier versions of the first logger, and
    what a party saves when it stops for lack of others.

    Args:
        trainer: Of this process, with this party's folders.
        signature: As of ``signature``.
        stopped: Path of the checkpoint that a stopping party saves.
    """
    return max(
        (path for path in _candidates(trainer, stopped) if _holds(path, signature)),
        key=lambda path: get_filesystem(path).modified(path),
        default=None,
    )


def _candidates(trainer: Trainer, stopped: str) -> Iterator[str]:
    folders = [*checkpoint_dirs(trainer), os.path.join(trainer.default_root_dir, "checkpoints")]
    for logger in trainer.loggers[:1]:  # the one by which Lightning places checkpoints
        versions = _listed(os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name)))
        folders += [os.path.join(version, "checkpoints") for version in versions]
    for folder in dict.fromkeys(folders):
        yield from (path for path in _listed(folder) if path.endswith(ModelCheckpoint.FILE_EXTENSION))
    stem, suffix = os.path.splitext(os.path.basename(stopped))
    for path in _listed(os.path.dirname(stopped)):
        if os.path.basename(path).startswith(stem) and path.endswith(suffix):
            yield path


def _listed(folder: str) -> list[str]:
    """Return the paths of what a folder holds, which may be a URL; nothing if there is no such folder."""
    fs = get_filesystem(folder)
    if not fs.isdir(folder):
        return []
    return [fs.unstrip_protocol(path).removeprefix("file://") for path in fs.ls(folder, detail=False)]


def _holds(path: str, signature: str) -> bool:
    """Tell whether a checkpoint holds a string.

    The pickle in it is searched and not loaded: this takes no time for the tensors, and runs nobody's code.
    """
    fs = get_filesystem(path)
    if not fs.isfile(path):
        return False
    with fs.open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            return False  # cut off while it was written: nothing can resume it
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(signature.encode() in archive.read(name) for name in pickles)
