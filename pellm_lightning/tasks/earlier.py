"""What an earlier run has written, kept when a later one writes to the same place."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pellm_lightning.trainer.file_names import unused

_CONFIG = "adapter_config.json"
_WRITTEN = (_CONFIG, "adapter_model.safetensors", "adapter_model.bin", "README.md", "base")


@contextmanager
def earlier_adapter_kept(folder: Path) -> Iterator[None]:
    """Move adapters that lie in a folder to ``<folder>-<n>``; drop them again if the same are saved anew.

    Several adapters have a subfolder each. Anything else in the folder is left alone.

    Args:
        folder: To which the body of the context saves adapters.
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
    """Give a file another name if it is there and does not hold ``content``, which is to be written to it."""
    if path.exists() and path.read_text(encoding="utf-8") != content:
        path.rename(unused(str(path)))


def _name_moved_base(path: Path, before: Path, now: Path) -> None:
    """Let an adapter's configuration name the base model that was moved with it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("base_model_name_or_path") == str(before):
        config["base_model_name_or_path"] = str(now)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("adapter_*")}
