"""The sum of what the members send, made block by block while the next blocks are on their way."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pellm_lightning.comm.mesh.frames import Incoming, Outgoing

BLOCK_BYTES = 256 << 10
"""So much is added at a time: it fits into a core's cache, and is a multiple of every scalar's size."""


class Reduction:
    """x_0 + x_1 + … + x_{N-1} in the order of the ranks, each sum rounded to the dtype.

    Args:
        own: Flat tensor, this member's addend; the sum takes its place.
        rings: Where each peer's addend comes in, of the same dtype, used round and round.
        incoming: The peers' addends on their way.
        outgoing: The messages that carry the sum away from ``own``.
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

    def go_on(self) -> bool:
        """Add what has come from all; return whether there was any."""
        come = min((message.received for message in self._incoming), default=0) // self._own.itemsize
        stop = come if come == self._own.numel() else come - come % self._block
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
    """Return where the addend's scalars ``start`` to ``end`` lie; no block goes over the ring's end."""
    size = ring.numel()
    return ring[start % size : start % size + end - start]
