"""A virtual environment for each peer, made when it is first needed."""

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
# Of our constraints only what peers share with us: flwr wants an older rich than ours.
_SHARED = ("numpy", "torch", "transformers", "peft", "tokenizers", "safetensors", "accelerate")

REQUIREMENTS = {
    "torchft": ["torch", "numpy", "torchft==0.2.0"],
    "flower": ["numpy", "flwr==1.42.0"],
    "flower-training": ["torch", "numpy", "flwr==1.42.0", "transformers", "peft", "safetensors"],
    "nvflare": ["numpy", "nvflare==2.9.0"],
}


class NotInstalled(Exception):
    """A peer's environment could not be made; the message says why."""


@cache
def python_of(name: str, folder: Path) -> str:
    """Return the interpreter of a peer's environment below the folder, which is made if it is not there.

    Raises:
        NotInstalled: If Python or pip refuses.
    """
    home = folder.absolute() / "environments" / name
    python, stamp = home / "bin" / "python", home / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS[name])
    if stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    print(f"installing {' '.join(REQUIREMENTS[name])} into {home}", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(home)])
    pins = home / "pins.txt"
    pins.write_text("".join(_pins()))
    # torch goes first: its constraint picks a build before another package asks for a range of versions.
    first = [["torch"]] if "torch" in REQUIREMENTS[name] else []
    for packages in [*first, REQUIREMENTS[name]]:
        _run([str(python), "-m", "pip", "install", "-q", "-c", str(pins), *packages])
    stamp.write_text(wanted)
    return str(python)


def versions(python: str, packages: Sequence[str]) -> str:
    """Return ``name version, ...`` of what is installed there."""
    script = (
        "import importlib.metadata as m, sys; print(', '.join(f'{p} {m.version(p)}' for p in sys.argv[1:]))"
    )
    return subprocess.run(
        [python, "-c", script, *packages], capture_output=True, text=True, check=True
    ).stdout.strip()


def _pins() -> list[str]:
    lines = _CONSTRAINTS.read_text().splitlines(keepends=True)
    return [line for line in lines if line.split("==")[0] in _SHARED]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        raise NotInstalled(errors[0] if errors else done.stdout.strip()[-200:])
