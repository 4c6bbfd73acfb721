"""When a round is due."""

import pytest

from pellm_lightning.loop.schedule import Clock, Schedule, schedule


def rounds_of(plan: Schedule, epochs: int, steps_per_batch: list[int]) -> list[tuple[int, int]]:
    """Return the (epoch, batch) of each round of a run whose batches make so many optimizer steps."""
    rounds, since = [], 0
    for epoch in range(epochs):
        for batch, steps in enumerate(steps_per_batch):
            since += steps
            if plan.due(Clock(since, 0.0, epoch, epoch_ends=batch == len(steps_per_batch) - 1)):
                rounds.append((epoch, batch))
                since = 0
    return rounds


@pytest.mark.parametrize(
    ("every_n_epochs", "every_n_steps", "expected"),
    [
        (None, None, Schedule("epochs", 1)),
        (1, None, Schedule("epochs", 1)),
        (3, None, Schedule("epochs", 3)),
        (None, 1, Schedule("steps", 1)),
        (None, 100, Schedule("steps", 100)),
    ],
)
def test_arguments_name_the_schedule(
    every_n_epochs: int | None, every_n_steps: int | None, expected: Schedule
) -> None:
    assert schedule(every_n_epochs, every_n_steps) == expected


def test_two_schedules_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every_n_epochs=1 and every_n_steps=10 are both given.*Keep one"):
        schedule(1, 10)
    with pytest.raises(ValueError, match=r"every_n_steps=10 and every_n_seconds=2\.5 are both given"):
        schedule(None, 10, 2.5)


@pytest.mark.parametrize("n", [0, -1])
@pytest.mark.parametrize("name", ["every_n_epochs", "every_n_steps"])
def test_a_round_takes_at_least_one(name: str, n: int) -> None:
    arguments = {"every_n_epochs": None, "every_n_steps": None} | {name: n}
    with pytest.raises(ValueError, match=f"{name}={n} must be at least 1"):
        schedule(**arguments)


def test_epochs_end_with_a_round() -> None:
    # Three batches an epoch, so batch 2 is an epoch's last.
    assert rounds_of(Schedule("epochs", 1), 3, [1, 1, 1]) == [(0, 2), (1, 2), (2, 2)]
    assert rounds_of(Schedule("epochs", 2), 5, [1, 1, 1]) == [(1, 2), (3, 2)]


def test_an_epoch_without_a_step_has_no_round() -> None:
    assert rounds_of(Schedule("epochs", 1), 2, [0, 0, 0]) == []


def test_steps_are_counted_over_epochs() -> None:
    # Steps 1 2 3 | 4 5 6 | 7 8 9: every fourth is (1, 0) and (2, 1).
    assert rounds_of(Schedule("steps", 4), 3, [1, 1, 1]) == [(1, 0), (2, 1)]


def test_gradient_accumulation_makes_no_round_without_a_step() -> None:
    # A step every second batch: after batch 1 the count is 1, after batch 3 it is 2.
    assert rounds_of(Schedule("steps", 2), 1, [0, 1, 0, 1, 0]) == [(0, 3)]


def test_two_optimizers_step_over_the_mark() -> None:
    # Counts 2, 4: the third step is inside the second batch, and is not missed.
    assert rounds_of(Schedule("steps", 3), 1, [2, 2, 2]) == [(0, 1)]


@pytest.mark.parametrize("n", [0, -1.0, float("nan"), float("inf")])
def test_seconds_are_above_zero(n: float) -> None:
    with pytest.raises(ValueError, match=f"every_n_seconds={n} must be a number of seconds above 0"):
        schedule(None, None, n)


def test_seconds_end_with_the_batch_in_which_they_are_over() -> None:
    plan = schedule(None, None, 2.5)
    assert plan == Schedule("seconds", 2.5)
    told = [plan.due(Clock(steps, seconds, 0, False)) for steps, seconds in [(9, 2.4), (9, 2.5), (0, 9.0)]]
    assert told == [False, True, False], "not before, and not without a step"


def test_fragments_share_steps_and_seconds() -> None:
    assert Schedule("steps", 100).shared_by(4) == Schedule("steps", 25)
    assert Schedule("seconds", 10.0).shared_by(4) == Schedule("seconds", 2.5)
