"""Joining the other parties, as the environment or the settings of separate jobs say."""

import logging
from dataclasses import replace

import torch.distributed as dist

from pellm_lightning.comm.communicator import Communicator
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.quorum import Quorum
from pellm_lightning.comm.topology import Topology, launch_environ
from pellm_lightning.comm.torchrun.federation import Federation
from pellm_lightning.comm.torchrun.store import launched, store_from_env

log = logging.getLogger(__name__)


def join(topology: Topology, jobs: SeparateJobs | None, *, quorum: Quorum, timeout_s: float) -> Communicator:
    """Join the other parties; for the leader of a party.

    Args:
        topology: Party and rank of this process.
        jobs: How this party joins separate jobs; None if all parties come from one launch.
        quorum: Parties that must have trained in a round.
        timeout_s: Seconds a party of one launch may be late.

    Raises:
        PartyLostError: If the rendezvous or a party cannot be reached.
    """
    if jobs is not None:
        return jobs.join(quorum)
    if not launched():
        log.warning(
            "[party 0] No launcher found, so this is a federation of one party. To federate N parties on"
            " this host run `torchrun --nproc-per-node N your_script.py`%s.",
            f"; the {topology.party_size} processes of this Trainer are that one party"
            if topology.party_size > 1
            else "",
        )
    store = store_from_env(timeout_s)
    return Federation(store, topology.party, topology.num_parties, timeout_s=timeout_s)


def group_size() -> int:
    """Return the number of processes of torch's default process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launch_topology(jobs: SeparateJobs | None, num_parties: int | None = None) -> Topology:
    """Return party and rank of this process, where torch's default process group, if any, is the party.

    Args:
        jobs: How this party joins separate jobs; None if all parties come from one launch.
        num_parties: Parties of the launch; None takes it from the default process group, without which every
            process is a party.

    Raises:
        FederationError: If the default process group spans more than one party, or part of one.
    """
    size = group_size()
    rank = dist.get_rank() if dist.is_initialized() else 0
    environ = launch_environ()
    if jobs is not None:
        topology = jobs.topology()
        if topology.party_size > size:  # where another launcher than torchrun made the group, it tells less
            raise FederationError(
                f"The launch of party {topology.name!r} has {topology.party_size} processes, but torch's"
                f" default process group spans {size}: each group would join as if it were the party. Let the"
                " group span the launch before joining, by init_process_group() or Fabric, or start one."
            )
        return replace(topology, rank_in_party=rank, party_size=size)
    world = int(environ.get("WORLD_SIZE", 1)) if "RANK" in environ else size
    parties = num_parties or (1 if world % size else world // size)
    if parties * size != world or (size > 1 and parties == 1 and num_parties is None):
        harm = "gradients cross between parties" if size > 1 else "each would join as if it were a party"
        raise FederationError(
            f"torch's default process group spans {size} of the launch's {world} processes, so {harm}"
            f"{'' if num_parties is None else f' (num_parties={num_parties})'}. Let each party have a group"
            " of its own, by PartyEnvironment(num_parties=...); if all processes are one party, by"
            " init_process_group() and num_parties=1."
        )
    topology = Topology.from_env(parties) if "RANK" in environ else Topology()
    return replace(topology, rank_in_party=rank, party_size=size)
