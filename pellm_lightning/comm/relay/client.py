"""Client of the relay: how a party meets another one there, and which pairs need it."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from pellm_lightning.comm.mesh.handshake import BadPeerError, HandshakeSteps, receive_exactly, send_all
from pellm_lightning.comm.proxy import Proxy
from pellm_lightning.comm.relay.frames import ADMITTED, CHALLENGE_BYTES, HELLO, JOINED, Ticket, request
from pellm_lightning.comm.sockets import is_loopback, split_address
from pellm_lightning.comm.tls import TLS

# Less than what a relay lets a ticket count.
_FRESH_S = 20.0
# A pair that needed the relay tries the direct way again after so long.
_RELAYED_S = 600.0


@dataclass(frozen=True)
class RelayAccess:
    """Where a relay is, and the leave to use it.

    Args:
        address: "host:port".
        ticket: The leave.
        proxy: By which it is reached.
    """

    address: str
    ticket: Ticket
    proxy: Proxy | None = None

    @property
    def endpoint(self) -> str:
        """What is dialed: the relay, or the proxy before it."""
        return self.address if self.proxy is None else self.proxy.address


class NoRelayError(Exception):
    """There is no relay, or none that this party can use; says why."""


class RelayRoute:
    """The way to other parties by the relay of the rendezvous.

    Args:
        ask: Asks the rendezvous for access; raises ``NoRelayError`` where there is none.
        tls: This party's certificate: without it nothing is encrypted from end to end.

    Example:
        >>> route = RelayRoute(lambda: RelayAccess("hub:443", Ticket(b"", b"")))
        >>> route.note("b", relayed=True)
        >>> route.is_needed("b"), route.is_needed("c")
        (True, False)
    """

    def __init__(self, ask: Callable[[], RelayAccess], tls: TLS | None = None) -> None:
        self._ask, self._tls = ask, tls
        self._asked_at = float("-inf")
        self._access: RelayAccess | None = None
        self._refusal = ""
        self._relayed_at: dict[str, float] = {}

    def access(self) -> RelayAccess:
        """Return how the relay is used.

        Raises:
            NoRelayError: If it cannot be.
        """
        now = time.monotonic()
        if now > self._asked_at + _FRESH_S:
            self._asked_at, self._access = now, None
            try:
                self._access = self._checked(self._ask())
            except NoRelayError as error:
                self._refusal = str(error)
        if self._access is None:
            raise NoRelayError(self._refusal)
        return self._access

    def forget(self) -> None:
        """Ask the rendezvous again the next time: it may have been restarted."""
        if self._access is not None:
            self._asked_at = float("-inf")

    def note(self, peer: str, *, relayed: bool) -> None:
        """Note how a pair was connected."""
        self._relayed_at.pop(peer, None)
        if relayed:
            self._relayed_at[peer] = time.monotonic()

    def is_needed(self, peer: str) -> bool:
        """Tell whether a pair needed the relay a while ago."""
        return time.monotonic() < self._relayed_at.get(peer, float("-inf")) + _RELAYED_S

    def _checked(self, access: RelayAccess) -> RelayAccess:
        host, _ = split_address(access.address)
        if self._tls is None and not is_loopback(host):
            raise NoRelayError(
                f"the relay at {access.address} is not used without TLS, since everybody on the way could"
                " read and change what it passes on: give all parties and the rendezvous tls"
            )
        return access


def meet(sock: socket.socket, access: RelayAccess, peer: str, group: str) -> HandshakeSteps[None]:
    """Wait at a relay for a peer of a group; what follows on the connection is the peer's.

    Args:
        sock: Connected to the relay, or to the proxy before it.
        access: How the relay is used.
        peer: Name of the other party.
        group: Group of the connection.

    Raises:
        BadPeerError: If the relay does not admit this party, or is none.
    """
    if access.proxy is not None:
        yield from access.proxy.tunnel(sock, access.address)
    try:
        yield from send_all(sock, HELLO)
        hello = yield from receive_exactly(sock, len(HELLO) + CHALLENGE_BYTES)
        if hello[: len(HELLO)] != HELLO:
            raise BadPeerError(f"at {access.address} is no relay of this version")
        yield from send_all(sock, request(access.ticket, hello[len(HELLO) :], peer, group))
        answer = yield from receive_exactly(sock, 1)
    except BadPeerError as error:
        raise BadPeerError(f"the relay at {access.address} does not admit this party: {error}") from error
    if answer != ADMITTED or (yield from receive_exactly(sock, 1)) != JOINED:
        raise BadPeerError(f"at {access.address} is no relay of this version")
