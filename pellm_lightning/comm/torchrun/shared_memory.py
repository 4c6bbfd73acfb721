"""Lane of parties that share a host: they add each other's values where they lie, in shared memory."""

import contextlib
import errno
import json
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
# Bytes of a party's slot: they stay in a core's cache, and a barrier per slot is cheap next to copying it.
_SLOT_BYTES = 1 << 20
# Of what a party does, in an error message.
_LABEL_CHARS = 100
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
        chunks = [values[ring.chunk_of(at, len(values), values.itemsize, size)] for at in range(size)]
        what = f"{len(values)} x {values.dtype}"
        for places in self._places(len(chunks[0]), values, parts=size):
            pieces = [part[places] for part in chunks]
            slots = self._next_slots(values, places, parts=size)
            _copy_each(slots[rank], pieces)
            self._meet(f"all_reduce of {what}")
            first, *others = ring.order(rank, size)
            for other in others:
                slots[first, rank].add_(slots[other, rank])
            self._meet(f"sums of all_reduce of {what}")
            _copy_each(pieces, [slots[ring.order(party, size)[0], party] for party in range(size)])
        return Done()

    @override
    def broadcast(self, tensor: Tensor, source: int) -> Pending:
        values = tensor.detach().view(-1)
        for places in self._places(len(values), values):
            slots = self._next_slots(values, places)[source]
            if source == self.rank:
                _copy_each(slots, [values[places]])
            self._meet(f"broadcast from {source} of {len(values)} x {values.dtype}")
            if source != self.rank:
                _copy_each([values[places]], slots)
        return Done()

    @override
    def all_gather(self, out: Tensor, tensor: Tensor, sizes: list[int]) -> Pending:
        gathered = out.split(sizes)
        for places in self._places(max(sizes), tensor):
            slots = self._next_slots(tensor, places)
            _copy_each(slots[self.rank], [tensor[places]])
            lengths = self._meet(f"all_gather of {sizes} x {tensor.dtype}", b"%d" % len(tensor))
            if [*map(int, lengths)] != sizes:
                raise MismatchError(
                    f"The parties gather {b', '.join(lengths).decode()} scalars, but expect {sizes}. Give the"
                    " sizes of what is sent at all parties."
                )
            _copy_each([values[places] for values in gathered], slots[:, 0])
        return Done()

    @override
    def all_to_all(self, out: Tensor, tensor: Tensor, out_sizes: list[int], sizes: list[int]) -> Pending:
        sent, received = tensor.split(sizes), out.split(out_sizes)
        longest = self._longest_part(f"all_to_all of {tensor.dtype}", sizes, out_sizes)
        for places in self._places(longest, tensor, parts=self.size):
            slots = self._next_slots(tensor, places, parts=self.size)  # by sender and receiver
            _copy_each(slots[self.rank], [part[places] for part in sent])
            self._meet("parts of all_to_all")
            _copy_each([part[places] for part in received], slots[:, self.rank])
        return Done()

    @override
    def all_gather_bytes(self, message: bytes, size: int) -> list[bytes]:
        what, gathered = f"all_gather_bytes of {size}", [b""] * self.size
        at_once = host_sockets.MESSAGE_BYTES - len(what) - 1
        for start in range(0, size, at_once):
            pieces = self._meet(what, message[start : start + at_once])
            gathered = [before + piece for before, piece in zip(gathered, pieces, strict=True)]
        return gathered

    @override
    def share(self, size_bytes: int, *, willing: bool) -> Tensor | None:
        answers = self._meet(f"share of {size_bytes} bytes", b"yes" if willing else b"no")
        return None if b"no" in answers else _allocated(self._sockets, size_bytes)

    @override
    def barrier(self) -> None:
        self._meet("barrier")

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

    def _longest_part(self, what: str, sizes: list[int], out_sizes: list[int]) -> int:
        """Return the longest part of an all-to-all, which no party knows: not those of the others.

        Raises:
            MismatchError: If a party expects another size than it is sent; all raise it.
        """
        answers = [json.loads(answer) for answer in self._meet(what, json.dumps([sizes, out_sizes]).encode())]
        for source, (sent, _) in enumerate(answers):
            for target, (_, expected) in enumerate(answers):
                if sent[target] != expected[source]:
                    raise MismatchError(
                        f"Party {source} sends {sent[target]} scalars to party {target}, which expects"
                        f" {expected[source]}. Give the sizes of what is sent at all parties."
                    )
        longest: int = max(max(sent) for sent, _ in answers)
        return longest

    def _meet(self, what: str, message: bytes = b"") -> list[bytes]:
        """Wait for all parties, which must be at the same collective; return their messages, in order.

        Raises:
            MismatchError: If they are not.
        """
        answers = self._sockets.exchange(f"{what}:".encode() + message)
        labels, _, messages = zip(*(answer.partition(b":") for answer in answers), strict=True)
        if len({*labels}) > 1:
            by_party = ", ".join(label.decode(errors="replace")[:_LABEL_CHARS] for label in labels)
            raise MismatchError(
                f"The parties exchange different tensors: {by_party}, by party. Call the same collectives"
                " with the same shapes and dtypes at all parties."
            )
        return [*messages]


