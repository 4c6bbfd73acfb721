"""The public names, the callback's arguments, and the counts of the house."""

import inspect
import subprocess
import sys

from paths import ROOT

import pellm_lightning
from pellm_lightning import FederatedAveraging

NAMES = [
    "Aggregator",
    "FederatedAveraging",
    "FederatedCLI",
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
    "TLS",
    "TooFewPartiesError",
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
]


def test_names_at_top_level() -> None:
    assert sorted(pellm_lightning.__all__) == sorted(NAMES)
    assert all(hasattr(pellm_lightning, name) for name in NAMES)


def test_arguments_of_the_callback() -> None:
    assert list(inspect.signature(FederatedAveraging).parameters) == ARGUMENTS


def test_the_counts_of_the_house_are_printed() -> None:
    script = [sys.executable, ROOT / "docs/house.py"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    lines = [line.rsplit("  ", 1) for line in done.stdout.splitlines() if not line.startswith(" ")]
    found = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    assert found["modules at top level"] == "2"
    assert found["arguments of the callback"] == str(len(ARGUMENTS))
