"""Benchmarks that call the package otherwise than its users do still run."""

import importlib
import sys
from pathlib import Path

import pytest

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_step_without_a_round_is_timed_in_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(_BENCHMARKS)
    for name in ("round", "processes", "shapes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert 0 < importlib.import_module("round").hook_seconds(steps=5) < 1
