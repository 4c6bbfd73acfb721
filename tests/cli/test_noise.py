"""What third-party packages may say; system/test_launched.py counts the lines of an example."""

import logging
import os
import subprocess
import sys

import pytest

from pellm_lightning.cli.noise import _in_one_line, _is_no_advertisement

REPORT = (
    "\x1b[1mBertForSequenceClassification LOAD REPORT\x1b[0m from: runs/minilm\n"
    "Key               | Status  | \n"
    "------------------+---------+-\n"
    "classifier.bias   | MISSING | \n"
    "pooler.weight     | UNEXPECTED | \n"
    "classifier.weight | MISSING | \n"
    "\nNotes:\n- MISSING:\tthose params were newly initialized because missing from the checkpoint."
)

SAY = """
import logging
import warnings

from pellm_lightning.cli.noise import quieten, quieten_loggers

quieten()
quieten_loggers()
logging.basicConfig()
names = ("peft.tuners", "lightning.fabric.utilities.seed", "pellm_lightning.engine", "my_project")
for name in (*names, "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(name).warning("%s speaks", name)
    logging.getLogger(name).error("%s fails", name)
for module in ("transformers.x", "pellm_lightning.x"):
    warnings.warn_explicit(f"{module} warns", UserWarning, f"{module}.py", 1, module=module)
    warnings.warn_explicit(f"{module} will change", FutureWarning, f"{module}.py", 2, module=module)
"""


def said(rank: int, *options: str) -> str:
    environ = os.environ | {"LOCAL_RANK": str(rank)}
    words = [sys.executable, *options, "-c", SAY]
    return subprocess.run(words, env=environ, stderr=subprocess.PIPE, text=True, check=True).stderr


def test_others_than_the_first_show_errors_and_our_own_warnings() -> None:
    first, second = said(0), said(1)
    for name in ("peft.tuners", "lightning.fabric.utilities.seed"):
        assert f"{name} speaks" in first
        assert f"{name} speaks" not in second
        assert f"{name} fails" in second
    for name in ("pellm_lightning.engine", "my_project"):
        assert f"{name} speaks" in second
    for process in (first, second):
        assert "bitsandbytes.backends.cpu.ops speaks" not in process  # PEFT imports it for everybody
        assert "bitsandbytes.backends.cpu.ops fails" in process
    assert "transformers.x warns" in first
    assert "transformers.x warns" not in second
    assert "pellm_lightning.x warns" in second
    assert "transformers.x will change" not in first
    assert "pellm_lightning.x will change" in first
    assert "transformers.x will change" in said(1, "-W", "default")


def test_a_report_of_weights_is_one_line() -> None:
    record = logging.LogRecord("transformers", logging.WARNING, "", 0, REPORT, (), None)
    assert _in_one_line(record)
    assert record.getMessage() == (
        "BertForSequenceClassification from runs/minilm: MISSING classifier.bias, classifier.weight;"
        " UNEXPECTED pooler.weight"
    )
    other = logging.LogRecord("transformers", logging.WARNING, "", 0, "%d tokens", (3,), None)
    assert _in_one_line(other)
    assert other.getMessage() == "3 tokens"


@pytest.mark.parametrize(("text", "shown"), [("💡 Tip: install it", False), ("GPU available: True", True)])
def test_advertisements_are_left_out(text: str, shown: bool) -> None:
    assert _is_no_advertisement(logging.LogRecord("x", logging.INFO, "", 0, text, (), None)) == shown
