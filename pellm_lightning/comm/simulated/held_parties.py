"""HeldParties: the simulated parties that one worker holds, as threads which meet within it."""

import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pellm_lightning.comm import ring
from pellm_lightning.comm.communicator import Communicator
from pellm_lightning.comm.errors import PartyLostError

T = TypeVar("T")
R = TypeVar("R")


class _Meeting(Generic[T]):
    """Meeting of the threads of one worker: the last to come acts on what all have brought."""

    def __init__(self, size: int) -> None:
        self._brought: list[Any] = [None] * size
        self._act: Callable[[list[Any]], Any] = list
        self._result: Any = None
        self._barrier = threading.Barrier(size, action=self._finish)

    def meet(self, index: int, value: T, act: Callable[[list[T]], R]) -> R:
        """Bring a value; return what ``act`` makes of the values of all, in their order."""
        self._brought[index], self._act = value, act
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise _AbortedError("Another party of this process has failed.") from None
        return self._result  # type: ignore[no-any-return]  # nobody acts again before this thread comes back

    def abort(self) -> None:
        """Let all who wait, or come, fail."""
        self._barrier.abort()

    def _finish(self) -> None:
        self._result = self._act(self._brought)
        self._brought = [None] * len(self._brought)


class _AbortedError(PartyLostError):
    """The failure of another thread, which has an error of its own that says why."""


class HeldParties:
    """Parties of a simulation that take part in one round, a part of which each worker holds.

    Every worker makes one; its parties' rounds then run by ``run``, and meet those of the other workers by
    the workers' communicator. Which party has which place changes from round to round.

    Args:
        workers: The joined processes of the launch.
        num_parties: Parties of the simulation.
        places: How many take part in a round.

    Raises:
        ValueError: If there are fewer places than workers.

    Example:
        >>> from torch.distributed import HashStore
        >>> from pellm_lightning import Federation
        >>> held = HeldParties(Federation(HashStore(), party=0, num_parties=1), num_parties=100, places=2)
        >>> held.assign([7, 42])
        >>> [held.parties[place] for place in held.local]
        [7, 42]
    """

    def __init__(self, workers: Communicator, num_parties: int, places: int) -> None:
        count = workers.num_parties
        if places < count:
            raise ValueError(
                f"A round of {places} sampled parties leaves some of the {count} processes without one."
                f" Sample {count} parties or more, or launch fewer processes."
            )
        sizes = [places // count + (worker < places % count) for worker in range(count)]
        bounds = pairwise(accumulate(sizes, initial=0))
        self.workers = workers
        self.num_parties = num_parties
        self.held = [range(start, stop) for start, stop in bounds]
        """Places that each worker holds."""
        self.local = self.held[workers.party]
        """Places that this worker holds."""
        self.parties: list[int] = list(range(places))
        """Party at each place."""
        self.names: list[str] = [str(party) for party in self.parties]
        self._meeting: _Meeting[Any] = _Meeting(len(self.local))

    def assign(self, parties: Sequence[int]) -> None:
        """Give each place to a party, for the next round."""
        if len(parties) != len(self.parties) or len(set(parties)) < len(parties):
            raise ValueError(f"{list(parties)!r:.200} must be {len(self.parties)} different parties.")
        self.parties = list(parties)
        self.names = [str(party) for party in parties]

    def run(self, acts: Sequence[Callable[[], T]]) -> list[T]:
        """Call one act for each local place, all at the same time; return their results.

        Raises:
            BaseException: What the first act has raised; the others fail then.
        """
        meeting = self._meeting = _Meeting[Any](len(self.local))
        results: list[Any] = [None] * len(acts)
        errors: list[BaseException] = []

        def call(index: int) -> None:
            try:
                results[index] = acts[index]()
            except BaseException as error:
                errors.append(error)
                meeting.abort()

        with _one_thread_each():
            threads = [threading.Thread(target=call, args=[index], daemon=True) for index in range(len(acts))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, _AbortedError)), errors[0])
        return results

    def meet(self, place: int, value: T, act: Callable[[list[T]], R]) -> R:
        """Bring a value to the other local places; return what the last to come makes of all."""
        return self._meeting.meet(place - self.local.start, value, act)

    # ---- what the last of the local places does for all of them

    def gather(self, brought: list[Any]) -> list[Any]:
        """Return a JSON value of every place, of all workers."""
        if self.workers.num_parties == 1:
            return list(brought)
        joined = self.workers.join_quorum("exchange", None, {"places": brought})
        return [value for of_worker in joined.metadata.values() for value in of_worker["places"]]

    def sum_(self, tensors: list[Tensor]) -> None:
        """Sum flat, contiguous tensors over all places, into each of them.

        In one process the order of the additions is that of parties with a process each, to the bit.
        """
        if self.workers.num_parties == 1:
            return _sum_as_in_ring_(tensors)
        total = tensors[0].to("cpu", copy=True)
        for tensor in tensors[1:]:
            total.add_(tensor.to("cpu"))
        self.workers.all_reduce_(total)
        for tensor in tensors:
            tensor.copy_(total)
        return None

    def broadcast(self, tensors: list[Tensor], source: int) -> None:
        """Overwrite the tensors of all places by that of one."""
        worker = next(w for w, places in enumerate(self.held) if source in places)
        mine = source in self.local
        value = tensors[source - self.local.start if mine else 0].detach().to("cpu", copy=True)
        self.workers.broadcast_(value, worker)
        for tensor in tensors:
            tensor.copy_(value)

    def all_to_all(self, brought: list[tuple[Sequence[Tensor], Sequence[int]]]) -> list[list[Tensor]]:
        """Return, by local place, what all places have sent to it.

        Args:
            brought: By local place, its parts for all places, and how much each place sends to it.
        """
        parts = [[part.detach().to("cpu") for part in of_place] for of_place, _ in brought]
        sizes = [of_place for _, of_place in brought]
        if self.workers.num_parties == 1:
            return [[of_place[place].clone() for of_place in parts] for place in self.local]
        sent = [torch.cat([of_place[to] for of_place in parts for to in there]) for there in self.held]
        totals = [sum(of_place[source] for of_place in sizes for source in there) for there in self.held]
        received: list[list[Tensor]] = [[] for _ in self.local]
        for there, values in zip(self.held, self.workers.all_to_all(sent, totals), strict=True):
            cuts = iter(values.split([of_place[source] for source in there for of_place in sizes]))
            for _ in there:
                for of_place in received:
                    of_place.append(next(cuts))
        return received


def _sum_as_in_ring_(tensors: list[Tensor]) -> None:
    """Sum over the tensors, chunk by chunk in the order of ``ring``, into each of them."""
    parties, (first, *_) = len(tensors), tensors
    for end in range(parties):
        at = ring.chunk_of(end, first.numel(), first.element_size(), parties)
        start, *others = ring.order(end, parties)
        total = tensors[start][at].clone()
        for other in others:
            total.add_(tensors[other][at])
        for tensor in tensors:
            tensor[at].copy_(total)


@contextmanager
def _one_thread_each() -> Any:
    """Let new threads compute by themselves: each would start as many more as there are processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
