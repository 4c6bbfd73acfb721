"""Rounds that run in the background while the parties go on training."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from pellm_lightning.aggregation.base import Aggregation
from pellm_lightning.aggregation.deviation import Deviation
from pellm_lightning.comm import Collectives, FederationError
from pellm_lightning.engine.aggregator import Aggregator, RoundReport
from pellm_lightning.engine.auxiliary import AuxiliaryValues

T = TypeVar("T")


@dataclass(frozen=True)
class Overlap:
    """How a round overlaps with the local steps that follow it.

    At its beginning a party's parameters are copied, and the round goes on with the copies. ``delay_steps``
    optimizer steps later its result lands: ``x = mix * x + (1 - mix) * result``, as in Streaming DiLoCo
    (Douillard et al. 2025, arXiv:2501.18512, where they are called tau and alpha). A round that is not
    through by then is waited for.

    Args:
        delay_steps: Optimizer steps between the beginning of a round and the landing of its result; 0 waits
            for it at once.
        mix: How much of the local parameters stays when it lands, in [0, 1). With 0 the steps made in the
            meantime are dropped, but for what the local optimizer remembers.

    Raises:
        ValueError: If an argument is out of its range.
    """

    delay_steps: int
    mix: float = 0.5

    def __post_init__(self) -> None:
        delay = self.delay_steps
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise ValueError(
                f"Overlap(delay_steps={delay!r}) must be a whole number of optimizer steps, 0 or more."
            )
        if not 0 <= self.mix < 1:
            raise ValueError(
                f"Overlap(mix={self.mix!r}) must be at least 0 and below 1: with 1 a party would never take"
                " over a result."
            )
        if self.mix and not delay:
            raise ValueError(
                f"Overlap(delay_steps=0, mix={self.mix!r}) keeps local parameters of which the result knows"
                " all, and parties would drift apart. Use mix=0, or a delay."
            )

    def check(self, rule: Aggregation) -> None:
        """Refuse a rule whose result cannot be landed later.

        Raises:
            ValueError: If it cannot.
        """
        if rule.writes_base:
            raise ValueError(
                f"{rule!r} writes into the frozen weights, with which training goes on while a round is under"
                " way. Use another aggregation, or no overlap."
            )
        if rule.frozen_parts(0) != rule.frozen_parts(1):
            raise ValueError(
                f"{rule!r} trains other factors after each round, but with an overlap nobody knows yet that"
                " the round is over. Use another aggregation, or no overlap."
            )
        if self.mix and rule.outer == "mean":
            raise ValueError(
                f"{rule!r} gives the factors other coordinates each round, so mix={self.mix:g} of the old"
                " ones has no meaning. Use Overlap(mix=0), aggregation=Mean(), or"
                " LowRankMean(factorization='procrustes')."
            )


class OverlappedAggregator(Aggregator):
    """An aggregator whose rounds can run in the background: ``begin``, train on, ``apply``.

    It works on copies of the parameters in CPU memory, one more times their size. Whatever a round does
    (masks, noise, compression, parties that come and go) it does to the copies, in a thread of its own.

    Args:
        federation: The joined parties.
        parameters: Named floating-point tensors on one device.
        overlap: How results land.
        **options: As of ``Aggregator``.

    Raises:
        ValueError: As ``Aggregator``; or if the aggregation allows no overlap.
    """

    def __init__(
        self, federation: Collectives, parameters: Mapping[str, Tensor], overlap: Overlap, **options: Any
    ) -> None:
        if options.get("auxiliary") is not None:
            raise ValueError("A drift correction needs the last round's result at once: use no overlap.")
        self._staging = Staging(parameters)
        super().__init__(federation, self._staging.copies, **options)
        overlap.check(self._plan.rule)
        self._overlap = overlap
        self._under_way: Future[RoundReport] | None = None
        self._report: RoundReport | None = None
        self._stalled = 0.0
        self.completed = time.monotonic()
        """When the last round was through, by this process's clock; about the same moment at all parties."""

    @property
    def failed(self) -> bool:
        """Whether the round under way has failed already; ``apply()`` raises why."""
        round = self._under_way
        return round is not None and round.done() and round.exception() is not None

    # ---- what a party calls

    @override
    def start(self) -> bool:
        overwritten = super().start()
        if overwritten:
            self._report = None
            self._staging.put(mix=0)
        if self._report is not None:  # its result is what the global vector holds
            self._global_state.write_()
        return overwritten

    def begin(self, weight: float, loss: float | None = None, *, steps_left: float = math.nan) -> None:
        """Begin a round with the parameters as they are now; it goes on in the background.

        Args:
            weight: As of ``step``.
            loss: As of ``step``.
            steps_left: As of ``step``.

        Raises:
            RuntimeError: If the last one has not landed yet.
        """
        self._check_applied()
        begun = time.perf_counter()
        step = super().step
        self._staging.take()

        def round() -> RoundReport:
            self._staging.wait()
            report = step(weight, loss, steps_left=steps_left)
            self.completed = time.monotonic()
            return report

        self._under_way = _in_background(round)
        self._stalled = time.perf_counter() - begun

    def apply(self, *, last: bool = False) -> RoundReport:
        """Wait for the round under way, and mix its result into the parameters.

        Args:
            last: Take the result as it is, so that all parties end with the same parameters.

        Raises:
            RuntimeError: If none is under way.
            FederationError: As ``step``.
        """
        self._wait()
        begun = time.perf_counter()
        if self._report is None:
            raise RuntimeError(f"No round of party {self.federation.name} is under way. Call begin() first.")
        report, self._report = self._report, None
        healed = self.federation.place[0] in report.excluded  # NaN would survive any mixing
        self._staging.put(mix=0 if last or healed else self._overlap.mix)
        return replace(report, stalled_seconds=self._stalled + time.perf_counter() - begun)

    @override
    def step(
        self,
        weight: float,
        loss: float | None = None,
        contribution: AuxiliaryValues | None = None,
        *,
        steps_left: float = math.nan,
    ) -> RoundReport:
        """Run one round with all parties and wait for it; all go on with its result as it is.

        Args:
            weight: As of ``Aggregator.step``.
            loss: As of ``Aggregator.step``.
            contribution: Of nothing: drift corrections go without an overlap.
            steps_left: As of ``Aggregator.step``.

        Raises:
            FederationError: As ``Aggregator.step``.
        """
        self.begin(weight, loss, steps_left=steps_left)
        return self.apply(last=True)

    @override
    def drain(self) -> Iterator[RoundReport]:
        self._check_applied()
        self._staging.take()
        self._staging.wait()
        for report in super().drain():
            self._staging.put(mix=0)
            self._staging.wait()
            yield report

    @override
    def mean(self, values: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        self._wait()  # parties meet for one thing at a time
        return super().mean(values)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state as of ``Aggregator``, when the round under way is through or has failed."""
        with contextlib.suppress(FederationError):  # which land() will raise
            self._wait(again=True)
        pending = None if self._report is None else asdict(self._report)
        return super().state_dict() | {"pending": pending}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict({**state, "pending": None})
        pending = state.get("pending")
        if pending is not None:
            deviation = pending["deviation"]
            pending = pending | {"deviation": None if deviation is None else Deviation(**deviation)}
            self._report = RoundReport(**pending)

    def _check_applied(self) -> None:
        if self._under_way is not None or self._report is not None:
            raise RuntimeError(f"Party {self.federation.name} begins a round before the last has landed.")

    def _wait(self, *, again: bool = False) -> None:
        """Return when no round is under way any more; raise what it failed with, once or ``again``."""
        round, begun = self._under_way, time.perf_counter()
        if round is None:
            return
        try:
            self._report = round.result()
        finally:
            self._stalled += time.perf_counter() - begun
            # It may still be running, if the waiting was interrupted.
            if round.done() and not (again and round.exception()):
                self._under_way = None


class Staging:
    """Parameters, and copies of them in CPU memory.

    From and to a GPU the copies are page-locked and go over a stream of their own.

    Args:
        live: Named tensors on one device.
    """

    def __init__(self, live: Mapping[str, Tensor]) -> None:
        self._live = dict(live)
        self.copies = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for name, tensor in live.items()
        }
        first = next(iter(live.values()), None)
        self._stream = torch.cuda.Stream(first.device) if first is not None and first.is_cuda else None
        self.take()
        self.wait()

    @torch.no_grad()
    def take(self) -> None:
        """Begin to copy the parameters as they are now; later changes do not show."""
        if self._stream is None:
            for name, tensor in self._live.items():
                self.copies[name].copy_(tensor)
            return
        training = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            for name, tensor in self._live.items():
                self.copies[name].copy_(tensor, non_blocking=True)
        training.wait_stream(self._stream)  # the next step changes what is being copied

    def wait(self) -> None:
        """Return when the copies are there."""
        if self._stream is not None:
            self._stream.synchronize()

    @torch.no_grad()
    def put(self, mix: float) -> None:
        """Let the parameters be ``mix`` of themselves and the rest of the copies.

        Args:
            mix: In [0, 1); 0 gives the copies, bit for bit.
        """
        for name, tensor in self._live.items():
            if mix:
                tensor.lerp_(self.copies[name].to(tensor.device, non_blocking=True), 1 - mix)
            else:
                tensor.copy_(self.copies[name], non_blocking=True)
        if self._stream is not None:  # the next round overwrites what is being read
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))


def _in_background(act: Callable[[], T]) -> "Future[T]":
    """Return what ``act`` will return; no process waits for its thread when it ends."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="federated round", daemon=True).start()
    return future
