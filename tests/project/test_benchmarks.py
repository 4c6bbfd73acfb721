"""Benchmarks that call the package otherwise than its users do still run."""

import importlib
import sys

import pytest
from paths import BENCHMARKS


def test_a_step_without_a_round_is_timed_in_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("round", "processes", "shapes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert 0 < importlib.import_module("round").hook_seconds(steps=5) < 1
