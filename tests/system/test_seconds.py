"""What measures seconds where all else in the tests of its module does not: nothing runs at the same time."""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from manual_rounds import started
from party_threads import Classifier, Rounds, data, fit_parties, quiet_trainer, run_parties

from pellm_lightning import Federation, Overlap, RoundReport
from pellm_lightning.tensors import snapshot


def longest_pause(act: Callable[[], Any]) -> float:
    """Return for how many seconds another thread could not go on while this one acts."""
    pauses, over = [0.0], threading.Event()

    def beat() -> None:
        last = time.monotonic()
        while not over.wait(0.002):
            pauses.append(time.monotonic() - last)
            last = time.monotonic()

    thread = threading.Thread(target=beat)
    thread.start()
    act()
    over.set()
    thread.join()
    return max(*pauses)


def test_a_large_state_does_not_stop_the_heart(tmp_path: Path) -> None:
    """Who holds the interpreter for as long as it takes to copy gigabytes is taken for dead."""
    state = {"global": torch.ones(1 << 25)}  # 128 MiB
    file = io.BytesIO()
    snapshot.write(state, file)
    packed, states = file.getvalue(), snapshot.SnapshotDir(tmp_path)
    acts: list[Callable[[], Any]] = [
        lambda: snapshot.Manifest.of(state),
        lambda: states.keep(1, state),
        states.newest,
    ]
    # A copy of bytes holds it, as long as this machine, with what else it has to do, takes to copy so many.
    held = min(longest_pause(lambda: bytearray(packed)) for _ in range(3))
    for act in acts:
        # Who holds it does so each time; any other is paused for as long only by chance.
        assert any(longest_pause(act) < held / 2 for _ in range(20))


def test_waiting_is_not_counted_as_exchanging() -> None:
    def act(federation: Federation) -> RoundReport:
        aggregator = started(federation, {"w": torch.zeros(2)})
        if federation.party == 1:
            time.sleep(2.0)
        return aggregator.step(1)

    early, late = run_parties(2, act)
    # A round of two numbers takes milliseconds, and on a busy machine tenths of a second.
    assert early.waited_seconds > 1.5
    assert early.seconds < 1.0
    assert late.waited_seconds < 1.0


class Slow(Callback):
    """Lets each step take so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


@pytest.mark.parametrize("overlap", [None, Overlap(1)])
def test_a_slow_party_does_not_idle_a_fast_one(tmp_path: Path, overlap: Overlap | None) -> None:
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> None:
        callbacks = [Slow(0.1 if party else 0.005), federated(every_n_seconds=0.3, overlap=overlap, quorum=1)]
        steps = {"max_epochs": -1, "max_steps": 6 if party else 80}
        loader = data(400, seed=party, batch_size=4)
        quiet_trainer(tmp_path, callbacks, logger=loggers[party], **steps).fit(Classifier(party), loader)

    fit_parties(2, fit)
    fast, slow = (logger.rounds[0] for logger in loggers)
    assert fast["step"] > 2 * slow["step"], "both came when the time was up"
    assert fast["weight"] + slow["weight"] == fast["total_weight"]
    assert fast["weight"] > 2 * slow["weight"], "each counts by its samples"
    assert fast["waited_seconds"] < 0.5, "it waited for all six steps of the slow one, 0.6 s"
