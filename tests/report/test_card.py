"""What a federation leaves to be said, and the model card that says it."""

from dataclasses import asdict
from pathlib import Path

from run_records import done

from pellm_lightning.report.card import write_card
from pellm_lightning.report.run_summary import RunSummary

SETTINGS = {"every_n_steps": 10, "weighting": "samples", "exchange": "Plain()"}


def card(folder: Path, summary: RunSummary) -> str:
    write_card(folder, asdict(summary), "the/base")
    return (folder / "README.md").read_text()


def test_samples_are_summed_over_rounds_and_resumptions(tmp_path: Path) -> None:
    summary = RunSummary(["a", "b"], SETTINGS)
    summary.count(done(0, [0, 1], weights=(3.0, 0.0)))
    resumed = RunSummary(["a", "b"], SETTINGS).resumed(asdict(summary))
    resumed.count(done(1, [0, 1], weights=(4.0, 5.0)))
    text = card(tmp_path, resumed)
    assert "| rounds | `2` |" in text
    assert "| `a` | 2 | 7 |" in text
    assert "| `b` | 2 | 5 |" in text
    assert "Samples are counted as often" in text
    assert "The table is of" not in text
    assert RunSummary(["a", "c"], SETTINGS).resumed(asdict(summary)).rounds == 0


def test_who_came_late_tells_all_rounds_and_which_it_counted(tmp_path: Path) -> None:
    summary = RunSummary(["a", "b", "c"], SETTINGS | {"weighting": "uniform"})
    for index, parties in ((7, (0, 1, 2)), (8, (0, 2))):
        summary.count(done(index, parties))
    text = card(tmp_path, summary)
    assert "| rounds | `9` |" in text
    assert "| party | rounds | sum of its weights |" in text
    assert "| `b` | 1 | 1 |" in text
    assert "of the 2 rounds that the party which has saved this took part in" in text
    assert "Samples are counted" not in text


def test_nothing_is_hidden_before_the_first_round_and_all_once_a_weight_was(tmp_path: Path) -> None:
    summary = RunSummary(["a", "b"], SETTINGS)
    assert "| `a` | 0 | 0 |" in card(tmp_path, summary)
    summary.count(done(0, [0, 1], weights=()))
    summary.count(done(1, [0, 1]))
    assert "| `a` | 2 | hidden by the exchange |" in card(tmp_path, summary)


def test_a_federation_that_wrote_into_the_base_names_it(tmp_path: Path) -> None:
    assert "base/" not in card(tmp_path, RunSummary(["a"], SETTINGS))
    told = card(tmp_path, RunSummary(["a"], SETTINGS, writes_base=True))
    assert "load it onto the model in `base/`, and not onto `the/base`" in told
