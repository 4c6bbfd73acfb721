"""Launches by torchrun."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from paths import search_path


def torchrun(
    processes: int,
    words: Sequence[str],
    cwd: Path,
    options: Sequence[str] = (),
    program: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Launch ``words`` (a script and its arguments) in so many processes; return code and output."""
    return subprocess.run(
        [
            *(program, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", *options, *words),
        ],
        cwd=cwd,
        env=os.environ
        | {"PYTHONPATH": search_path(), "COLUMNS": "200"}
        | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": program},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
