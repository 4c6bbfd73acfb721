"""Lane of parties that share a host: they add each other's values where they lie, in shared memory."""

import contextlib
import errno
import logging
import mmap
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm import ring
from pellm_lightning.comm.errors import MismatchError
from pellm_lightning.comm.torchrun import host_sockets
from pellm_lightning.comm.torchrun.free_memory import free_bytes
from pellm_lightning.comm.torchrun.host_sockets import Gather, HostSockets
from pellm_lightning.comm.torchrun.lane import Lane, Pending

log = logging.getLogger(__name__)

SWITCH = "PELLM_SHARED_MEMORY"
"""Environment variable that switches the lane off at all parties, if it is 0 at one."""
# Bytes of a party's slot: they stay in a core's cache, and a barrier per slot is cheap beside copying it.
_SLOT_BYTES = 1 << 20
# A party writes one while others still read the last one.
_NUM_SLOTS = 2


class Done:
    """Handle of a collective that is complete."""

    def wait(self) -> None:
        """Return at once."""


class SharedMemoryLane(Lane):
    """Lane through slots in shared memory, two for each party, in turn.

    To sum, a party copies a piece of its tensor into its slot, waits for the others, adds up its own chunk of
    all parties' slots in place, waits again, and copies the sums out. They have the bits of Gloo's sums.

    Args:
        sockets: Connections of the parties: their barrier.
        memory: The slots, (bytes,) uint8, the same at all parties.
    """

    def __init__(self, sockets: HostSockets, memory: Tensor) -> None:
        self._sockets = sockets
        self.rank, self.size = sockets.rank, sockets.size
        self._slots = memory.view(_NUM_SLOTS, self.size, -1)
        self._turn = 0

    @override
    def all_reduce(self, tensor: Tensor) -> Pending:
        values, rank, size = tensor.detach().view(-1), self.rank, self.size
        chunk = ring.chunk_size(len(values), values.itemsize, size)
        chunks = [values[party * chunk : (party + 1) * chunk] for party in range(size)]
        for places in self._places(chunk, values, parts=size):
            pieces = [part[places] for part in chunks]
            slots = self._next_slots(values, places, parts=size)
            _copy_each(slots[rank], pieces)
            self._meet("all_reduce", values)
            first, *others = ring.order(rank, size)
            for other in others:
                slots[first, rank].add_(slots[other, rank])
            self._meet("sums of all_reduce", values)
            _copy_each(pieces, [slots[ring.order(party, size)[0], party] for party in range(size)])
        return Done()

    @override
    def broadcast(self, tensor: Tensor, source: int) -> Pending:
        values = tensor.detach().view(-1)
        for places in self._places(len(values), values):
            slots = self._next_slots(values, places)[source]
            if source == self.rank:
                _copy_each(slots, [values[places]])
            self._meet("broadcast", values)
            if source != self.rank:
                _copy_each([values[places]], slots)
        return Done()

    @override
    def all_gather(self, gathered: list[Tensor], tensor: Tensor) -> Pending:
        for places in self._places(len(tensor), tensor):
            slots = self._next_slots(tensor, places)
            _copy_each(slots[self.rank], [tensor[places]])
            self._meet("all_gather", tensor)
            _copy_each([values[places] for values in gathered], slots[:, 0])
        return Done()

    @override
    def all_to_all(self, out: Tensor, tensor: Tensor, out_sizes: list[int], sizes: list[int]) -> Pending:
        sent, received = tensor.split(sizes), out.split(out_sizes)
        # No party knows how much the others send each other.
        longest = max(map(int, self._exchange(str(max(*sizes, *out_sizes)))))
        for places in self._places(longest, tensor, parts=self.size):
            slots = self._next_slots(tensor, places, parts=self.size)  # by sender and receiver
            _copy_each(slots[self.rank], [part[places] for part in sent])
            self._exchange("all_to_all")
            _copy_each([part[places] for part in received], slots[:, self.rank])
        return Done()

    @override
    def all_gather_bytes(self, message: bytes, size: int) -> list[bytes]:
        at_once = host_sockets.MESSAGE_BYTES - 1
        gathered = [b""] * self.size
        for start in range(0, size, at_once):  # it begins with a byte, since no message may be empty
            pieces = self._sockets.exchange(b":" + message[start : start + at_once])
            gathered = [before + piece[1:] for before, piece in zip(gathered, pieces, strict=True)]
        return gathered

    @override
    def share(self, size_bytes: int, *, willing: bool) -> Tensor | None:
        if "no" in self._exchange("yes" if willing else "no"):
            return None
        return _allocated(self._sockets, size_bytes)

    @override
    def barrier(self) -> None:
        self._exchange("barrier")

    @override
    def abort(self) -> None:
        self._sockets.close()

    # ---- slots and turns

    def _places(self, length: int, values: Tensor, parts: int = 1) -> Iterator[slice]:
        """Yield the ranges of parts of a length that fit into a slot together."""
        at_once = self._slots.shape[2] // (parts * values.itemsize)
        for start in range(0, length, at_once):
            yield slice(start, min(start + at_once, length))

    def _next_slots(self, values: Tensor, places: slice, parts: int = 1) -> Tensor:
        """Return the slots of the next turn, by party and part, as long as a range of the values."""
        self._turn += 1
        slots, length = self._slots[self._turn % _NUM_SLOTS].view(values.dtype), places.stop - places.start
        used: Tensor = slots[:, : parts * length].unflatten(1, (parts, length))
        return used

    def _meet(self, what: str, values: Tensor) -> None:
        """Wait for all parties, which must be at the same.

        Raises:
            MismatchError: If they are not.
        """
        answers = self._exchange(f"{what} of {len(values)} x {values.dtype}")
        if len(set(answers)) > 1:
            raise MismatchError(
                f"The parties exchange different tensors: {', '.join(answers)}, by party. Call the same"
                " collectives with the same shapes and dtypes at all parties."
            )

    def _exchange(self, words: str) -> list[str]:
        return [answer.decode() for answer in self._sockets.exchange(words.encode())]


