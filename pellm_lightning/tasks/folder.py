"""Folders that are whole or not there: written beside, and moved into place when they are finished."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What loaders of PEFT and transformers look for: left from an earlier save, it would be taken for a part of
# the new one (an adapter_config.json makes transformers put that adapter on a merged model).
_LOADED = (
    "adapter_config.json",
    "adapter_model.*",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "pytorch_model*.bin",
    "*.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "base",
)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``folder`` to write into; it takes the place when nothing has failed.

    What loaders would read in a ``folder`` that is there already goes; all else in it stays. After an
    exception, ``folder`` is as it was.
    """
    folder = Path(os.path.abspath(folder))
    unfinished = folder.parent / f".{folder.name}.unfinished-{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            _replace(folder, unfinished)
        else:
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _replace(folder: Path, unfinished: Path) -> None:
    new = sorted(unfinished.iterdir())
    for old in {path for pattern in _LOADED for path in folder.glob(pattern)} | {
        folder / p.name for p in new
    }:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.exists() or old.is_symlink():
            old.unlink()
    for path in new:
        path.rename(folder / path.name)
