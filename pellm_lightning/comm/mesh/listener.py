"""Listener: accepts the other members' connections on one port for the life of the process."""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Collection
from selectors import EVENT_READ, DefaultSelector

from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.mesh.handshake import (
    BadPeerError,
    HandshakeSteps,
    PeerHandshake,
    PeerHandshakes,
    receive_greeting,
    start_tls,
)
from pellm_lightning.comm.sockets import configure, is_loopback, join_address, listening_socket
from pellm_lightning.comm.tls import TLS

log = logging.getLogger(__name__)

# Timeout of a handshake.
_GREETING_S = 5.0
# Handshakes under way at most; each costs a descriptor.
_MAX_UNFINISHED = 256
# Connections accepted at most before the handshakes under way proceed.
_MAX_ACCEPTED = 64
# Groups for which a member may be waiting: it is in one at a time, but may have given up on others.
_MAX_WAITING = 4

AcceptedPeer = tuple[str, str, socket.socket]


class Listener:
    """Accepts the other members' connections; a thread of its own drives all handshakes side by side.

    Others (no certificate, a name that is not in the roster, garbage, silence) are disconnected without an
    answer, and hold up nobody.

    Args:
        host: Interface to listen on, a name or an IPv4 or IPv6 address.
        port: Port to listen on; 0 takes a free one.
        name: This party.
        roster: Names of all parties of the federation.
        tls: Certificate of this party, and the authority of the others'; None listens without encryption, and
            whoever reaches the port can pass for any party.

    Raises:
        FederationError: If the port cannot be bound.

    Example:
        >>> listener = Listener("127.0.0.1", 0, name="a", roster=["a", "b"])
        >>> listener.address.rpartition(":")[0]
        '127.0.0.1'
        >>> listener.close()
    """

    def __init__(
        self, host: str, port: int = 0, *, name: str, roster: Collection[str], tls: TLS | None = None
    ) -> None:
        self._roster = frozenset(roster) - {name}
        self._context = None if tls is None else tls.server_context
        self._server = _listening(host, port)
        bound_host, bound_port = self._server.getsockname()[:2]
        self.address = join_address(bound_host, bound_port)
        """Where it listens, as "host:port"."""
        if tls is None and not is_loopback(bound_host):
            log.warning(
                "[party %s] listens at %s without TLS: whoever reaches it can pass for a party, and nothing"
                " is encrypted. Use TLS, or an address of a private network.",
                name,
                self.address,
            )
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[str, socket.socket]] = {}
        self._rejected = (0.0, "")
        self._closing = threading.Event()
        self._selector = DefaultSelector()
        self._handshakes: PeerHandshakes[AcceptedPeer] = PeerHandshakes(self._selector)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector.register(self._server, EVENT_READ)
        self._selector.register(self._wake_reader, EVENT_READ)
        self._thread = threading.Thread(target=self._listen, name=f"listener of {name}", daemon=True)
        self._thread.start()

    def take(self, peer: str, group: str) -> socket.socket | None:
        """Return a connection on which ``peer`` has asked for ``group``, None if there is none yet."""
        with self._lock:
            return self._waiting.get(peer, {}).pop(group, None)

    def rejected(self, since: float) -> str:
        """Return whose connection was rejected last, and why; empty if not since (``time.monotonic()``)."""
        at, reason = self._rejected
        return reason if at >= since else ""

    def close(self) -> None:
        """Close all connections that were not taken, and free the port."""
        if self._closing.is_set():
            return
        self._wake_writer.send(b"x")  # first, since the thread may see the other at any time, and closes this
        self._closing.set()
        self._thread.join()

    def _listen(self) -> None:
        try:
            while not self._closing.is_set():
                for key, _ in self._selector.select(self._handshakes.seconds_left()):
                    if key.fileobj is self._server:
                        self._accept()
                    elif isinstance(key.data, PeerHandshake):
                        self._advance(key.data)
                for handshake in self._handshakes.overdue():
                    self._handshakes.cancel(handshake)
        finally:
            self._disconnect_all()

    def _accept(self) -> None:
        for _ in range(_MAX_ACCEPTED):
            try:
                sock, address = self._server.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # No descriptor is left, or the peer has disconnected. Retrying at once would burn a core.
                log.warning("a connection could not be accepted: %s", error)
                self._make_room(len(self._handshakes) - 1)
                self._closing.wait(0.05)
                return
            self._make_room(_MAX_UNFINISHED - 1)
            self._advance(self._handshakes.start(_handshake(sock, self._context), _GREETING_S, address[0]))

    def _make_room(self, most: int) -> None:
        while len(self._handshakes) > max(most, 0):
            self._handshakes.cancel_one()

    def _advance(self, handshake: PeerHandshake[AcceptedPeer]) -> None:
        try:
            accepted = self._handshakes.advance(handshake)
        except (OSError, BadPeerError) as error:
            self._reject(handshake.host, str(error))
            return
        if accepted is None:
            return
        peer, group, sock = accepted
        if peer in self._roster:
            self._keep(peer, group, sock)
        else:
            self._reject(handshake.host, f"it calls itself {peer!r}, which is not in the roster")
            sock.close()

    def _reject(self, host: str, why: str) -> None:
        self._rejected = (time.monotonic(), f"{host}: {why}")
        log.debug("rejected the connection of %s", self._rejected[1])

    def _keep(self, peer: str, group: str, sock: socket.socket) -> None:
        with self._lock:
            waiting = self._waiting.setdefault(peer, {})
            left = [waiting.pop(group)] if group in waiting else []
            waiting[group] = sock
            if len(waiting) > _MAX_WAITING:
                left.append(waiting.pop(next(iter(waiting))))
        for other in left:
            other.close()

    def _disconnect_all(self) -> None:
        self._handshakes.cancel_all()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for of_peer in waiting.values():
            for sock in of_peer.values():
                sock.close()
        self._selector.close()
        for own in (self._server, self._wake_reader, self._wake_writer):
            own.close()


def _handshake(sock: socket.socket, context: ssl.SSLContext | None) -> HandshakeSteps[AcceptedPeer]:
    """Return the name and the group of a peer that has connected."""
    try:
        sock.setblocking(False)
        configure(sock)
        sock = yield from start_tls(sock, context)
        name, group = yield from receive_greeting(sock)
    except BaseException:
        sock.close()
        raise
    return name, group, sock


def _listening(host: str, port: int) -> socket.socket:
    try:
        return listening_socket(host, port, _MAX_UNFINISHED)
    except (OSError, OverflowError, UnicodeError) as error:
        raise FederationError(
            f"This party cannot listen on {join_address(host, port)} for the others: {error}. Give an address"
            " of this host, and a port that no other process uses, or 0 for any."
        ) from error
