"""Dialer: opens connections to the members that listen, and retries until they answer."""

import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from errno import EINPROGRESS, EWOULDBLOCK
from selectors import EVENT_WRITE, DefaultSelector
from typing import Any

from pellm_lightning.comm.mesh.handshake import (
    BadPeerError,
    HandshakeSteps,
    PeerHandshake,
    PeerHandshakes,
    receive_greeting,
    send_greeting,
    start_tls,
)
from pellm_lightning.comm.sockets import Lookup, configure, is_loopback, split_address
from pellm_lightning.comm.tls import TLS, peer_name

# Timeout of one attempt: a host that went down silently never answers an old one.
_ATTEMPT_S = 10.0
_PAUSE_S = 0.05


class Dialer:
    """Opens connections to several members at once.

    Args:
        name: This party.
        group: Group of the connections.
        callees: Name and address of each member to dial, by its rank.
        tls: Certificate of this party, and the authority of theirs.
        own_port: Port at which this party listens, 0 if it does not.
    """

    def __init__(
        self,
        name: str,
        group: str,
        callees: Mapping[int, tuple[str, str]],
        tls: TLS | None = None,
        own_port: int = 0,
    ) -> None:
        self.failures = dict.fromkeys(callees, "nobody answers")
        """Last error of each member that has not answered yet."""
        self._name = name
        self._group = group
        self._callees = callees
        self._context = None if tls is None else tls.client_context
        self._due = dict.fromkeys(callees, 0.0)
        self._attempts = Counter[int]()
        self._own_port = own_port
        self._lookups: dict[int, Lookup] = {}
        self._selector = DefaultSelector()
        self._handshakes: PeerHandshakes[socket.socket] = PeerHandshakes(self._selector)
        self._ranks: dict[PeerHandshake[socket.socket], int] = {}

    def poll(self, timeout_s: float) -> Iterator[tuple[int, socket.socket]]:
        """Wait for events, then yield each member that has answered, with its connection."""
        self._dial_due()
        if self._selector.get_map():
            for key, _ in self._selector.select(timeout_s):
                yield from self._advance(key.data)
        else:
            time.sleep(timeout_s)
        for handshake in self._handshakes.overdue():
            self._handshakes.cancel(handshake)
            self._due[self._ranks.pop(handshake)] = 0.0

    def close(self) -> None:
        """Cancel the handshakes under way."""
        self._handshakes.cancel_all()
        self._selector.close()

    def _dial_due(self) -> None:
        now = time.monotonic()
        for rank in [rank for rank, at in self._due.items() if at <= now]:
            addresses = self._looked_up(rank)
            if not addresses:
                continue
            del self._due[rank]
            handshake = self._handshakes.start(self._dial(rank, addresses), _ATTEMPT_S)
            self._ranks[handshake] = rank
            # The first step only starts to connect.
            for _ in self._advance(handshake):
                pass

    def _looked_up(self, rank: int) -> Sequence[tuple[Any, ...]]:
        """Return the addresses of a member; empty as long as its name, which may be anything, is resolved."""
        host, port = split_address(self._callees[rank][1])
        if rank not in self._lookups:
            self._lookups[rank] = Lookup(host, port)
        try:
            addresses = self._lookups[rank].result()
        except OSError as error:
            del self._lookups[rank]
            self._failed(rank, str(error))
            return []
        if not addresses:
            self.failures[rank] = f"the name {host!r} is not resolved"
        return addresses

    def _failed(self, rank: int, why: str) -> None:
        host, _ = split_address(self._callees[rank][1])
        try:
            only_there = is_loopback(host)
        except ValueError:  # a name
            only_there = False
        if only_there:
            why += (
                f" ({host} is reached from its own host only: give party {self._callees[rank][0]} 'listen')"
            )
        self.failures[rank] = why
        self._due[rank] = time.monotonic() + _PAUSE_S

    def _advance(self, handshake: PeerHandshake[socket.socket]) -> Iterator[tuple[int, socket.socket]]:
        try:
            sock = self._handshakes.advance(handshake)
        except (OSError, BadPeerError) as error:
            self._failed(self._ranks.pop(handshake), str(error))
            return
        if sock is not None:
            rank = self._ranks.pop(handshake)
            del self.failures[rank]
            yield rank, sock

    def _dial(self, rank: int, found: Sequence[tuple[Any, ...]]) -> HandshakeSteps[socket.socket]:
        """Return a connection to a member that has confirmed its name and its group."""
        name = self._callees[rank][0]
        # A name may stand for several addresses, of which only one listens.
        family, kind, protocol, _, where = found[self._attempts[rank] % len(found)]
        self._attempts[rank] += 1
        sock = socket.socket(family, kind, protocol)
        try:
            yield from _connect(sock, where)
            if sock.getpeername()[:2] == (sock.getsockname()[0], self._own_port):
                raise BadPeerError("that address leads back to this party itself")
            sock = yield from start_tls(sock, self._context)
            if isinstance(sock, ssl.SSLSocket) and peer_name(sock) != name:
                raise BadPeerError(f"its certificate says {peer_name(sock)!r}")
            yield from send_greeting(sock, self._name, self._group)
            greeting = yield from receive_greeting(sock)
            if greeting != (name, self._group):
                raise BadPeerError(f"it is {greeting[0]!r}, in group {greeting[1]!r}")
        except BaseException:
            sock.close()
            raise
        return sock


def _connect(sock: socket.socket, where: tuple[object, ...]) -> HandshakeSteps[None]:
    sock.setblocking(False)
    configure(sock)
    error = sock.connect_ex(where)
    if error in (EINPROGRESS, EWOULDBLOCK):
        yield sock.fileno(), EVENT_WRITE
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))
