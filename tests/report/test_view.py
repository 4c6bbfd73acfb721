"""The live view: what it shows of a federation, and when it keeps quiet."""

import io
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from party_threads import Classifier, ValidatedClassifier, data, fit_parties, quiet_trainer
from rich.console import Console

from pellm_lightning import RoundReport
from pellm_lightning.report.bar import FederationProgressBar
from pellm_lightning.report.run_view import RunView
from pellm_lightning.report.view import clock, last_phases, spark, view


def report(**changed: Any) -> RoundReport:
    known: dict[str, Any] = {
        "round": 6,
        "parties": (0, 1, 2),
        "active_parties": 3,
        "trained_parties": 3,
        "quorum": 2,
        "total_weight": 40.0,
        "weight": 10.0,
        "excluded": (),
        "loss": 1.25,
        "seconds": 0.5,
        "waited_seconds": 3.0,
        "stalled_seconds": 3.5,
        "bytes_sent": 2_000_000,
        "update_norm": 0.75,
        "distance": 0.5,
        "deviation": None,
        "local_loss": 1.5,
        "weights": (10.0, 20.0, 10.0),
        "losses": (1.5, 1.125, None),
        "distances": (0.25, None, 0.125),
    }
    return RoundReport(**(known | changed))


def shown(
    *rounds: RoundReport,
    phases: Mapping[str, str] | None = None,
    names: tuple[str, ...] = ("berlin", "oslo", "rome"),
    seconds_left: float | None = None,
    width: int = 80,
) -> list[str]:
    watched = RunView(0, names, rounds, dict)
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(view(watched, phases or {}, seconds_left))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


def test_before_the_first_round_there_are_the_parties() -> None:
    lines = shown(phases={"berlin": "training", "oslo": "joining"})
    assert lines == [
        "federation of 3 parties · no round yet",
        "party          does",
        "berlin (here)  training",
        "oslo           joining",
        "rome",
    ]


def test_rounds_are_told_with_losses_costs_and_each_party() -> None:
    first = report(round=5, loss=2.0, bytes_sent=1_000_000)
    lines = shown(first, report(), phases={"oslo": "in round 7"}, seconds_left=3725)
    assert lines == [
        "federation of 3 parties · 7 rounds done · 1:02:05 left",
        "global loss 1.25 █▁ · own 1.5 · update norm 0.75",
        "last round 2 MB in 0.50 s · waited 3.0 s for the others · 3 MB in all",
        "party          does        weight   loss  distance",
        "berlin (here)                25 %    1.5      0.25",
        "oslo           in round 7    50 %  1.125         -",
        "rome                         25 %      -     0.125",
    ]


def test_a_masked_exchange_shows_no_party_s_figures() -> None:
    lines = shown(report(weights=(), losses=(), distances=()))
    assert lines[3:] == ["party          does", "berlin (here)", "oslo", "rome"]


def test_who_is_missing_and_who_was_left_out_is_seen() -> None:
    done = report(
        parties=(0, 2),
        active_parties=0,
        trained_parties=1,
        excluded=(2,),
        weights=(10.0, 0.0),
        total_weight=10.0,
        losses=(1.5, None),
        distances=(None, None),
    )
    lines = shown(done)
    assert lines[0] == "federation of 3 parties · 7 rounds done · 1 of 3 trained, below quorum 2"
    assert lines[4].split() == ["berlin", "(here)", "100", "%", "1.5", "-"]
    assert lines[5].split() == ["oslo", "missing", "-", "-"]
    assert lines[6].split() == ["rome", "left", "out", "-", "-"]


def test_what_another_party_says_does_not_move_the_cursor_nor_set_colours() -> None:
    said = "\x1b[2J[red]in\nround 7[/red]" + 200 * "!"
    lines = shown(phases={"oslo": said}, names=("here", "oslo"))
    assert len(lines) == 4
    assert "\x1b" not in lines[3]
    assert lines[3].startswith("oslo         [2J[red]inround 7[/red]!!")
    assert all(len(line) <= 80 for line in lines)


def test_the_last_table_tells_who_has_finished() -> None:
    run = RunView(0, ("berlin", "oslo", "rome"), [report(parties=(0, 2))], dict)
    seen = {"berlin": "in round 6", "oslo": "silent for 9 s", "rome": "meeting for round 7"}
    assert last_phases(run, seen) == {"berlin": "finished", "oslo": "silent for 9 s", "rome": "finished"}
    assert last_phases(run, seen | {"rome": "left"})["rome"] == "left"


def test_bars_and_clocks() -> None:
    assert spark([1.0, 2.0, float("nan"), 3.0]) == "▁▅ █"
    assert spark([2.0, 2.0]) == "▁▁"
    assert spark([float("nan")]) == ""
    assert [clock(s) for s in (0.4, 59.6, 3600.0, 360_000.0)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "100:00:00",
    ]


def fit_with_bar(
    folder: Path, module: Classifier | None = None, *, ci: str | None = None, **console: Any
) -> FederationProgressBar:
    bar = FederationProgressBar(console_kwargs=console)

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(
            folder, [federated(every_n_steps=2), bar], max_steps=6, enable_progress_bar=True
        )
        trainer.fit(module or ValidatedClassifier(), data(16, seed=party), data(8, seed=9))

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        if ci is not None:
            patch.setenv("CI", ci)
        fit_parties(1, fit)
    return bar


def test_in_a_terminal_a_fit_shows_the_federation_above_the_bars(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pellm_lightning")
    file = io.StringIO()
    fit_with_bar(tmp_path, file=file, force_terminal=True, width=100, color_system=None)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "federation of 1 party · " in text
    assert "3 rounds done" in text
    assert "Epoch 0" in text
    assert "/-" not in text  # of max_epochs, which is not given
    assert re.search(r"0 \(here\) +finished", text[text.rindex("3 rounds done") :])
    assert "global_loss" not in text  # it stands above the bar already
    assert not [r for r in caplog.records if "round 0: " in r.getMessage()]
    assert "federation view" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(("terminal", "ci"), [(False, ""), (True, "true")])
def test_without_a_terminal_and_in_ci_each_round_is_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, terminal: bool, ci: str
) -> None:
    caplog.set_level("INFO", "pellm_lightning")
    file = io.StringIO()
    bar = fit_with_bar(tmp_path, file=file, force_terminal=terminal, ci=ci)
    assert bar.quiet
    assert file.getvalue() == ""
    lines = [
        r.getMessage()
        for r in caplog.records
        if re.search(r"round \d: 1 of 1 parties trained, loss", r.getMessage())
    ]
    assert len(lines) == 3


def test_the_view_ends_with_a_fit_that_fails(tmp_path: Path) -> None:

    class Broken(ValidatedClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 3:
                raise RuntimeError("the lights went out")
            return super().training_step(batch, batch_idx)

    file = io.StringIO()
    with pytest.raises(RuntimeError, match="lights"):
        fit_with_bar(tmp_path, Broken(), file=file, force_terminal=True, color_system=None)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert re.search(r"0 \(here\) +failed", text[text.rindex("federation of") :])
    assert "federation view" not in [thread.name for thread in threading.enumerate()]


def test_without_a_federation_it_is_lightning_s_bar(tmp_path: Path) -> None:
    file = io.StringIO()
    bar = FederationProgressBar(console_kwargs={"file": file, "force_terminal": True, "width": 100})
    trainer: Trainer = quiet_trainer(tmp_path, [bar], max_steps=2, enable_progress_bar=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        trainer.fit(Classifier(), data(8, seed=0))
    assert "Epoch 0" in file.getvalue()
    assert "federation" not in file.getvalue()
