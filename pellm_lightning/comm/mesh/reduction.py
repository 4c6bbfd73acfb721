"""Pipelined sum of the members' tensors: block by block while the next blocks are being received."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pellm_lightning.comm.mesh.frames import Incoming, Outgoing

BLOCK_BYTES = 256 << 10
"""Bytes added at a time: they fit into a core's cache, and are a multiple of every scalar's size."""


class Reduction:
    """x_0 + x_1 + … + x_{N-1} in the order of the ranks, each sum rounded to the dtype.

    Args:
        own: Flat tensor, this member's addend; overwritten by the sum.
        rings: Ring buffer for each peer's addend, of the same dtype.
        incoming: Messages that carry the peers' addends.
        outgoing: Messages that carry the sum.
    """

    def __init__(
        self,
        own: Tensor,
        rings: Mapping[int, Tensor],
        incoming: Sequence[Incoming],
        outgoing: Sequence[Outgoing],
    ) -> None:
        self._own = own
        self._rings = [rings.get(peer) for peer in range(len(rings) + 1)]
        self._incoming = incoming
        self._outgoing = outgoing
        self._block = BLOCK_BYTES // own.itemsize
        self._done = 0

    def advance(self) -> bool:
        """Add what was received from all; return whether there was any."""
        received = min((message.received for message in self._incoming), default=0) // self._own.itemsize
        stop = received if received == self._own.numel() else received - received % self._block
        if stop == self._done:
            return False
        while self._done < stop:
            end = min(self._done + self._block, stop)
            self._add(self._done, end)
            self._done = end
        for incoming in self._incoming:
            incoming.freed = self._done * self._own.itemsize
        for outgoing in self._outgoing:
            outgoing.ready = self._done * self._own.itemsize
        return True

    def _add(self, start: int, end: int) -> None:
        into = self._own[start:end]
        addends = [into if ring is None else _wrapped(ring, start, end) for ring in self._rings]
        sum_ = addends[0]
        for addend in addends[1:-1]:
            sum_ += addend
        torch.add(sum_, addends[-1], out=into)


def _wrapped(ring: Tensor, start: int, end: int) -> Tensor:
    """Return the addend's scalars ``start`` to ``end``; no block goes over the ring's end."""
    size = ring.numel()
    return ring[start % size : start % size + end - start]
