"""The public names, the callback's arguments, and the counts of the house."""

import ast
import importlib
import inspect
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

import pellm_lightning
from pellm_lightning import FederatedAveraging, comm

NAMES = [
    "Aggregator",
    "FederatedAveraging",
    "FederatedCLI",
    "FederatedLoop",
    "Federation",
    "FederationError",
    "Membership",
    "MismatchError",
    "Overlap",
    "Parameters",
    "PartyEnvironment",
    "PartyLostError",
    "RoundReport",
    "SeparateJobs",
    "Simulation",
    "TLS",
    "TooFewPartiesError",
    "Weighting",
]
ARGUMENTS = [
    "every_n_epochs",
    "every_n_steps",
    "every_n_seconds",
    "weighting",
    "aggregation",
    "exchange",
    "privacy",
    "overlap",
    "parameters",
    "outer_optimizer",
    "outer_scheduler",
    "inner_optimizer_state",
    "on_nonfinite",
    "quorum",
    "timeout_s",
    "record",
    "jobs",
    "simulate",
]


def test_names_at_top_level() -> None:
    assert sorted(pellm_lightning.__all__) == sorted(NAMES)
    assert all(hasattr(pellm_lightning, name) for name in NAMES)
    assert {*NAMES} <= {*dir(pellm_lightning)}


@pytest.mark.parametrize("package", [pellm_lightning, comm])
def test_a_name_is_imported_from_where_it_is_defined(package: ModuleType) -> None:
    """What is told to type checkers is what a program gets."""
    told = {
        alias.name: statement.module
        for block in ast.parse(Path(str(package.__file__)).read_text()).body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(told) == sorted(package.__all__)
    for name, module in told.items():
        assert getattr(package, name) is getattr(importlib.import_module(str(module)), name)
    with pytest.raises(AttributeError, match="has no attribute 'Averaging'"):
        package.Averaging  # noqa: B018


def test_the_trainer_is_wrapped_once_the_callback_is_used() -> None:
    code = """
import os
from lightning.pytorch import Trainer
plain = Trainer.fit
import pellm_lightning
assert Trainer.fit is plain
forked = os.fork()  # each name in a process that has used none
getattr(pellm_lightning, "FederatedAveraging" if forked else "FederatedCLI")
assert Trainer.fit.__wrapped__ is plain
assert not forked or os.waitpid(forked, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arguments_of_the_callback() -> None:
    assert list(inspect.signature(FederatedAveraging).parameters) == ARGUMENTS


def test_the_counts_of_the_house_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "docs/house.py"), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    lines = [line.rsplit("  ", 1) for line in printed if not line.startswith(" ")]
    found = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    assert found["modules at top level"] == "2"
    assert found["arguments of the callback"] == str(len(ARGUMENTS))
