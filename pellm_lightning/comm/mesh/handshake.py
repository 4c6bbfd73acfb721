"""How two members meet: addresses, and the greeting that opens a connection.

A conversation that takes several turns (a handshake, a greeting) is a generator: it yields what it waits for,
so many can go on side by side, and whoever drives them decides how long one may take.
"""

import json
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector
from typing import Generic, TypeVar

from pellm_lightning.comm.tls import peer_name

T = TypeVar("T")
HandshakeSteps = Generator[tuple[int, int], None, T]
"""A conversation: yields a descriptor and the event there that it must wait for; returns its result."""

_GREETING = struct.Struct("!4sBH")
_GREETING_MAGIC, _VERSION = b"PeLH", 1
GREETING_BYTES = 4096
"""No greeting is longer: room for 256 characters of a group's name, even if each is escaped."""


class BadPeerError(Exception):
    """The other end is not who or what it must be; the connection is worth nothing."""


# ---- addresses and sockets


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[::1]:port".

    Raises:
        ValueError: If it is neither.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is no address: give host:port, or [host]:port for IPv6.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """Return "host:port", with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def prepare(sock: socket.socket) -> None:
    """Set what every connection between members needs."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


# ---- conversations


def secure(sock: socket.socket, context: ssl.SSLContext | None) -> HandshakeSteps[socket.socket]:
    """Shake hands if there is a context; return the socket to go on with, which owns the descriptor."""
    if context is None:
        return sock
    server_side = context.protocol == ssl.PROTOCOL_TLS_SERVER
    wrapped = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
    try:
        yield from _turns(wrapped, wrapped.do_handshake)
    except BaseException:
        wrapped.close()
        raise
    return wrapped


def greet(sock: socket.socket, name: str, group: str) -> HandshakeSteps[None]:
    """Say who we are, and which group this connection is for."""
    words = json.dumps({"from": name, "group": group}).encode()
    left = _GREETING.pack(_GREETING_MAGIC, _VERSION, len(words)) + words
    while left:
        sent = yield from _turns(sock, partial(sock.send, left))
        left = left[sent:]


def greeting(sock: socket.socket) -> HandshakeSteps[tuple[str, str]]:
    """Read who is at the other end, and for which group; with TLS the certificate must say the same.

    Raises:
        BadPeerError: If it says something else than a greeting, or greets by another's name.
    """
    magic, version, length = _GREETING.unpack((yield from _exactly(sock, _GREETING.size)))
    if magic != _GREETING_MAGIC or version != _VERSION or length > GREETING_BYTES:
        raise BadPeerError("it does not speak as members do")
    words = yield from _exactly(sock, length)
    try:
        fields = json.loads(words)
        name, group = fields["from"], fields["group"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadPeerError("it does not speak as members do") from error
    if not isinstance(name, str) or not isinstance(group, str):
        raise BadPeerError("it does not speak as members do")
    if isinstance(sock, ssl.SSLSocket) and peer_name(sock) != name:
        raise BadPeerError(f"it calls itself {name!r}, but its certificate says {peer_name(sock)!r}")
    return name, group


def _exactly(sock: socket.socket, size: int) -> HandshakeSteps[bytes]:
    got = b""
    while len(got) < size:
        piece = yield from _turns(sock, partial(sock.recv, size - len(got)))
        if not piece:
            raise BadPeerError("it hung up")
        got += piece
    return got


def _turns(sock: socket.socket, act: Callable[[], T]) -> HandshakeSteps[T]:
    while True:
        try:
            return act()
        except ssl.SSLWantReadError:
            yield sock.fileno(), EVENT_READ
        except ssl.SSLWantWriteError:
            yield sock.fileno(), EVENT_WRITE
        except BlockingIOError:
            # A greeting always finds room in a fresh connection, so what has to wait is a read.
            yield sock.fileno(), EVENT_READ


@dataclass(eq=False)
class PeerHandshake(Generic[T]):
    """One conversation under way."""

    turns: HandshakeSteps[T]
    deadline: float
    host: str
    descriptor: int = -1
    events: int = 0


class PeerHandshakes(Generic[T]):
    """Conversations that go on side by side, none of which can hold up another.

    Args:
        selector: What their sockets are registered with, each with its ``PeerHandshake`` as data.
    """

    def __init__(self, selector: BaseSelector) -> None:
        self._selector = selector
        self._under_way: dict[PeerHandshake[T], None] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, turns: HandshakeSteps[T], seconds: float, host: str = "") -> PeerHandshake[T]:
        """Start a conversation with a host that may take so long; ``go_on`` makes its first turn."""
        talk = PeerHandshake(turns, time.monotonic() + seconds, host)
        self._under_way[talk] = None
        return talk

    def go_on(self, talk: PeerHandshake[T]) -> T | None:
        """Let it take its next turn; return its result, or None if it is to be continued.

        Raises:
            OSError, BadPeerError: If it came to a bad end.
        """
        try:
            descriptor, events = next(talk.turns)
        except StopIteration as stop:
            self._forget(talk)
            result: T = stop.value
            return result
        except BaseException:
            self._forget(talk)
            raise
        if descriptor != talk.descriptor:
            talk.descriptor, talk.events = descriptor, events
            self._selector.register(descriptor, events, talk)
        elif events != talk.events:
            talk.events = events
            self._selector.modify(descriptor, events, talk)
        return None

    def end(self, talk: PeerHandshake[T]) -> None:
        """Break it off."""
        self._forget(talk)
        talk.turns.close()

    def seconds_left(self) -> float | None:
        """Return how long until the first is overdue, None if there is none."""
        deadlines = [talk.deadline for talk in self._under_way]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def overdue(self) -> list[PeerHandshake[T]]:
        """Return those whose time is over."""
        now = time.monotonic()
        return [talk for talk in self._under_way if talk.deadline <= now]

    def most_dispensable(self) -> PeerHandshake[T]:
        """Return the one that was begun first with the host that has the most: a crowd crowds out itself."""
        crowd = Counter(talk.host for talk in self._under_way).most_common(1)[0][0]
        return next(talk for talk in self._under_way if talk.host == crowd)

    def end_all(self) -> None:
        """Break all off."""
        for talk in list(self._under_way):
            self.end(talk)

    def _forget(self, talk: PeerHandshake[T]) -> None:
        self._under_way.pop(talk, None)
        if talk.descriptor >= 0:
            self._selector.unregister(talk.descriptor)
            talk.descriptor = -1
