"""The party as Lightning's whole world."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from party_threads import Classifier, data, quiet_trainer

from pellm_lightning import FederatedAveraging, PartyEnvironment
from pellm_lightning.comm.topology import Topology
from pellm_lightning.comm.torchrun import store
from pellm_lightning.trainer import environment


@pytest.fixture
def launched() -> Iterator[Any]:
    """Make this process look like one that torchrun has started."""
    patch = pytest.MonkeyPatch()

    def launch(rank: int, world_size: int, hosts: int = 1) -> None:
        per_host = world_size // hosts
        for name, value in {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank % per_host,
            "LOCAL_WORLD_SIZE": per_host,
            "MASTER_ADDR": "host-0",
            "MASTER_PORT": 1234,
        }.items():
            patch.setenv(name, str(value))

    yield launch
    patch.undo()


@pytest.mark.parametrize(
    ("rank", "num_parties", "hosts", "expected"),
    [
        # world size, rank and local rank in the party, node of the party
        (2, 2, 1, (2, 0, 0, 0)),
        (3, 2, 1, (2, 1, 1, 0)),
        (3, None, 1, (1, 0, 0, 0)),
        (2, 1, 1, (4, 2, 2, 0)),
        # One party over two hosts of two processes.
        (3, 1, 2, (4, 3, 1, 1)),
        # Two hosts, each a party of two.
        (3, 2, 2, (2, 1, 1, 0)),
    ],
)
def test_lightning_sees_the_party_only(
    launched: Any, rank: int, num_parties: int | None, hosts: int, expected: tuple[int, ...]
) -> None:
    launched(rank, 4, hosts)
    party = PartyEnvironment(num_parties)
    assert (party.world_size(), party.global_rank(), party.local_rank(), party.node_rank()) == expected
    assert party.creates_processes_externally
    assert (party.main_address, party.main_port) == ("host-0", 1234)


def test_ranks_are_the_launchers_to_set(launched: Any) -> None:
    launched(3, 4)
    party = PartyEnvironment(2)
    party.set_global_rank(9)
    with pytest.raises(ValueError, match=r"A party has 2 process\(es\) .* devices=9 x num_nodes=1"):
        party.set_world_size(9)
    assert not dist.is_initialized()
    assert (party.world_size(), party.global_rank()) == (2, 1)


def test_the_partys_group_is_formed_as_a_run_begins_and_once(
    launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(3, 4)
    party, formed = PartyEnvironment(2), list[Topology]()
    monkeypatch.setattr(party, "_init_process_group", formed.append)
    with pytest.raises(ValueError, match=r"devices=9 x num_nodes=1"):
        party.set_world_size(9)  # of a Trainer that is refused, which no run follows
    party.set_world_size(2)
    assert not formed, "a Trainer is built, and the party's other processes need not be there yet"
    party.set_world_size(2)
    assert formed == [Topology(1, 2, 1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        party.set_world_size(2)
        party.validate_settings(2, 1)
    assert len(formed) == 1


def test_shards_without_a_launcher_are_refused_as_a_run_begins() -> None:
    party = PartyEnvironment()
    party.set_world_size(2)
    with pytest.raises(ValueError, match=r"A party has 1 process\(es\) .* devices=2 x num_nodes=1"):
        party.set_world_size(2)


@pytest.mark.parametrize(
    ("rank", "size", "num_parties", "expected"),
    [(3, 4, 2, Topology(1, 2, 1, 2)), (1, 2, None, Topology(1, 2))],
)
def test_what_deepspeed_writes_into_the_environment_is_not_the_launch(
    launched: Any, rank: int, size: int, num_parties: int | None, expected: Topology
) -> None:
    launched(rank, size)
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    party = strategy.cluster_environment = PartyEnvironment(num_parties)
    strategy._num_nodes, strategy.parallel_devices = 1, [torch.device("cpu")] * expected.party_size
    strategy._set_node_environment_variables()
    assert os.environ["RANK"] == str(expected.rank_in_party)
    assert party.topology == Topology.from_env(num_parties) == expected
    assert party.local_rank() == expected.rank_in_party
    assert store.launched()


def test_lightning_does_not_pick_it_by_itself(launched: Any) -> None:
    launched(0, 2)
    assert not PartyEnvironment.detect()


def test_without_a_launcher_it_is_a_party_of_one() -> None:
    party = PartyEnvironment()
    assert (party.world_size(), party.global_rank(), party.local_rank(), party.node_rank()) == (1, 0, 0, 0)
    assert (party.main_address, party.main_port) == ("127.0.0.1", 0)
    party.validate_settings(1, 1)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_parties": 0}, "num_parties=0 must be at least 1"),
        ({"timeout_s": 0}, "timeout_s=0 must be positive"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartyEnvironment(**arguments)


def test_devices_must_be_the_partys_processes(launched: Any) -> None:
    launched(0, 4)
    with pytest.raises(
        ValueError, match=r"2 process\(es\) \(2 parties .* devices=4 x num_nodes=1. Set devices"
    ):
        PartyEnvironment(2).validate_settings(4, 1)
    assert not dist.is_initialized()


def test_a_world_that_is_not_divisible_is_refused(launched: Any, tmp_path: Path) -> None:
    launched(1, 4)
    trainer = quiet_trainer(tmp_path, [FederatedAveraging()], plugins=[PartyEnvironment(3)])
    words = r"num_parties=3 does not divide the 4 launched process\(es\) \(rank 1\)"
    with pytest.raises(ValueError, match=words):
        trainer.fit(Classifier(), data(4, seed=0))


def test_the_party_of_a_trainer(launched: Any, tmp_path: Path) -> None:
    launched(3, 4)
    plain = quiet_trainer(tmp_path)
    assert environment.topology_of(plain) == Topology(3, 4, 0, 1)
    federated = quiet_trainer(tmp_path, plugins=[PartyEnvironment(4)])
    assert environment.topology_of(federated) == Topology(3, 4, 0, 1)
    assert environment.party_of(federated) == environment.party_of(None) == 3


@pytest.mark.parametrize(("size", "hosts", "shared"), [(4, 1, True), (2, 2, False), (1, 1, False)])
def test_a_terminal_is_shared_by_parties_of_one_launcher(
    launched: Any, size: int, hosts: int, shared: bool
) -> None:
    launched(0, size, hosts)
    assert environment.shares_terminal(Topology(0, size, 0, 1)) == shared
    assert not environment.shares_terminal(Topology(0, 1, 0, size))


def test_of_the_parties_that_share_a_terminal_the_first_of_each_host_owns_it(launched: Any) -> None:
    owners = []
    for party in range(4):
        launched(party, 4, 2)
        owners.append(environment.owns_terminal(Topology(party, 4, 0, 1)))
    assert owners == [True, False, True, False]
    launched(1, 2)
    assert environment.owns_terminal(Topology(0, 1, 1, 2)), "of one party alone"


def test_rank_zero_means_the_partys(launched: Any) -> None:
    before = utils_rank_zero_only.rank
    try:
        environment.set_rank_zero(1)
        assert rank_zero_only.rank == utils_rank_zero_only.rank == 1
        environment.set_rank_zero(0)
        assert rank_zero_only.rank == utils_rank_zero_only.rank == 0
    finally:
        utils_rank_zero_only.rank = before


def test_a_cpu_is_shared_without_a_word() -> None:
    assert environment.describe_device(torch.device("cpu")) is None


# ---- no launcher


def test_without_a_launcher_a_fit_is_a_federation_of_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Classifier(seed=2)
    trainer = quiet_trainer(tmp_path, [FederatedAveraging()])
    trainer.fit(module, data(8, seed=0))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning == (
        "[party 0] No launcher found, so this is a federation of one party. To federate N parties on this"
        " host run `torchrun --nproc-per-node N your_script.py`."
    )
    assert float(trainer.callback_metrics["federated/active_parties"]) == 1
    alone = Classifier(seed=2)
    quiet_trainer(tmp_path).fit(alone, data(8, seed=0))
    torch.testing.assert_close(module.vector(), alone.vector(), rtol=0, atol=1e-6)


def test_no_launcher_but_a_party_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = quiet_trainer(tmp_path, [FederatedAveraging()], plugins=[PartyEnvironment()])
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    trainer.fit(Classifier(), data(8, seed=0))
    assert "No launcher found" in caplog.text
    assert not dist.is_initialized()
