"""Unix sockets between the parties of one host: a barrier that notices the dead, and memory for all."""

import contextlib
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

_CONNECT_S = 10.0
# A party that has left when all had come to it is no loss: what they sent to others arrives within this.
_LEFT_S = 0.5
_LATE = "Timed out waiting for other parties of this host"
MESSAGE_BYTES = 1 << 15
"""Longest message of an exchange."""
_CREDENTIALS = struct.Struct("3i")  # process, user and group, as SO_PEERCRED gives them
Gather: TypeAlias = Callable[[str, object], list[Any]]


class HostSockets:
    """Connections of this party to each other party, all of one host.

    The kernel's queues order memory: what a party has written before it sends is there for who has received,
    on every kind of processor. A process that ends closes its sockets, however it ends. Since a child that it
    has forked may hold them open, the process itself is watched also.

    Args:
        rank: This party.
        peers: Connected sockets that keep messages apart, by party.
        timeout_s: Seconds a party may be late.

    Example:
        >>> one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        >>> first, second = HostSockets(0, {1: one}, timeout_s=5), HostSockets(1, {0: other}, timeout_s=5)
        >>> _ = other.send(b"here")
        >>> first.exchange(b"here as well")
        [b'here as well', b'here']
        >>> first.close()
        >>> second.close()
    """

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], timeout_s: float) -> None:
        self.rank = rank
        self.size = len(peers) + 1
        self._peers = dict(peers)
        self._timeout_s = timeout_s
        self._processes = {party: _watched_process(sock) for party, sock in self._peers.items()}

    def exchange(self, message: bytes) -> list[bytes]:
        """Send a message of 1 byte to 32 KiB to all, and return all parties' in order: a barrier.

        Raises:
            RuntimeError: If a party has gone, or is late.
        """
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # who has gone is found below, with what it sent before
                peer.send(message)
        received = {self.rank: message}
        deadline = time.monotonic() + self._timeout_s
        poll, party_of = self._watch()
        gone = None
        while len(received) < self.size:
            ready = poll.poll(1e3 * max(deadline - time.monotonic(), 0))
            if not ready:
                raise RuntimeError(_closed_by(gone) if gone is not None else _LATE)
            for descriptor, _ in ready:
                party = party_of[descriptor]
                if party not in received:
                    received[party] = self._receive(party)
                    # It may be one barrier ahead already: only its end matters now.
                    poll.modify(self._peers[party].fileno(), 0)
                else:  # it has gone: either all have come to it, whose messages are here soon, or never will
                    gone, deadline = party, min(deadline, time.monotonic() + _LEFT_S)
                    poll.unregister(descriptor)
        return [received[party] for party in range(self.size)]

    def send_descriptor(self, descriptor: int) -> None:
        """Give all other parties an open file."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the next exchange will notice
                socket.send_fds(peer, [b"descriptor"], [descriptor])

    def receive_descriptor(self, party: int) -> int:
        """Return what a party has sent by ``send_descriptor``.

        Raises:
            OSError: If it has sent none, since it could not open one, or is late.
        """
        peer = self._peers[party]
        peer.settimeout(self._timeout_s)
        try:
            _, descriptors, _, _ = socket.recv_fds(peer, MESSAGE_BYTES, 1)
        finally:
            peer.settimeout(None)
        if not descriptors:
            raise OSError(f"party {party} has sent no descriptor")
        return descriptors[0]

    def send_no_descriptor(self) -> None:
        """Tell all other parties that there is no file."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.send(b"no descriptor")

    def close(self) -> None:
        """Break the connections; who waits in ``exchange``, here or elsewhere, wakes and fails."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # closing alone would not wake a thread of this process
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()
        processes, self._processes = self._processes, dict.fromkeys(self._peers)
        for process in processes.values():
            if process is not None:
                os.close(process)

    def _watch(self) -> tuple[select.poll, dict[int, int]]:
        """Return what waits for the others, and whose each descriptor is."""
        poll, party_of = select.poll(), {}
        for party, peer in self._peers.items():
            for descriptor in (peer.fileno(), self._processes[party]):
                if descriptor is not None:
                    if descriptor < 0:
                        raise RuntimeError("This party has closed its connections")
                    poll.register(descriptor, select.POLLIN)
                    party_of[descriptor] = party
        return poll, party_of

    def _receive(self, party: int) -> bytes:
        """Return a message that has arrived.

        Raises:
            RuntimeError: If there is none, since the party has gone.
        """
        message = b""
        with contextlib.suppress(OSError):
            try:
                message = self._peers[party].recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except ConnectionResetError:  # it has gone, but its message may be behind this
                message = self._peers[party].recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
        if not message:
            raise RuntimeError(_closed_by(party))
        return message


def connect(rank: int, size: int, timeout_s: float, gather: Gather, *, wanted: bool) -> HostSockets | str:
    """Connect all parties of a launch if they share a host; else return why not. All come to the same.

    Args:
        rank: This party.
        size: Number of parties.
        timeout_s: Seconds a party may be late later on.
        gather: Publishes a JSON value, and returns all parties' in order.
        wanted: Whether this party wants it.
    """
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as connected:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) if wanted and _supported() else None
        name = f"pellm-{secrets.token_hex(16)}"
        if listener is not None:
            opened.enter_context(listener)
            listener.bind(f"\0{name}")  # an abstract name, of which no file is left
            listener.listen(size)
            listener.settimeout(_CONNECT_S)
        offers = gather("host", None if listener is None else [_host(), name])
        if listener is None or None in offers:
            return "a party does not want it, or its system cannot"
        if any(host != offers[0][0] for host, _ in offers):
            return "the parties are on several hosts, or of several users"
        peers: dict[int, socket.socket] = {}
        failure = None
        try:
            for party in range(rank):
                peers[party] = connected.enter_context(_dial(offers[party][1], rank))
            while len(peers) < size - 1:
                party, peer = _accept(listener)
                peers[party] = connected.enter_context(peer)
        except (OSError, ValueError) as error:
            failure = f"party {rank}: {error}"
        failures = gather("host connections", failure)
        first = next(filter(None, failures), None)
        if first is not None:
            return str(first)
        connected.pop_all()
        return HostSockets(rank, peers, timeout_s)


def _closed_by(party: int) -> str:
    return f"Connection closed by party {party}"


def _supported() -> bool:
    """Whether this is a system whose sockets and memory work as is needed here."""
    return hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED") and os.path.exists("/proc/self/ns")


def _host() -> list[object]:
    """Return what parties must have in common to reach each other by an abstract name."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return [file.read().strip(), os.readlink("/proc/self/ns/net"), os.geteuid()]


