"""Paths of the repository, its examples and benchmarks, and of the scripts that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"
HELPERS = ROOT / "tests" / "helpers"
SCRIPTS = ROOT / "tests" / "scripts"


def search_path() -> str:
    """``PYTHONPATH`` of a process that imports the package and the helpers, wherever it runs."""
    return os.pathsep.join([str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")])
