"""The store of a launch: torchrun's own if it hosts one, else that of rank 0."""

import os
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist
from ports import free_port

from pellm_lightning.comm import PartyLostError
from pellm_lightning.comm.topology import Topology, hide_launch
from pellm_lightning.comm.torchrun.store import store_from_env


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
