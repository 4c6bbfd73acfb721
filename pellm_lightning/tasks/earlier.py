"""Backup of the output of earlier runs to the same place."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pellm_lightning.trainer.file_names import unused

_CONFIG = "adapter_config.json"
_WRITTEN = (_CONFIG, "adapter_model.safetensors", "adapter_model.bin", "README.md", "base")


@contextmanager
def backed_up_adapter(folder: Path) -> Iterator[None]:
    """Move earlier adapters to ``<folder>-<n>``, and drop them if the new ones are equal.

    Several adapters have a subfolder each. Anything else in the folder is left alone.

    Args:
        folder: Folder to which the body of the context saves adapters.
    """
    subfolders = [path.parent.name for path in sorted(folder.glob(f"*/{_CONFIG}"))]
    if not (folder / _CONFIG).exists() and not subfolders:
        yield
        return
    kept = Path(unused(str(folder.resolve())))
    kept.mkdir(parents=True)
    for name in (*_WRITTEN, *subfolders):
        if (folder / name).exists():
            (folder / name).rename(kept / name)
    for config in kept.rglob(_CONFIG):
        _name_moved_base(config, folder.resolve() / "base", kept / "base")
    yield
    if not (kept / "base").exists() and _weights(kept) == _weights(folder):
        shutil.rmtree(kept)


def keep_earlier_file(path: Path, content: str) -> None:
    """Rename a file unless its content equals ``content``, which will be written to it."""
    if path.exists() and path.read_text(encoding="utf-8") != content:
        path.rename(unused(str(path)))


def _name_moved_base(path: Path, before: Path, now: Path) -> None:
    """Update the path of the moved base model in an adapter's configuration."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("base_model_name_or_path") == str(before):
        config["base_model_name_or_path"] = str(now)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("adapter_*")}
