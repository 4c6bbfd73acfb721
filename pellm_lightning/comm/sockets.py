"""Addresses and sockets of everything in this package that listens or connects."""

import ipaddress
import os
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
# Of Linux's struct tcp_info: tcpi_retransmits, and tcpi_last_ack_recv, in milliseconds.
_TCP_INFO = struct.Struct("=2xB53xI")
_AddressInfo: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[::1]:port".

    Raises:
        ValueError: If it is neither.

    Example:
        >>> split_address("[::1]:80")
        ('::1', 80)
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is no address: give host:port, or [host]:port for IPv6.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_unspecified(host: str) -> bool:
    """Tell whether a host to listen on stands for all interfaces, as "", "0.0.0.0" and "::" do.

    Example:
        >>> is_unspecified("[::]"), is_unspecified("10.8.0.2")
        (True, False)
    """
    host = host.removeprefix("[").removesuffix("]")
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        return False


def is_loopback(host: str) -> bool:
    """Tell whether only this host reaches an address.

    Example:
        >>> is_loopback("::1"), is_loopback("localhost"), is_loopback("10.8.0.2"), is_loopback("clinic")
        (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # a name
        return host == "localhost"


class Lookup:
    """Resolution of the name of a host in a thread of its own: it may take a resolver minutes.

    Args:
        host: A name, or an address, which is resolved at once.
        port: The port.

    Example:
        >>> Lookup("127.0.0.1", 80).result()[0][4]
        ('127.0.0.1', 80)
    """

    def __init__(self, host: str, port: int) -> None:
        self._found: list[_AddressInfo] = []
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None
        try:
            self._find(host, port, socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            self._thread = threading.Thread(target=self._look_up, args=(host, port), daemon=True)
            self._thread.start()

    def result(self, timeout_s: float = 0.0) -> "list[_AddressInfo]":
        """Return the addresses; empty if they are not found yet.

        Raises:
            OSError: If there are none.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return self._found

    def _look_up(self, host: str, port: int) -> None:
        try:
            self._find(host, port, 0)
        except OSError as error:
            self._error = error
        except UnicodeError as error:
            self._error = OSError(f"{host!r} cannot be the name of a host: {error}")

    def _find(self, host: str, port: int, flags: int) -> None:
        self._found = [*socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)]


def connected(address: str, timeout_s: float) -> socket.socket:
    """Return a connection to "host:port"; resolver and host may take ``timeout_s`` each.

    Raises:
        OSError: If there is none.
    """
    host, port = split_address(address)
    found = Lookup(host, port).result(timeout_s)
    failure: OSError = TimeoutError(f"the name {host!r} was not resolved within {timeout_s:g} s")
    for family, kind, protocol, _, where in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout_s)
            sock.connect(where)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def configure(sock: socket.socket) -> None:
    """Set a connection to send at once, and to notice within two minutes that a host has gone down."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def probe(sock: socket.socket, seconds: float) -> None:
    """Let an idle connection break once nobody has answered its probes for about so long.

    A firewall that has forgotten a connection drops it without a word; probes keep its entry.
    """
    for option, value in (
        ("TCP_KEEPIDLE", max(1, int(seconds / 2))),
        ("TCP_KEEPINTVL", max(1, int(seconds / 6))),
        ("TCP_KEEPCNT", 3),
    ):
        if hasattr(socket, option):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def is_unanswered(sock: socket.socket, seconds: float) -> bool:
    """Tell whether what a connection sends is sent again, and nothing was acknowledged for so long.

    A host that is up acknowledges, also while its process reads nothing. The system itself would go on for a
    quarter of an hour. Only Linux tells.
    """
    if sys.platform != "linux":
        return False
    retransmits, since_ms = _TCP_INFO.unpack(
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    )
    return bool(retransmits > 0 and since_ms > 1000 * seconds)


def join_address(host: str, port: int) -> str:
    """Return "host:port", with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listening_socket(host: str, port: int, backlog: int, *, only_ipv6: bool = False) -> socket.socket:
    """Return a non-blocking socket that listens on one address: the first that ``host`` stands for.

    Args:
        host: A name or an address, of IPv6 with or without brackets.
        port: Port; 0 for any free one.
        backlog: Connections that the system keeps until they are accepted.
        only_ipv6: Whether an IPv6 address takes no connections over IPv4.

    Raises:
        OSError, OverflowError, UnicodeError: If the address cannot be bound.
    """
    host = host.removeprefix("[").removesuffix("]")
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            # A restarted process gets its port back at once. Elsewhere this would let others steal it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and only_ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def allow_descriptors(number: int) -> int:
    """Raise the number of descriptors that this process may have, as far as the system lets it; return it."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return number
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        soft = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return number if soft == resource.RLIM_INFINITY else soft


def oldest_of_largest_host(connections: Mapping[T, str]) -> T:
    """Return the connection to drop first: a host that opens too many drops its own.

    Args:
        connections: Host of each connection, the oldest first.

    Example:
        >>> oldest_of_largest_host({"1": "one", "2": "many", "3": "many"})
        '2'
    """
    largest = Counter(connections.values()).most_common(1)[0][0]
    return next(connection for connection, host in connections.items() if host == largest)
