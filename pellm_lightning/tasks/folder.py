"""Atomic writing of folders: written to a temporary folder, then moved into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Files that PEFT's and transformers' loaders read: those of an earlier save would be mistaken for parts of
# the new one (an adapter_config.json makes transformers add that adapter to a merged model).
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
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into, which replaces ``folder`` on success.

    Of an existing ``folder`` files that loaders would read are removed, all others stay. After an exception
    ``folder`` is unchanged.
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
