"""The rendezvous' inner life: who comes in, what they ask, and when they are shown out."""

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from pellm_lightning.comm.rendezvous.frames import (
    DONE,
    HELLO,
    LENGTH_BYTES,
    REFUSED,
    FrameError,
    length,
    pack,
    unpack,
)
from pellm_lightning.comm.rendezvous.key_value_store import KeyValueStore, RefusedError
from pellm_lightning.comm.tls import peer_name

log = logging.getLogger(__name__)

# Both, and what else is open, fit into the 1024 descriptors that a process usually may have. The 128 parties
# that a round can have take three each.
MAX_CONNECTIONS = 512
MAX_STRANGERS = 256
# A party has two or three; more are left over from a host that vanished.
MAX_CONNECTIONS_PER_NAME = 8
# Long enough for a handshake over a slow line; a stranger needs no more.
_HELLO_S = 5.0
# The rest of a frame follows its first byte, and an answer is taken, at the speed of the line.
_FRAME_S = 10.0
# Larger frames are read and sent one at a time per guest, so that memory is bounded by the number of guests.
_LARGE_BYTES = 64 << 10
_LOG_STRANGERS_S = 10.0

# What a connection raises that breaks, lies or is too late.
_BROKEN = (OSError, EOFError, FrameError)


@dataclass(eq=False)
class _Session:
    """Who asks: a party by its certificate, or without TLS whoever connects from one host."""

    name: str | None
    label: str
    connections: "list[_Connection]" = field(default_factory=list)
    large: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(eq=False)
class _Connection:
    """One connection, accepted and, with TLS, encrypted."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    heard_at: float = field(default_factory=time.monotonic)

    def cut(self) -> None:
        """Close at once; whoever waits for this connection gets an error of ``_BROKEN``."""
        self.writer.transport.abort()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Cut the connection unless the block ends in time."""
        timer = asyncio.get_running_loop().call_later(seconds, self.cut)
        try:
            yield
        finally:
            timer.cancel()


