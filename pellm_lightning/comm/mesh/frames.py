"""Frames of tensors between two members.

Nothing here blocks, and nothing is allocated by a length that the other end claims: a receiver knows
beforehand what it expects, and reads into memory that it has.
"""

import contextlib
import socket
import ssl
import struct
import sys
from collections import deque
from enum import IntEnum
from selectors import EVENT_READ, EVENT_WRITE
from typing import NamedTuple

import torch


class Kind(IntEnum):
    """What a frame carries."""

    PART = 1
    SUM = 2
    BROADCAST = 3
    ALL_TO_ALL = 4
    LOST = 8
    MISMATCH = 9


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    *(torch.bool, torch.complex64, torch.complex128),
)
"""Dtypes that can be sent; the index is the code on the wire."""

_LABEL = struct.Struct("!4sBBHIQQ")
_LENGTH = struct.Struct("!I")
# Tensors go in the byte order of the machine; another order is no frame.
_FRAME_MAGIC = b"PeLF" if sys.byteorder == "little" else b"PeBF"
HEADER_BYTES = _LABEL.size + _LENGTH.size

# A frame that was begun must be completed before anything else can be sent, such as a failure notice.
_FRAME_BYTES = 1 << 20
# Copying so little costs less than a second packet.
_SMALL_BYTES = 8 << 10
# Send buffer of the system for connections within one host.
_LOCAL_BYTES = 256 << 10
# Reads in a row whose bytes are dropped.
_DRAINS = 16
# Bytes moved in one direction before the other has its turn.
_TURN_BYTES = 1 << 20


class Label(NamedTuple):
    """Header of a message; sender and receiver each make it from the arguments of their collective.

    Args:
        kind: A ``Kind``.
        dtype: Index into ``DTYPES``.
        source: Rank whose tensor is broadcast, else 0.
        sequence: Number of the collective.
        whole: Bytes of the whole tensor, 0 where members may differ.
        size: Bytes of this message.
    """

    kind: int
    dtype: int
    source: int
    sequence: int
    whole: int
    size: int

    def pack(self) -> bytes:
        """Return the label as bytes, which begin each frame."""
        return _LABEL.pack(_FRAME_MAGIC, *self)

    @classmethod
    def unpack(cls, packed: bytes) -> "Label | None":
        """Return the label, None if the bytes are no label."""
        magic, *fields = _LABEL.unpack(packed)
        return cls(*fields) if magic == _FRAME_MAGIC else None

    def __str__(self) -> str:
        kinds = {Kind.PART: "all_reduce", Kind.SUM: "all_reduce (sums)", Kind.ALL_TO_ALL: "all_to_all"}
        kind = kinds.get(Kind(self.kind)) if self.kind in (1, 2, 4) else None
        if self.kind == Kind.BROADCAST:
            kind = f"broadcast from member {self.source}"
        dtype = (
            str(DTYPES[self.dtype]).removeprefix("torch.") if self.dtype < len(DTYPES) else "unknown dtype"
        )
        size = f"{self.size} bytes" + (f" of {self.whole}" if self.whole else "")
        return f"{kind or f'message of kind {self.kind}'}, number {self.sequence}, {dtype}, {size}"


class Outgoing:
    """Message to send.

    Args:
        label: Its label.
        data: Its bytes, sent without a copy.
        ready: Number of bytes that can be sent already; the owner raises it.
    """

    def __init__(self, label: Label, data: memoryview, ready: int | None = None) -> None:
        self.data = data
        self.ready = len(data) if ready is None else ready
        self._label = label.pack()
        self._head = memoryview(b"")
        self._sent = 0
        self._stop = 0
        self._begun = False

    def upcoming(self) -> memoryview:
        """Return the bytes to send next, empty if none are ready."""
        if self._head:
            return self._head
        if self._sent == self._stop and (self.ready > self._sent or not (self._begun or self.data)):
            self._begin_frame()
            return self._head
        return self.data[self._sent : self._stop]

    def advance(self, sent: int) -> None:
        """Note that so many bytes of what was upcoming have been sent."""
        if self._head:
            self._head = self._head[sent:]
        else:
            self._sent += sent

    @property
    def is_done(self) -> bool:
        """Whether everything has been sent."""
        return self._begun and not self._head and self._sent == len(self.data)

    def cut(self) -> bool:
        """Make the frame that was begun the last one; return whether any of it is left to send."""
        self.data = self.data[: self._stop]
        self.ready = self._stop
        return self._begun and not self.is_done

    def _begin_frame(self) -> None:
        self._begun = True
        length = min(self.ready - self._sent, _FRAME_BYTES)
        head = self._label + _LENGTH.pack(length)
        self._stop = self._sent + length
        if length <= _SMALL_BYTES:
            head += self.data[self._sent : self._stop]
            self._sent = self._stop
        self._head = memoryview(head)


