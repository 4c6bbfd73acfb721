"""Guards against leaks of environment variables, process groups, threads or ranks; fixtures of many files.

By ``pytest -n 3 --dist loadfile --no-loadscope-reorder`` three files run at a time, on two cores: many tests
wait for one another, so that two leave a core idle for a third of the time. Tests marked ``alone``
measure seconds, and nothing runs at the same time. In those marked ``patient`` parties give each other up
after tenths of a second: only tests like them run at the same time.
"""

import contextlib
import fcntl
import functools
import gc
import logging
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from job_threads import World
from lightning.fabric.utilities import registry
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.trainer.connectors import data_connector
from ports import free_port

from pellm_lightning.comm import topology
from pellm_lightning.comm.torchrun.gloo import GlooGroup
from pellm_lightning.comm.torchrun.shared_memory import SWITCH
from pellm_lightning.tensors import flat_buffer

# A busy processor makes an example slow and no wrong: tests have a timeout, examples have none of their own.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

# torchrun's own default is one port of the host, at which launches of several workers would meet.
os.environ["PET_MASTER_PORT"] = str(free_port())

# Twice a connection to a store torch asks a name server who 127.0.0.1 is, and waits 5 s if no answer comes.
os.environ["RES_OPTIONS"] = "timeout:1"

gc.disable()  # imports and 6,000 tests are no garbage, but make every collection slow: until tests run

TESTS = Path(__file__).parent
_NOTES = Path(tempfile.gettempdir(), f"pellm-tests-{os.getuid()}-{TESTS.stat().st_ino}")  # of this checkout
# Marked "alone": their processes need both cores, or they measure what a processor can do.
_ALONE = {
    "system/test_chaos.py",
    "system/test_networks.py",
    "system/test_seconds.py",
}
# Marked "patient": they wait more than they compute, so several run at a time, and nothing else does. So are
# all tests of separate jobs as threads, which have the fixture ``world``.
_PATIENT = {
    "callbacks/test_separate_jobs.py",
    "callbacks/test_separate_jobs_errors.py",
    "comm/elastic/test_reachability.py",
    "comm/elastic/test_separate_jobs.py",
    "comm/mesh/test_mesh.py",
    "comm/rendezvous/test_client.py",
    "comm/rendezvous/test_server.py",
    "comm/torchrun/test_shared_memory.py",
    "exchange/secure/test_separate_jobs.py",
}
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _kind(item: pytest.Item) -> str:
    """Return "alone", "patient" for what runs next to its like only, or nothing for all else."""
    return next((kind for kind in ("alone", "patient") if item.get_closest_marker(kind)), "")


@pytest.hookimpl(tryfirst=True)  # before -m selects by the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files last that run alone, launches first, long files before short ones: workers end together.

    A file goes where most of its tests belong: one that is patient in a file of others costs its own seconds,
    but a file of others among the patient would run by itself, test by test.
    """
    kinds: dict[Path, Counter[str]] = {}
    for item in items:
        path = item.path.relative_to(TESTS).as_posix()
        if path in _ALONE:
            item.add_marker("alone")
        elif path in _PATIENT or "world" in getattr(item, "fixturenames", ()):
            item.add_marker("patient")
        kinds.setdefault(item.path, Counter())[_kind(item)] += 1
    last = {path: of_file.most_common(1)[0][0] for path, of_file in kinds.items()}
    launched = {item.path for item in items if item.get_closest_marker("torchrun")}
    counts = {path: of_file.total() for path, of_file in kinds.items()}
    items.sort(key=lambda item: (last[item.path], item.path not in launched, -counts[item.path], item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage from here on, but only what tests make."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout, which must not count the waiting
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test wait until nothing runs that must not run at the same time."""
    if item.get_closest_marker("torchrun") or getattr(item.module, "python", None) is fork_server.python:
        fork_server.python()  # no test's own time: on a busy machine it takes tens of seconds to come up
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with contextlib.ExitStack() as held:
        # Who waits holds the first, so that nobody slips in before. Each kind shares its own file, and passes
        # only when nobody holds the other's.
        with _locked(TESTS, fcntl.LOCK_EX):
            kind = _kind(item)
            own, other = ("helpers", "conftest.py") if kind == "patient" else ("conftest.py", "helpers")
            with _locked(TESTS / other, fcntl.LOCK_EX):
                shared = fcntl.LOCK_EX if kind == "alone" else fcntl.LOCK_SH
                held.enter_context(_locked(TESTS / own, shared))
        held.enter_context(_noted(item.nodeid))
        return (yield)


