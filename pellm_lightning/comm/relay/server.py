"""Relay on the port of a rendezvous: admits parties by ticket, joins them in pairs, passes their bytes."""

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TypeAlias

from pellm_lightning.comm.relay.frames import (
    ADMITTED,
    CHALLENGE_BYTES,
    HELLO,
    JOINED,
    MAX_REQUEST_BYTES,
    Ticket,
    proof,
    requested,
)
from pellm_lightning.comm.rendezvous.frames import LENGTH_BYTES, FrameError, length
from pellm_lightning.comm.sockets import is_unanswered, probe

log = logging.getLogger(__name__)

# A ticket is for the connections of the moment; what was admitted stays.
_TICKET_S = 60
# A peer that is about to come forms the same connections; one that waits in vain asks again.
_WAIT_S = 30.0
# Held for each connection, and by the system on both sides: what a slow receiver has not read.
_BUFFER_BYTES = 128 << 10
# A connection whose bytes nobody acknowledges for so long is dead.
_SILENCE_S = 20.0
MAX_PARTIES = 128
"""As many as a round can have; without a roster, which is on one host, anything calls itself a party."""

_Room: TypeAlias = tuple[frozenset[str], bytes]


@dataclass(frozen=True)
class RelayQuotas:
    """Limits of what one party can use of a relay.

    Args:
        connections: Connections at most; one more closes the party's oldest. It has one to each other party.
        bytes_per_s: What it can send, over all its connections; None sets no limit.
        idle_s: Seconds without a byte after which a pair is disconnected. It then connects again, at the next
            round.

    Raises:
        ValueError: If one is not positive.

    Example:
        >>> RelayQuotas(connections=8, bytes_per_s=1e7).idle_s
        3600
    """

    connections: int = 64
    bytes_per_s: float | None = None
    idle_s: float = 3600

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} of the relay's quotas must be positive.")


