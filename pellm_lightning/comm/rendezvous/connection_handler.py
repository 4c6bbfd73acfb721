"""Connection handler of the rendezvous: who is admitted, answers to requests, timeouts and limits."""

import asyncio
import contextlib
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from pellm_lightning.comm.relay.server import Relay, asks_for_relay
from pellm_lightning.comm.rendezvous.frames import (
    DONE,
    FULL,
    HELLO,
    LENGTH_BYTES,
    REFUSED,
    FrameError,
    Op,
    length,
    pack,
    unpack,
)
from pellm_lightning.comm.rendezvous.key_value_store import FullError, KeyValueStore, RefusedError, awaited
from pellm_lightning.comm.sockets import configure, oldest_of_largest_host
from pellm_lightning.comm.tls import REVOKED, is_revoked, peer_name

log = logging.getLogger(__name__)

# Both, and what else is open, fit into the 1024 descriptors that a process usually may have. The 128 parties
# that a round can have take three each.
MAX_CONNECTIONS = 512
MAX_UNAUTHENTICATED = 256
# A party has two or three; more are left over from a host that went down.
MAX_CONNECTIONS_PER_NAME = 8
# Timeout of a handshake; long enough for a slow link.
_HELLO_S = 5.0
# The rest of a frame follows its first byte, and an answer is read, at the speed of the link.
_FRAME_S = 10.0
# The longest that a request waits for a change.
_MAX_AWAIT_S = 30.0
# Larger frames are read and sent one at a time per session, so that the number of sessions bounds memory.
_LARGE_BYTES = 64 << 10
_LOG_REJECTED_S = 10.0
_OWNER = re.compile(rb"(?:^|/)@([\w.-]{1,64})(?:/|$)")

# What a connection raises that breaks, sends garbage or is too late.
_BROKEN = (OSError, EOFError, FrameError)


@dataclass(eq=False)
class _Session:
    """Client of the rendezvous: a party by its certificate, or without TLS all connections from one host."""

    name: str | None
    label: str
    connections: "list[_Connection]" = field(default_factory=list)
    large: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(eq=False)
