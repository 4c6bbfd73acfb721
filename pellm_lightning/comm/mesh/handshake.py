"""Handshake of two members: TLS, and the greeting that opens a connection.

A handshake that takes several steps is a generator: it yields what it waits for, so many can proceed side by
side, and whoever drives them sets their timeouts.
"""

import json
import socket
import ssl
import struct
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector
from typing import Generic, TypeVar

from pellm_lightning.comm.sockets import oldest_of_largest_host
from pellm_lightning.comm.tls import peer_name

T = TypeVar("T")
HandshakeSteps = Generator[tuple[int, int], None, T]
"""Steps of a handshake: yields a descriptor and the event there that it must wait for; returns its result."""

_GREETING = struct.Struct("!4sBH")
_GREETING_MAGIC, _VERSION = b"PeLH", 1
GREETING_BYTES = 4096
"""No greeting is longer: room for 256 characters of a group's name, even if each is escaped."""


class BadPeerError(Exception):
    """The other end is not the expected member; the connection must be closed."""


# ---- steps


def start_tls(sock: socket.socket, context: ssl.SSLContext | None) -> HandshakeSteps[socket.socket]:
    """Run the TLS handshake if there is a context; return the socket to continue with."""
    if context is None:
        return sock
    server_side = context.protocol == ssl.PROTOCOL_TLS_SERVER
    wrapped = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
    try:
        yield from _retried(wrapped, wrapped.do_handshake)
    except BaseException:
        wrapped.close()
        raise
    return wrapped


def send_greeting(sock: socket.socket, name: str, group: str) -> HandshakeSteps[None]:
    """Send this party's name, and the group of the connection."""
    message = json.dumps({"from": name, "group": group}).encode()
    yield from send_all(sock, _GREETING.pack(_GREETING_MAGIC, _VERSION, len(message)) + message)


def receive_greeting(sock: socket.socket) -> HandshakeSteps[tuple[str, str]]:
    """Return the other end's name and its group; with TLS the certificate must have the same name.

    Raises:
        BadPeerError: If it sends no greeting, or has another name in its certificate.
    """
    magic, version, length = _GREETING.unpack((yield from receive_exactly(sock, _GREETING.size)))
    if magic != _GREETING_MAGIC or version != _VERSION or length > GREETING_BYTES:
        raise BadPeerError("it sends no greeting of this protocol")
    message = yield from receive_exactly(sock, length)
    try:
        fields = json.loads(message)
        name, group = fields["from"], fields["group"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadPeerError("it sends no greeting of this protocol") from error
    if not isinstance(name, str) or not isinstance(group, str):
        raise BadPeerError("it sends no greeting of this protocol")
    if isinstance(sock, ssl.SSLSocket) and peer_name(sock) != name:
        raise BadPeerError(f"it calls itself {name!r}, but its certificate says {peer_name(sock)!r}")
    return name, group


def send_all(sock: socket.socket, left: bytes) -> HandshakeSteps[None]:
    """Send bytes."""
    while left:
        sent = yield from _retried(sock, partial(sock.send, left))
        left = left[sent:]


def receive_exactly(sock: socket.socket, size: int) -> HandshakeSteps[bytes]:
    """Return so many bytes.

    Raises:
        BadPeerError: If the other end disconnects before.
    """
    got = b""
    while len(got) < size:
        piece = yield from _retried(sock, partial(sock.recv, size - len(got)))
        if not piece:
            raise BadPeerError("it disconnected")
        got += piece
    return got


def _retried(sock: socket.socket, act: Callable[[], T]) -> HandshakeSteps[T]:
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
    """One handshake under way."""

    steps: HandshakeSteps[T]
    deadline: float
    host: str
    descriptor: int = -1
    events: int = 0


class PeerHandshakes(Generic[T]):
    """Handshakes that proceed side by side, none of which can hold up another.

    Args:
        selector: What their sockets are registered with, each with its ``PeerHandshake`` as data.
    """

    def __init__(self, selector: BaseSelector) -> None:
        self._selector = selector
        self._under_way: dict[PeerHandshake[T], None] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def start(self, steps: HandshakeSteps[T], seconds: float, host: str = "") -> PeerHandshake[T]:
        """Start a handshake with a host, with its timeout; ``advance`` makes its first step."""
        handshake = PeerHandshake(steps, time.monotonic() + seconds, host)
        self._under_way[handshake] = None
        return handshake

    def advance(self, handshake: PeerHandshake[T]) -> T | None:
        """Make its next step; return its result, or None if it is not complete.

        Raises:
            OSError, BadPeerError: If it failed.
        """
        try:
            descriptor, events = next(handshake.steps)
        except StopIteration as stop:
            self._forget(handshake)
            result: T = stop.value
            return result
        except BaseException:
            self._forget(handshake)
            raise
        if descriptor != handshake.descriptor:
            handshake.descriptor, handshake.events = descriptor, events
            self._selector.register(descriptor, events, handshake)
        elif events != handshake.events:
            handshake.events = events
            self._selector.modify(descriptor, events, handshake)
        return None

    def cancel(self, handshake: PeerHandshake[T]) -> None:
        """Close it without a result."""
        self._forget(handshake)
        handshake.steps.close()

    def seconds_left(self) -> float | None:
        """Return the time until the first timeout, None if there is no handshake."""
        deadlines = [handshake.deadline for handshake in self._under_way]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def overdue(self) -> list[PeerHandshake[T]]:
        """Return those that have timed out."""
        now = time.monotonic()
        return [handshake for handshake in self._under_way if handshake.deadline <= now]

    def cancel_one(self) -> None:
        """Cancel the oldest with the host that has most, so that one host cannot crowd out the others."""
        self.cancel(oldest_of_largest_host({handshake: handshake.host for handshake in self._under_way}))

    def cancel_all(self) -> None:
        """Cancel all."""
        for handshake in list(self._under_way):
            self.cancel(handshake)

    def _forget(self, handshake: PeerHandshake[T]) -> None:
        self._under_way.pop(handshake, None)
        if handshake.descriptor >= 0:
            self._selector.unregister(handshake.descriptor)
            handshake.descriptor = -1
