"""A party's update on its way into the mean of all, and the step of the global vector."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pellm_lightning.aggregation.base import Parts, RoundContext
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import Collectives
from pellm_lightning.engine import outer_optimizer
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues
from pellm_lightning.privacy.clipping import squared_norm
from pellm_lightning.privacy.processor import DPProcessor
from pellm_lightning.tensors import portable
from pellm_lightning.tensors.flat_buffer import Chunk, Layout


@dataclass(frozen=True)
class ReducedFlags:
    """What the parties say when each has seen all its values."""

    fine: list[bool]
    """Party by party, whether all its values are finite."""
    total_weight: float
    """Sum of the weights as they were summed: 1, or where the exchange hides them, that of the parties'."""
    clipping_bit: float
    """Mean of the parties' clipping bits; 0 without adaptive clipping."""
    loss: float | None
    """Mean of the parties' training losses, weighted; None if no party gave one."""
    effective_steps: float
    """Mean of the parties' extents, weighted; 0 if updates are not rescaled."""


class UpdateReducer:
    """The vectors of the rounds of one layout: what the parties share, and what crosses between them.

    Args:
        layout: Of the parameters.
        plan: The rule applied to them.
        optimizer: Makes the outer optimizer of the global vector.
        federation: The joined parties.
        exact: Whether the exchange sums float32 exactly; if not, the parties' ballot crosses apart.
        private: Makes updates differentially private; None leaves them as they are.
        auxiliary: What crosses beside the updates; None if nothing does.
        scheduler: Makes the schedule of the outer optimizer's learning rate; None leaves it as it is.
    """

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        optimizer: outer_optimizer.OptimizerFactory,
        federation: Collectives,
        *,
        exact: bool,
        private: DPProcessor | None,
        auxiliary: AuxiliaryTerms | None = None,
        scheduler: outer_optimizer.SchedulerFactory | None = None,
    ) -> None:
        self.layout = layout
        self._plan = plan
        self._federation = federation
        self._exact = exact
        self._private = private
        self.auxiliary = auxiliary
        self.carried = layout.new_vector() if auxiliary is not None and auxiliary.vector else None
        """Mean of the parties' vectors of the last round in which each part crossed, (D,) float32."""
        self._carrying = None if self.carried is None else layout.new_vector()
        self._parameter = nn.Parameter(layout.pack_(layout.new_vector()))
        self.optimizer = optimizer([self._parameter])
        self.schedule = outer_optimizer.Schedule(scheduler, self.optimizer)
        # The parties' ballot follows the vector: a flag each, the clipping bit, the loss with its weight, the
        # weight, and the extent if updates are rescaled.
        self._rescales = auxiliary is not None and auxiliary.rescales
        self._staging = layout.new_vector(extra=federation.max_parties + 4 + self._rescales)
        self._scratch = layout.new_scratch()
        self._scratch2 = torch.empty_like(self._scratch)

    @property
    def global_(self) -> Tensor:
        """The global vector, (D,) float32."""
        return self._parameter.data

    @property
    def pseudo_gradient(self) -> Tensor:
        """What the outer optimizer gets: after ``average`` the mean of ``anchor - x``, (D,) float32."""
        return self._staging[: self.layout.size]

    # ---- the mean of the updates

    def average(
        self, counting: RoundContext, loss: float | None, contribution: AuxiliaryValues | None = None
    ) -> tuple[float, ReducedFlags]:
        """Sum the parties' ``share * (anchor - x)``; return the norm of this party's update, and the ballot.

        Parts that the rule does not average stay at home, and zero in the vector. Behind the last bucket
        rides the ballot: what each party has to say once it has seen all its values.
        """
        share = counting.share
        averaged = self._plan.rule.averaged(counting.round, counting.num_participants)
        told = self._staging[self.layout.size :]
        if not self._exact:  # weights need more digits than updates
            told = told.double()
        bit = 0.0
        if self._private is not None and share:
            bit = self._make_private(self._private, averaged, counting.num_participants)
            loss = None
        squares: list[float] = []
        effective_steps = 0.0 if contribution is None else contribution.effective_steps
        factor = share if not self._rescales else share / effective_steps if effective_steps else 0.0

        def packed() -> Iterator[Tensor]:
            yield from self._carry(counting, averaged, contribution)
            *buckets, last = self.layout.buckets()
            for bucket in buckets:
                squares.extend(self._pack(bucket, factor))
                if self._crosses(bucket, averaged):
                    yield self._staging[bucket[0].start : bucket[-1].stop]
            squares.extend(self._pack(last, factor))
            self._cast(told, _norm(squares), bit, loss, share, effective_steps)
            start = last[0].start if self._crosses(last, averaged) else self.layout.size
            if self._exact:
                yield self._staging[start:]
            else:
                yield self._staging[start : self.layout.size]
                yield told

        counting.federation.all_reduce_each_(packed())
        return _norm(squares), self._counted(told)

    def drop_(self) -> None:
        """Forget what was summed, so that the next step moves nothing."""
        self.pseudo_gradient.zero_()
        if self._carrying is not None:
            self._carrying.zero_()

    def divide_(self, total_weight: float) -> None:
        """Make a mean of a sum of updates times their weights, and of what crossed with them."""
        self.pseudo_gradient.mul_(1 / total_weight)
        if self._carrying is not None:
            self._carrying.mul_(1 / total_weight)

    def finish_(self, counting: RoundContext, effective_steps: float) -> None:
        """Let the means of what crossed beside the updates act on the pseudo-gradient."""
        if self.auxiliary is None or not self.auxiliary.sums:
            return
        for at in self._crossed(counting):
            if self._rescales:
                self.pseudo_gradient[at].mul_(effective_steps)
            if self._carrying is not None and self.auxiliary.vector_coefficient:
                self._add_(at, self._carrying, self.auxiliary.vector_coefficient)

    def _add_(self, at: slice, vector: Tensor, factor: float) -> None:
        """Add a multiple of a vector to the pseudo-gradient, by two roundings at every party.

        ``add_(alpha=...)`` makes one of them where the processor can.
        """
        for start in range(at.start, at.stop, len(self._scratch)):
            part = slice(start, min(start + len(self._scratch), at.stop))
            multiple = torch.mul(vector[part], factor, out=self._scratch[: part.stop - part.start])
            self.pseudo_gradient[part].add_(multiple)

    def _carry(
        self, counting: RoundContext, averaged: Parts, contribution: AuxiliaryValues | None
    ) -> Iterator[Tensor]:
        """Yield the parts of this party's vector that cross, times its share."""
        if self._carrying is None:
            return
        self._carrying.zero_()
        if counting.share and contribution is not None:
            for name, part in contribution.vector.items():
                torch.mul(part, counting.share, out=self.layout.view(self._carrying, name))
        for bucket in self._crossing(averaged):
            yield self._carrying[bucket[0].start : bucket[-1].stop]

    def _crossing(self, averaged: Parts) -> list[list[Chunk]]:
        """Return the buckets of the parts that are averaged."""
        groups = self._plan.groups
        return [bucket for bucket in self.layout.buckets() if averaged.issuperset(groups[bucket[0].group])]

    def _crossed(self, counting: RoundContext) -> Iterator[slice]:
        """Yield where the vectors hold what crossed in this round."""
        for bucket in self._crossing(self._plan.rule.averaged(counting.round, counting.num_participants)):
            yield slice(bucket[0].start, bucket[-1].stop)

    def _make_private(self, private: DPProcessor, averaged: Parts, counting: int) -> float:
        """Settle how the update is clipped and how much noise it gets; return the noisy clipping bit."""
        crossing = [chunk for bucket in self._crossing(averaged) for chunk in bucket]
        norm = _norm([squared_norm(self._update(c, out=self._scratch2[: c.size])) for c in crossing])
        private.prepare(norm, counting)
        return private.noisy_bit(norm, counting)

    def _crosses(self, bucket: list[Chunk], averaged: Parts) -> bool:
        """Tell whether a bucket's part is averaged; if not, nothing moves there."""
        if averaged.issuperset(self._plan.groups[bucket[0].group]):
            return True
        self._staging[bucket[0].start : bucket[-1].stop].zero_()
        return False

    def _pack(self, bucket: list[Chunk], factor: float) -> Iterator[float]:
        for chunk in bucket:
            update = self._update(chunk, out=self._staging[chunk.start : chunk.stop])
            yield _squared_norm(update)
            if factor > 0:
                if self._private is not None:
                    self._private.privatize_(update)
                update.mul_(factor)
            else:
                update.zero_()  # and not a product: 0 * nan is nan

    def _update(self, chunk: Chunk, out: Tensor) -> Tensor:
        """Return the anchor minus the parameters."""
        anchor = chunk.as_written(self.global_[chunk.start : chunk.stop], self._scratch[: chunk.size])
        return chunk.subtracted_from(anchor, out=out)

    def _cast(
        self,
        told: Tensor,
        update_norm: float,
        bit: float,
        loss: float | None,
        share: float,
        effective_steps: float,
    ) -> None:
        """Write this party's ballot: whether its values are finite, and its share of the mean loss."""
        fine = math.isfinite(update_norm)
        known = loss if share > 0 and loss is not None and math.isfinite(loss) else None
        mine = [
            float(party == self._federation.party and fine) for party in range(self._federation.max_parties)
        ]
        of_loss = [0.0, 0.0] if known is None else [share * known, share]
        numbers = [
            *mine,
            share * bit,
            *of_loss,
            share,
            *([share * effective_steps] if self._rescales else []),
        ]
        told.copy_(torch.tensor(numbers, dtype=told.dtype))

    def _counted(self, told: Tensor) -> ReducedFlags:
        numbers = told.tolist()
        effective_steps = numbers.pop() if self._rescales else 0.0
        *fine, bit, loss, share, total = numbers
        met = fine[: self._federation.num_parties]
        return ReducedFlags(
            fine=[vote == 1.0 for vote in met],
            total_weight=total,
            clipping_bit=bit / total if total else 0.0,
            loss=loss / share if share else None,
            effective_steps=effective_steps / total if total else 0.0,
        )

    # ---- the step

    def keep_(self, counting: RoundContext) -> None:
        """Let the mean of the parties' vectors be that of this round; what did not cross stays as it was."""
        if self.carried is None or self._carrying is None:
            return
        for at in self._crossed(counting):
            self.carried[at].copy_(self._carrying[at])

    def advance(self, *, writes: bool, moves: bool) -> float:
        """Step the outer optimizer by the pseudo-gradient; return the parameters' distance from the mean.

        Args:
            writes: Write the parameters at once, while they are in the cache.
            moves: Whether anybody counted. If not, the global vector stays, whatever the optimizer remembers,
                and so does the learning rate.
        """
        plain = outer_optimizer.is_plain_sgd(self.optimizer)
        squares: list[float] = []
        for chunk in self.layout.chunks():
            at = slice(chunk.start, chunk.stop)
            pseudo_gradient, global_ = self._staging[at], self.global_[at]
            if plain and not chunk.rounds:  # in place, while the chunk is in the cache
                mean = global_.sub_(pseudo_gradient)
            else:
                mean = self._scratch2[: chunk.size]
                torch.sub(chunk.as_written(global_, mean), pseudo_gradient, out=mean)
            away = chunk.subtracted_from(mean, out=self._scratch[: chunk.size])
            squares.append(_squared_norm(away))
            if plain:  # bit for bit what SGD(lr=1) does
                values = global_.sub_(pseudo_gradient) if chunk.rounds else global_
                if writes:
                    chunk.scatter_(values)
        if not plain:
            if moves:
                self._step()
            if writes:
                self.write_()
        if moves:
            self.schedule.step()
        return _norm(squares)

    def _step(self) -> None:
        self._parameter.grad = self.pseudo_gradient
        try:
            portable.step_(self.optimizer, piece=self._scratch.numel())
        finally:
            self._parameter.grad = None

    def write_(self) -> None:
        """Write the global vector into the parameters."""
        self.layout.unpack_(self.global_)


def _norm(squares: list[float]) -> float:
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan


def _squared_norm(values: Tensor) -> float:
    squared = float(torch.dot(values, values))
    # Squares of large finite values overflow float32; those of infinite ones float64, too.
    return squared if math.isfinite(squared) else float(values.double().square().sum())
