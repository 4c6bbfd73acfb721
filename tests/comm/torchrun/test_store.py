"""The store of a launch: torchrun's own if it hosts one, else that of rank 0; texts of any length in it."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from ports import free_port

from pellm_lightning.comm import PartyLostError
from pellm_lightning.comm.topology import Topology, hide_launch
from pellm_lightning.comm.torchrun.store import delete_text, get_text, put_text, store_from_env

_HEADERS = 64  # of a request, besides key and values
_BUFFER_BYTES = 4096  # of torch 2.7's server, which drops who fills it just so


@pytest.fixture
def launch() -> Iterator[pytest.MonkeyPatch]:
    """The environment of rank 0 of two processes, which a test may change."""
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        yield patch


@pytest.mark.parametrize("hidden", [False, True])
def test_the_store_of_torchrun_is_found_also_when_the_launch_is_hidden(
    launch: pytest.MonkeyPatch, hidden: bool
) -> None:
    """torch 2.14 and later believe in torchrun's store only if the environment names its address."""
    launch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
    agent.set("of", "torchrun")
    if hidden:
        hide_launch(Topology(0, 2))
    store = store_from_env(5.0)
    assert store.get("of") == b"torchrun"


def test_without_torchruns_rank_0_hosts_it(launch: pytest.MonkeyPatch) -> None:
    launch.setenv("WORLD_SIZE", "1")
    launch.setattr("pellm_lightning.comm.torchrun.store.launched", lambda: True)
    store = store_from_env(5.0)
    store.set("of", "rank 0")
    other = dist.TCPStore(
        "127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
    )
    assert other.get("of") == b"rank 0"
    assert store_from_env(5.0).get("of") == b"rank 0"  # a second federation in the process


@pytest.mark.parametrize("given", ["", "many", "70000", "-1"])
def test_a_port_that_is_none_is_named(launch: pytest.MonkeyPatch, given: str) -> None:
    launch.setenv("MASTER_PORT", given)
    with pytest.raises(PartyLostError, match=f"could not reach the rendezvous at 127.0.0.1:{given}"):
        store_from_env(1.0)


class Recorded:
    """A store that records the bytes of each request, and has none without an answer."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.sizes: list[int] = []

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.sizes.append(len(key) + len(expected) + len(desired) + _HEADERS)
        return self._store.compare_set(key, expected, desired)


# As a request of their own, the last three end a connection to torch 2.7's server.
@pytest.mark.parametrize("length", [0, 1, 2999, 3000, 3001, 6000, 40_000, 8171, 12_267, 16_363])
def test_a_text_of_any_length_arrives(length: int) -> None:
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    writer, reader = (
        dist.TCPStore("127.0.0.1", host.port, is_master=False, timeout=timedelta(seconds=20))
        for _ in range(2)
    )
    text = "".join(chr(ord("a") + index % 23) for index in range(length))
    before = host.num_keys()
    recorded = Recorded(writer)
    put_text(recorded, "abc", text)  # type: ignore[arg-type]
    assert max(recorded.sizes) < _BUFFER_BYTES
    assert get_text(reader, "abc") == get_text(writer, "abc") == text
    delete_text(reader, "abc")
    assert host.num_keys() == before


def test_a_key_is_there_only_when_its_whole_text_is() -> None:
    store = dist.HashStore()
    seen: list[bool] = []

    class Watched:
        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            seen.append(store.check(["abc"]))
            return store.compare_set(key, expected, desired)

    put_text(Watched(), "abc", "x" * 10_000)  # type: ignore[arg-type]
    assert seen == [False] * 4
    assert get_text(store, "abc") == "x" * 10_000


@pytest.mark.parametrize("kind", ["file", "prefix", "hash"])
def test_other_stores_of_torch_hold_texts(kind: str, tmp_path: Path) -> None:
    store: dist.Store = dist.FileStore(str(tmp_path / "store"), 1) if kind == "file" else dist.HashStore()
    if kind == "prefix":
        store = dist.PrefixStore("pellm/1", store)
    put_text(store, "abc", "y" * 7000)
    assert get_text(store, "abc") == "y" * 7000
    delete_text(store, "abc")
    assert not store.check(["abc"])
    assert not store.check(["abc/1"])
