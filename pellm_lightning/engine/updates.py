"""UpdateReducer: sums the parties' updates of one fragment, and steps the global vector."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pellm_lightning.aggregation.base import Parts, RoundContext
from pellm_lightning.engine import outer_optimizer
from pellm_lightning.engine.auxiliary import AuxiliaryValues
from pellm_lightning.engine.context import EngineContext
from pellm_lightning.engine.shared_updates import LARGEST, ReducedFlags, SharedUpdates, flags_size
from pellm_lightning.exchange import Plain
from pellm_lightning.privacy.clipping import squared_norm
from pellm_lightning.privacy.processor import DPProcessor
from pellm_lightning.tensors import portable
from pellm_lightning.tensors.flat_buffer import Chunk, Layout, norm_of, sum_of_squares

_SMALLEST = torch.finfo(torch.float32).tiny


class UpdateReducer:
    """Reducer of the parties' updates of one fragment, with the fragment's outer optimizer.

    Args:
        context: What the aggregator works with.
        layout: Of the fragment's parameters.
        vector: The fragment's part of the global vector, (D,) float32; the parameters are copied into it.
    """

    def __init__(self, context: EngineContext, layout: Layout, vector: Tensor) -> None:
        self.layout = layout
        self._context = context
        self._plan = context.plan
        self._federation = context.federation
        # If the exchange rounds float32, the flags cross apart, in float64.
        self._exact = context.exchange.exact
        self._private = context.privacy
        self._tells_norms = context.shares_figures
        self._is_robust = context.robust_rule is not None
        self._auxiliary = auxiliary = context.auxiliary
        self.carried = layout.new_vector() if auxiliary is not None and auxiliary.vector else None
        """Mean of the parties' vectors of the last round in which each part crossed, (D,) float32."""
        self._carrying = None if self.carried is None else layout.new_vector()
        self._vector = layout.pack_(vector)
        # The optimizer steps range by range, so that its intermediate results are of a range's size.
        self._parameters = [nn.Parameter(part) for part in layout.ranges(vector)]
        self.optimizer = context.outer_optimizer(self._parameters)
        self.schedule = outer_optimizer.OuterSchedule(context.outer_scheduler, self.optimizer)
        # The flags follow the vector: one for each party, the clipping bit, the loss with its weight, the
        # weight, and the effective steps if updates are rescaled.
        self._rescales = auxiliary is not None and auxiliary.rescales
        self.bounds = context.new_sender_bounds()
        """Bounds that this party applies to what it sends itself; None without."""
        self._reports_norm = self.bounds is not None and self.bounds.norm_factor is not None
        extra = flags_size(self._federation.max_parties) + self._rescales + self._reports_norm
        # Not touched before the first round: where rounds work in shared memory it never takes any.
        self._staging = torch.empty(layout.size + extra, dtype=torch.float32, device=layout.device)
        self._scratch = layout.new_scratch()
        self._scratch2 = torch.empty_like(self._scratch)
        self._shared: SharedUpdates | None = None
        self._undoable = 0  # so many scalars of the staging hold the global vector from before the step
        self.error_feedback = context.exchange.new_error_feedback(self.pseudo_gradient)
        """What lossy compression has removed so far, to be sent later; None without."""

    @property
    def global_(self) -> Tensor:
        """The fragment's part of the global vector, (D,) float32."""
        return self._vector

    @property
    def pseudo_gradient(self) -> Tensor:
        """Gradient for the outer optimizer: after ``average`` the mean of ``anchor - x``, (D,) float32."""
        return self._staging[: self.layout.size]

    # ---- shared memory

    def share_memory(self) -> None:
        """Let rounds work in memory that the parties share, if they can; every party must call it.

        The global vector is then there also, and all parties must hold the same.
        """
        if self._shared is not None or not self._is_plain:
            return
        size_bytes = SharedUpdates.size_bytes(self.layout, self._federation.num_parties)
        memory = self._federation.share_memory(size_bytes, willing=self.layout.device.type == "cpu")
        if memory is None:
            return
        self._shared = SharedUpdates(self._federation, self._plan, self.layout, memory, self.global_)
        self._set_vector(self._shared.global_)
        self._staging = self._staging.new_empty(0)

    def _set_vector(self, vector: Tensor) -> None:
        self._vector = vector
        for parameter, part in zip(self._parameters, self.layout.ranges(vector), strict=True):
            parameter.set_(part)  # type: ignore[call-overload]  # torch's stubs lack it

    @property
    def _is_plain(self) -> bool:
        """Whether a round is one sum of updates and one subtraction: so at all parties or at none."""
        context = self._context
        extras = context.privacy or context.auxiliary or context.plan.products
        own = self._is_robust or self.bounds is not None
        return type(context.exchange) is Plain and context.is_plain_averaging and not (extras or own)

    def prepare(self, loss: float | None) -> bool:
        """Do what can be done before the parties meet; return whether the update is finite, if known yet."""
        return self._shared is None or self._shared.pack(loss)

    # ---- the mean of the updates

    def average(
        self, counting: RoundContext, loss: float | None, contribution: AuxiliaryValues | None = None
    ) -> tuple[float, ReducedFlags]:
        """Sum the parties' ``share * (anchor - x)``; return the norm of this party's update, and the flags.

        Under a robust rule only the flags are summed, and the vector holds this party's own ``anchor - x``.
        Parts that the rule does not average are not sent, and are zero in the vector. The flags are sent with
        the last bucket, when each party has seen all its values.
        """
        if self._shared is not None:
            norm, reduced, shown = self._shared.combine(counting)
            self._federation.barrier(shown)  # behind this the others pack what they bring to the next round
            return norm, reduced
        self._undoable = 0
        share = counting.share
        averaged = self._plan.rule.averaged(counting.round, counting.num_participants)
        flags = self._staging[self.layout.size :]
        if not self._exact:  # weights need more digits than updates
            flags = flags.double()
        bit = 0.0
        if self._private is not None and share:
            bit = self._prepare_privacy(self._private, averaged, counting.num_participants)
            loss = None
        squares: list[float] = []
        reported = 0.0
        effective_steps = 0.0 if contribution is None else contribution.effective_steps
        factor = share if not self._rescales else share / effective_steps if effective_steps else 0.0
        if self._is_robust:
            factor = float(share > 0)
        if self.bounds is not None and self._reports_norm and share:
            norm = self._norm_of(averaged)
            factor *= self.bounds.scale(norm)
            reported = self.bounds.reported(norm)

        def packed() -> Iterator[Tensor]:
            yield from self._carry(counting, averaged, contribution)
            *buckets, last = self.layout.buckets()
            for bucket in buckets:
                crosses = self._crosses(bucket, averaged)
                squares.extend(self._pack(bucket, factor) if crosses else self._measure(bucket))
                if crosses:
                    yield self._staging[bucket[0].start : bucket[-1].stop]
            crosses = self._crosses(last, averaged)
            squares.extend(self._pack(last, factor) if crosses else self._measure(last))
            self._write_flags(flags, norm_of(squares), bit, loss, share, effective_steps, reported)
            start = last[0].start if crosses else self.layout.size
            if self._exact:
                yield self._staging[start:]
            else:
                yield self._staging[start : self.layout.size]
                yield flags

        if self._is_robust:  # single updates are sent only once all are known to be finite
            for _ in packed():
                pass
            counting.federation.all_reduce_each_([flags])
        else:
            counting.federation.all_reduce_each_(packed())
        return norm_of(squares), self._read_flags(flags)

    def sent(self, counting: RoundContext) -> Tensor:
        """Return those numbers of this party's update that a round sends; they follow each other."""
        ranges = [*self._crossed(counting)]
        return self._staging[ranges[0].start : ranges[-1].stop] if ranges else self._staging[:0]

    def drop_(self) -> None:
        """Discard what was summed, so that the next step moves nothing."""
        self.pseudo_gradient.zero_()
        if self._carrying is not None:
            self._carrying.zero_()

    def divide_(self, total_weight: float) -> None:
        """Turn sums of weighted updates, and of the auxiliary vectors, into means."""
        self.pseudo_gradient.mul_(1 / total_weight)
        if self._carrying is not None:
            self._carrying.mul_(1 / total_weight)

    def apply_auxiliary_(self, counting: RoundContext, effective_steps: float) -> None:
        """Apply the means of the auxiliary terms to the pseudo-gradient."""
        if self._auxiliary is None or not self._auxiliary.sums:
            return
        for at in self._crossed(counting):
            if self._rescales:
                self.pseudo_gradient[at].mul_(effective_steps)
            if self._carrying is not None and self._auxiliary.vector_coefficient:
                self._add_(at, self._carrying, self._auxiliary.vector_coefficient)

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
        """Yield the ranges of the vectors that were sent in this round."""
        for bucket in self._crossing(self._plan.rule.averaged(counting.round, counting.num_participants)):
            yield slice(bucket[0].start, bucket[-1].stop)

    def _prepare_privacy(self, private: DPProcessor, averaged: Parts, counting: int) -> float:
        """Choose the clipping factor and noise of the update; return the noisy clipping bit."""
        norm = self._norm_of(averaged)
        private.prepare(norm, counting)
        return private.noisy_bit(norm, counting)

    def _norm_of(self, averaged: Parts) -> float:
        """Return the norm of what this party will send of its update."""
        crossing = [chunk for bucket in self._crossing(averaged) for chunk in bucket]
        return norm_of([squared_norm(self._update(c, out=self._scratch2[: c.size])) for c in crossing])

    def _crosses(self, bucket: list[Chunk], averaged: Parts) -> bool:
        """Tell whether a bucket's part is averaged; if not, nothing moves there."""
        if averaged.issuperset(self._plan.groups[bucket[0].group]):
            return True
        self._staging[bucket[0].start : bucket[-1].stop].zero_()
        return False

    def _pack(self, bucket: list[Chunk], factor: float) -> Iterator[float]:
        for chunk in bucket:
            update = self._update(chunk, out=self._staging[chunk.start : chunk.stop])
            yield sum_of_squares(update)
            if factor > 0:
                if self._private is not None:
                    self._private.privatize_(update)
                update.mul_(factor)
            else:
                update.zero_()  # and not a product: 0 * nan is nan

    def _measure(self, bucket: list[Chunk]) -> Iterator[float]:
        """Yield the squared norms of an update that is not sent."""
        for chunk in bucket:
            yield sum_of_squares(self._update(chunk, out=self._scratch2[: chunk.size]))

    def _update(self, chunk: Chunk, out: Tensor) -> Tensor:
        """Return the anchor minus the parameters."""
        anchor = chunk.as_written(self.global_[chunk.start : chunk.stop], self._scratch[: chunk.size])
        return chunk.subtracted_from(anchor, out=out)

    def _write_flags(
        self,
        flags: Tensor,
        update_norm: float,
        bit: float,
        loss: float | None,
        share: float,
        effective_steps: float,
        reported_norm: float,
    ) -> None:
        """Write this party's flags: whether its values are finite, and its share of the mean loss."""
        # 0 says that something is not finite, or beyond float32.
        vote = float(update_norm <= LARGEST)
        if vote and self._tells_norms:
            vote = max(update_norm, _SMALLEST)  # read as 0 again
        known = loss if share > 0 and loss is not None and math.isfinite(loss) else None
        mine = [
            vote if party == self._federation.party else 0.0 for party in range(self._federation.max_parties)
        ]
        of_loss = [0.0, 0.0] if known is None else [share * known, share]
        numbers = [
            *mine,
            share * bit,
            *of_loss,
            share,
            *([share * effective_steps] if self._rescales else []),
            *([share * reported_norm] if self._reports_norm else []),
        ]
        flags.copy_(torch.tensor(numbers, dtype=flags.dtype))

    def _read_flags(self, flags: Tensor) -> ReducedFlags:
        numbers = flags.tolist()
        norm = numbers.pop() if self._reports_norm else 0.0
        effective_steps = numbers.pop() if self._rescales else 0.0
        *fine, bit, loss, share, total = numbers
        met = fine[: self._federation.num_parties]
        return ReducedFlags(
            fine=[0 < vote < math.inf for vote in met],
            norms=[0.0 if norm <= _SMALLEST else norm for norm in met] if self._tells_norms else [],
            total_weight=total,
            clipping_bit=bit / total if total else 0.0,
            loss=loss / share if share else None,
            effective_steps=effective_steps / total if total else 0.0,
            mean_norm=norm / total if total else 0.0,
        )

    # ---- the step

    def keep_carried_(self, counting: RoundContext) -> None:
        """Keep the mean of the parties' auxiliary vectors; parts that were not sent stay as they were."""
        if self.carried is None or self._carrying is None:
            return
        for at in self._crossed(counting):
            self.carried[at].copy_(self._carrying[at])

    def advance(self, *, writes: bool, moves: bool) -> float:
        """Step the outer optimizer by the pseudo-gradient; return the parameters' distance from the mean.

        Args:
            writes: Write the parameters at once, while they are in the cache. If not, a step of SGD(lr=1)
                leaves behind what it takes to ``undo_`` it.
            moves: Whether anybody counted. If not, the global vector stays, whatever the optimizer remembers,
                and so does the learning rate.
        """
        if self._shared is not None:
            distance = self._shared.write_(moves=moves)
            self._set_vector(self._shared.global_)
            return distance
        plain = outer_optimizer.is_plain_sgd(self.optimizer)
        squares: list[float] = []
        for chunk in self.layout.chunks():
            at = slice(chunk.start, chunk.stop)
            pseudo_gradient, global_ = self._staging[at], self.global_[at]
            if plain and not chunk.rounds:  # in place, while the chunk is in the cache
                mean = self._subtract_(at, self._scratch2, undoable=not writes)
            else:
                mean = self._scratch2[: chunk.size]
                torch.sub(chunk.as_written(global_, mean), pseudo_gradient, out=mean)
            away = chunk.subtracted_from(mean, out=self._scratch[: chunk.size])
            squares.append(sum_of_squares(away))
            if plain:  # bit for bit what SGD(lr=1) does
                if chunk.rounds:
                    self._subtract_(at, self._scratch, undoable=not writes)
                if writes:
                    chunk.scatter_(global_)
        if not plain:
            if moves:
                self._step()
            if writes:
                self.write_()
        if moves:
            self.schedule.step()
        return norm_of(squares)

    def undo_(self) -> None:
        """Undo the last step, as far as it has come, if it was one of SGD(lr=1) that did not write."""
        self.global_[: self._undoable].copy_(self._staging[: self._undoable])
        self._undoable = 0

    def forget_previous(self) -> None:
        """Let the last step stand."""
        self._undoable = 0

    def _subtract_(self, at: slice, scratch: Tensor, *, undoable: bool) -> Tensor:
        """Subtract a range of the pseudo-gradient, whose place may take what the global vector was there."""
        step, global_ = self._staging[at], self.global_[at]
        if undoable:
            kept, step = step, scratch[: at.stop - at.start].copy_(step)
            kept.copy_(global_)
            self._undoable = at.stop
        return global_.sub_(step)

    def _step(self) -> None:
        ranges = self.layout.ranges(self.pseudo_gradient)
        for parameter, part in zip(self._parameters, ranges, strict=True):
            parameter.grad = part
        try:
            portable.step_(self.optimizer, piece=self._scratch.numel())
        finally:
            self.optimizer.zero_grad()

    def write_(self) -> None:
        """Write the global vector into the parameters."""
        self.layout.unpack_(self.global_)

    # ---- the state

    def state(self) -> dict[str, Any]:
        """Return the state of the outer optimizer, its schedule and the auxiliary mean, not copied."""
        return {
            "outer_class": type(self.optimizer).__name__,
            "outer_optimizer": self.optimizer.state_dict(),
            "outer_scheduler": self.schedule.state,
            "carried": self.carried,
            "bounds": None if self.bounds is None else self.bounds.state(),
        }

    def restore(self, state: Mapping[str, Any], vector: Tensor) -> None:
        """Load a state, and the fragment's part of the global vector.

        Raises:
            ValueError: If it is of other settings; it may come from a peer.
        """
        self._check(state)
        self.schedule.restore(state.get("outer_scheduler"), state["outer_optimizer"])
        if self.carried is not None:
            self.carried.copy_(state["carried"])
        if self.bounds is not None and state.get("bounds"):
            self.bounds.restore(state["bounds"])
        self.global_.copy_(vector)
        outer_optimizer.load_(self.optimizer, state["outer_optimizer"])

    def _check(self, state: Mapping[str, Any]) -> None:
        name, carried = type(self.optimizer).__name__, state.get("carried")
        if state.get("outer_class", name) != name:
            raise ValueError(
                f"The saved federated state is of the outer optimizer {state['outer_class']:.100}, this party"
                f" has {name}. Resume with the outer_optimizer of the checkpoint."
            )
        if getattr(carried, "shape", None) != getattr(self.carried, "shape", None):
            method = self._auxiliary.method if self._auxiliary else "plain averaging"
            raise ValueError(
                f"The federated state was saved {'without' if carried is None else 'with another'} auxiliary"
                f" vector than {method} keeps. Resume with the drift correction of the checkpoint, or begin"
                " anew from its weights."
            )
