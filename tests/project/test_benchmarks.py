"""Benchmarks that call the package otherwise than its users do still run, and end."""

import importlib
import subprocess
import sys

import pytest
from paths import BENCHMARKS


def test_a_step_without_a_round_is_timed_in_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("round", "processes", "shapes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert 0 < importlib.import_module("round").hook_seconds(steps=5) < 1


@pytest.mark.timeout(30)
def test_one_party_that_fails_ends_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    all_succeed = importlib.import_module("big_states").all_succeed

    def end(*codes: str) -> bool:
        return all_succeed([subprocess.Popen([sys.executable, "-c", code]) for code in codes])

    assert end("", "")
    assert not end("raise SystemExit(3)", "import time; time.sleep(600)")
    assert not end("import time; time.sleep(600)", "raise SystemExit(3)")
