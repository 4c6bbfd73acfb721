"""Guards against leaks of environment variables, process groups, threads or ranks; fixtures of many files."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import World
from lightning.fabric.utilities.rank_zero import rank_zero_only

from pellm_lightning import layout
from pellm_lightning.federation.launch.gloo import GlooGroup

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session", autouse=True)
def groups_are_taken_down_beside() -> Iterator[None]:
    """Let other threads take down Gloo groups: each takes 10 ms a member, and tests make thousands."""
    aborted: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
    abort = GlooGroup.abort

    def abort_and_hand_over(self: GlooGroup) -> None:
        last = [self._group]  # the thread that clears this takes it down
        abort(self)
        aborted.put(last)

    def take_down() -> None:
        while (last := aborted.get()) is not None:
            last.clear()

    threads = [threading.Thread(target=take_down, name="takes groups down") for _ in range(8)]
    for thread in threads:
        thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlooGroup, "abort", abort_and_hand_over)
        yield
    for _ in threads:
        aborted.put(None)
    for thread in threads:
        thread.join()


@pytest.fixture(autouse=True)
def no_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in _LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    threads = set(threading.enumerate())
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    rank_zero_only.rank = 0
    yield
    changed = {
        name
        for name in before.keys() ^ os.environ.keys() | before.keys()
        if before.get(name) != os.environ.get(name) and name != "PYTEST_CURRENT_TEST"
    }
    started = {t for t in threading.enumerate() if t not in threads and not t.daemon}
    for thread in started:
        thread.join(timeout=5)  # those of `from_pretrained` end a moment after it returns
    left = {t for t in started if t.is_alive()}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    assert not changed, f"environment variables changed: {changed}"
    assert not left, f"threads left behind: {left}"
    assert not dist.is_initialized(), "a default process group was left behind"


@pytest.fixture(autouse=True)
def one_thread_per_party() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(
        torch.float32
    )  # Lightning sets it in turn; with threads the last may not restore it


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut vectors of a few dozen scalars as those of millions are."""
    monkeypatch.setattr(layout, "_CHUNK", 8)
    monkeypatch.setattr(layout, "_BUCKET", 24)


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    """Make worlds whose threads all end."""
    made: list[World] = []

    def make(*arguments: Any, **keywords: Any) -> World:
        made.append(World(*arguments, **keywords))
        return made[-1]

    yield make
    for one in made:
        one.close()
