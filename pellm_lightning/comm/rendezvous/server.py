"""Rendezvous server: a small key-value store where parties find each other and agree. No tensors, no files.

A request is done or refused at once; only one that waits for a change is answered later, within seconds. So
losing the server loses nothing that the parties do not write again.
"""

import logging
import socket
import threading
from collections.abc import Collection

from typing_extensions import Self

from pellm_lightning.comm.relay.server import Relay, RelayQuotas
from pellm_lightning.comm.rendezvous.connection_handler import (
    MAX_CONNECTIONS,
    MAX_UNAUTHENTICATED,
    ConnectionHandler,
)
from pellm_lightning.comm.sockets import allow_descriptors, is_loopback, join_address, listening_socket
from pellm_lightning.comm.tls import RENDEZVOUS, TLS, check_name

log = logging.getLogger(__name__)

# Connections that the system keeps until they are accepted.
_BACKLOG = 512
# Of connections that are not relayed, and all else that is open.
_DESCRIPTORS = MAX_CONNECTIONS + MAX_UNAUTHENTICATED + 256


class RendezvousServer:
    """Key-value store that all parties reach over TCP, or better TLS.

    With ``tls`` only parties of the roster are admitted, by the names in their certificates, and a key with a
    path component ``@name`` can be written by that party only (see ``KeyValueStore``). Without, whoever
    reaches the address may read and change everything: use that on one host or in a private network.

    Args:
        host: Address of the one interface to listen on; ``"0.0.0.0"`` or ``"::"`` for all.
        port: Port; 0 for any free one.
        roster: Names of the parties. Only certificates can enforce it.
        tls: Certificate with the common name "rendezvous", its key, and the federation's authority.
        relay: What a party may use of the blind relay on the same port, which joins two parties that cannot
            dial each other; None relays nothing.

    Raises:
        ValueError: If an argument is out of range, ``tls`` comes without a roster, or a relay without ``tls``
            where other hosts reach it.

    Example::

        with RendezvousServer("127.0.0.1", 0) as server:
            store = RendezvousStore(server.address)
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        roster: Collection[str] | None = None,
        tls: TLS | None = None,
        relay: RelayQuotas | None = None,
    ) -> None:
        if not host:
            raise ValueError(
                "host is empty. Name the interface to listen on; 0.0.0.0 or :: stands for all of them."
            )
        if not 0 <= port < 1 << 16:
            raise ValueError(f"port={port} must lie in 0..65535.")
        if tls is not None and not roster:
            raise ValueError("tls comes without a roster. Give the names of the parties that may join.")
        if tls is not None and tls.name != RENDEZVOUS:
            raise ValueError(
                f"The certificate {tls.cert} is named {tls.name!r}, but parties trust only a rendezvous named"
                f" {RENDEZVOUS!r}. Make one of that name."
            )
        if RENDEZVOUS in (roster or ()):
            raise ValueError(f"No party can be called {RENDEZVOUS!r}. Give it another name.")
        names = frozenset(check_name(name) for name in roster or ())
        if relay is not None and tls is None and not is_loopback(host):
            raise ValueError(
                f"A relay at host={host!r} without TLS would pass on updates that everybody on the way can"
                " read and change. Give tls, or listen on 127.0.0.1 for a trial."
            )
        self._relay = relay
        self._parties = len(names)
        self._handler = ConnectionHandler(
            names,
            None if tls is None else tls.server_context,
            None if relay is None else Relay(names, relay),
        )
        self._host, self._port = host, port
        self._encrypted = tls is not None
        self._address: str | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """``host:port`` as bound."""
        if self._address is None:
            raise RuntimeError("The rendezvous has no address before it listens. Call start() first.")
        return self._address

    def start(self) -> Self:
        """Listen, and serve in a thread of this process; return this server.

        Raises:
            OSError: If the address cannot be bound.
        """
        listener = self._bind()
        # A forgotten close() must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._handler.run, args=(listener,), name="rendezvous", daemon=True
        )
        self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Listen, and serve in this thread until ``close()``, which a signal handler may also call.

        Raises:
            OSError: If the address cannot be bound.
        """
        self._handler.run(self._bind())

    def close(self) -> None:
        """Close all connections and delete all keys; with ``start()``, return when that is done."""
        self._handler.close()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(self) -> socket.socket:
        if self._address is not None:
            raise RuntimeError(f"The rendezvous at {self._address} was started before. Make a new one.")
        listener = listening_socket(self._host, self._port, _BACKLOG, only_ipv6=True)
        host, port = listener.getsockname()[:2]
        self._address = join_address(host, port)
        log.info(
            "the rendezvous listens on %s %s TLS%s",
            self._address,
            "with" if self._encrypted else "without",
            ", and relays" if self._relay else "",
        )
        if self._relay is not None:
            self._allow_connections(self._relay)
        if not self._encrypted and not is_loopback(host):
            log.warning(
                "the rendezvous at %s is open to everybody who reaches it, and nothing is encrypted. Use TLS,"
                " or an address of a private network.",
                self._address,
            )
        return listener

    def _allow_connections(self, quotas: RelayQuotas) -> None:
        """Let this process have as many connections as all parties may need."""
        needed = _DESCRIPTORS + self._parties * min(quotas.connections, 2 * self._parties)
        allowed = allow_descriptors(needed)
        if allowed < needed:
            log.warning(
                "the relay may need %d descriptors for %d parties, and this process can have %d: raise the"
                " hard limit (ulimit -Hn, or LimitNOFILE= of systemd)",
                needed,
                self._parties,
                allowed,
            )
