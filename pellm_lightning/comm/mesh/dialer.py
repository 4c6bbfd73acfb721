"""How a member reaches those that listen: it calls until they answer."""

import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from errno import EINPROGRESS, EWOULDBLOCK
from selectors import EVENT_WRITE, DefaultSelector

from pellm_lightning.comm.mesh.handshake import (
    BadPeerError,
    HandshakeSteps,
    PeerHandshake,
    PeerHandshakes,
    greet,
    greeting,
    prepare,
    secure,
    split_address,
)
from pellm_lightning.comm.tls import TLS, peer_name

# One attempt may take so long: a host that went down without a word never answers an old one.
_ATTEMPT_S = 10.0
_PAUSE_S = 0.05


class Dialer:
    """Connections being opened to several members at once.

    Args:
        name: This party.
        group: What the connections are for.
        callees: Name and address of each member to call, by its rank.
        tls: By which to prove this party's name and to judge theirs.
    """

    def __init__(
        self, name: str, group: str, callees: Mapping[int, tuple[str, str]], tls: TLS | None = None
    ) -> None:
        self.troubles = dict.fromkeys(callees, "nobody answers")
        """What is the matter with those that have not answered yet."""
        self._name = name
        self._group = group
        self._callees = callees
        self._context = None if tls is None else tls.client_context
        self._due = dict.fromkeys(callees, 0.0)
        self._attempts = Counter[int]()
        self._selector = DefaultSelector()
        self._talks: PeerHandshakes[socket.socket] = PeerHandshakes(self._selector)
        self._ranks: dict[PeerHandshake[socket.socket], int] = {}

    def go_on(self, timeout_s: float) -> Iterator[tuple[int, socket.socket]]:
        """Wait for something to happen, then yield each member that has answered, with its connection."""
        self._call_who_is_due()
        if self._selector.get_map():
            for key, _ in self._selector.select(timeout_s):
                yield from self._go_on(key.data)
        else:
            time.sleep(timeout_s)
        for talk in self._talks.overdue():
            self._talks.end(talk)
            self._due[self._ranks.pop(talk)] = 0.0

    def close(self) -> None:
        """Give up on those that have not answered."""
        self._talks.end_all()
        self._selector.close()

    def _call_who_is_due(self) -> None:
        now = time.monotonic()
        for rank in [rank for rank, at in self._due.items() if at <= now]:
            del self._due[rank]
            talk = self._talks.begin(self._call(rank), _ATTEMPT_S)
            self._ranks[talk] = rank
            # The first turn only starts to connect.
            for _ in self._go_on(talk):
                pass

    def _go_on(self, talk: PeerHandshake[socket.socket]) -> Iterator[tuple[int, socket.socket]]:
        try:
            sock = self._talks.go_on(talk)
        except (OSError, BadPeerError) as error:
            rank = self._ranks.pop(talk)
            self.troubles[rank] = str(error)
            self._due[rank] = time.monotonic() + _PAUSE_S
            return
        if sock is not None:
            rank = self._ranks.pop(talk)
            del self.troubles[rank]
            yield rank, sock

    def _call(self, rank: int) -> HandshakeSteps[socket.socket]:
        """Return a connection to a member on which it has confirmed who and where it is."""
        name, address = self._callees[rank]
        host, port = split_address(address)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # the member itself told the name, which may be anything
            raise BadPeerError(f"{host!r} cannot be the name of a host: {error}") from error
        # A name may stand for several addresses, of which only one listens.
        family, kind, protocol, _, where = found[self._attempts[rank] % len(found)]
        self._attempts[rank] += 1
        sock = socket.socket(family, kind, protocol)
        try:
            yield from _connect(sock, where)
            sock = yield from secure(sock, self._context)
            if isinstance(sock, ssl.SSLSocket) and peer_name(sock) != name:
                raise BadPeerError(f"its certificate says {peer_name(sock)!r}")
            yield from greet(sock, self._name, self._group)
            said = yield from greeting(sock)
            if said != (name, self._group):
                raise BadPeerError(f"it is {said[0]!r}, in group {said[1]!r}")
        except BaseException:
            sock.close()
            raise
        return sock


def _connect(sock: socket.socket, where: tuple[object, ...]) -> HandshakeSteps[None]:
    prepare(sock)
    error = sock.connect_ex(where)
    if error in (EINPROGRESS, EWOULDBLOCK):
        yield sock.fileno(), EVENT_WRITE
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))
