"""Tiny models, and what a command leaves in its process."""

import os
from types import SimpleNamespace

import pytest
from tiny_language_models import (  # noqa: F401 - fixtures
    bert,
    llama,
    loading_is_over,
    one_model_at_a_time,
    quiet_trainer,
    tokenizer,
)

from pellm_lightning.cli import errors


@pytest.fixture(autouse=True)
def place_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command sets which party it is, for the rest of the process."""
    for name, value in (("party", None), ("folder", None), ("debug", False)):
        monkeypatch.setattr(errors._Process, name, value)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are wrapped at the terminal's width, which under pytest-xdist is another one."""
    size = SimpleNamespace(get_terminal_size=lambda *_: os.terminal_size((100, 24)))
    monkeypatch.setattr(errors, "shutil", size)  # in that module only: pytest asks for it too
