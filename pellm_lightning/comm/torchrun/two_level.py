"""Lane of parties on several hosts: those of one host sum in its memory, and one of each over Gloo."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm.torchrun.gloo import GlooGroup
from pellm_lightning.comm.torchrun.lane import Lane, Pending
from pellm_lightning.comm.torchrun.shared_memory import SharedMemoryLane


class SumOfHosts:
    """Handle of a sum that the first party of this host adds up over the hosts.

    Args:
        tensor: The sum of this host's parties, overwritten by that of all.
        over_hosts: What the first party waits for; None at the others.
        on_host: Lane of this host's parties; None if there is one only.
    """

    def __init__(self, tensor: Tensor, over_hosts: Pending | None, on_host: SharedMemoryLane | None) -> None:
        self._tensor = tensor
        self._over_hosts = over_hosts
        self._on_host = on_host

    def wait(self) -> None:
        """Block until the sum is complete.

        Raises:
            RuntimeError: If a party is lost or late.
        """
        if self._over_hosts is not None:
            self._over_hosts.wait()
        if self._on_host is not None:
            self._on_host.broadcast(self._tensor, source=0).wait()


class TwoLevelLane(Lane):
    """Lane of which sums cross from host to host once for each host instead of once for each party.

    The sums have the same bits at all parties, but not those of one Gloo group: numbers are added in another
    order. What is no sum goes over a Gloo group of all.

    Args:
        everybody: Group of all parties.
        on_host: Lane of this host's parties; None if there is one only.
        over_hosts: Group of the hosts' first parties; None at the others.
    """

    def __init__(
        self, everybody: GlooGroup, on_host: SharedMemoryLane | None, over_hosts: GlooGroup | None
    ) -> None:
        self.rank = everybody.rank
        self._everybody = everybody
        self._on_host = on_host
        self._over_hosts = over_hosts

    @override
    def all_reduce(self, tensor: Tensor) -> Pending:
        if self._on_host is not None:
            self._on_host.all_reduce(tensor).wait()
        started = None if self._over_hosts is None else self._over_hosts.all_reduce(tensor)
        return SumOfHosts(tensor, started, self._on_host)

    @override
    def broadcast(self, tensor: Tensor, source: int) -> Pending:
        return self._everybody.broadcast(tensor, source)

    @override
    def all_gather(self, out: Tensor, tensor: Tensor, sizes: list[int]) -> Pending:
        return self._everybody.all_gather(out, tensor, sizes)

    @override
    def all_to_all(self, out: Tensor, tensor: Tensor, out_sizes: list[int], sizes: list[int]) -> Pending:
        return self._everybody.all_to_all(out, tensor, out_sizes, sizes)

    @override
    def all_gather_bytes(self, message: bytes, size: int) -> list[bytes]:
        return self._everybody.all_gather_bytes(message, size)

    @override
    def abort(self) -> None:
        for lane in (self._on_host, self._over_hosts, self._everybody):
            if lane is not None:
                lane.abort()


def over_hosts(
    store: dist.Store, hosts: Sequence[Sequence[int]], party: int, timeout_s: float
) -> GlooGroup | None:
    """Return the group of the hosts' first parties, if this party is one.

    Args:
        store: Store of the rendezvous, with a prefix of its own.
        hosts: The parties of each host.
        party: This party.
        timeout_s: Seconds a party may be late.
    """
    first = [host[0] for host in hosts]
    return GlooGroup(store, first.index(party), len(first), timeout_s) if party in first else None
