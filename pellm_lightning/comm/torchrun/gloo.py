"""Stand-alone Gloo group, the only place that touches torch's process-group classes.

A stand-alone group is no default group: nothing of Lightning (barriers, ``sync_dist``, samplers,
torchmetrics) sees it.
"""

import os
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.torchrun.lane import LEFT, Lane, Pending


def check_transport() -> None:
    """Refuse a setting of the environment that promises what there is not.

    Raises:
        FederationError: If it asks for TLS.
    """
    if os.environ.get("GLOO_DEVICE_TRANSPORT", "").upper() == "TCP_TLS":
        raise FederationError(
            "GLOO_DEVICE_TRANSPORT=TCP_TLS asks Gloo for TLS, which torch's released builds do not have."
            " Unset it and run the parties as separate jobs with tls=TLS(...), or inside a VPN."
        )


class GlooWork(Pending):
    """Handle of a collective under way.

    Its connections stay open as long as anything refers to torch's handle, an exception's traceback included,
    and as long as they are open no other party notices that this one has failed. So the handle is dropped
    before an error leaves ``wait()``.
    """

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        """Block until the collective is complete.

        Raises:
            RuntimeError: If it failed or timed out.
        """
        work, self._work = self._work, None
        if work is None:
            raise RuntimeError(LEFT)
        try:
            work.wait()
        finally:
            del work

    def forget(self) -> None:
        """Drop the handle of a collective that nobody will wait for."""
        self._work = None


class GlooGroup(Lane):
    """One Gloo group over a store.

    Args:
        store: Store of the rendezvous. Its prefix can be used by one group only, ever.
        rank: This party.
        size: Number of parties.
        timeout_s: Seconds a member may be late for a collective.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self._size = rank, size
        # The group keeps no reference to a store subclass written in Python, so we do.
        self._store = store
        # torch's stubs do not know the collectives of this class.
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))
        self._pending: list[GlooWork] = []
        # A round in the background may start a collective while the training thread aborts: begun on a group
        # that is broken already, it would hold the connections open until the timeout.
        self._starting = threading.Lock()

    @override
    def all_reduce(self, tensor: Tensor) -> Pending:
        with self._starting:
            return self._noted(self._joined.allreduce([tensor]))

    @override
    def broadcast(self, tensor: Tensor, source: int) -> Pending:
        with self._starting:
            return self._noted(self._joined.broadcast(tensor, source))

    @override
    def all_gather(self, out: Tensor, tensor: Tensor, sizes: list[int]) -> Pending:
        parties = len(sizes)
        with self._starting:
            if len(set(sizes)) == 1:
                return self._noted(self._joined.allgather([list(out.split(sizes))], [tensor]))
            # Gloo gathers equal sizes only, and broadcasts would wait for each other.
            copies = tensor.repeat(parties)
            return self._noted(self._joined.alltoall_base(out, copies, sizes, [len(tensor)] * parties))

    @override
    def all_to_all(self, out: Tensor, tensor: Tensor, out_sizes: list[int], sizes: list[int]) -> Pending:
        with self._starting:
            return self._noted(self._joined.alltoall_base(out, tensor, out_sizes, sizes))

    @override
    def all_gather_bytes(self, message: bytes, size: int) -> list[bytes]:
        row = torch.frombuffer(bytearray(message.ljust(size, b"\0")), dtype=torch.uint8)
        rows = [torch.empty_like(row) for _ in range(self._size)]
        with self._starting:
            pending = self._noted(self._joined.allgather([rows], [row]))
        pending.wait()
        return [row.numpy().tobytes() for row in rows]

    @override
    def abort(self) -> None:
        with self._starting:
            group, self._group = self._group, None
            if group is not None:
                group.abort()
            for pending in self._pending:
                pending.forget()
            self._pending = []

    @property
    def _joined(self) -> Any:
        if self._group is None:
            raise RuntimeError(LEFT)
        return self._group

    def _noted(self, work: Any) -> GlooWork:
        """Return the handle of a collective that has begun, which ``abort`` can drop."""
        self._pending = [other for other in self._pending if other._work is not None]
        self._pending.append(GlooWork(work))
        return self._pending[-1]
