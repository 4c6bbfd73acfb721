"""BackgroundRounds: rounds of copies of the parameters, in a thread, while the party continues to train."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, replace
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from pellm_lightning.comm import FederationError
from pellm_lightning.engine.coordination import Purpose
from pellm_lightning.engine.global_state import GlobalState
from pellm_lightning.engine.round import LocalInput, RoundRunner
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.tensors.deviation import Deviation

T = TypeVar("T")


class BackgroundRounds:
    """Runner of rounds on copies of the parameters: ``begin``, train, ``apply``.

    Whatever a round does (secure aggregation, noise, compression, parties that are lost) it does to the
    copies, in a thread of its own.

    Args:
        rounds: Runner of the rounds of the copies.
        state: Their global state.
        staging: The copies.
        mix: How much of the local parameters is kept when a result is applied, in [0, 1).
    """

    def __init__(self, rounds: RoundRunner, state: GlobalState, staging: "Staging", mix: float) -> None:
        self._rounds = rounds
        self._federation = rounds.federation
        self._state = state
        self._staging = staging
        self._mix = mix
        self._running: Future[RoundReport | None] | None = None
        self._report: RoundReport | None = None
        self._stalled = 0.0
        self.completed = time.monotonic()
        """End of the last round, by this process's clock; about the same moment at all parties."""

    @property
    def failed(self) -> bool:
        """Whether the running round has failed already; ``apply()`` raises why."""
        round = self._running
        return round is not None and round.done() and round.exception() is not None

    def start(self, *, overwritten: bool) -> None:
        """Begin when the parties have met.

        Args:
            overwritten: Whether the copies were overwritten by the parameters of another party.
        """
        if overwritten:
            self._report = None
            self._staging.put(mix=0)
        if self._report is not None:  # its result is what the global vector holds
            self._state.write_(self._state.last_written)

    def begin(self, local: LocalInput) -> None:
        """Begin a round with the parameters as they are now.

        Raises:
            RuntimeError: If the last one has not been applied yet.
        """
        self._check_applied()
        begun = time.perf_counter()
        self._staging.take(self._state.updates.layout.names)

        def round() -> RoundReport | None:
            self._staging.wait()
            report = self._rounds.run(Purpose.ROUND, local)
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
            FederationError: As ``Aggregator.step``.
        """
        self.wait()
        begun = time.perf_counter()
        if self._report is None:
            raise RuntimeError(f"No round of party {self._federation.name} is running. Call begin() first.")
        report, self._report = self._report, None
        was_excluded = self._federation.place[0] in report.excluded  # NaN would survive any mixing
        self._put_written(mix=0 if last or was_excluded else self._mix)
        return replace(report, stalled_seconds=self._stalled + time.perf_counter() - begun)

    def step(self, local: LocalInput) -> RoundReport:
        """Run a round and wait for it; its result is taken as it is."""
        self.begin(local)
        return self.apply(last=True)

    def drain(self) -> Iterator[RoundReport]:
        """Take part in the others' rounds with weight 0, as ``Aggregator.drain``."""
        self._check_applied()
        self._staging.take()
        self._staging.wait()
        while (report := self._rounds.run(Purpose.DONE, LocalInput())) is not None:
            self._put_written(mix=0)
            self._staging.wait()
            yield report

    def wait(self, *, again: bool = False) -> None:
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

    def settle(self) -> None:
        """Return when no round is running any more; ``apply`` raises what it failed with."""
        with contextlib.suppress(FederationError):
            self.wait(again=True)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the report of the round to be applied, if any, when the running one has ended or failed."""
        self.settle()
        return None if self._report is None else asdict(self._report)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a round that is still to be applied."""
        deviation = state["deviation"]
        report = {**state, "deviation": None if deviation is None else Deviation(**deviation)}
        self._report = RoundReport(**report)

    def _put_written(self, mix: float) -> None:
        """Mix into the parameters what the last round has written; other fragments stay as they are."""
        fragments = [self._state.fragments[index] for index in self._state.last_written]
        self._staging.put(mix, [name for updates in fragments for name in updates.layout.names])

    def _check_applied(self) -> None:
        if self._running is not None or self._report is not None:
            raise RuntimeError(f"Party {self._federation.name} begins a round before the last was applied.")


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
