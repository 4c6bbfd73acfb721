"""Real processes that are killed, stopped and restarted at random: see benchmarks/chaos.py."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fork_server import python
from paths import BENCHMARKS


def figures_of(script: str, folder: Path, *words: str) -> Any:
    path = folder / "figures.json"
    done = subprocess.run(
        [python(), str(BENCHMARKS / script), *words, f"--json={path}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return json.loads(path.read_text())


@pytest.mark.torchrun
@pytest.mark.timeout(180)
def test_nothing_is_lost_whatever_is_killed_when(tmp_path: Path) -> None:
    words = ("--seconds=24", "--ttl=0.5", "--haste=1.6", "--seeds=7", f"--keep={tmp_path}")
    (figures,) = figures_of("chaos.py", tmp_path, *words)
    assert figures["sound"], figures
    assert figures["ended"], figures
    assert not figures["errors"], figures
    assert figures["total"] >= 20, figures
    assert figures["rounds"] >= 50, figures


@pytest.mark.torchrun
@pytest.mark.timeout(120)
def test_nothing_is_lost_by_one_that_lies(tmp_path: Path) -> None:
    words = ("--seconds=8", "--ttl=1.5", "--haste=0.1", "--seeds=7", f"--keep={tmp_path}")
    (figures,) = figures_of("chaos.py", tmp_path, *words, "--dishonest=lying")
    assert figures["sound"], figures
    assert figures["ended"], figures
    assert not figures["errors"], figures
    assert figures["rounds"] > 12, figures
    # One that breaks instead of lying would harm nobody either.
    assert all(": pellm_lightning." in end for end in figures["rogue_ends"]), figures
    assert '"settled"' in (tmp_path / "seed-7lying" / "p4.jsonl").read_text()


@pytest.mark.timeout(120)
def test_many_rounds_leave_nothing_behind(tmp_path: Path) -> None:
    figures = figures_of("soak.py", tmp_path, "--rounds=300", "--crowd=8")
    long, crowd = figures["long"], figures["crowd"]
    assert long["rounds"] == 300
    assert long["threads"][0] == long["threads"][1], long
    assert long["descriptors"][0] == long["descriptors"][1], long
    assert long["keys"][1] <= long["keys"][0] + 2, long
    assert long["memory_mb"][1] < long["memory_mb"][0] + 12, long
    assert crowd["sound"], crowd
    assert crowd["lost"] == 1, crowd
