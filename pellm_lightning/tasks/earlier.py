"""What an earlier run has written, kept when a later one writes to the same place."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pellm_lightning.naming import unused

_CONFIG = "adapter_config.json"
_WRITTEN = (_CONFIG, "adapter_model.safetensors", "adapter_model.bin", "README.md", "base")


@contextmanager
def earlier_adapter_kept(folder: Path) -> Iterator[None]:
    """Move an adapter that lies in a folder to ``<folder>-<n>``; drop it again if the same is saved anew.

    Anything else in the folder is left alone.

    Args:
        folder: To which the body of the context saves an adapter.
    """
    if not (folder / _CONFIG).exists():
        yield
        return
    kept = Path(unused(str(folder.resolve())))
    kept.mkdir(parents=True)
    for name in _WRITTEN:
        if (folder / name).exists():
            (folder / name).rename(kept / name)
    _name_moved_base(kept, folder.resolve() / "base")
    yield
    if not (kept / "base").exists() and _weights(kept) == _weights(folder):
        for path in kept.iterdir():
            path.unlink()
        kept.rmdir()


def keep_earlier_file(path: Path, content: str) -> None:
    """Give a file another name if it is there and does not hold ``content``, which is to be written to it."""
    if path.exists() and path.read_text(encoding="utf-8") != content:
        path.rename(unused(str(path)))


def _name_moved_base(adapter: Path, before: Path) -> None:
    """Let the configuration of an adapter that was moved name the base model that was moved with it."""
    config = json.loads((adapter / _CONFIG).read_text(encoding="utf-8"))
    if config.get("base_model_name_or_path") == str(before):
        config["base_model_name_or_path"] = str(adapter / "base")
        (adapter / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("adapter_*"))]
