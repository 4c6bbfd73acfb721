"""SharedUpdates: the updates and the global vector of plain rounds, in memory that the parties share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import RoundContext
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import Communicator, ring
from pellm_lightning.tensors.flat_buffer import Chunk, Layout, norm_of, sum_of_squares

# Rows of the memory begin at multiples of so many scalars, a cache line; a loss of two ends each.
_ALIGNMENT, _LOSS = 16, 2


@dataclass(frozen=True)
class ReducedFlags:
    """Flags and figures of a sum of updates."""

    fine: list[bool]
    """Party by party, whether all its values are finite."""
    total_weight: float = 1.0
    """Sum of the weights as they were summed: 1, or where the exchange hides them, that of the parties'."""
    clipping_bit: float = 0.0
    """Mean of the parties' clipping bits; 0 without adaptive clipping."""
    loss: float | None = None
    """Mean of the parties' training losses, weighted; None if no party gave one."""
    effective_steps: float = 0.0
    """Mean of the parties' effective steps, weighted; 0 if updates are not rescaled."""


class SharedUpdates:
    """Buffers of all parties' updates and of two global vectors, the present one and the next.

    A party packs its update before the parties meet, so that their headers are the barrier behind which all
    can read it. Each computes its chunk of the next global vector from all updates; behind a second barrier
    all write that vector into their parameters. What a failed round leaves in these buffers is never read.

    The bits are those of a sum over Gloo: the same operations in the same order.

    Args:
        federation: The joined parties.
        plan: The rule, which says what is averaged.
        layout: Of the parameters.
        memory: Memory that all parties have mapped, of ``size_bytes``.
        vector: The global vector, (D,) float32, the same at all parties; it is copied.
    """

    def __init__(
        self, federation: Communicator, plan: Plan, layout: Layout, memory: Tensor, vector: Tensor
    ) -> None:
        self._federation = federation
        self._plan = plan
        self._layout = layout
        rows = memory.view(torch.float32).view(federation.num_parties + 2, -1)
        self.global_, self._next, *self._updates = rows[:, : layout.size]
        self._losses = rows[2:].view(torch.float64)[:, -1]
        self._scratch, self._scratch2 = layout.new_scratch(), layout.new_scratch()
        self._norm: float | None = None
        self._moved = False
        if federation.party == 0:
            self.global_.copy_(vector)
        federation.barrier()

    @staticmethod
    def size_bytes(layout: Layout, num_parties: int) -> int:
        """Return the bytes of memory that the parties need together."""
        row = _ALIGNMENT * math.ceil((layout.size + _LOSS) / _ALIGNMENT)
        return 4 * row * (num_parties + 2)

    def pack(self, loss: float | None) -> bool:
        """Write this party's update and loss for the others; return whether all values are finite."""
        party = self._federation.party
        self._losses[party] = math.nan if loss is None else loss
        update, chunks = self._updates[party], self._layout.chunks()
        self._norm = norm_of([self._subtract(chunk, update[chunk.start : chunk.stop]) for chunk in chunks])
        return math.isfinite(self._norm)

    def combine(self, counting: RoundContext) -> tuple[float, ReducedFlags, list[Tensor]]:
        """Compute this party's part of the next global vector, if it moves.

        A party of weight 0 has packed nothing: what it learned since the last round is nobody's business.

        Returns:
            The norm of this party's update, the flags, and what the others have seen of it.
        """
        own, self._norm = self._norm, None
        if own is None:
            chunks = self._layout.chunks()
            own = norm_of([self._subtract(chunk, self._scratch2[: chunk.size]) for chunk in chunks])
        party, self._moved = self._federation.party, counting.num_participants > 0
        if self._moved:
            for at, averaged in self._own_ranges(counting):
                self._step(at, counting, averaged=averaged)
        flags = ReducedFlags([True] * len(counting.shares), loss=self._mean_loss(counting))
        shown = [self._updates[party], self._losses[party : party + 1]] if counting.share else []
        return own, flags, shown

    def write_(self) -> float:
        """Advance to the next global vector, and write it; return the parameters' distance from the mean."""
        squares = []
        after = self._next if self._moved else self.global_
        for chunk in self._layout.chunks():
            at = slice(chunk.start, chunk.stop)
            mean = after[at]
            if chunk.rounds:  # the mean of what the parties held has not the digits that they cannot hold
                step = torch.sub(self.global_[at], mean, out=self._scratch2[: chunk.size])
                mean = step.neg_().add_(self._anchor(chunk))
            away = chunk.subtracted_from(mean, out=self._scratch[: chunk.size])
            squares.append(sum_of_squares(away))
            chunk.scatter_(after[at])
        if self._moved:
            self.global_, self._next = self._next, self.global_
        return norm_of(squares)

    # ---- parts

    def _anchor(self, chunk: Chunk) -> Tensor:
        """Return what the parameters were when the round began; a rounded copy is in the first scratch."""
        return chunk.as_written(self.global_[chunk.start : chunk.stop], self._scratch[: chunk.size])

    def _subtract(self, chunk: Chunk, out: Tensor) -> float:
        """Write the update of a chunk, and return the sum of its squares."""
        return sum_of_squares(chunk.subtracted_from(self._anchor(chunk), out=out))

    def _own_ranges(self, counting: RoundContext) -> Iterator[tuple[slice, bool]]:
        """Yield the ranges of the vector that this party computes, and whether each is averaged.

        They are its chunks of what would be the messages over Gloo, of which the last has the flags.
        """
        averaged = self._plan.rule.averaged(counting.round, counting.num_participants)
        buckets, parties = self._layout.buckets(), self._federation.num_parties
        for bucket in buckets:
            start, stop = bucket[0].start, bucket[-1].stop
            crosses = averaged.issuperset(self._plan.groups[bucket[0].group])
            flags = flags_size(self._federation.max_parties) if bucket is buckets[-1] else 0
            chunk = ring.chunk_of(self._federation.party, stop - start + flags, 4, parties)
            first, end = start + chunk.start, min(start + chunk.stop, stop)
            for at in range(first, end, len(self._scratch)):
                yield slice(at, min(at + len(self._scratch), end)), crosses

    def _step(self, at: slice, counting: RoundContext, *, averaged: bool) -> None:
        """Compute a range of the next global vector."""
        size = at.stop - at.start
        mean, part = self._scratch[:size], self._scratch2[:size]
        if not averaged:
            self._next[at].copy_(self.global_[at])
            return
        order = ring.order(self._federation.party, self._federation.num_parties)
        first, *others = (party for party in order if counting.shares[party])
        torch.mul(self._updates[first][at], counting.shares[first], out=mean)
        for party in others:
            mean.add_(torch.mul(self._updates[party][at], counting.shares[party], out=part))
        if 1 + len(others) < len(order):
            mean.add_(0.0)  # what those would have sent who do not count: it turns -0 into 0
        torch.sub(self.global_[at], mean, out=self._next[at])

    def _mean_loss(self, counting: RoundContext) -> float | None:
        known = [
            (share, loss)
            for share, loss in zip(counting.shares, self._losses.tolist(), strict=True)
            if share and math.isfinite(loss)
        ]
        total = math.fsum(share for share, _ in known)
        return math.fsum(share * loss for share, loss in known) / total if total else None


def flags_size(max_parties: int) -> int:
    """Return the number of flags that follow the updates where these are sent."""
    return max_parties + 4
