"""OverlappedAggregator: rounds in a background thread while the party continues to train."""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from pellm_lightning.aggregation.base import Aggregation
from pellm_lightning.comm import Communicator, FederationError
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.auxiliary import AuxiliaryValues
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.tensors.deviation import Deviation

T = TypeVar("T")


@dataclass(frozen=True)
class Overlap:
    """Settings of rounds that overlap with local steps, or exchange one fragment of the parameters at a time.

    With a delay a party's parameters are copied when a round begins, and the round continues with the copies.
    ``delay_steps`` optimizer steps later its result is applied: ``x = mix * x + (1 - mix) * result``, as in
    Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512, where they are called tau and alpha). A round
    that is not complete by then is waited for.

    With K fragments the layers are dealt to K groups that take turns: each has a round as often as the
    schedule says, and each exchange is a K-th as large.

    Example:
        >>> Overlap(delay_steps=10, fragments=4)
        Overlap(delay_steps=10, mix=0.5, fragments=4)

    Args:
        delay_steps: Optimizer steps between the beginning of a round and the application of its result; 0
            lets training wait for it.
        mix: How much of the local parameters is kept when it is applied, in [0, 1). With 0 the steps made in
            the meantime are dropped, but for the state of the local optimizer. Without a delay it has no
            effect.
        fragments: Number K of groups of layers that take turns.

    Raises:
        ValueError: If an argument is out of its range.
    """

    delay_steps: int = 0
    mix: float = 0.5
    fragments: int = 1

    def __post_init__(self) -> None:
        delay, fragments = self.delay_steps, self.fragments
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise ValueError(
                f"Overlap(delay_steps={delay!r}) must be a whole number of optimizer steps, 0 or more."
            )
        if not 0 <= self.mix < 1:
            raise ValueError(
                f"Overlap(mix={self.mix!r}) must be at least 0 and below 1: with 1 a party would never take"
                " over a result."
            )
        if isinstance(fragments, bool) or not isinstance(fragments, int) or fragments < 1:
            raise ValueError(f"Overlap(fragments={fragments!r}) must be a whole number, 1 or more.")

    @property
    def in_background(self) -> bool:
        """Whether training continues while a round is under way."""
        return self.delay_steps > 0

    def check_schedule(self, every_n_steps: int | None, every_n_seconds: float | None) -> None:
        """Refuse a schedule in which fragments cannot take turns, or a result comes after the next round.

        Raises:
            ValueError: If it is one.
        """
        fragments = self.fragments
        if fragments > 1 and every_n_seconds is None:
            if every_n_steps is None:
                raise ValueError(
                    f"{fragments} fragments take turns between two rounds of one of them, and an epoch is not"
                    f" divided. Give every_n_steps, a multiple of {fragments}, or every_n_seconds."
                )
            if every_n_steps % fragments:
                raise ValueError(
                    f"{fragments} fragments take turns between two rounds of one of them, so every_n_steps="
                    f"{every_n_steps} must be a multiple of {fragments}; or give every_n_seconds."
                )
        if every_n_steps is not None and self.delay_steps >= every_n_steps // fragments:
            raise ValueError(
                f"{self!r} applies a round after the next one has begun, {every_n_steps // fragments}"
                " steps later. Choose a smaller delay_steps, or rounds that are further apart."
            )

    def check(self, rule: Aggregation) -> None:
        """Refuse a rule whose result cannot be applied later.

        Raises:
            ValueError: If it cannot.
        """
        if rule.writes_base:
            raise ValueError(
                f"{rule!r} writes into the frozen weights, with which training continues during a round. Use"
                " another aggregation, or no overlap."
            )
        if rule.frozen_parts(0) != rule.frozen_parts(1):
            raise ValueError(
                f"{rule!r} trains other factors after each round, but with an overlap nobody knows yet that"
                " the round is over. Use another aggregation, or no overlap."
            )
        if self.in_background and self.mix and rule.outer == "mean":
            raise ValueError(
                f"{rule!r} gives the factors other coordinates each round, so mix={self.mix:g} of the old"
                " ones has no meaning. Use Overlap(mix=0), aggregation=Mean(), or"
                " LowRankMean(factorization='procrustes')."
            )


