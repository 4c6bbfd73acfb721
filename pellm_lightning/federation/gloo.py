"""The stand-alone Gloo group, the only place that touches torch's process-group classes.

A stand-alone group is no default group: nothing of Lightning (barriers, ``sync_dist``, samplers,
torchmetrics) sees it.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor


class GlooGroup:
    """One Gloo group over a store. Collectives return a work handle; ``wait()`` on it blocks.

    Args:
        store: Store to meet in. Its prefix can be used by one group only, ever.
        rank: This party.
        size: Number of parties.
        timeout_s: Seconds a member may be late for a collective.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
        # The group keeps no reference to a store subclass written in Python, so we do.
        self._store = store
        # torch's stubs do not know the collectives of this class.
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))

    def all_reduce(self, tensor: Tensor) -> dist.Work:
        """Start to sum a contiguous CPU tensor in place over the group."""
        work: dist.Work = self._group.allreduce([tensor])
        return work

    def broadcast(self, tensor: Tensor, source: int) -> dist.Work:
        """Start to overwrite a contiguous CPU tensor by the one of party ``source``."""
        work: dist.Work = self._group.broadcast(tensor, source)
        return work

    def abort(self) -> None:
        """Break all connections, so that whoever waits for this party notices at once."""
        self._group.abort()
