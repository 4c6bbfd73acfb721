"""Where the other members of the federation come in: one port for the life of the process."""

import ipaddress
import logging
import os
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
    greeting,
    join_address,
    prepare,
    secure,
)
from pellm_lightning.comm.tls import TLS

log = logging.getLogger(__name__)

# Whoever has not shaken hands and said who it is by then is a stranger.
_GREETING_S = 5.0
# So many may be at it at a time; each costs a descriptor.
_MAX_UNFINISHED = 256
# So many are accepted before those who are at it have their turn.
_MAX_ACCEPTED = 64
# Groups for which a member may be waiting: it is in one at a time, but may have given up on others.
_MAX_WAITING = 4

Guest = tuple[str, str, socket.socket]


class Listener:
    """Accepts the other members' connections; a thread of its own drives all handshakes side by side.

    A stranger (no certificate, a name that is not in the roster, garbage, silence) is hung up on without an
    answer, and holds up nobody.

    Args:
        host: Interface to listen on, a name or an IPv4 or IPv6 address.
        port: Port to listen on; 0 takes a free one.
        name: This party.
        roster: Names of all parties of the federation.
        tls: By which to prove this party's name and to judge the others'; None listens without encryption,
            and anybody who reaches the port may pass for anybody.

    Raises:
        FederationError: If the port cannot be had.
    """

    def __init__(
        self, host: str, port: int = 0, *, name: str, roster: Collection[str], tls: TLS | None = None
    ) -> None:
        self._roster = frozenset(roster) - {name}
        self._context = None if tls is None else tls.server_context
        self._server = _bound(host, port)
        bound_host, bound_port = self._server.getsockname()[:2]
        self.address = join_address(bound_host, bound_port)
        """Where it listens, as "host:port"."""
        if tls is None and not ipaddress.ip_address(bound_host.partition("%")[0]).is_loopback:
            log.warning(
                "[party %s] listens at %s without TLS: whoever reaches it can pass for a party, and nothing"
                " is encrypted. Use TLS, or an address of a private network.",
                name,
                self.address,
            )
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[str, socket.socket]] = {}
        self._rebuffed = (0.0, "")
        self._closing = threading.Event()
        self._selector = DefaultSelector()
        self._talks: PeerHandshakes[Guest] = PeerHandshakes(self._selector)
        self._bell, self._ring = socket.socketpair()
        self._selector.register(self._server, EVENT_READ)
        self._selector.register(self._bell, EVENT_READ)
        self._thread = threading.Thread(target=self._listen, name=f"listener of {name}", daemon=True)
        self._thread.start()

    def take(self, peer: str, group: str) -> socket.socket | None:
        """Return a connection on which ``peer`` has asked for ``group``, None if there is none yet."""
        with self._lock:
            return self._waiting.get(peer, {}).pop(group, None)

    def rebuffed(self, since: float) -> str:
        """Return in words who was hung up on last; empty if nobody was since (``time.monotonic()``)."""
        at, whom = self._rebuffed
        return whom if at >= since else ""

    def close(self) -> None:
        """Hang up on everybody who waits, and free the port."""
        if self._closing.is_set():
            return
        self._ring.send(b"x")  # first, since the thread may see the other at any time, and closes this
        self._closing.set()
        self._thread.join()

    def _listen(self) -> None:
        try:
            while not self._closing.is_set():
                for key, _ in self._selector.select(self._talks.seconds_left()):
                    if key.fileobj is self._server:
                        self._accept()
                    elif isinstance(key.data, PeerHandshake):
                        self._go_on(key.data)
                for talk in self._talks.overdue():
                    self._talks.end(talk)
        finally:
            self._hang_up()

    def _accept(self) -> None:
        for _ in range(_MAX_ACCEPTED):
            try:
                sock, address = self._server.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # No descriptor is left, or the guest has gone again. Trying on at once would burn a core.
                log.warning("a connection could not be accepted: %s", error)
                self._make_room(len(self._talks) - 1)
                self._closing.wait(0.05)
                return
            self._make_room(_MAX_UNFINISHED - 1)
            self._go_on(self._talks.begin(_received(sock, self._context), _GREETING_S, address[0]))

    def _make_room(self, most: int) -> None:
        while len(self._talks) > max(most, 0):
            self._talks.end(self._talks.most_dispensable())

    def _go_on(self, talk: PeerHandshake[Guest]) -> None:
        try:
            guest = self._talks.go_on(talk)
        except (OSError, BadPeerError) as error:
            self._rebuff(talk.host, str(error))
            return
        if guest is None:
            return
        peer, group, sock = guest
        if peer in self._roster:
            self._admit(peer, group, sock)
        else:
            self._rebuff(talk.host, f"it calls itself {peer!r}, which is not in the roster")
            sock.close()

    def _rebuff(self, host: str, why: str) -> None:
        self._rebuffed = (time.monotonic(), f"somebody at {host}: {why}")
        log.debug("hung up on %s", self._rebuffed[1])

    def _admit(self, peer: str, group: str, sock: socket.socket) -> None:
        with self._lock:
            waiting = self._waiting.setdefault(peer, {})
            left = [waiting.pop(group)] if group in waiting else []
            waiting[group] = sock
            if len(waiting) > _MAX_WAITING:
                left.append(waiting.pop(next(iter(waiting))))
        for other in left:
            other.close()

    def _hang_up(self) -> None:
        self._talks.end_all()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for of_peer in waiting.values():
            for sock in of_peer.values():
                sock.close()
        self._selector.close()
        for own in (self._server, self._bell, self._ring):
            own.close()


def _received(sock: socket.socket, context: ssl.SSLContext | None) -> HandshakeSteps[Guest]:
    """Let a guest prove its name and say what it comes for."""
    try:
        prepare(sock)
        sock = yield from secure(sock, context)
        name, group = yield from greeting(sock)
    except BaseException:
        sock.close()
        raise
    return name, group, sock


def _bound(host: str, port: int) -> socket.socket:
    host = host.removeprefix("[").removesuffix("]")
    sock = None
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        if os.name == "posix":
            # A restarted party gets its port back at once. Elsewhere this would let others steal it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_MAX_UNFINISHED)
        sock.setblocking(False)
    except (OSError, OverflowError, UnicodeError) as error:
        if sock is not None:
            sock.close()
        raise FederationError(
            f"This party cannot listen on {join_address(host, port)} for the others: {error}. Give an address"
            " of this host, and a port that no other process uses, or 0 for any."
        ) from error
    return sock
