"""Dialer: opens connections to other members, directly or by a relay, and retries until they answer."""

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
from pellm_lightning.comm.relay.client import NoRelayError, RelayAccess, RelayRoute, meet
from pellm_lightning.comm.sockets import Lookup, configure, is_loopback, split_address
from pellm_lightning.comm.tls import TLS, peer_name

# Timeout of one attempt: a host that went down silently never answers an old one.
_ATTEMPT_S = 10.0
# Of a direct one where there is a relay: a firewall drops it without a word.
_DIRECT_S = 3.0
# Within one host a direct connection takes milliseconds.
_LOCAL_S = 0.25
_PAUSE_S = 0.05
_AWAY_S = 1.0


class Dialer:
    """Opens connections to several members at once.

    Whoever is dialed is dialed directly first, and then in turns by the relay and directly again, or the
    other way round where the pair needed the relay before. Whoever dials this party is met at the relay once
    there was time for a direct connection.

    Args:
        name: This party.
        group: Group of the connections.
        callees: Name and address of each member to dial, by its rank.
        tls: Certificate of this party, and the authority of theirs.
        own_address: Where this party listens.
        callers: Name of each member that dials this one, by its rank.
        relay: The way by the relay; None if there is none.
    """

    def __init__(
        self,
        name: str,
        group: str,
        callees: Mapping[int, tuple[str, str]],
        tls: TLS | None,
        own_address: str,
        callers: Mapping[int, str],
        relay: RelayRoute | None = None,
    ) -> None:
        self.relayed: set[int] = set()
        """Ranks of the members that are connected by the relay."""
        self._name, self._group, self._tls, self._relay = name, group, tls, relay
        self._names = {rank: name for rank, (name, _) in callees.items()} | dict(callers)
        self._addresses = {rank: address for rank, (_, address) in callees.items()}
        self._own_host, self._own_port = split_address(own_address)
        self._failures: dict[int, dict[str, str]] = {rank: {"": "nobody answers"} for rank in callees}
        self._attempts = Counter[int]()
        self._lookups: dict[str, Lookup] = {}
        self._selector = DefaultSelector()
        self._handshakes: PeerHandshakes[socket.socket] = PeerHandshakes(self._selector)
        self._ranks: dict[PeerHandshake[socket.socket], int] = {}
        self._by_relay = {rank: self._is_relayed_first(rank) for rank in self._names}
        self._due = dict.fromkeys(callees, 0.0)
        if relay is not None:
            grace_s = _LOCAL_S if is_loopback(self._own_host) else _DIRECT_S
            direct_until = time.monotonic() + grace_s
            self._due |= {rank: 0.0 if self._by_relay[rank] else direct_until for rank in callers}
            self._by_relay |= dict.fromkeys(callers, True)

    @property
    def failures(self) -> dict[int, str]:
        """Last errors of each member that has not answered yet."""
        return {rank: ", ".join(errors.values()) for rank, errors in self._failures.items() if errors}

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
            rank = self._ranks.pop(handshake)
            late = (
                f"{self._names[rank]} has not come to the relay" if self._by_relay[rank] else "nobody answers"
            )
            self._failed(rank, late, 0.0)

    def connected(self, rank: int) -> None:
        """Note that a member has dialed this one: it need not be met at the relay."""
        self._due.pop(rank, None)
        self.relayed.discard(rank)

    def close(self) -> None:
        """Cancel the handshakes under way."""
        self._handshakes.cancel_all()
        self._selector.close()

    def _is_relayed_first(self, rank: int) -> bool:
        return self._relay is not None and self._relay.is_needed(self._names[rank])

    def _dial_due(self) -> None:
        now = time.monotonic()
        for rank in [rank for rank, at in self._due.items() if at <= now]:
            try:
                access = self._access(rank)
            except NoRelayError as error:
                self._do_without_relay(str(error))
                return  # what is due is now due otherwise
            except OSError as error:  # the rendezvous is away
                self._failed(rank, str(error), _AWAY_S)
                continue
            addresses = self._looked_up(rank, access)
            if not addresses:
                continue
            del self._due[rank]
            is_brief = access is None and self._relay is not None
            steps = self._dial(rank, addresses, access)
            handshake = self._handshakes.start(steps, _DIRECT_S if is_brief else _ATTEMPT_S)
            self._ranks[handshake] = rank
            # The first step only starts to connect.
            for _ in self._advance(handshake):
                pass

    def _access(self, rank: int) -> RelayAccess | None:
        """Return how the relay is used to reach a member now, None for the direct way."""
        return self._relay.access() if self._relay is not None and self._by_relay[rank] else None

    def _do_without_relay(self, why: str) -> None:
        """Dial directly from now on, and wait for those who dial this party."""
        self._relay = None
        for rank in self._names:
            if rank not in self._addresses:
                self._due.pop(rank, None)
            elif rank in self._failures:
                self._by_relay[rank] = False
                self._failures[rank]["relay"] = f"nor is there a way by a relay: {why}"

    def _looked_up(self, rank: int, access: RelayAccess | None) -> Sequence[tuple[Any, ...]]:
        """Return the addresses to dial; empty as long as the name, which may be anything, is resolved."""
        address = self._addresses[rank] if access is None else access.endpoint
        host, port = split_address(address)
        if address not in self._lookups:
            self._lookups[address] = Lookup(host, port)
        try:
            addresses = self._lookups[address].result()
        except OSError as error:
            del self._lookups[address]
            self._failed(rank, str(error))
            return []
        if not addresses:
            self._note(rank, f"the name {host!r} is not resolved")
        return addresses

    def _failed(self, rank: int, why: str, pause_s: float = _PAUSE_S) -> None:
        """Note a failed attempt, and take the other way next."""
        if not self._by_relay[rank] and is_loopback(host := split_address(self._addresses[rank])[0]):
            why += f" ({host} is reached from its own host only: give party {self._names[rank]} 'listen')"
        self._note(rank, why)
        if self._relay is not None:
            if self._by_relay[rank]:
                self._relay.forget()
            else:
                pause_s = 0.0  # the other way is another one
            self._by_relay[rank] = rank not in self._addresses or not self._by_relay[rank]
        if self._relay is not None or rank in self._addresses:
            self._due[rank] = time.monotonic() + pause_s

    def _note(self, rank: int, why: str) -> None:
        way = "relay" if self._by_relay[rank] else ""
        self._failures.setdefault(rank, {})[way] = f"by the relay: {why}" if way else why

    def _advance(self, handshake: PeerHandshake[socket.socket]) -> Iterator[tuple[int, socket.socket]]:
        try:
            sock = self._handshakes.advance(handshake)
        except (OSError, BadPeerError) as error:
            self._failed(self._ranks.pop(handshake), str(error))
            return
        if sock is not None:
            rank = self._ranks.pop(handshake)
            self._failures.pop(rank, None)
            (self.relayed.add if self._by_relay[rank] else self.relayed.discard)(rank)
            yield rank, sock

    def _dial(
        self, rank: int, found: Sequence[tuple[Any, ...]], access: RelayAccess | None
    ) -> HandshakeSteps[socket.socket]:
        """Return a connection to a member that has confirmed its name and its group."""
        name = self._names[rank]
        # A name may stand for several addresses, of which only one listens.
        family, kind, protocol, _, where = found[self._attempts[rank] % len(found)]
        self._attempts[rank] += 1
        sock = socket.socket(family, kind, protocol)
        try:
            yield from _connect(sock, where)
            if access is not None:
                yield from meet(sock, access, name, self._group)
            elif sock.getpeername()[:2] == (sock.getsockname()[0], self._own_port):
                raise BadPeerError("that address leads back to this party itself")
            is_caller = rank in self._addresses
            sock = yield from start_tls(sock, self._context(is_caller=is_caller))
            if isinstance(sock, ssl.SSLSocket) and peer_name(sock) != name:
                raise BadPeerError(f"its certificate says {peer_name(sock)!r}")
            if is_caller:
                yield from send_greeting(sock, self._name, self._group)
            greeting = yield from receive_greeting(sock)
            if greeting != (name, self._group):
                raise BadPeerError(f"it is {greeting[0]!r}, in group {greeting[1]!r}")
            if not is_caller:
                yield from send_greeting(sock, self._name, self._group)
        except BaseException:
            sock.close()
            raise
        return sock

    def _context(self, *, is_caller: bool) -> ssl.SSLContext | None:
        if self._tls is None:
            return None
        return self._tls.client_context if is_caller else self._tls.server_context


def _connect(sock: socket.socket, where: tuple[object, ...]) -> HandshakeSteps[None]:
    sock.setblocking(False)
    configure(sock)
    error = sock.connect_ex(where)
    if error in (EINPROGRESS, EWOULDBLOCK):
        yield sock.fileno(), EVENT_WRITE
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))
