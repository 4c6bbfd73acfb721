"""HTTP proxies: how a party behind one reaches the rendezvous and its relay (CONNECT, RFC 9110)."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from selectors import EVENT_READ, EVENT_WRITE
from socket import socket
from urllib.parse import quote, unquote, urlsplit
from urllib.request import (  # type: ignore[attr-defined]
    getproxies_environment,
    proxy_bypass_environment,
)

from pellm_lightning.comm.sockets import is_loopback, join_address, split_address

NO_PROXY = "none"
"""Setting that takes no proxy, whatever the environment says."""

_MAX_ANSWER_BYTES = 8 << 10


@dataclass(frozen=True)
class Proxy:
    """HTTP proxy that opens a connection to an address on behalf of this host.

    Args:
        host: Its host.
        port: Its port.
        user: Who this party is to it; empty for nobody.
        password: Its password there.

    Example:
        >>> str(Proxy("proxy.clinic.example", 3128, "a", "secret"))
        'http://proxy.clinic.example:3128'
    """

    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"http://{join_address(self.host, self.port)}"

    @property
    def address(self) -> str:
        """Its address, "host:port"."""
        return join_address(self.host, self.port)

    @property
    def url(self) -> str:
        """Its URL, with the password."""
        who = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.user else ""
        return f"http://{who}{self.address}"

    def tunnel(self, sock: socket, address: str) -> Iterator[tuple[int, int]]:
        """Let the proxy at the other end of a connection open one to an address.

        Yields the descriptor and the event that it waits for, if the socket does not block.

        Raises:
            OSError: If the proxy refuses, or answers something else.
        """
        lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
        if self.user:
            basic = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            lines.append(f"Proxy-Authorization: Basic {basic}")
        left = "\r\n".join([*lines, "", ""]).encode()
        while left:
            try:
                left = left[sock.send(left) :]
            except BlockingIOError:
                yield sock.fileno(), EVENT_WRITE
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            try:
                byte = sock.recv(1)  # and none of what comes after the answer
            except BlockingIOError:
                yield sock.fileno(), EVENT_READ
                continue
            if not byte or len(answer) == _MAX_ANSWER_BYTES:
                raise OSError(f"the proxy {self} does not answer CONNECT as an HTTP proxy")
            answer += byte
        self._check(answer.partition(b"\r\n")[0].decode(errors="replace"), address)

    def _check(self, status: str, address: str) -> None:
        version, _, rest = status.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise OSError(f"the proxy {self} does not answer CONNECT as an HTTP proxy")
        if rest.startswith("2"):
            return
        cure = f"Let its administrator allow CONNECT to {address}"
        if rest.startswith(str(int(HTTPStatus.PROXY_AUTHENTICATION_REQUIRED))):
            cure = "Give user and password, as in https_proxy=http://user:password@host:port"
        raise OSError(f"the proxy {self} answers {rest[:80]!r} to CONNECT {address}. {cure}")


def proxy_to(address: str, setting: str | None = None) -> Proxy | None:
    """Return the proxy by which an address is reached, None for none; a loopback address needs none.

    Args:
        address: "host:port".
        setting: "http://[user:password@]host:port", or "none"; None takes ``https_proxy`` and ``no_proxy`` of
            the environment.

    Raises:
        ValueError: If it is no such proxy.

    Example:
        >>> str(proxy_to("hub.example:443", "http://proxy:3128"))
        'http://proxy:3128'
        >>> proxy_to("127.0.0.1:29400", "http://proxy:3128")
    """
    source, url = "jobs.proxy", setting
    if setting is None:
        proxies = getproxies_environment()
        source, url = "https_proxy", proxies.get("https")
        if url and proxy_bypass_environment(address, proxies):
            return None
    if not url or url == NO_PROXY:
        return None
    proxy = _parsed(url, source)
    return None if is_loopback(split_address(address)[0]) else proxy


def _parsed(url: str, source: str) -> Proxy:
    shown = url.rpartition("@")[2] if "@" in url else url  # never a password
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme == "http" and parts.hostname and parts.path in ("", "/"):
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
            return Proxy(parts.hostname, parts.port or 80, user, password)
    except ValueError:  # a port that is none
        pass
    raise ValueError(
        f"{source} names {shown!r}, which is no HTTP proxy: give http://host:port, with user:password@ before"
        f" the host if it asks for them, or {NO_PROXY!r} as jobs.proxy."
    )
