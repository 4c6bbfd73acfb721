"""The summary of a party's data: a table, or a line where several parties share a terminal."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pellm_lightning.comm.topology import Topology
from pellm_lightning.tasks.summary import Line, Summary

LINES = [
    Line("files", 1200, 1190, 9000, cut=7, left_out=10, note="all of it.", is_loss=True),
    Line("val_files", 5, 5, 40),
]
TABLE = """\
Party 1, block_size=8  records  samples  tokens  cut  left out
files                    1,200    1,190   9,000    7        10
val_files                    5        5      40    0         0
files: all of it."""


def logged(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path | None,
    parts: str,
    *,
    shared: bool,
) -> str:
    monkeypatch.setattr("pellm_lightning.tasks.summary.shares_terminal", lambda _: shared)
    monkeypatch.setattr("pellm_lightning.tasks.summary.topology_of", lambda _: Topology(1, 3))
    summary = Summary()
    for line in LINES:
        summary.add(line)
    trainer: Any = SimpleNamespace()
    with caplog.at_level(logging.INFO):
        summary.log_at(trainer, 1, "block_size=8", folder, parts)
        summary.log_at(trainer, 1, "block_size=8", folder, parts)  # nothing new
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    return record.getMessage()


def test_alone_in_a_terminal_a_party_shows_the_table(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = logged(caplog, monkeypatch, tmp_path, "who holds what", shared=False)
    assert text == f"{TABLE}\nwho holds what\nCached, with the texts, in {tmp_path}."


@pytest.mark.parametrize(("parts", "more"), [("", "More"), ("who holds what", "More, and who holds what,")])
def test_of_parties_that_share_a_terminal_each_has_a_line_and_the_table_in_its_folder(
    parts: str, more: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert logged(caplog, monkeypatch, tmp_path, parts, shared=True) == (
        "[party 1] files: 1,200 records, 9,000 tokens, 7 cut, 10 left out; val_files: 5 records, 40 tokens."
        f" {more} in {tmp_path}/summary-1.txt."
    )
    assert (tmp_path / "summary-1.txt").read_text() == "\n".join(filter(None, [TABLE, parts])) + "\n"


def test_without_a_folder_the_table_is_shown_whatever_the_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert logged(caplog, monkeypatch, None, "", shared=True) == TABLE
