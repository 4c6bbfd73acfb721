"""Launches by torchrun."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fork_server import python
from paths import search_path


def process_environ() -> dict[str, str]:
    """Environment of a process that finds the package and the helpers, and whose torchrun forks, too."""
    return os.environ | {"PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python()}


def torchrun(
    processes: int,
    words: Sequence[str],
    cwd: Path,
    options: Sequence[str] = (),
    program: str | None = None,
    timeout_s: float = 150,
) -> subprocess.CompletedProcess[str]:
    """Launch ``words`` (a script and its arguments) in so many processes; return code and output.

    ``program`` is a Python for them that has imported nothing yet, where that matters.
    """
    return subprocess.run(
        [
            *(python(), "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", *options, *words),
        ],
        cwd=cwd,
        env=process_environ() | {"COLUMNS": "200"} | ({"PYTHON_EXEC": program} if program else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
