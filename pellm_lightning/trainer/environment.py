"""Cluster environment of one party, whose processes form Lightning's world, and its leader process."""

import atexit
import logging
import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from typing_extensions import override

from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.topology import Topology, keep_launch, launch_environ
from pellm_lightning.comm.torchrun.store import launched, store_from_env
from pellm_lightning.trainer.isolation import callbacks_of

log = logging.getLogger(__name__)


class PartyEnvironment(ClusterEnvironment):
    """Cluster environment that splits the processes of one launch into parties, each a world of its own.

    With ``torchrun --nproc-per-node 4`` and ``Trainer(plugins=[PartyEnvironment(num_parties=2)],
    strategy="ddp", devices=2)`` ranks 0 and 1 are party 0 and train with DDP, ranks 2 and 3 are party 1.

    Args:
        num_parties: Number of parties; None makes every process a party. It must divide the number of
            processes.
        timeout_s: Seconds a process of a party waits for the others of the same party. While its leader
            waits for other parties the others wait for it, so it must not be shorter than the callback's
            ``timeout_s``.

    Example:
        >>> environment = PartyEnvironment(num_parties=2)
        >>> trainer = Trainer(plugins=[environment], accelerator="cpu", logger=False)
    """

    def __init__(self, num_parties: int | None = None, timeout_s: float = 1800) -> None:
        super().__init__()
        if num_parties is not None and num_parties < 1:
            raise ValueError(
                f"num_parties={num_parties} must be at least 1, or None for one party per process."
            )
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be positive, in seconds.")
        self.num_parties = num_parties
        self.timeout_s = timeout_s
        self._is_built = False  # whether set_world_size has been called: the next call is a run's
        if launched():
            keep_launch()  # before a strategy writes

    @property
    def topology(self) -> Topology:
        """Party and rank of this process."""
        return Topology.from_env(self.num_parties)

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return launch_environ().get("MASTER_ADDR", "127.0.0.1")

    @property
    @override
    def main_port(self) -> int:
        return int(launch_environ().get("MASTER_PORT", 0))

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def world_size(self) -> int:
        return self.topology.party_size

    @override
    def set_world_size(self, size: int) -> None:
        """Check the size, which the launcher sets, and initialise the party's process group.

        Each strategy of several processes calls this before it would initialise a group, over all parties;
        those that shard do not call ``validate_settings``. The Trainer calls it first as it is built, when
        the party's other processes need not be there yet.
        """
        if self._is_built:
            self.validate_settings(size, 1)
        elif launched():
            check_party_size(self.topology, size, 1)
        self._is_built = True

    @override
    def global_rank(self) -> int:
        return self.topology.rank_in_party

    @override
    def set_global_rank(self, rank: int) -> None:
        log.debug("The launcher sets the rank in the party; ignoring set_global_rank(%d).", rank)

    @override
    def local_rank(self) -> int:
        return self.topology.local_rank()

    @override
    def node_rank(self) -> int:
        topology = self.topology
        return topology.rank_in_party // min(
            topology.party_size, int(launch_environ().get("LOCAL_WORLD_SIZE", 1 << 30))
        )

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Validate the Trainer's devices and initialise the party's process group."""
        topology = self.topology
        check_party_size(topology, num_devices, num_nodes)
        if topology.party_size > 1 and not dist.is_initialized():
            self._init_process_group(topology)

    def _init_process_group(self, topology: Topology) -> None:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(_fresh_prefix(topology), store_from_env(self.timeout_s)),
            rank=topology.rank_in_party,
            world_size=topology.party_size,
            timeout=timedelta(seconds=self.timeout_s),
        )
        # Exiting with a live group sometimes aborts the process, and torchrun then kills the others.
        atexit.register(_destroy_party_group)


def check_party_size(topology: Topology, num_devices: int, num_nodes: int) -> None:
    """Check that the Trainer runs in as many processes as the party has.

    Raises:
        ValueError: Names both numbers.
    """
    if num_devices * num_nodes != topology.party_size:
        raise ValueError(
            f"A party has {topology.party_size} process(es) ({topology.num_parties} parties in the"
            f" federation), but the Trainer has devices={num_devices} x num_nodes={num_nodes}. Set"
            " devices to the processes per party, with strategy='ddp' if there are several, or launch"
            " num_parties x devices processes (of separate jobs: devices)."
        )


def topology_of(trainer: Trainer) -> Topology:
    """Return this process's party and rank; without PartyEnvironment each process of a launch is a party.

    With separate jobs the callback defines the party. Processes without a launcher's rank, started by
    Lightning or SLURM, belong to one party.
    """
    # A single-device strategy does not expose its environment.
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, PartyEnvironment):
        topology = environment.topology
    else:
        topology = Topology.from_env()
    for callback in callbacks_of(trainer):
        job = getattr(callback, "jobs", None)
        if isinstance(job, SeparateJobs):
            topology = job.topology()
    if "RANK" not in launch_environ() and trainer.world_size > 1:
        return replace(topology, rank_in_party=trainer.global_rank, party_size=trainer.world_size)
    return topology


def party_of(trainer: Trainer | None) -> int:
    """Return the index of the party this process belongs to."""
    return Topology.from_env().party if trainer is None else topology_of(trainer).party


def set_rank_zero(rank_in_party: int) -> None:
    """Set the rank in the party for Lightning's rank-zero functions, so that every party's loggers write."""
    for function in (rank_zero_only, utils_rank_zero_only):
        setattr(function, "rank", rank_in_party)  # noqa: B010  (unknown to the type checker)


def shares_terminal(topology: Topology) -> bool:
    """Return whether several parties of one launcher share this host and its terminal."""
    return int(launch_environ().get("LOCAL_WORLD_SIZE", 1)) > topology.party_size


def owns_terminal(topology: Topology) -> bool:
    """Return whether this process writes to its terminal: of the parties that share one, the first does."""
    return not shares_terminal(topology) or int(launch_environ().get("LOCAL_RANK", 0)) == 0


def _fresh_prefix(topology: Topology) -> str:
    """Return a store prefix that is unique to this start: torchrun restarts workers with the same store."""
    return f"party/{topology.party}/{launch_environ().get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _destroy_party_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def describe_device(device: torch.device) -> str | None:
    """Return a unique identifier of an accelerator, None for a CPU."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{os.uname().nodename}:{properties.uuid}"
