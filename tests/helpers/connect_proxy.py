"""An HTTP proxy for tests: opens what CONNECT asks for, and notes it."""

import base64
import contextlib
import socket
import threading
from typing import Any

from pellm_lightning.comm.sockets import connected, join_address


class Forwarder:
    """Passes on what comes to a port of its own, and keeps a copy.

    Args:
        target: Address that all connections lead to; None lets each one ask by CONNECT.
        account: "user:password" that it asks for; empty for nobody.
    """

    def __init__(self, target: str | None = None, account: str = "") -> None:
        self.target, self.account = target, account
        self.asked: list[str] = []
        self.copy = bytearray()
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = join_address(*self._server.getsockname()[:2])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Forwarder":
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.close()
        self.cut()
        self._thread.join()

    def cut(self) -> None:
        """End all connections."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        self._server.settimeout(0.1)  # closing it does not wake who waits
        while self._server.fileno() >= 0:
            try:
                sock, _ = self._server.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            sock.settimeout(None)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            target = self.target or self._asked(sock)
            if target is None:
                return
            with connected(target, 5) as other:
                other.settimeout(None)
                self._sockets += [sock, other]
                if self.target is None:
                    sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=self._pass, args=(other, sock), daemon=True)
                back.start()
                self._pass(sock, other)
                back.join()

    def _asked(self, sock: socket.socket) -> str | None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += sock.recv(1)
        method, target, _ = request.decode().split(" ", 2)
        self.asked.append(target)
        basic = base64.b64encode(self.account.encode()).decode()
        if method != "CONNECT":
            sock.sendall(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")
        elif self.account and f"Proxy-Authorization: Basic {basic}\r\n" not in request.decode():
            sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        else:
            return target
        return None

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                self.copy += piece
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)
