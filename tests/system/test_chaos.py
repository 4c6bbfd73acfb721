"""Real processes that are killed, stopped and restarted at random: see benchmarks/chaos.py."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fork_server import python
from paths import BENCHMARKS


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), str(BENCHMARKS / script), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.torchrun
@pytest.mark.timeout(180)
def test_nothing_is_lost_whatever_is_killed_when(tmp_path: Path) -> None:
    told = tmp_path / "figures.json"
    done = run(
        "chaos.py",
        "--seconds=24",
        "--ttl=0.5",
        "--haste=1.6",
        "--seeds=7",
        f"--json={told}",
        f"--keep={tmp_path}",
    )
    assert done.returncode == 0, done.stdout
    (figures,) = json.loads(told.read_text())
    assert figures["sound"], figures
    assert figures["ended"], figures
    assert not figures["errors"], figures
    assert figures["total"] >= 20, figures
    assert figures["rounds"] >= 50, figures


@pytest.mark.timeout(120)
def test_many_rounds_leave_nothing_behind(tmp_path: Path) -> None:
    figures = soak(tmp_path, "--rounds=300", "--crowd=8")
    long, crowd = figures["long"], figures["crowd"]
    assert long["rounds"] == 300
    assert long["threads"][0] == long["threads"][1], long
    assert long["descriptors"][0] == long["descriptors"][1], long
    assert long["keys"][1] <= long["keys"][0] + 2, long
    assert long["memory_mb"][1] < long["memory_mb"][0] + 12, long
    assert crowd["sound"], crowd
    assert crowd["lost"] == 1, crowd


def soak(tmp_path: Path, *words: str) -> Any:
    told = tmp_path / "figures.json"
    done = run("soak.py", *words, f"--json={told}")
    assert done.returncode == 0, done.stdout
    return json.loads(told.read_text())