def _dial(name: str, rank: int) -> socket.socket:
    """Return a connection to the party that listens at an abstract name."""
    with contextlib.ExitStack() as opened:
        peer = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        peer.settimeout(_CONNECT_S)
        peer.connect(f"\0{name}")
        _check_user(peer)
        peer.send(str(rank).encode())
        peer.settimeout(None)
        opened.pop_all()
    return peer


def _accept(listener: socket.socket) -> tuple[int, socket.socket]:
    """Return who has connected, and the connection."""
    with contextlib.ExitStack() as opened:
        peer = opened.enter_context(listener.accept()[0])
        peer.settimeout(_CONNECT_S)
        _check_user(peer)
        party = int(peer.recv(MESSAGE_BYTES))
        peer.settimeout(None)
        opened.pop_all()
    return party, peer


def _credentials(peer: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end, as the kernel knows them."""
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(data)
    return process, user


def _check_user(peer: socket.socket) -> None:
    """Refuse other users: names of this kind are open to all of a host."""
    _, user = _credentials(peer)
    if user != os.geteuid():
        raise OSError(f"a process of user {user} answers")


def _watched_process(peer: socket.socket) -> int | None:
    """Return a descriptor that can be read once the process at the other end has ended, if possible."""
    process, _ = _credentials(peer)
    if process in (0, os.getpid()):  # of another namespace, or a thread of this one
        return None
    try:
        return os.pidfd_open(process)
    except OSError:  # a container may forbid it; then the sockets have to do
        return None