class Incoming:
    """Message to receive.

    Args:
        label: The label it must have.
        ring: Ring buffer for its bytes.
    """

    def __init__(self, label: Label, ring: memoryview) -> None:
        self.label = label
        self.received = 0
        self.freed = 0
        """Bytes that the owner has processed and that may be overwritten."""
        self._packed = label.pack()
        self._ring = ring
        self._head = bytearray(HEADER_BYTES)
        self._head_received = 0
        self._frame_left = 0
        self._begun = False

    def buffer(self) -> memoryview:
        """Return the buffer for the next bytes, empty while the ring is full."""
        if self._frame_left == 0:
            return memoryview(self._head)[self._head_received :]
        size = len(self._ring)
        start = self.received % size
        return self._ring[
            start : start + min(self._frame_left, size - self.received + self.freed, size - start)
        ]

    def advance(self, received: int) -> None:
        """Note that bytes were received into the buffer.

        Raises:
            UnexpectedFrameError: If that completes the head of an unexpected frame.
        """
        if self._frame_left:
            self.received += received
            self._frame_left -= received
            return
        self._head_received += received
        if self._head_received == HEADER_BYTES:
            self._read_head()

    @property
    def is_done(self) -> bool:
        """Whether everything was received."""
        return self._begun and self.received == self.label.size

    def _read_head(self) -> None:
        packed, self._head_received = bytes(self._head[: _LABEL.size]), 0
        (length,) = _LENGTH.unpack_from(self._head, _LABEL.size)
        # Only a message without bytes has a frame without bytes.
        fits = 0 < length <= self.label.size - self.received or length == self.label.size == 0
        if packed != self._packed or not fits:
            raise UnexpectedFrameError(Label.unpack(packed), length)
        self._begun = True
        self._frame_left = length


class UnexpectedFrameError(Exception):
    """A frame that was not expected: ``label`` is None for bytes that are no frame."""

    def __init__(self, label: Label | None, length: int) -> None:
        super().__init__(label, length)
        self.label = label
        self.length = length


class PeerDisconnectedError(Exception):
    """The other end closed the connection, or it broke."""


class Link:
    """Non-blocking connection to one member, with its queues of messages.

    Args:
        sock: Connected and non-blocking; the link closes it.
        rank: The member at the other end.
    """

    def __init__(self, sock: socket.socket, rank: int) -> None:
        self.sock = sock
        self.rank = rank
        self.outbox: deque[Outgoing] = deque()
        self.inbox: deque[Incoming] = deque()
        self.events = 0
        """Selector events that the last turn waits for."""
        self.is_hot = False
        """Whether the last turn ended only because of its limit of bytes."""
        self._send_error: OSError | None = None
        self._receive = sock.recv_into
        with contextlib.suppress(OSError):  # a peer that has disconnected is noticed at the first turn
            if sock.getsockname()[0] == sock.getpeername()[0]:
                # Within one host more would only push one another out of the caches: 0.8 of the time.
                # Elsewhere the system tunes it.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_BYTES)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to send or to receive."""
        return not self.outbox and not self.inbox

    def turn(self) -> int:
        """Send and receive without waiting; return the number of bytes moved.

        Raises:
            UnexpectedFrameError: If the other end sends an unexpected frame.
            PeerDisconnectedError: If it has disconnected too early.
        """
        self.events = 0
        sent = self.push()
        received = self._pull() if self.inbox else 0
        self.is_hot = max(sent, received) >= _TURN_BYTES
        if not self.inbox and self.outbox and self._send_error is not None:
            raise PeerDisconnectedError(str(self._send_error))
        return sent + received

    def send_last(self, label: Label) -> None:
        """Make ``label`` the last message, after the frame that is under way."""
        begun = [message for message in list(self.outbox)[:1] if message.cut()]
        self.outbox = deque([*begun, Outgoing(label, memoryview(b""))])

    def drain(self, scrap: bytearray) -> bool:
        """Finish sending, then read and drop what is received; return whether the other end has disconnected.

        Closing a connection without having read everything destroys what is still on its way.
        """
        self.push()
        try:
            if not self.outbox or self._send_error is not None:
                socket.socket.shutdown(self.sock, socket.SHUT_WR)
            for _ in range(_DRAINS):
                if not socket.socket.recv_into(self.sock, scrap):
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True
        return False

    def push(self) -> int:
        """Send without waiting; return the number of bytes sent.

        A disconnected peer is reported by ``turn``, which first reads what it has sent.
        """
        moved = 0
        while self.outbox and moved < _TURN_BYTES and self._send_error is None:
            message = self.outbox[0]
            upcoming = message.upcoming()
            if upcoming:
                sent = self._send(upcoming)
                message.advance(sent)
                moved += sent
            if message.is_done:
                self.outbox.popleft()
            elif not upcoming or sent < len(upcoming):
                break
        return moved

    def _pull(self) -> int:
        moved = 0
        while self.inbox and moved < _TURN_BYTES:
            message = self.inbox[0]
            buffer = message.buffer()
            received = self._fill(buffer)
            message.advance(received)
            moved += received
            if message.is_done:
                self.inbox.popleft()
            elif received < len(buffer) or not buffer:
                break
        return moved

    def _send(self, data: memoryview) -> int:
        """Send the start of ``data``; less than all means that the rest must wait."""
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError):
            sent = 0
        except ssl.SSLWantReadError:
            self.events |= EVENT_READ
            return 0
        except OSError as error:
            self._send_error = error
            return 0
        if sent < len(data):
            self.events |= EVENT_WRITE
        return sent

    def _fill(self, buffer: memoryview) -> int:
        """Fill the start of ``buffer``; less than all means that the rest was not received yet."""
        received = 0
        try:
            while received < len(buffer):
                # TLS returns 16 KiB at a time, and what it has already read does not wake a selector.
                some = self._receive(buffer[received:])
                if not some:
                    raise PeerDisconnectedError("it disconnected")
                received += some
        except (BlockingIOError, ssl.SSLWantReadError):
            self.events |= EVENT_READ
        except ssl.SSLWantWriteError:
            self.events |= EVENT_WRITE
        except OSError as error:
            raise PeerDisconnectedError(str(error)) from error
        return received
