"""Channel: one connection of a client to the rendezvous."""

import contextlib
import socket
import ssl
import weakref

from pellm_lightning.comm.proxy import Proxy
from pellm_lightning.comm.rendezvous.frames import HELLO, LENGTH_BYTES, FrameError, length, unpack
from pellm_lightning.comm.sockets import configure, connected
from pellm_lightning.comm.tls import RENDEZVOUS, peer_name

_PIECE_BYTES = 64 << 10


class ServerDisconnectedError(OSError):
    """An authenticated server closed the connection without an answer."""


class Channel:
    """One connection to a rendezvous, after the hello.

    Args:
        address: "host:port" of the rendezvous.
        context: Settings of TLS, None for a plain connection.
        timeout_s: Seconds that each single step may take.
        proxy: HTTP proxy by which it is reached; None for none.

    Raises:
        OSError: If it cannot be reached or closes the connection, in the handshake an ``ssl.SSLError``.
        FrameError: If it is no rendezvous.
    """

    def __init__(
        self, address: str, context: ssl.SSLContext | None, timeout_s: float, proxy: Proxy | None = None
    ) -> None:
        self._socket = connected(proxy.address if proxy else address, timeout_s)
        try:
            for _ in proxy.tunnel(self._socket, address) if proxy else ():
                pass  # it blocks, so there is nothing to wait for
            configure(self._socket)
            if context is not None:
                self._socket = context.wrap_socket(self._socket)
            # A forgotten store closes its connection, also while the interpreter ends.
            weakref.finalize(self, self._socket.close)
            self._hello()
        except BaseException:
            self._socket.close()
            raise

    def exchange(self, request: bytes) -> tuple[int, list[bytes | None]]:
        """Send a request; return the tag and the fields of the answer."""
        for at in range(0, len(request), _PIECE_BYTES):  # so that each piece has its own time
            self._socket.sendall(request[at : at + _PIECE_BYTES])
        answer = self._receive(LENGTH_BYTES)
        size = LENGTH_BYTES + length(answer[:LENGTH_BYTES])
        answer = self._receive(size, answer)
        if len(answer) > size:
            raise FrameError("more than an answer")
        return unpack(answer[LENGTH_BYTES:])

    def set_timeout(self, seconds: float) -> None:
        """Set the seconds that the server may be silent."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Close the connection, even while another thread waits for an answer."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _hello(self) -> None:
        """Check the server's name, and exchange protocol versions."""
        if isinstance(self._socket, ssl.SSLSocket) and peer_name(self._socket) != RENDEZVOUS:
            raise FrameError(f"its certificate is named {peer_name(self._socket)!r}, not {RENDEZVOUS!r}")
        try:
            self._socket.sendall(HELLO)
            hello = self._receive(len(HELLO))
        except (ConnectionError, ssl.SSLEOFError) as error:
            if isinstance(self._socket, ssl.SSLSocket):
                # With TLS 1.3 a client that is not admitted learns it only now.
                raise ServerDisconnectedError(str(error)) from error
            raise
        if hello[:-2] != HELLO[:-2]:
            raise FrameError("it sends something else than hello")
        if hello != HELLO:
            raise FrameError(f"its protocol has version {hello[-1]}, not {HELLO[-1]}")

    def _receive(self, size: int, got: bytes = b"") -> bytes:
        """Return ``got`` and what is received after it, at least ``size`` bytes in all."""
        data = bytearray(got)
        while len(data) < size:
            piece = self._socket.recv(_PIECE_BYTES)
            if not piece:
                raise ConnectionResetError("it closed the connection")
            data += piece
        return bytes(data)