@contextlib.contextmanager
def _locked(path: Path, how: int, limit_s: float = 900) -> Iterator[None]:
    """Hold a lock on a file; a test takes longer than the limit only if it hangs where no timeout ends it."""
    descriptor = os.open(path, os.O_RDONLY)
    deadline = time.monotonic() + limit_s
    try:
        while not _has_locked(descriptor, how):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{path} was locked for {limit_s:g} s, by {' or '.join(_noted_tests()) or 'no test'}."
                    " End that process."
                )
            time.sleep(0.01)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a fork may hold it open
        os.close(descriptor)


def _has_locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _noted(test: str) -> Iterator[None]:
    """Note the test that this process runs, for others that wait for it: also of another run here."""
    _NOTES.mkdir(exist_ok=True)
    note = _NOTES / str(os.getpid())
    note.write_text(test)
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _noted_tests() -> list[str]:
    found = []
    for note in sorted(_NOTES.glob("*")):
        with contextlib.suppress(OSError):  # it was killed, or has just ended
            os.kill(int(note.name), 0)
            found.append(f"{note.read_text()} (process {note.name})")
    return found


_ENDS_A_GROUP = "ends a Gloo group of "


@pytest.fixture(scope="session", autouse=True)
def groups_end_in_threads() -> Iterator[None]:
    """Destroy each Gloo group in a thread of its own: it takes 10 ms a member, and tests make thousands.

    torch's destructor waits for a collective under way until a peer's group is destroyed, or it times out. So
    no group may wait for another one's destructor, and no test waits for any.
    """
    abort = GlooGroup.abort

    def abort_and_hand_over(self: GlooGroup) -> None:
        last = [self._group]  # the thread that clears this destroys it
        abort(self)
        name = _ENDS_A_GROUP + os.environ.get("PYTEST_CURRENT_TEST", "no test")
        threading.Thread(target=last.clear, name=name, daemon=True).start()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlooGroup, "abort", abort_and_hand_over)
        yield


def pytest_sessionfinish() -> None:
    """Wait a moment for groups that still end, so that the interpreter does not exit under them.

    Here and not in a fixture, whose end is part of a worker's last test, and would fail it.
    """
    deadline = time.monotonic() + 5
    ending = [thread for thread in threading.enumerate() if thread.name.startswith(_ENDS_A_GROUP)]
    for thread in ending:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = Counter(thread.name for thread in ending if thread.is_alive())
    for name, count in left.items():
        print(f"{count} threads are left at the end: each {name}", file=sys.__stderr__)


# By pytest, by older torch when it compiles, by scikit-learn when it is imported, and by our command line.
_SET_BY_OTHERS = (
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_IPEX",
)


@pytest.fixture(autouse=True)
def no_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in _LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    threads = set(threading.enumerate())
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    rank_zero_only.rank = 0
    yield
    topology._hidden.clear()
    changed = {
        name
        for name in before.keys() ^ os.environ.keys() | before.keys()
        if before.get(name) != os.environ.get(name) and name not in _SET_BY_OTHERS
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


@pytest.fixture(scope="session", autouse=True)
def loaders_are_requested_one_at_a_time() -> Iterator[None]:
    """Keep parties that are threads apart where Lightning changes ``DataLoader`` while it asks for one."""
    lock, replace = threading.RLock(), data_connector._replace_dunder_methods

    @contextlib.contextmanager
    def replace_alone(*arguments: Any) -> Iterator[None]:
        with lock, replace(*arguments):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_connector, "_replace_dunder_methods", replace_alone)
        yield


@pytest.fixture(scope="session", autouse=True)
def plugins_are_looked_up_once() -> Iterator[None]:
    """Keep what is installed: each of thousands of Trainers would read the metadata of every package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Let fixtures of a module compute as its tests do: by one thread, whose sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    monkeypatch.setattr(flat_buffer, "_CHUNK", 8)
    monkeypatch.setattr(flat_buffer, "_BUCKET", 24)


@pytest.fixture(params=["shared memory", "gloo"])
def lane(request: pytest.FixtureRequest) -> Iterator[str]:
    """Let parties of one launch exchange in shared memory, as they do on one host, then over Gloo."""
    with _lane(request.param):
        yield request.param


@pytest.fixture
def over_gloo() -> Iterator[None]:
    """Let parties of one launch exchange as they do on several hosts."""
    with _lane("gloo"):
        yield


@contextlib.contextmanager
def _lane(lane: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # ends before the test for leaks
        patch.setenv(SWITCH, str(int(lane == "shared memory")))
        yield


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