@dataclass(eq=False)
class _End:
    """Connection of an admitted party, which waits for its peer or is joined with it."""

    sock: socket.socket
    name: str
    room: _Room
    peer: "asyncio.Future[_End]"
    """The end that it is joined with."""
    moved_at: float = field(default_factory=time.monotonic)
    bytes_sent: int = 0
    has_sent: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nothing more is passed on of what it sends."""

    def end(self) -> None:
        """End its connection; whoever reads or writes there notices, and closes it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Relay:
    """Joins connections of two parties that ask for each other, and passes bytes, which it cannot read.

    It learns who is connected with whom, and how many bytes go when. It holds one buffer per connection, and
    reads nothing that the other end has no room for.

    Args:
        roster: Names of the parties; empty admits whatever name a ticket was given to.
        quotas: What one party can use.

    Example:
        >>> relay = Relay(frozenset({"a", "b"}), RelayQuotas())
        >>> relay.ticket("a").text.split()[1]
        b'a'
    """

    def __init__(self, roster: frozenset[str], quotas: RelayQuotas) -> None:
        self._roster, self._quotas = roster, quotas
        self._secret = secrets.token_bytes(32)
        self._waiting: dict[_Room, _End] = {}
        self._ends: dict[str, list[_End]] = {}
        self._free_at: dict[str, float] = {}

    def ticket(self, name: str) -> Ticket:
        """Return a ticket for a party that has proved its name."""
        text = f"{time.monotonic() + _TICKET_S:.0f} {name}".encode()
        return Ticket(text, self._key(text))

    async def admit(self, sock: socket.socket) -> _End:
        """Return the admitted end of an accepted connection; its caller sets the timeout.

        Raises:
            FrameError: If what is sent is no request, or no party may make it.
            OSError, EOFError: If the connection breaks.
        """
        loop, challenge = asyncio.get_running_loop(), secrets.token_bytes(CHALLENGE_BYTES)
        if await _exactly(sock, len(HELLO)) != HELLO:
            raise FrameError("no hello of this version to the relay")
        await loop.sock_sendall(sock, HELLO + challenge)
        size = length(await _exactly(sock, LENGTH_BYTES))
        if size > MAX_REQUEST_BYTES:
            raise FrameError(f"a request of {size} bytes to the relay")
        ticket, peer, room, answer = requested(await _exactly(sock, size))
        name, other = self._checked(ticket), peer.decode(errors="replace")
        if not hmac.compare_digest(answer, proof(self._key(ticket), challenge, peer, room)):
            raise FrameError(f"no proof of the ticket of {name!r}")
        if name not in self._ends and len(self._ends) >= MAX_PARTIES:
            raise FrameError("a party too many")
        if name == other or (self._roster and not {name, other} <= self._roster):
            raise FrameError(f"a request of {name!r} for {other!r}, which are no two parties of the roster")
        await loop.sock_sendall(sock, ADMITTED)
        return _End(sock, name, (frozenset((name, other)), room), loop.create_future())

    async def carry(self, end: _End) -> None:
        """Join an end with its peer, and pass on what it sends, until the connection of either has ended."""
        self._make_room(end)
        try:
            async with self._met(end) as peer:
                await self._pass_on(end, peer)
        finally:
            end.has_sent.set()
            self._ends[end.name].remove(end)
            if not self._ends[end.name]:
                del self._ends[end.name]

    def _key(self, ticket: bytes) -> bytes:
        return hmac.digest(self._secret, ticket, "sha256")

    def _checked(self, ticket: bytes) -> str:
        """Return for whom a ticket was made; whether it is genuine shows the proof."""
        until, _, name = ticket.partition(b" ")
        if not until.isdigit() or len(until) > 15 or int(until) < time.monotonic():
            raise FrameError("a ticket that is none, or out of date")
        return name.decode(errors="replace")

    def _make_room(self, end: _End) -> None:
        """Add a connection to its party's, and end the oldest of too many."""
        ends = self._ends.setdefault(end.name, [])
        ends.append(end)
        for oldest in ends[: -self._quotas.connections]:
            oldest.end()

    @contextlib.asynccontextmanager
    async def _met(self, end: _End) -> AsyncIterator[_End]:
        """Lend the peer of an end; afterwards both are at an end.

        Raises:
            FrameError, OSError: If the peer does not come.
        """
        other = self._waiting.pop(end.room, None)
        if other is not None and other.name == end.name:  # the party asks again: it has given up the first
            other.end()
            other = None
        if other is None or other.peer.done():
            peer = await self._awaited(end)
        else:
            peer = other
            self._join(end, other)
        try:
            yield peer
        except BaseException:
            end.end()
            peer.end()
            raise
        finally:
            end.has_sent.set()
            await peer.has_sent.wait()  # until then it writes to this connection

    def _join(self, end: _End, other: _End) -> None:
        for each in (end, other):  # before a byte of the other
            each.sock.send(JOINED)
            probe(each.sock, _SILENCE_S)
        end.peer.set_result(other)
        other.peer.set_result(end)
        log.info("relays between %s and %s", *sorted((end.name, other.name)))
        self._watch(end, other)

    async def _awaited(self, end: _End) -> _End:
        """Wait until the peer comes; the party must be silent meanwhile."""

        def leave() -> None:
            if not end.peer.done():
                end.peer.set_exception(ConnectionResetError(f"{end.name} has left while it waited"))

        loop = asyncio.get_running_loop()
        self._waiting[end.room] = end
        loop.add_reader(end.sock, leave)
        timer = loop.call_later(_WAIT_S, end.end)
        try:
            return await end.peer
        finally:
            timer.cancel()
            loop.remove_reader(end.sock)
            if self._waiting.get(end.room) is end:
                del self._waiting[end.room]

    def _watch(self, end: _End, other: _End) -> None:
        """End a pair that sends nothing for too long, or of which one has gone without a word."""
        if end.has_sent.is_set() and other.has_sent.is_set():
            sent = (end.name, end.bytes_sent, other.name, other.bytes_sent)
            log.info("relays no more: %s has sent %d bytes, %s %d", *sent)
            return
        idle_s = time.monotonic() - max(end.moved_at, other.moved_at)
        if idle_s >= self._quotas.idle_s or any(is_unanswered(e.sock, _SILENCE_S) for e in (end, other)):
            end.end()
            other.end()
        asyncio.get_running_loop().call_later(min(1.0, self._quotas.idle_s / 4), self._watch, end, other)

    async def _pass_on(self, end: _End, peer: _End) -> None:
        loop, buffer = asyncio.get_running_loop(), memoryview(bytearray(_BUFFER_BYTES))
        while count := await loop.sock_recv_into(end.sock, buffer):
            await loop.sock_sendall(peer.sock, buffer[:count])
            end.moved_at, end.bytes_sent = time.monotonic(), end.bytes_sent + count
            await asyncio.sleep(self._pause_s(end.name, count))  # others' turn, also without a quota
        peer.sock.shutdown(socket.SHUT_WR)

    def _pause_s(self, name: str, count: int) -> float:
        """Return for how long a party that has sent so many bytes must wait."""
        if self._quotas.bytes_per_s is None:
            return 0.0
        now = time.monotonic()
        free_at = max(self._free_at.get(name, now), now) + count / self._quotas.bytes_per_s
        self._free_at[name] = free_at
        return free_at - now


async def asks_for_relay(sock: socket.socket) -> bool:
    """Tell by its first byte, which stays to be read, whether a connection is for the relay."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def note() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(sock, note)
    try:
        await readable
    finally:
        loop.remove_reader(sock)
    return sock.recv(1, socket.MSG_PEEK) == HELLO[:1]


async def _exactly(sock: socket.socket, size: int) -> bytes:
    loop, got = asyncio.get_running_loop(), b""
    while len(got) < size:
        piece = await loop.sock_recv(sock, size - len(got))
        if not piece:
            raise EOFError("it closed the connection")
        got += piece
    return got