class ConnectionHandler:
    """Serves one ``KeyValueStore`` to whoever may come in.

    Args:
        roster: Names that may come in, with TLS.
        context: Settings of TLS; None to let everybody in.
    """

    def __init__(self, roster: frozenset[str], context: ssl.SSLContext | None) -> None:
        self._roster = roster
        self._context = context
        self._table = KeyValueStore()
        self._guests: dict[str, _Session] = {}
        self._strangers: dict[asyncio.Task[None], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turned_away = 0
        self._logged_at = -_LOG_STRANGERS_S
        self._closing = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def run(self, listener: socket.socket) -> None:
        """Serve who comes to ``listener`` until ``close()``; then close that, too."""
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
            accepting.result()  # it never returns, so this raises why it could not go on

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left, or the caller has gone again
                log.warning("the rendezvous could not accept a connection: %s", error)
                await asyncio.sleep(0.5)
                continue
            self._make_room_for_a_stranger()
            task = asyncio.create_task(self._meet(sock, address[0]))
            self._strangers[task] = address[0]
            self._tasks.add(task)
            task.add_done_callback(partial(self._forget, sock))
            await asyncio.sleep(0)  # others' turn, even while a thousand knock

    def _forget(self, sock: socket.socket, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        sock.close()  # a task that was cancelled before it began has not

    def _make_room_for_a_stranger(self) -> None:
        """Show out the one who has waited longest, of the host with the most: it crowds out itself first."""
        if len(self._strangers) >= MAX_STRANGERS:
            crowd = Counter(self._strangers.values()).most_common(1)[0][0]
            oldest = next(task for task, host in self._strangers.items() if host == crowd)
            del self._strangers[oldest]
            oldest.cancel()

    async def _meet(self, sock: socket.socket, host: str) -> None:
        """Let somebody in, or not, and attend to them until they go."""
        connection = None
        try:
            until = time.monotonic() + _HELLO_S
            connection = await self._connected(sock)
            with connection.within(until - time.monotonic()):
                guest = await self._greeted(connection, host)
            del self._strangers[_me()]
            self._seat(guest, connection)
            try:
                await self._attend(guest, connection)
            finally:
                self._unseat(guest, connection)
        except _BROKEN as error:
            if self._strangers.pop(_me(), None):
                self._count_turned_away(host, error)
        finally:
            self._strangers.pop(_me(), None)
            if connection is not None:
                connection.cut()

    async def _connected(self, sock: socket.socket) -> _Connection:
        """Return the connection over an accepted socket, encrypted if that is asked for."""
        _keep_alive(sock)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop),
            sock,
            ssl=self._context,
            ssl_handshake_timeout=None if self._context is None else _HELLO_S,
        )
        return _Connection(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    async def _greeted(self, connection: _Connection, host: str) -> _Session:
        """Return who is there; whoever is not on the roster gets no answer."""
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
        return self._guests.get(label) or _Session(name, label)

    def _seat(self, guest: _Session, connection: _Connection) -> None:
        """Count a connection among its guest's."""
        if guest.name is not None:
            _make_room(guest.connections, MAX_CONNECTIONS_PER_NAME)
        seated = [other for known in self._guests.values() for other in known.connections]
        _make_room(seated, MAX_CONNECTIONS)
        if not guest.connections:
            log.info("[%s] is here", guest.label)
        guest.connections.append(connection)
        self._guests[guest.label] = guest

    def _unseat(self, guest: _Session, connection: _Connection) -> None:
        guest.connections.remove(connection)
        if not guest.connections:
            del self._guests[guest.label]
            log.info("[%s] is gone", guest.label)

    async def _attend(self, guest: _Session, connection: _Connection) -> None:
        """Answer one request after the other. No local variable holds one while the next is waited for."""
        while True:
            await _send(guest, connection, *self._answered(guest, connection, await _body(guest, connection)))
            await asyncio.sleep(0)  # others' turn, even if the next request is here already

    def _answered(
        self, guest: _Session, connection: _Connection, body: bytes
    ) -> tuple[int, list[bytes | None]]:
        if connection.writer.is_closing():
            # What was buffered before the cut will be asked again: an addition must not count twice.
            raise ConnectionResetError("the connection was cut")
        op, fields = unpack(body)
        try:
            return DONE, self._table.answer(op, fields, guest.name)
        except RefusedError as error:
            return REFUSED, [str(error).encode()]

    def _count_turned_away(self, host: str, error: BaseException) -> None:
        """Log strangers, but not each one: they must not fill the disk."""
        self._turned_away += 1
        if time.monotonic() - self._logged_at > _LOG_STRANGERS_S:
            log.warning("turned away %d, the last from %s: %s", self._turned_away, host, error)
            self._turned_away, self._logged_at = 0, time.monotonic()


async def _body(guest: _Session, connection: _Connection) -> bytes:
    """Wait for a frame as long as it takes, but for its second byte and all others not for long."""
    head = await connection.reader.readexactly(1)
    connection.heard_at = time.monotonic()
    with connection.within(_FRAME_S):
        size = length(head + await connection.reader.readexactly(LENGTH_BYTES - 1))
    async with guest.large if size > _LARGE_BYTES else contextlib.nullcontext():
        with connection.within(_FRAME_S):
            return await connection.reader.readexactly(size)


async def _send(guest: _Session, connection: _Connection, tag: int, fields: list[bytes | None]) -> None:
    """Send an answer piece by piece, so that what is not taken is noticed and not piled up."""
    size = sum(len(field or b"") for field in fields)
    async with guest.large if size > _LARGE_BYTES else contextlib.nullcontext():
        # Only here: until then its fields are the table's own, and cost nothing.
        answer = pack(tag, fields)
        with connection.within(_FRAME_S):
            for at in range(0, len(answer), _LARGE_BYTES):
                connection.writer.write(answer[at : at + _LARGE_BYTES])
                await connection.writer.drain()


def _make_room(connections: Sequence[_Connection], most: int) -> None:
    """Cut the connection that was silent longest if one more would be too many."""
    present = [connection for connection in connections if not connection.writer.is_closing()]
    if len(present) >= most:
        min(present, key=lambda connection: connection.heard_at).cut()


def _keep_alive(sock: socket.socket) -> None:
    """Notice within two minutes that a host has vanished without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _me() -> "asyncio.Task[None]":
    task: asyncio.Task[None] | None = asyncio.current_task()
    assert task is not None  # only called in tasks
    return task
