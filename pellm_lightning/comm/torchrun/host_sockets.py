"""Unix sockets between the parties of one host: a barrier that notices the dead, and memory for all."""

import contextlib
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from pellm_lightning.comm.torchrun.lane import LEFT

_CONNECT_S = 10.0
# A party that has left when all had come to it is no loss: what they sent to others arrives within this.
_LEFT_S = 0.5
MESSAGE_BYTES = 1 << 15
"""Longest message of an exchange."""
_CREDENTIALS = struct.Struct("3i")  # process, user and group, as SO_PEERCRED gives them
_FILE = struct.Struct("i")  # a descriptor, as SCM_RIGHTS gives it
Gather: TypeAlias = Callable[[str, object], list[Any]]


class LateError(RuntimeError):
    """Timeout of an exchange, with the parties that have sent nothing."""

    def __init__(self, parties: Sequence[int]) -> None:
        super().__init__("Timed out waiting for other parties of this host")
        self.parties = parties


class HostSockets:
    """Connections of this party to each other party of its host.

    The kernel's queues order memory: what a party has written before it sends is there for who has received,
    on every kind of processor. A process that ends closes its sockets, however it ends. Since a child that it
    has forked may hold them open, the process itself is watched also.

    Args:
        party: This party.
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

    def __init__(self, party: int, peers: Mapping[int, socket.socket], timeout_s: float) -> None:
        self.party = party
        self.parties = sorted([party, *peers])
        """The parties of this host, of which ``rank`` is the place of this one."""
        self.rank = self.parties.index(party)
        self.size = len(self.parties)
        self._peers = dict(peers)
        self._timeout_s = timeout_s
        self._processes = {party: _watched_process(sock) for party, sock in self._peers.items()}
        # Held while they are watched: the numbers of closed descriptors are soon those of others.
        self._in_use = threading.RLock()
        self._closed = False

    def exchange(self, message: bytes, files: list[int] | None = None) -> list[bytes]:
        """Send a message of 1 byte to 32 KiB to all, and return all parties' in order: a barrier.

        Args:
            message: This party's.
            files: Descriptors of open files that all receive with it; those of the others are appended. All
                parties give a list, or none does.

        Raises:
            RuntimeError: If a party has gone, or is late.
        """
        with self._in_use:
            return self._exchange(message, files)

    def _exchange(self, message: bytes, files: list[int] | None) -> list[bytes]:
        if self._closed:
            raise RuntimeError(LEFT)
        own = list(files or ())
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # who has gone is found below, with what it sent before
                socket.send_fds(peer, [message], own) if own else peer.send(message)
        received = {self.party: message}
        deadline = time.monotonic() + self._timeout_s
        poll, party_of = self._watch()
        gone = None
        while len(received) < self.size:
            ready = poll.poll(1e3 * max(deadline - time.monotonic(), 0))
            if not ready:
                late = LateError([party for party in self.parties if party not in received])
                raise late if gone is None else self._lost(gone)
            for descriptor, _ in ready:
                party = party_of[descriptor]
                if party not in received:
                    received[party] = self._receive(party, files)
                    # It may be one barrier ahead already: only its end matters now.
                    poll.modify(self._peers[party].fileno(), 0)
                else:  # it has gone: either all have come to it, whose messages are here soon, or never will
                    gone, deadline = party, min(deadline, time.monotonic() + _LEFT_S)
                    poll.unregister(descriptor)
        return [received[party] for party in self.parties]

    def close(self) -> None:
        """Break the connections; who waits in ``exchange``, here or elsewhere, wakes and fails."""
        self._closed = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # closing alone would not wake a thread of this process
                peer.shutdown(socket.SHUT_RDWR)
        with self._in_use:
            for peer in self._peers.values():
                peer.close()
            processes, self._processes = self._processes, {}
            for process in processes.values():
                if process is not None:
                    os.close(process)

    def _watch(self) -> tuple[select.poll, dict[int, int]]:
        """Return what waits for the others, and whose each descriptor is."""
        poll, party_of = select.poll(), {}
        for party, peer in self._peers.items():
            for descriptor in (peer.fileno(), self._processes[party]):
                if descriptor is not None:
                    poll.register(descriptor, select.POLLIN)
                    party_of[descriptor] = party
        return poll, party_of

    def _receive(self, party: int, files: list[int] | None) -> bytes:
        """Return a message that has arrived.

        Raises:
            RuntimeError: If there is none, since the party has gone.
        """
        message = b""
        with contextlib.suppress(OSError):
            try:
                message = _received(self._peers[party], files)
            except ConnectionResetError:  # it has gone, but its message may be behind this
                message = _received(self._peers[party], files)
        if not message:
            raise self._lost(party)
        return message

    def _lost(self, party: int) -> RuntimeError:
        return RuntimeError(LEFT if self._closed else f"Connection closed by party {party}")


def connect(
    party: int, num_parties: int, timeout_s: float, gather: Gather, *, wanted: bool
) -> tuple[list[list[int]], HostSockets | None] | str:
    """Connect the parties of each host; say why not, if none is to be. All come to the same.

    Args:
        party: This party.
        num_parties: Number of parties.
        timeout_s: Seconds a party may be late later on.
        gather: Publishes a JSON value, and returns all parties' in order.
        wanted: Whether this party wants it.

    Returns:
        The parties by host, in the order of the hosts' first ones; and the connections of this party, None if
        it is alone on its host.
    """
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as connected:
        listener, offer = None, None
        with contextlib.suppress(OSError):  # then this system cannot, for which the others must not wait
            if wanted and _supported():
                listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                name = f"pellm-{secrets.token_hex(16)}"
                listener.bind(f"\0{name}")  # an abstract name, of which no file is left
                listener.listen(socket.SOMAXCONN)  # others of this host may connect also
                offer = [_host(), name]
        offers = gather("host", offer)
        if listener is None or None in offers:
            return "a party does not want it, or its system cannot"
        hosts = _by_host([host for host, _ in offers])
        if len(hosts) == num_parties:
            return "the parties are on several hosts, or of several users"
        others = next({*host} for host in hosts if party in host) - {party}
        peers: dict[int, socket.socket] = {}
        failure = None
        try:
            for other in sorted(other for other in others if other < party):
                peers[other] = connected.enter_context(_dial(offers[other][1], party))
            deadline = time.monotonic() + _CONNECT_S
            while missing := others - {*peers}:
                other, peer = _accept(listener, missing, deadline)
                peers[other] = connected.enter_context(peer)
        except OSError as error:
            failure = f"party {party}: {error}"
        failures = gather("host connections", failure)
        first = next(filter(None, failures), None)
        if first is not None:
            return str(first)
        sockets = HostSockets(party, peers, timeout_s) if peers else None
        connected.pop_all()
        return hosts, sockets


def _by_host(hosts: Sequence[object]) -> list[list[int]]:
    """Return the parties of each host, from the host of each party."""
    found: list[list[int]] = []
    for party, host in enumerate(hosts):
        together = next((of_host for of_host in found if hosts[of_host[0]] == host), None)
        if together is None:
            found.append([party])
        else:
            together.append(party)
    return found


def _supported() -> bool:
    """Whether this is a system whose sockets and memory work as is needed here."""
    return hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED") and os.path.exists("/proc/self/ns")


def _host() -> list[object]:
    """Return what parties must have in common to reach each other by an abstract name."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return [file.read().strip(), os.readlink("/proc/self/ns/net"), os.geteuid()]