class OverlappedAggregator(Aggregator):
    """Aggregator whose rounds can run in the background: ``begin``, train, ``apply``.

    It works on copies of the parameters in CPU memory, as large as these. Whatever a round does (secure
    aggregation, noise, compression, parties that are lost) it does to the copies, in a thread of its own.

    Args:
        federation: The joined parties.
        parameters: Named floating-point tensors on one device.
        overlap: How results are applied.
        **options: As of ``Aggregator``.

    Raises:
        ValueError: As ``Aggregator``; or if the aggregation allows no overlap.

    Example:
        >>> aggregator = OverlappedAggregator(federation, parameters, Overlap(5))  # doctest: +SKIP
        >>> aggregator.start()  # doctest: +SKIP
        >>> aggregator.begin(weight=8.0)  # doctest: +SKIP
        >>> train(model, steps=5)  # doctest: +SKIP
        >>> report = aggregator.apply()  # doctest: +SKIP
    """

    def __init__(
        self, federation: Communicator, parameters: Mapping[str, Tensor], overlap: Overlap, **options: Any
    ) -> None:
        if options.get("auxiliary") is not None:
            raise ValueError("A drift correction needs the last round's result at once: use no overlap.")
        self._staging = Staging(parameters)
        super().__init__(federation, self._staging.copies, **options)
        overlap.check(self._context.plan.rule)
        self._overlap = overlap
        self._running: Future[RoundReport] | None = None
        self._report: RoundReport | None = None
        self._stalled = 0.0
        self.completed = time.monotonic()
        """End of the last round, by this process's clock; about the same moment at all parties."""

    @property
    def failed(self) -> bool:
        """Whether the running round has failed already; ``apply()`` raises why."""
        round = self._running
        return round is not None and round.done() and round.exception() is not None

    # ---- what a party calls

    @override
    def start(self) -> bool:
        overwritten = super().start()
        if overwritten:
            self._report = None
            self._staging.put(mix=0)
        if self._report is not None:  # its result is what the global vector holds
            self._global_state.write_(self._global_state.last_written)
        return overwritten

    def begin(self, weight: float, loss: float | None = None, *, steps_left: float = math.nan) -> None:
        """Begin a round with the parameters as they are now; it runs in the background.

        Args:
            weight: As of ``step``.
            loss: As of ``step``.
            steps_left: As of ``step``.

        Raises:
            RuntimeError: If the last one has not been applied yet.
        """
        self._check_applied()
        begun = time.perf_counter()
        step = super().step
        self._staging.take(self._global_state.updates.layout.names)

        def round() -> RoundReport:
            self._staging.wait()
            report = step(weight, loss, steps_left=steps_left)
            self.completed = time.monotonic()
            return report

        self._running = _in_background(round)
        self._stalled = time.perf_counter() - begun

    def apply(self, *, last: bool = False) -> RoundReport:
        """Wait for the running round, and mix its result into the parameters.

        Args:
            last: Take the result as it is, so that all parties end with the same parameters.

        Raises:
            RuntimeError: If none is running.
            FederationError: As ``step``.
        """
        self._wait()
        begun = time.perf_counter()
        if self._report is None:
            raise RuntimeError(f"No round of party {self.federation.name} is running. Call begin() first.")
        report, self._report = self._report, None
        was_excluded = self.federation.place[0] in report.excluded  # NaN would survive any mixing
        takes_all = last or was_excluded or not self._overlap.in_background
        self._put_written(mix=0 if takes_all else self._overlap.mix)
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
        """Run one round with all parties and wait for it; all continue with its result as it is.

        Args:
            weight: As of ``Aggregator.step``.
            loss: As of ``Aggregator.step``.
            contribution: None: drift corrections need rounds without an overlap.
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
            self._put_written(mix=0)
            self._staging.wait()
            yield report

    @override
    def mean(self, values: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        self._wait()  # parties meet for one thing at a time
        return super().mean(values)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state as of ``Aggregator``, when the running round has ended or failed."""
        with contextlib.suppress(FederationError):  # which apply() will raise
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

    def _put_written(self, mix: float) -> None:
        """Mix into the parameters what the last round has written; other fragments stay as they are."""
        state = self._global_state
        names = [name for index in state.last_written for name in state.fragments[index].layout.names]
        self._staging.put(mix, names)

    def _check_applied(self) -> None:
        if self._running is not None or self._report is not None:
            raise RuntimeError(f"Party {self.federation.name} begins a round before the last was applied.")

    def _wait(self, *, again: bool = False) -> None:
        """Return when no round is running any more; raise what it failed with, once or ``again``."""
        round, begun = self._running, time.perf_counter()
        if round is None:
            return
        try:
            self._report = round.result()
        finally:
            self._stalled += time.perf_counter() - begun
            # It may still be running, if the waiting was interrupted.
            if round.done() and not (again and round.exception()):
                self._running = None


class Staging:
    """Staging buffers of parameters in CPU memory.

    From and to a GPU the copies are page-locked and made on a stream of their own.

    Args:
        live: Named tensors on one device.

    Example:
        >>> x = torch.ones(2)
        >>> staging = Staging({"x": x})
        >>> x.fill_(3.0).tolist()
        [3.0, 3.0]
        >>> staging.put(mix=0.5)
        >>> x.tolist()
        [2.0, 2.0]
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
    def take(self, names: Collection[str] | None = None) -> None:
        """Begin to copy the parameters as they are now; later changes do not show.

        Args:
            names: Which; None for all.
        """
        live = [(self.copies[name], self._live[name]) for name in (self._live if names is None else names)]
        if self._stream is None:
            for copy, tensor in live:
                copy.copy_(tensor)
            return
        training = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            for copy, tensor in live:
                copy.copy_(tensor, non_blocking=True)
        training.wait_stream(self._stream)  # the next step changes what is being copied

    def wait(self) -> None:
        """Return when the copies are there."""
        if self._stream is not None:
            self._stream.synchronize()

    @torch.no_grad()
    def put(self, mix: float, names: Collection[str] | None = None) -> None:
        """Mix the copies into the parameters: ``mix`` of themselves and the rest of the copies.

        Args:
            mix: In [0, 1); 0 gives the copies, bit for bit.
            names: Which; None for all.
        """
        for name in self._live if names is None else names:
            tensor, copy = self._live[name], self.copies[name]
            if mix:
                tensor.lerp_(copy.to(tensor.device, non_blocking=True), 1 - mix)
            else:
                tensor.copy_(copy, non_blocking=True)
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
