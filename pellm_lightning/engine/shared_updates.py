"""SharedUpdates: the updates and the global vector of plain rounds, in memory that the parties share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import RoundContext
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import Communicator, ring
from pellm_lightning.tensors.flat_buffer import Chunk, Layout, Strided, norm_of, sum_of_squares

# Rows of the memory begin at multiples of so many scalars, a cache line.
_ALIGNMENT = 16
# Figures of float64, so of two scalars, that end each row besides one for each party: a loss and a norm.
_FIGURES = 2
LARGEST = torch.finfo(torch.float32).max
"""Norm above which an update is not finite, as it is sent."""


@dataclass(frozen=True)
class ReducedFlags:
    """Flags and figures of a sum of updates, known once each party has seen all its values."""

    fine: list[bool]
    """Party by party, whether all its values are finite."""
    norms: list[float]
    """Party by party, the 2-norm of its update; empty where it must not be shown."""
    total_weight: float = 1.0
    """Sum of the weights as they were summed: 1, or where the exchange hides them, that of the parties'."""
    clipping_bit: float = 0.0
    """Mean of the parties' clipping bits; 0 without adaptive clipping."""
    loss: float | None = None
    """Mean of the parties' training losses, weighted; None if no party gave one."""
    effective_steps: float = 0.0
    """Mean of the parties' effective steps, weighted; 0 if updates are not rescaled."""
    mean_norm: float = 0.0
    """Mean of the parties' norms, weighted, as they report them; 0 unless senders bound them."""


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
        self._federation, self._party = federation, federation.party
        self._plan = plan
        self._layout = layout
        size, parties = layout.size, federation.num_parties
        rows = memory.view(torch.float32).view(parties + 2, -1)
        self.global_, self._next, *self._updates = rows[:, :size]
        behind = rows[2:].view(torch.float64)[:, -_FIGURES - parties :]
        # By party its loss, its norm, and of its chunk the squared distance of each party from the mean.
        self._losses, self._norms, self._squares = behind[:, 0], behind[:, 1], behind[:, _FIGURES:]
        self._scratch, self._scratch2 = layout.new_scratch(), layout.new_scratch()
        self._norm = math.nan  # of this party's update in this round
        self._counts = False
        self._chunks: list[Chunk] = []
        self._pieces: dict[int, list[Tensor]] = {}
        if self._party == 0:
            self.global_.copy_(vector)
        federation.barrier()

    @staticmethod
    def size_bytes(layout: Layout, num_parties: int) -> int:
        """Return the bytes of memory that the parties need together."""
        row = _ALIGNMENT * math.ceil((layout.size + 2 * (_FIGURES + num_parties)) / _ALIGNMENT)
        return 4 * row * (num_parties + 2)

    def pack(self, loss: float | None) -> bool:
        """Write this party's update, norm and loss for the others; return whether it is within float32."""
        self._losses[self._party] = math.nan if loss is None else loss
        update, chunks = self._updates[self._party], self._layout.chunks()
        norm = norm_of([self._subtract(chunk, update[chunk.start : chunk.stop]) for chunk in chunks])
        self._norms[self._party] = norm
        return norm <= LARGEST

    def combine(self, counting: RoundContext) -> tuple[float, ReducedFlags, list[Tensor]]:
        """Compute this party's part of the next global vector.

        Returns:
            The norm of this party's update, the flags, and what the others see of it.
        """
        self._counts, self._norm = counting.share > 0, float(self._norms[self._party])
        if not self._counts:  # perhaps it has packed nothing, since nobody is to see it
            chunks = self._layout.chunks()
            self._norm = norm_of([self._subtract(chunk, self._scratch2[: chunk.size]) for chunk in chunks])
        if counting.num_participants:
            squares = [self._step(at, counting, averaged=averaged) for at, averaged in self._ranges(counting)]
            totals = [math.fsum(of_party) for of_party in zip(*squares, strict=True)]
            self._squares[self._party] = torch.tensor(totals or [0.0], dtype=torch.float64)
        norms = [
            norm if share else 0.0 for norm, share in zip(self._norms.tolist(), counting.shares, strict=True)
        ]
        flags = ReducedFlags([True] * len(norms), norms, loss=self._mean_loss(counting))
        figures = self._losses[self._party, None], self._norms[self._party, None]
        shown = [self._updates[self._party], *figures] if self._counts else []
        return self._norm, flags, shown

    def write_(self, *, moves: bool) -> float:
        """Write the global vector; return the parameters' distance from the mean.

        Args:
            moves: Whether to advance to the next one first: not if nobody counts after all.
        """
        distance = self._distance() if moves else self._norm
        if moves:
            self.global_, self._next = self._next, self.global_
        pieces, values = self._views(self.global_)
        flat = [piece for piece in pieces if isinstance(piece, Tensor)]
        if len(flat) == len(values):
            torch._foreach_copy_(flat, values)  # one call, where one for each tensor would take longer
        else:
            for piece, value in zip(pieces, values, strict=True):
                piece.copy_(value)
        return distance

    # ---- parts

    def _anchor(self, chunk: Chunk) -> Tensor:
        """Return what the parameters were when the round began; a rounded copy is in the first scratch."""
        return chunk.as_written(self.global_[chunk.start : chunk.stop], self._scratch[: chunk.size])

    def _subtract(self, chunk: Chunk, out: Tensor) -> float:
        """Write the update of a chunk, and return the sum of its squares."""
        return sum_of_squares(chunk.subtracted_from(self._anchor(chunk), out=out))

    def _ranges(self, counting: RoundContext) -> Iterator[tuple[slice, bool]]:
        """Yield the ranges of the vector that this party computes, and whether each is averaged.

        They are its chunks of what would be the messages over Gloo, of which the last has the flags.
        """
        averaged = self._plan.rule.averaged(counting.round, counting.num_participants)
        buckets, parties = self._layout.buckets(), self._federation.num_parties
        for bucket in buckets:
            start, stop = bucket[0].start, bucket[-1].stop
            crosses = averaged.issuperset(self._plan.groups[bucket[0].group])
            flags = flags_size(self._federation.max_parties) if bucket is buckets[-1] else 0
            chunk = ring.chunk_of(self._party, stop - start + flags, 4, parties)
            first, end = start + chunk.start, min(start + chunk.stop, stop)
            for at in range(first, end, len(self._scratch)):
                yield slice(at, min(at + len(self._scratch), end)), crosses

    def _step(self, at: slice, counting: RoundContext, *, averaged: bool) -> list[float]:
        """Compute a range of the next global vector; return the squared distances there, by party."""
        shares, size = counting.shares, at.stop - at.start
        mean, part = self._scratch[:size], self._scratch2[:size]
        updates = [update[at] for update in self._updates]
        order = [party for party in ring.order(self._party, len(shares)) if shares[party]]
        if averaged:
            torch.mul(updates[order[0]], shares[order[0]], out=mean)
            for party in order[1:]:
                mean.add_(torch.mul(updates[party], shares[party], out=part))
            if len(order) < len(shares):
                mean.add_(0.0)  # what the others would have sent: it turns -0 into 0
        else:
            mean.zero_()
        torch.sub(self.global_[at], mean, out=self._next[at])
        return [
            sum_of_squares(torch.sub(update, mean, out=part)) if share else 0.0
            for update, share in zip(updates, shares, strict=True)
        ]

    def _mean_loss(self, counting: RoundContext) -> float | None:
        known = [
            (share, loss)
            for share, loss in zip(counting.shares, self._losses.tolist(), strict=True)
            if share and math.isfinite(loss)
        ]
        total = math.fsum(share for share, _ in known)
        return math.fsum(share * loss for share, loss in known) / total if total else None

    def _distance(self) -> float:
        """Return the distance of this party's parameters from the parties' mean."""
        if self._counts:
            return norm_of(self._squares[:, self._party].tolist())
        squares = []
        for chunk in self._layout.chunks():
            at = slice(chunk.start, chunk.stop)
            step = torch.sub(self.global_[at], self._next[at], out=self._scratch2[: chunk.size])
            mean = torch.sub(self._anchor(chunk), step, out=step)
            squares.append(sum_of_squares(chunk.subtracted_from(mean, out=self._scratch[: chunk.size])))
        return norm_of(squares)

    def _views(self, vector: Tensor) -> tuple[list[Tensor | Strided], list[Tensor]]:
        """Return all pieces of the parameters, and those of a vector, which are made once."""
        chunks = self._layout.chunks()
        if chunks is not self._chunks:
            self._chunks, self._pieces = chunks, {}
        if vector.data_ptr() not in self._pieces:
            parts = [chunk.split(vector[chunk.start : chunk.stop]) for chunk in chunks]
            self._pieces[vector.data_ptr()] = [piece for of_chunk in parts for piece in of_chunk]
        return [piece for chunk in chunks for piece in chunk.pieces], self._pieces[vector.data_ptr()]


def flags_size(max_parties: int) -> int:
    """Return the number of flags that follow the updates where these are sent."""
    return max_parties + 4