class _Connection:
    """One connection, accepted and, with TLS, encrypted."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    received_at: float = field(default_factory=time.monotonic)
    party: str | None = None
    """The party that its keys name, where no certificate does."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when what its request waits for has changed, or it was cut."""

    def cut(self) -> None:
        """Close at once; what waits for this connection gets an error of ``_BROKEN``."""
        self.writer.transport.abort()
        self.changed.set()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Cut the connection unless the block ends in time."""
        timer = asyncio.get_running_loop().call_later(seconds, self.cut)
        try:
            yield
        finally:
            timer.cancel()


class ConnectionHandler:
    """Serves one ``KeyValueStore`` to all admitted connections.

    Args:
        roster: Names that are admitted, with TLS.
        context: Settings of TLS; None admits everybody.
        relay: What joins two parties that ask for each other on the same port; None if nothing does.
    """

    def __init__(
        self, roster: frozenset[str], context: ssl.SSLContext | None, relay: Relay | None = None
    ) -> None:
        self._roster = roster
        self._context = context
        self._relay = relay
        self._store = KeyValueStore(len(roster))
        self._sessions: dict[str, _Session] = {}
        self._unauthenticated: dict[asyncio.Task[None], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_rejected = 0
        self._logged_at = -_LOG_REJECTED_S
        self._closing = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def run(self, listener: socket.socket) -> None:
        """Serve connections to ``listener`` until ``close()``; then close it."""
        with listener:
            asyncio.run(self._serve(listener))

    def close(self) -> None:
        """Make ``run`` return soon; from any thread, at any time."""
        self._closing.set()
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has returned already
                self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self, listener: socket.socket) -> None:
        stop = self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._closing.is_set():  # close() came before there was a loop to tell
            return
        stopping = asyncio.create_task(stop.wait())
        accepting = asyncio.create_task(self._accept(listener))
        await asyncio.wait({stopping, accepting}, return_when=asyncio.FIRST_COMPLETED)
        ended = [stopping, accepting, *self._tasks]
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
        if accepting.done() and not accepting.cancelled():
            accepting.result()  # it never returns, so this raises why it stopped

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left, or the client has disconnected
                log.warning("the rendezvous could not accept a connection: %s", error)
                await asyncio.sleep(0.5)
                continue
            self._limit_unauthenticated()
            task = asyncio.create_task(self._handle(sock, address[0]))
            self._unauthenticated[task] = address[0]
            self._tasks.add(task)
            task.add_done_callback(partial(self._forget, sock))
            await asyncio.sleep(0)  # others' turn, even while a thousand connect

    def _forget(self, sock: socket.socket, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        sock.close()  # a task that was cancelled before it began has not

    def _limit_unauthenticated(self) -> None:
        """Drop the oldest of the host that has most, so that one host cannot crowd out the others."""
        if len(self._unauthenticated) >= MAX_UNAUTHENTICATED:
            oldest = oldest_of_largest_host(self._unauthenticated)
            del self._unauthenticated[oldest]
            oldest.cancel()

    async def _handle(self, sock: socket.socket, host: str) -> None:
        """Admit a connection or reject it, and answer its requests until it ends."""
        connection = None
        try:
            until = time.monotonic() + _HELLO_S
            if self._relay is not None and await self._has_relayed(self._relay, sock):
                return
            connection = await self._connected(sock)
            with connection.within(until - time.monotonic()):
                session = await self._authenticate(connection, host)
            del self._unauthenticated[_me()]
            self._register(session, connection)
            try:
                await self._serve_requests(session, connection)
            finally:
                self._unregister(session, connection)
        except _BROKEN as error:
            if self._unauthenticated.pop(_me(), None):
                self._log_rejected(host, error)
        finally:
            self._unauthenticated.pop(_me(), None)
            if connection is not None:
                connection.cut()

    async def _has_relayed(self, relay: Relay, sock: socket.socket) -> bool:
        """Relay a connection to its end, if it asks for that."""
        configure(sock)
        try:
            if not await asyncio.wait_for(asks_for_relay(sock), _HELLO_S):
                return False
            end = await asyncio.wait_for(relay.admit(sock), _HELLO_S)
        except asyncio.TimeoutError as error:
            raise EOFError("it was silent") from error
        del self._unauthenticated[_me()]
        await relay.carry(end)
        return True

    async def _connected(self, sock: socket.socket) -> _Connection:
        """Return the connection over an accepted socket, encrypted if that is asked for."""
        configure(sock)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop),
            sock,
            ssl=self._context,
            ssl_handshake_timeout=None if self._context is None else _HELLO_S,
        )
        return _Connection(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    async def _authenticate(self, connection: _Connection, host: str) -> _Session:
        """Return the session of a connection; one that is not on the roster gets no answer."""
        name, label = None, host
        if self._context is not None:
            name = peer_name(connection.writer.get_extra_info("ssl_object"))
            if name not in self._roster:
                raise FrameError(f"a certificate named {name!r}, which is not on the roster")
            label = str(name)
        hello = await connection.reader.readexactly(len(HELLO))
        if hello[:-2] != HELLO[:-2]:
            raise FrameError("no hello of this protocol")
        # The other end finds the version in it, also if that is not its own.
        connection.writer.write(HELLO)
        await connection.writer.drain()
        if hello != HELLO:
            raise FrameError(f"version {int.from_bytes(hello[-2:], 'big')} of this protocol")
        return self._sessions.get(label) or _Session(name, label)

    def _register(self, session: _Session, connection: _Connection) -> None:
        """Add a connection to its session."""
        if session.name is not None:
            _make_room(session.connections, MAX_CONNECTIONS_PER_NAME)
        open_connections = [other for known in self._sessions.values() for other in known.connections]
        _make_room(open_connections, MAX_CONNECTIONS)
        if not session.connections and session.name is not None:
            log.info("[%s] connected", session.label)
        session.connections.append(connection)
        self._sessions[session.label] = session

    def _unregister(self, session: _Session, connection: _Connection) -> None:
        session.connections.remove(connection)
        if not session.connections:
            del self._sessions[session.label]
        party, others = session.name or connection.party, session.connections
        if party is not None and not any(session.name or other.party == party for other in others):
            log.info("[%s] disconnected", party)

    async def _serve_requests(self, session: _Session, connection: _Connection) -> None:
        """Answer one request after the other; no local variable holds one while the next is waited for."""
        while True:
            await _send(
                session,
                connection,
                *await self._answer(session, connection, await _body(session, connection)),
            )
            await asyncio.sleep(0)  # others' turn, even if the next request is here already

    async def _answer(
        self, session: _Session, connection: _Connection, body: bytes
    ) -> tuple[int, list[bytes | None]]:
        op, fields = unpack(body)
        try:
            if op == Op.AWAIT:
                await self._await_change(connection, fields)
            if self._context is not None and is_revoked(connection.writer.get_extra_info("ssl_object")):
                raise ConnectionResetError(REVOKED)
            if connection.writer.is_closing():
                # What was buffered before the cut will be sent again: an addition must not count twice.
                raise ConnectionResetError("the connection was cut")
            if op == Op.TICKET:
                return DONE, self._ticket(fields, session.name)
            answer = self._store.answer(op, fields, session.name)
            if session.name is None and connection.party is None:
                self._note_party(session, connection, op, fields)
            return DONE, answer
        except FullError as error:
            return FULL, [str(error).encode()]
        except RefusedError as error:
            return REFUSED, [str(error).encode()]

    def _ticket(self, fields: list[bytes | None], name: str | None) -> list[bytes | None]:
        """Return a ticket for the relay and its key; without certificates for whoever it says it is."""
        if len(fields) != 1 or not fields[0]:
            raise FrameError("no request for a ticket")
        if self._relay is None:
            raise RefusedError("it relays nothing. Start it with --relay, or let one of the two listen")
        ticket = self._relay.ticket(name or fields[0].decode(errors="replace")[:63])
        return [ticket.text, ticket.key]

    async def _await_change(self, connection: _Connection, fields: list[bytes | None]) -> None:
        """Wait until a value is another than the client knows, its time is over, or it was cut."""
        seconds, known = awaited(fields)
        connection.changed.clear()
        with self._store.watching(known, connection.changed.set):
            if self._store.is_as(known) and not connection.writer.is_closing():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(connection.changed.wait(), min(seconds, _MAX_AWAIT_S))

    def _note_party(
        self, session: _Session, connection: _Connection, op: int, fields: list[bytes | None]
    ) -> None:
        """Note which party an unauthenticated connection is of, by the keys that it writes."""
        requests = map(unpack, (field or b"" for field in fields)) if op == Op.TRANSACT else [(op, fields)]
        written = (of_request[0] for op, of_request in requests if op == Op.SET)
        owner = _OWNER.search(next(written, None) or b"")
        if owner:
            party = owner[1].decode()
            if all(other.party != party for other in session.connections):
                log.info("[%s] connected from %s", party, session.label)
            connection.party = party

    def _log_rejected(self, host: str, error: BaseException) -> None:
        """Log rejected connections, but not each one: they must not fill the disk."""
        self._num_rejected += 1
        if time.monotonic() - self._logged_at > _LOG_REJECTED_S:
            log.warning("rejected %d connections, the last from %s: %s", self._num_rejected, host, error)
            self._num_rejected, self._logged_at = 0, time.monotonic()


async def _body(session: _Session, connection: _Connection) -> bytes:
    """Wait for a frame without a timeout, but for its second byte and all others with one."""
    head = await connection.reader.readexactly(1)
    connection.received_at = time.monotonic()
    with connection.within(_FRAME_S):
        size = length(head + await connection.reader.readexactly(LENGTH_BYTES - 1))
    async with session.large if size > _LARGE_BYTES else contextlib.nullcontext():
        with connection.within(_FRAME_S):
            return await connection.reader.readexactly(size)


async def _send(session: _Session, connection: _Connection, tag: int, fields: list[bytes | None]) -> None:
    """Send an answer piece by piece, so that what is not read is noticed and not buffered."""
    size = sum(len(field or b"") for field in fields)
    async with session.large if size > _LARGE_BYTES else contextlib.nullcontext():
        # Only here: until then its fields are the store's own, and cost nothing.
        answer = pack(tag, fields)
        with connection.within(_FRAME_S):
            for at in range(0, len(answer), _LARGE_BYTES):
                connection.writer.write(answer[at : at + _LARGE_BYTES])
                await connection.writer.drain()


def _make_room(connections: Sequence[_Connection], most: int) -> None:
    """Cut the connection that was idle longest if one more would be too many."""
    present = [connection for connection in connections if not connection.writer.is_closing()]
    if len(present) >= most:
        min(present, key=lambda connection: connection.received_at).cut()


def _me() -> "asyncio.Task[None]":
    task: asyncio.Task[None] | None = asyncio.current_task()
    assert task is not None  # only called in tasks
    return task
