"""Numbers, sizes and times as people read them."""

import pytest

from pellm_lightning.report.formatting import duration, number, schedule, size


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (0, "0 B"),
        (204, "204 B"),
        (99_999, "100 kB"),
        (999_600, "1 MB"),
        (1_843_200, "1.84 MB"),
        (160e6, "160 MB"),
        (7e15, "7e+03 TB"),
    ],
)
def test_sizes(size_bytes: float, words: str) -> None:
    assert size(size_bytes) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, ""), (3.0, "3"), (12_345.0, "12,345"), (0.00012345, "0.0001234"), (12_345.6, "12,346")],
)
def test_numbers(value: float | None, words: str) -> None:
    assert number(value) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.25 s"), (119.0, "119 s"), (600, "10 min"), (9000, "2.5 h"), (4e5, "4.6 days")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every_n_epochs": None}, "epoch"),
        ({"every_n_epochs": 3}, "3 epochs"),
        ({"every_n_steps": 1}, "optimizer step"),
        ({"every_n_seconds": 2.5, "fragments": 1}, "2.5 seconds"),
        ({"every_n_steps": 12, "fragments": 4}, "12 optimizer steps for each of 4 fragments"),
    ],
)
def test_how_often_there_is_a_round(settings: dict[str, float | None], words: str) -> None:
    assert schedule(settings) == words
