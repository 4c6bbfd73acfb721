"""Mesh: collectives over own connections, one per pair of members, plain or TLS.

A member that dies, stalls or disagrees is named to all others, and none of them is harmed: each knows which
frames it expects, checks every frame against them, and sends a failure notice before it disconnects.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.mesh.dialer import Dialer
from pellm_lightning.comm.mesh.frames import (
    DTYPES,
    Incoming,
    Kind,
    Label,
    Link,
    Outgoing,
    PeerDisconnectedError,
    UnexpectedFrameError,
)
from pellm_lightning.comm.mesh.group import Group
from pellm_lightning.comm.mesh.handshake import send_greeting
from pellm_lightning.comm.mesh.listener import Listener
from pellm_lightning.comm.mesh.reduction import BLOCK_BYTES, Reduction
from pellm_lightning.comm.mesh.stall_detector import StallDetector
from pellm_lightning.comm.relay.client import RelayRoute
from pellm_lightning.comm.sockets import is_unanswered, probe
from pellm_lightning.comm.tls import TLS

__all__ = ["Listener", "Mesh"]

# Ring buffers for what other members send before it can be added: of each, and of all together.
_RING_BYTES = 1 << 20
_RINGS_BYTES = 16 << 20
# How often ``watch`` is called, at least.
_WATCH_S = 0.1
# Timeout of sending a failure notice.
_NOTICE_S = 0.3
# How often a forming mesh polls for members that have connected.
_POLL_S = 0.02


class Mesh:
    """The members of one group, connected pair by pair; each member constructs its own at the same time.

    Of a pair the higher rank dials the lower, or the lower the higher where only this one can be reached from
    other hosts. After an error the mesh is broken, and all its
    connections are closed.

    Args:
        listener: Accepts the connections of the members that dial this one.
        group: Name of the group, its own for each mesh that is ever formed.
        rank: This party's index in ``names``.
        names: Names of the members, the same at each of them.
        addresses: Where each member's listener is reached, "host:port".
        timeout_s: Seconds that a member may be late, at forming and at each collective.
        watch: Called several times a second while this party waits; what it raises breaks the mesh.
        tls: Certificate of this party, and the authority of the others', as the listener's.
        relay: The way to members that cannot be dialed; None if there is none.
        silence_s: Seconds for which what is sent may stay unanswered by the other end's host.

    Raises:
        ValueError: If the arguments do not fit each other.
        PartyLostError: If a member cannot be reached within ``timeout_s``; in a collective, if one is gone or
            later than that.
        MismatchError: In a collective, if a member calls another one, or with another dtype, size or source.

    Example:
        >>> listener = Listener("127.0.0.1", 0, name="a", roster=["a"])
        >>> mesh = Mesh(listener, "round 3", 0, ["a"], [listener.address], timeout_s=60)
        >>> mesh.all_reduce(torch.ones(2))
        >>> listener.close()
    """

    def __init__(
        self,
        listener: Listener,
        group: str,
        rank: int,
        names: Sequence[str],
        addresses: Sequence[str],
        *,
        timeout_s: float,
        watch: Callable[[], None] = lambda: None,
        tls: TLS | None = None,
        relay: RelayRoute | None = None,
        silence_s: float = 30.0,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be positive, in seconds.")
        self.rank = rank
        self.size = len(names)
        self._group = Group(group, rank, tuple(names), tuple(addresses))
        self._timeout_s, self._silence_s = timeout_s, silence_s
        self.relayed: list[str] = []
        """Members with which this one is connected by a relay."""
        self._watch = watch
        self._watched = time.monotonic()
        self._sequence = 0
        self._phase = "forming"
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._links: dict[int, Link] = {}
        self._selector = DefaultSelector()
        self._registered: dict[int, int] = {}
        self._in_use = threading.RLock()
        self._closing = threading.Lock()
        self._aborted = threading.Event()
        with self._guarded():
            self._form(listener, tls, relay)

    # ---- collectives

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a contiguous CPU tensor over the members, in place: the same bits at each of them.

        Member j adds up the j-th of N chunks in the order of the ranks and sends the sum to all, so each
        member sends and receives 2 (N-1)/N of the tensor's bytes (Rabenseifner, 2004: reduce-scatter, then
        all-gather). An error leaves the tensor half reduced.
        """
        data = _bytes(tensor)
        if tensor.dtype == torch.bool:
            raise ValueError("A tensor of bool cannot be summed: convert it to uint8.")
        with self._guarded("all_reduce"):
            bounds = [tensor.numel() * j // self.size for j in range(self.size + 1)]
            chunks = [data[a * tensor.itemsize : b * tensor.itemsize] for a, b in pairwise(bounds)]
            own = tensor.detach().view(-1)[bounds[self.rank] : bounds[self.rank + 1]]
            rings = self._rings(own)
            parts, sums = [], []

            def label(kind: Kind, owner: int) -> Label:
                return self._label(kind, tensor, len(chunks[owner]), whole=len(data))

            for peer, link in self._links.items():
                parts.append(Incoming(label(Kind.PART, self.rank), _bytes(rings[peer])))
                sums.append(Outgoing(label(Kind.SUM, self.rank), chunks[self.rank], ready=0))
                link.outbox += [Outgoing(label(Kind.PART, peer), chunks[peer]), sums[-1]]
                link.inbox += [parts[-1], Incoming(label(Kind.SUM, peer), chunks[peer])]
            self._exchange(Reduction(own, rings, parts, sums).advance)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a contiguous CPU tensor by the one of member ``source``."""
        data = _bytes(tensor)
        if not 0 <= source < self.size:
            raise ValueError(f"source={source} must lie in 0..{self.size - 1}.")
        nothing = memoryview(b"")
        with self._guarded("broadcast"):
            for peer, link in self._links.items():
                # Members that have nothing to send send an empty frame: so one that calls another collective
                # is distinguished from one that is late.
                out, into = (data if rank == source else nothing for rank in (self.rank, peer))
                for_peer, of_peer = (
                    self._label(Kind.BROADCAST, tensor, len(part), whole=len(data), source=source)
                    for part in (out, into)
                )
                link.outbox.append(Outgoing(for_peer, out))
                link.inbox.append(Incoming(of_peer, into))
            self._exchange()

    def all_to_all(self, out: Tensor, tensor: Tensor, out_sizes: list[int], sizes: list[int]) -> None:
        """Send each member its part of ``tensor``, and fill ``out`` by their parts for this one.

        Args:
            out: Flat CPU tensor that receives the parts in the order of the ranks.
            tensor: Flat CPU tensor of the same dtype: the parts for each member, in the order of the ranks.
            out_sizes: Scalars that each member sends to this one.
            sizes: Scalars that this one sends to each member.
        """
        into, data = _cut(out, out_sizes, self.size), _cut(tensor, sizes, self.size)
        if out.dtype != tensor.dtype or out_sizes[self.rank] != sizes[self.rank]:
            raise ValueError(
                f"out is {out.dtype} and expects {out_sizes[self.rank]} scalars of this member itself, tensor"
                f" is {tensor.dtype} and has {sizes[self.rank]}. Give both the same dtype and this member's"
                " own part the same size."
            )
        with self._guarded("all_to_all"):
            into[self.rank][:] = data[self.rank]
            for peer, link in self._links.items():
                link.outbox.append(
                    Outgoing(self._label(Kind.ALL_TO_ALL, tensor, len(data[peer])), data[peer])
                )
                link.inbox.append(Incoming(self._label(Kind.ALL_TO_ALL, out, len(into[peer])), into[peer]))
            self._exchange()

    @property
    def is_intact(self) -> bool:
        """Whether no connection has ended since the last collective: between two nobody sends anything."""
        if self._aborted.is_set():
            return False
        with DefaultSelector() as selector:
            for link in self._links.values():
                selector.register(link.sock, EVENT_READ)
            return not selector.select(0)

    def abort(self) -> None:
        """Close all connections at once; a collective that another thread is in fails."""
        self._aborted.set()
        with self._closing:
            for link in self._links.values():
                # Closing here would free the descriptor that the other thread waits for.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(link.sock, socket.SHUT_RDWR)
        if self._in_use.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._in_use.release()

    # ---- forming

    def _form(self, listener: Listener, tls: TLS | None, relay: RelayRoute | None) -> None:
        """Get one connection to each peer: some are dialed, the others dial."""
        group = self._group
        callees, callers = group.split()
        addresses = {peer: (group.names[peer], group.addresses[peer]) for peer in callees}
        names = {peer: group.names[peer] for peer in callers}
        dialer = Dialer(group.me, group.name, addresses, tls, listener.address, names, relay)
        began = time.monotonic()
        pause = 0.001
        missing: list[int] = []
        try:
            while not self._accept(listener, callers, dialer):
                for peer, sock in dialer.poll(pause):
                    self._link(peer, sock)
                pause = min(2 * pause, _POLL_S)
                missing = [peer for peer in range(self.size) if peer not in {self.rank, *self._links}]
                self._check()
                if time.monotonic() >= began + self._timeout_s:
                    rejected = listener.rejected(began)
                    raise group.absent(missing, self._timeout_s, dialer.failures, rejected)
        except FederationError as error:
            if time.monotonic() >= began + self._timeout_s / 2:
                error.missing = {"missing_parts": group.names_of(missing)}
            raise
        finally:
            dialer.close()
        self.relayed = group.names_of(sorted(dialer.relayed))
        for peer, name in enumerate(group.names):
            if relay is not None and peer != self.rank:
                relay.note(name, relayed=peer in dialer.relayed)

    def _accept(self, listener: Listener, callers: Sequence[int], dialer: Dialer) -> bool:
        """Greet the members that have connected; return whether all members are connected."""
        for peer in callers:
            sock = listener.take(self._group.names[peer], self._group.name)
            if sock is None:
                continue
            try:
                for _ in send_greeting(sock, self._group.me, self._group.name):
                    raise BlockingIOError("a fresh connection has no room for a greeting")
            except OSError:
                sock.close()
            else:
                self._link(peer, sock)
                dialer.connected(peer)
        return len(self._links) == self.size - 1

    def _link(self, peer: int, sock: socket.socket) -> None:
        """Use a connection; a member that connects again has given up its first one."""
        if peer in self._links:
            self._links.pop(peer).sock.close()
        probe(sock, self._silence_s)
        self._links[peer] = Link(sock, peer)

    # ---- exchanging

    def _exchange(self, work: Callable[[], bool] = lambda: False) -> None:
        """Send and receive all messages of the links; ``work`` is called whenever bytes have moved.

        Args:
            work: Processes what has been received; returns whether links can proceed after that.
        """
        stalls = StallDetector(self._timeout_s, self._links.values())
        try:
            self._move(stalls, work)
        except FederationError as error:
            undone = [link for link in self._links.values() if not link.is_done]
            error.missing = {
                kind: self._group.names_of(ranks) for kind, ranks in stalls.missing(undone).items()
            }
            raise

    def _move(self, stalls: StallDetector, work: Callable[[], bool]) -> None:
        undone = turning = list(self._links.values())
        # Before an error can be noticed, all members have been sent what this one does: so each of them can
        # find out for itself who is wrong.
        for link in undone:
            link.push()
        late: list[int] = []
        while undone:
            moved = {link: count for link in turning if (count := self._turn(link))}
            stalls.moved(moved)
            may_proceed = work()
            undone = [link for link in undone if not link.is_done]
            self._check()
            if may_proceed:
                turning = undone
                continue
            # Whoever is late may have failed for a third member's sake: then its notice is read first.
            was_late, late = bool(late), stalls.stalled(undone, time.monotonic())
            if late and was_late:
                raise self._group.late(late, self._timeout_s, self._here)
            ready = self._ready({link: link.events for link in undone}, 0.0 if moved else _WATCH_S)
            turning = list({*ready, *(link for link in undone if link.is_hot)})

    def _turn(self, link: Link) -> int:
        try:
            return link.turn()
        except PeerDisconnectedError as error:
            raise self._group.gone(link.rank, str(error), self._here) from error
        except UnexpectedFrameError as error:
            expected = link.inbox[0].label
            raise self._group.unexpected(
                link.rank, error.label, error.length, expected, self._here
            ) from error

    def _ready(self, events: Mapping[Link, int], timeout_s: float) -> list[Link]:
        """Wait until one of the links can proceed; return those that can."""
        for link in self._links.values():
            self._register(link, events.get(link, 0))
        return [key.data for key, _ in self._selector.select(timeout_s)]

    def _register(self, link: Link, events: int) -> None:
        before = self._registered.get(link.rank, 0)
        if events == before:
            return
        self._registered[link.rank] = events
        if not before:
            self._selector.register(link.sock, events, link)
        elif events:
            self._selector.modify(link.sock, events, link)
        else:
            self._selector.unregister(link.sock)

    def _check(self) -> None:
        """Call ``watch`` when it is due, and notice that another thread has aborted."""
        now = time.monotonic()
        if now - self._watched >= _WATCH_S:
            self._watched = now
            self._watch()
            for link in self._links.values():
                if is_unanswered(link.sock, self._silence_s):
                    why = f"its host has answered nothing for {self._silence_s:g} s"
                    raise self._group.gone(link.rank, why, self._here)
        if self._aborted.is_set():
            raise FederationError("abort() was called")

    def _label(self, kind: Kind, tensor: Tensor, size: int, *, whole: int = 0, source: int = 0) -> Label:
        return Label(kind, DTYPES.index(tensor.dtype), source, self._sequence, whole, size)

    def _rings(self, own: Tensor) -> dict[int, Tensor]:
        """Return ring buffers, of ``own``'s dtype, for what each peer sends to be added to ``own``."""
        peers = max(1, len(self._links))
        most = max(1, min(_RING_BYTES, _RINGS_BYTES // peers) // BLOCK_BYTES)
        size = BLOCK_BYTES * min(most, -(-own.nbytes // BLOCK_BYTES))
        if self._scratch.numel() < size * peers:
            self._scratch = torch.empty(size * peers, dtype=torch.uint8)
        rings = (self._scratch[i * size : (i + 1) * size] for i in range(len(self._links)))
        return {peer: ring.view(own.dtype) for peer, ring in zip(self._links, rings, strict=True)}

    # ---- errors

    @contextlib.contextmanager
    def _guarded(self, phase: str = "forming") -> Iterator[None]:
        """Run one collective at a time; after an error send the others a failure notice, and disconnect."""
        with self._in_use:
            if self._aborted.is_set():
                raise FederationError(
                    f"The mesh of group {self._group.name} is broken. Form a new one, of a new group."
                )
            self._phase = phase
            self._sequence += 1
            try:
                yield
            except BaseException as error:
                if self._aborted.is_set():
                    self._close()
                    raise FederationError(
                        f"abort() was called while {self._here}. Form a new mesh, of a new group."
                    ) from error
                if isinstance(error, FederationError):
                    self._send_notice(error)
                self._close()
                raise

    @property
    def _here(self) -> str:
        number = "" if self._phase == "forming" else f" number {self._sequence}"
        return f"{self._group.me} was in {self._phase}{number} of group {self._group.name}"

    def _send_notice(self, error: FederationError) -> None:
        """Tell the others which members failed, so that all blame the same and not this party."""
        blamed, label = self._group.failure_notice(error, self._sequence)
        if not blamed:
            return
        for link in self._links.values():
            link.send_last(label)
        scrap = bytearray(BLOCK_BYTES)
        deadline = time.monotonic() + _NOTICE_S
        left = list(self._links.values())
        while left and time.monotonic() < deadline:
            left = [
                link for link in left if not link.drain(scrap) and (link.rank not in blamed or link.outbox)
            ]
            self._ready({link: EVENT_READ | (EVENT_WRITE if link.outbox else 0) for link in left}, 0.05)

    def _close(self) -> None:
        with self._closing:
            self._aborted.set()
            for link in self._links.values():
                link.sock.close()
            self._links.clear()
        self._selector.close()
        self._registered.clear()
        self._scratch = torch.empty(0, dtype=torch.uint8)


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as it is, bytes in this machine's order.

    Raises:
        ValueError: If it is no such tensor, or of a dtype that cannot be sent.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype not in DTYPES:
        raise ValueError(
            f"A {tensor.dtype} tensor on {tensor.device} of strides {tensor.stride()} cannot be sent as it"
            " is: give a contiguous one on the CPU, of a usual dtype."
        )
    flat: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _cut(tensor: Tensor, sizes: Sequence[int], members: int) -> list[memoryview]:
    """Return the memory of each member's part of a flat tensor."""
    if len(sizes) != members or min(sizes) < 0 or sum(sizes) != tensor.numel():
        raise ValueError(
            f"sizes={list(sizes)} must be {members} numbers of scalars, one per member, and add up to the"
            f" {tensor.numel()} of the tensor."
        )
    data, ends = _bytes(tensor), list(accumulate(sizes, initial=0))
    return [data[a * tensor.itemsize : b * tensor.itemsize] for a, b in pairwise(ends)]