def open_lane(
    party: int, num_parties: int, timeout_s: float, gather: Gather, *, wanted: bool
) -> tuple[list[list[int]], SharedMemoryLane | None]:
    """Return the parties by host, and the lane of this host's; no hosts if a host cannot. Equal at all.

    Args:
        party: This party.
        num_parties: Number of parties.
        timeout_s: Seconds a party may be late.
        gather: Publishes a JSON value, and returns all parties' in order.
        wanted: Whether this party wants it.
    """
    wanted = wanted and os.environ.get(SWITCH) != "0"
    connected = host_sockets.connect(party, num_parties, timeout_s, gather, wanted=wanted)
    if isinstance(connected, str):
        log.debug("[party %d] exchanges over Gloo: %s", party, connected)
        return [], None
    hosts, sockets = connected
    with contextlib.ExitStack() as opened:
        memory = None
        if sockets is not None:
            opened.callback(sockets.close)
            memory = _allocated(sockets, _NUM_SLOTS * sockets.size * _SLOT_BYTES)
        fine = sockets is None or memory is not None
        if not all(gather("host memory", fine) if len(hosts) > 1 else [fine]):
            return [], None
        opened.pop_all()
    return hosts, None if sockets is None or memory is None else SharedMemoryLane(sockets, memory)


def _allocated(sockets: HostSockets, size_bytes: int) -> Tensor | None:
    """Return zeroed memory that all parties have mapped, None if one of them could not; the same at all.

    It has no name, so that nothing is left of it however the parties end. It is reserved at once, if so much
    is free: to reserve or to write to memory that is not there would kill a party.

    Raises:
        RuntimeError: If a party is lost or late.
    """
    memory, failure = None, ""
    files: list[int] = []
    try:
        if sockets.rank == 0:
            try:
                files.append(_reserved(size_bytes))
            except OSError as error:
                failure = f"party {sockets.party}: {error}"
        sockets.exchange(b"memory", files)
        memory = _map(files, size_bytes)
    except (OSError, ValueError) as error:
        failure = failure or f"party {sockets.party}: {error}"
    finally:
        for file in files:
            os.close(file)
    failures = [answer[1:].decode() for answer in sockets.exchange(f":{failure}".encode())]
    reason = next(filter(None, failures), None)
    if reason is None:
        return memory
    if sockets.rank == 0:
        log.warning(
            "[party %d] The parties share a host, but cannot share %d MB of its memory (%s): they exchange by"
            " copies, which takes longer. Free memory, or raise the limit of the container (docker run"
            " --memory) or of the processes (ulimit -f, ulimit -v).",
            sockets.party,
            size_bytes // 1_000_000,
            reason,
        )
    return None


def _reserved(size_bytes: int) -> int:
    """Return the descriptor of new memory of so many bytes, which are all there."""
    free = free_bytes()
    if size_bytes > free:
        raise OSError(errno.ENOMEM, f"{free // 1_000_000} MB are free")
    file = os.memfd_create("pellm")
    try:
        os.ftruncate(file, size_bytes)
        os.posix_fallocate(file, 0, size_bytes)
    except OSError:
        os.close(file)
        raise
    return file


def _map(files: list[int], size_bytes: int) -> Tensor:
    if not files:
        raise OSError("the descriptor of the memory has not arrived")
    mapped = mmap.mmap(files[0], size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    memory: Tensor = torch.frombuffer(mapped, dtype=torch.uint8)  # unmapped with its last view
    return memory


def _copy_each(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy tensors into others as far as both go."""
    for to, of in zip(into, values, strict=True):
        length = min(len(to), len(of))
        to[:length].copy_(of[:length])
