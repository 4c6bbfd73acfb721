"""Hosts of their own within one test: network namespaces, by lines that are slow, lossy, cut or filtered.

Each line is a TUN device, whose packets a thread of the test carries. Namespaces have no names, and they and
the devices belong to descriptors of this process, so nothing is left of a network when it ends, however it
ends. Nothing leads out of it.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import count, product
from typing import Any, TypeAlias

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES = 2048
# A line holds no more than it carries in so many seconds; the rest is lost, as at a router.
_QUEUE_S = 0.5
_IPV4, _TCP = 4, 6
_SOURCE, _DESTINATION = slice(12, 16), slice(16, 20)
_SYN, _ACK = 0x02, 0x10


Connection: TypeAlias = tuple[str, str, int]
"""A connection by TCP: the host that opens it, the host where, and the port there."""


class NoNetworkError(Exception):
    """This system does not let a test have networks of its own; says why."""


@dataclass(frozen=True)
class Host:
    """One host: a network namespace with one line."""

    address: str
    namespace: int
    line: int

    @property
    def entrance(self) -> str:
        """Path of the namespace, for ``enter`` in another process."""
        return f"/proc/{os.getpid()}/fd/{self.namespace}"


@dataclass(order=True)
class _Packet:
    due: float
    number: int
    to: Host = field(compare=False)
    content: bytes = field(compare=False)


class Network:
    """Hosts that reach one another over lines of their own; may be changed at any time.

    Args:
        names: What the hosts are called.
        addresses: The address of each host, in the same order; of its own choice if there are none.

    Raises:
        NoNetworkError: If the system does not let this process have one.
    """

    def __init__(self, *names: str, addresses: Sequence[str] = ()) -> None:
        self.delay_s = 0.0
        """Seconds that a packet is under way, one way."""
        self.loss = 0.0
        """Probability with which a packet is lost."""
        self.bits_per_s = float("inf")
        """What each host can send."""
        self.lost: Counter[str] = Counter()
        """Packets that did not arrive, by reason."""
        self.bytes_sent = 0
        self.firewall: Collection[Connection] | None = None
        """The connections that may be opened; None lets everything pass."""
        self.opened: set[Connection] = set()
        """What was opened, or tried."""
        self._flows: set[frozenset[tuple[bytes, int]]] = set()
        self._forgotten: set[frozenset[tuple[bytes, int]]] = set()
        self._cut: frozenset[tuple[str, str]] = frozenset()
        self._under_way: list[_Packet] = []
        self._numbers = count()
        self._random = random.Random(1)
        self._free = dict.fromkeys(names, 0.0)
        self._closing = False
        self.hosts: dict[str, Host] = {}
        try:
            addresses = addresses or [f"10.77.0.{number}" for number in range(1, len(names) + 1)]
            for name, address in zip(names, addresses, strict=True):
                self.hosts[name] = _host(address)
        except BaseException:
            self._close_hosts()
            raise
        self._by_address = {socket.inet_aton(host.address): name for name, host in self.hosts.items()}
        self._thread = threading.Thread(target=self._carry, name="network")
        self._thread.start()

    def cut(self, some: Collection[str], others: Collection[str]) -> None:
        """Let no packet pass between some hosts and others, from now on."""
        self._cut |= {*product(some, others), *product(others, some)}

    def split(self, *groups: Collection[str]) -> None:
        """Cut the network into groups."""
        for index, group in enumerate(groups):
            for other in groups[:index]:
                self.cut(group, other)

    def heal(self) -> None:
        """Mend all cuts."""
        self._cut = frozenset()

    def forget(self) -> None:
        """Drop the packets of all connections opened until now, as a firewall that has forgotten them."""
        self._forgotten |= self._flows

    def close(self) -> None:
        """Remove everything; processes that are still inside find their lines gone."""
        self._closing = True
        self._thread.join()
        self._close_hosts()

    def _carry(self) -> None:
        with selectors.DefaultSelector() as selector:
            for name, host in self.hosts.items():
                selector.register(host.line, selectors.EVENT_READ, name)
            while not self._closing:
                wait_s = self._under_way[0].due - time.monotonic() if self._under_way else 0.1
                for key, _ in selector.select(min(max(wait_s, 0.0), 0.1)):
                    for packet in _packets(key.fd):
                        self._send(key.data, packet)
                while self._under_way and self._under_way[0].due <= time.monotonic():
                    packet_due = heapq.heappop(self._under_way)
                    with contextlib.suppress(OSError):  # nobody has brought the line up, or it is full
                        os.write(packet_due.to.line, packet_due.content)

    def _send(self, sender: str, packet: bytes) -> None:
        receiver = self._by_address.get(packet[_DESTINATION])
        if packet[0] >> 4 != _IPV4 or receiver is None:
            return
        now = time.monotonic()
        begins = max(now, self._free[sender])
        opens = _opened_port(packet)
        if opens is not None:
            self.opened.add((sender, receiver, opens))
        if self.firewall is not None and not self._passes(sender, receiver, packet, opens):
            self.lost["firewall"] += 1
        elif self._forgets(packet):
            self.lost["forgotten"] += 1
        elif (sender, receiver) in self._cut:
            self.lost["cut"] += 1
        elif self._random.random() < self.loss:
            self.lost["loss"] += 1
        elif begins - now > _QUEUE_S:
            self.lost["queue"] += 1
        else:
            self.bytes_sent += len(packet)
            self._free[sender] = begins + 8 * len(packet) / self.bits_per_s
            due = self._free[sender] + self.delay_s
            heapq.heappush(self._under_way, _Packet(due, next(self._numbers), self.hosts[receiver], packet))

    def _passes(self, sender: str, receiver: str, packet: bytes, opens: int | None) -> bool:
        """Filter by state, as a firewall does: TCP that was opened with leave, and the answers to it."""
        assert self.firewall is not None
        if opens is not None:
            return (sender, receiver, opens) in self.firewall
        source, destination = _ports(packet)
        own, answered = (sender, receiver, destination), (receiver, sender, source)
        return packet[9] == _TCP and (own in self.firewall or answered in self.firewall)

    def _forgets(self, packet: bytes) -> bool:
        """Note the connection that a packet is of; tell whether it was forgotten."""
        if packet[9] != _TCP:
            return False
        ends = zip((packet[_SOURCE], packet[_DESTINATION]), _ports(packet), strict=True)
        flow = frozenset(ends)
        self._flows.add(flow)
        return flow in self._forgotten

    def _close_hosts(self) -> None:
        for host in self.hosts.values():
            os.close(host.line)
            os.close(host.namespace)


def enter(entrance: str) -> None:
    """Move this thread, and those it will start, to a host."""
    with open(entrance, "rb") as namespace:
        _call("setns", namespace.fileno(), _CLONE_NEWNET)


def why_none() -> str | None:
    """Return why no test can have a network here, None if it can."""
    try:
        Network("here").close()
    except NoNetworkError as error:
        return str(error)
    return None


def _host(address: str) -> Host:
    """Make a host; what it consists of is gone with its descriptors."""

    def make() -> Host:
        _call("unshare", _CLONE_NEWNET)
        namespace = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
        try:
            line = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        except OSError:
            os.close(namespace)
            raise
        host = Host(address, namespace, line)
        try:
            fcntl.ioctl(line, _TUNSETIFF, struct.pack("16sH22x", b"line", _IFF_TUN | _IFF_NO_PI))
            commands = (
                "addr add {}/32 dev line",
                "link set line up",
                "link set lo up",
                "route add default dev line",
            )
            for words in commands:
                command = ["ip", *words.format(address).split()]
                subprocess.run(command, check=True, capture_output=True, text=True)
        except BaseException:
            os.close(line)
            os.close(namespace)
            raise
        return host

    try:
        return in_thread(make)
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        raise NoNetworkError(
            f"no network namespace with a TUN device can be made here ({error}); it takes Linux, root"
            " (CAP_NET_ADMIN), /dev/net/tun and iproute2"
        ) from error


def in_thread(act: Callable[[], Any]) -> Any:
    """Return what ``act`` returns, done by a thread of its own: a namespace is left only by ending."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _ports(packet: bytes) -> tuple[int, int]:
    """The port that a packet comes from, and that it goes to."""
    start = 4 * (packet[0] & 15)
    source, destination = struct.unpack("!HH", packet[start : start + 4])
    return source, destination


def _opened_port(packet: bytes) -> int | None:
    """The port to which a packet opens a TCP connection, None if it opens none."""
    if packet[9] != _TCP or packet[4 * (packet[0] & 15) + 13] & (_SYN | _ACK) != _SYN:
        return None
    return _ports(packet)[1]


def _packets(line: int) -> list[bytes]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while len(found) < 64:
            found.append(os.read(line, _PACKET_BYTES))
    return found


def _call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