def open_lane(
    rank: int, size: int, timeout_s: float, gather: Gather, *, wanted: bool
) -> SharedMemoryLane | None:
    """Return the lane of parties that share a host, None if one of them cannot; the same at all.

    Args:
        rank: This party.
        size: Number of parties.
        timeout_s: Seconds a party may be late.
        gather: Publishes a JSON value, and returns all parties' in order.
        wanted: Whether this party wants it.
    """
    wanted = wanted and os.environ.get(SWITCH) != "0"
    sockets = host_sockets.connect(rank, size, timeout_s, gather, wanted=wanted)
    if not isinstance(sockets, HostSockets):
        log.debug("[party %d] exchanges over Gloo: %s", rank, sockets)
        return None
    with contextlib.ExitStack() as opened:
        opened.callback(sockets.close)
        memory = _allocated(sockets, _NUM_SLOTS * size * _SLOT_BYTES)
        if memory is None:
            return None
        opened.pop_all()
    return SharedMemoryLane(sockets, memory)


def _allocated(sockets: HostSockets, size_bytes: int) -> Tensor | None:
    """Return zeroed memory that all parties have mapped, None if one of them could not; the same at all.

    It has no name, so that nothing is left of it however the parties end. It is reserved at once, if so much
    is free: to reserve or to write to memory that is not there would kill a party.

    Raises:
        RuntimeError: If a party is lost or late.
    """
    memory, failure = None, ""
    make = _map_created if sockets.rank == 0 else _map_received
    try:
        memory = make(sockets, size_bytes)
    except (OSError, ValueError) as error:
        failure = f"party {sockets.rank}: {error}"
    failures = [answer[1:].decode() for answer in sockets.exchange(f":{failure}".encode())]
    reason = next(filter(None, failures), None)
    if reason is None:
        return memory
    if sockets.rank == 0:
        log.warning(
            "[party 0] The parties share a host, but cannot share %d MB of its memory (%s): they exchange by"
            " copies, which takes longer. Free memory, or raise the limit of the container (docker run"
            " --memory) or of the processes (ulimit -f, ulimit -v).",
            size_bytes // 1_000_000,
            reason,
        )
    return None


def _map_created(sockets: HostSockets, size_bytes: int) -> Tensor:
    """Create memory, and give it to the other parties; or tell them that there is none."""
    descriptor = None
    try:
        free = free_bytes()
        if size_bytes > free:
            raise OSError(errno.ENOMEM, f"{free // 1_000_000} MB are free")
        descriptor = os.memfd_create("pellm")
        os.ftruncate(descriptor, size_bytes)
        os.posix_fallocate(descriptor, 0, size_bytes)
        mapped = _map(descriptor, size_bytes)
    except OSError:
        sockets.send_no_descriptor()
        raise
    else:
        sockets.send_descriptor(descriptor)
        return mapped
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _map_received(sockets: HostSockets, size_bytes: int) -> Tensor:
    descriptor = sockets.receive_descriptor(0)
    try:
        return _map(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def _map(descriptor: int, size_bytes: int) -> Tensor:
    mapped = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    memory: Tensor = torch.frombuffer(mapped, dtype=torch.uint8)  # unmapped with its last view
    return memory


def _copy_each(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy tensors into others as far as both go."""
    for to, of in zip(into, values, strict=True):
        length = min(len(to), len(of))
        to[:length].copy_(of[:length])