def _dial(name: str, party: int) -> socket.socket:
    """Return a connection to the party that listens at an abstract name."""
    with contextlib.ExitStack() as opened:
        peer = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        peer.settimeout(_CONNECT_S)
        peer.connect(f"\0{name}")
        _check_user(peer)
        peer.send(str(party).encode())
        peer.settimeout(None)
        opened.pop_all()
    return peer


def _accept(listener: socket.socket, expected: Collection[int], deadline: float) -> tuple[int, socket.socket]:
    """Return which of the expected parties has connected, and the connection; anybody else's is closed."""
    while (left_s := deadline - time.monotonic()) > 0:
        listener.settimeout(left_s)
        with contextlib.ExitStack() as opened:
            peer = opened.enter_context(listener.accept()[0])
            peer.settimeout(left_s)
            with contextlib.suppress(OSError, ValueError):  # no party of ours
                _check_user(peer)
                party = int(peer.recv(MESSAGE_BYTES))
                if party in expected:
                    peer.settimeout(None)
                    opened.pop_all()
                    return party, peer
    raise TimeoutError(f"party {min(expected)} has not connected")


def _received(peer: socket.socket, files: list[int] | None) -> bytes:
    """Return a message that has arrived; what it brings of files is appended, or closed without a list."""
    if files is None:
        return peer.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
    # Not socket.recv_fds, which ignores its flags and would wait.
    message, ancillary, _, _ = peer.recvmsg(MESSAGE_BYTES, socket.CMSG_LEN(_FILE.size), socket.MSG_DONTWAIT)
    files += [_FILE.unpack(data)[0] for _, _, data in ancillary]
    return message


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
    except (OSError, AttributeError):  # a container forbids it, or Python lacks it: the sockets have to do
        return None
