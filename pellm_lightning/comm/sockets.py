"""Addresses and sockets of everything in this package that listens or connects."""

import ipaddress
import os
import socket
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


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


def is_loopback(host: str) -> bool:
    """Tell whether only this host reaches an address, as a socket is bound to it."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def configure(sock: socket.socket) -> None:
    """Set a connection to send at once, and to notice within two minutes that a host has gone down."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


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
