"""The rendezvous: what it keeps, whom it lets in, and that nobody can harm it or hold up the others."""

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from certificates import tls_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pellm_lightning.comm import FederationError
from pellm_lightning.comm.rendezvous import connection_handler, frames, key_value_store
from pellm_lightning.comm.rendezvous.client import RendezvousStore
from pellm_lightning.comm.rendezvous.frames import (
    HELLO,
    FrameError,
    Op,
    length,
    pack,
    pack_body,
    unpack,
)
from pellm_lightning.comm.rendezvous.key_value_store import KeyValueStore, RefusedError
from pellm_lightning.comm.rendezvous.server import RendezvousServer

ROSTER = ["clinic-a", "clinic-b"]
SOON_S = 0.5
"""An innocent client's request takes about 0.2 ms; this is what a loaded machine may add."""


@pytest.fixture(scope="module")
def plain() -> Iterator[RendezvousServer]:
    with RendezvousServer("127.0.0.1", 0) as server:
        yield server


@pytest.fixture(scope="module")
def encrypted() -> Iterator[RendezvousServer]:
    with RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=tls_of("rendezvous")) as server:
        yield server


@pytest.fixture(params=["plain", "encrypted"])
def either(request: pytest.FixtureRequest) -> RendezvousServer:
    server: RendezvousServer = request.getfixturevalue(request.param)
    return server


def port_of(server: RendezvousServer) -> int:
    return int(server.address.rpartition(":")[2])


def client_of(server: RendezvousServer, name: str = "clinic-a") -> RendezvousStore:
    tls = tls_of(name) if server._encrypted else None
    return RendezvousStore(server.address, tls=tls, timeout_s=5, retry_s=5)


def raw(server: RendezvousServer, hello: bytes = HELLO, name: str = "clinic-a") -> socket.socket:
    """A connection in the hands of the test."""
    sock = socket.create_connection(("127.0.0.1", port_of(server)), 5)
    if server._encrypted:
        sock = tls_of(name).client_context.wrap_socket(sock)
    sock.sendall(hello)
    return sock


def ended(sock: socket.socket) -> bytes:
    """Everything that comes until the other end closes."""
    heard = b""
    with sock, contextlib.suppress(ConnectionError, ssl.SSLError):
        while piece := sock.recv(65536):
            heard += piece
    return heard


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def guests_of(server: RendezvousServer) -> int:
    return sum(len(guest.connections) for guest in list(server._handler._sessions.values()))


def slowest(act: Callable[[], Any], times: int = 50) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return max(taken)


# ---- frames


fields = st.lists(st.none() | st.binary(max_size=50), max_size=20)


@given(tag=st.integers(0, 255), fields=fields)
def test_frames_come_back_as_they_were(tag: int, fields: list[bytes | None]) -> None:
    frame = pack(tag, fields)
    assert length(frame[:4]) == len(frame) - 4
    assert unpack(frame[4:]) == (tag, fields)


@given(body=st.binary(min_size=1, max_size=200))
def test_any_body_is_understood_or_refused(body: bytes) -> None:
    try:
        tag, fields = unpack(body)
    except FrameError:
        return
    assert pack(tag, fields)[4:] == body


def test_frames_are_bounded() -> None:
    for size in (0, frames.MAX_FRAME_BYTES + 1, 2**32 - 1):
        with pytest.raises(FrameError, match="a frame of"):
            length(struct.pack("!I", size))
    with pytest.raises(FrameError, match="too many fields"):
        unpack(pack(1, [b""] * (frames.MAX_FIELDS + 1))[4:])
    biggest = [b"k" * frames.MAX_KEY_BYTES, *[bytes(frames.MAX_VALUE_BYTES)] * 2]
    assert length(pack(Op.COMPARE_SET, biggest)[:4])


# ---- the table


def test_a_table_counts_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_value_store, "MAX_BYTES", 20)
    kept = KeyValueStore()
    kept.answer(Op.SET, [b"key", b"x" * 10], None)  # 13 bytes
    kept.answer(Op.SET, [b"key", b"x" * 17], None)  # 20 bytes
    with pytest.raises(RefusedError, match=r"used up\. Delete old keys"):
        kept.answer(Op.SET, [b"key", b"x" * 18], None)
    with pytest.raises(RefusedError, match="used up"):
        kept.answer(Op.COMPARE_SET, [b"k", b"", b""], None)
    assert kept.answer(Op.MULTI_GET, [b"key", b"k"], None) == [b"x" * 17, None]
    assert kept.answer(Op.DELETE, [b"key"], None) == [b"1"]
    kept.answer(Op.SET, [b"other", b"x" * 15], None)
    assert kept._size_bytes == 20


def test_a_table_counts_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_value_store, "MAX_KEYS", 2)
    kept = KeyValueStore()
    for key in (b"a", b"b", b"a"):
        kept.answer(Op.SET, [key, b""], None)
    for op, more in ((Op.SET, [b""]), (Op.ADD, [b"1"]), (Op.COMPARE_SET, [b"", b""])):
        with pytest.raises(RefusedError, match="There are 2 keys already"):
            kept.answer(op, [b"c", *more], None)
    assert len(kept) == 2


@pytest.mark.parametrize("amount", [b"", b"x", b"1.5", b" 1", b"+1", b"1" * 20, b"9223372036854775807"])
def test_only_whole_numbers_of_64_bits_are_added(amount: bytes) -> None:
    kept = KeyValueStore()
    kept.answer(Op.SET, [b"n", b"1"], None)
    with pytest.raises(RefusedError, match=r"whole numbers|64 bits"):
        kept.answer(Op.ADD, [b"n", amount], None)
    assert kept.answer(Op.MULTI_GET, [b"n"], None) == [b"1"]


@pytest.mark.parametrize(
    ("op", "given"),
    [(0, []), (99, [b"a"]), (Op.SET, [b"a"]), (Op.SET, [b"a", None]), (Op.DELETE, []), (Op.CHECK, [None])],
)
def test_what_is_no_request_is_no_frame(op: int, given: list[bytes | None]) -> None:
    with pytest.raises(FrameError):
        KeyValueStore().answer(op, given, None)


# Who may do what: (operation, key) -> whether clinic-a may.
RIGHTS = {
    (Op.SET, "at/@clinic-a"): True,
    (Op.ADD, "@clinic-a/n"): True,
    (Op.COMPARE_SET, "x/@clinic-a/y"): True,
    (Op.DELETE, "@clinic-a"): True,
    (Op.SET, "at/@clinic-b"): False,
    (Op.ADD, "@clinic-b/n"): False,
    (Op.COMPARE_SET, "x/@clinic-b/y"): False,
    (Op.DELETE, "@clinic-b"): False,
    (Op.SET, "@clinic-a/@clinic-b"): False,
    (Op.SET, "@"): False,
    (Op.SET, "@clinic-a2"): False,
    (Op.SET, "@clinic-"): False,
    (Op.SET, "plan/1"): False,
    (Op.ADD, "plan/1"): False,
    (Op.SET, "mail@clinic-a"): False,  # not at the start of a component
    (Op.COMPARE_SET, "plan/1"): True,
    (Op.DELETE, "plan/1"): True,
    (Op.MULTI_GET, "@clinic-b"): True,
    (Op.CHECK, "@clinic-b"): True,
}


@pytest.mark.parametrize(("op", "key"), RIGHTS)
def test_who_may_do_what(op: Op, key: str) -> None:
    more = {Op.SET: [b"1"], Op.ADD: [b"1"], Op.COMPARE_SET: [b"", b"1"]}.get(op, [])
    kept = KeyValueStore()
    if RIGHTS[op, key]:
        kept.answer(op, [key.encode(), *more], "clinic-a")
    else:
        with pytest.raises(RefusedError, match="clinic-a"):
            kept.answer(op, [key.encode(), *more], "clinic-a")
        assert len(kept) == 0
    kept.answer(op, [key.encode(), *more], None)


# ---- transactions


def transaction(*requests: tuple[Op, list[bytes]]) -> list[bytes]:
    return [pack_body(op, fields) for op, fields in requests]


def test_a_transaction_is_done_in_order() -> None:
    kept = KeyValueStore()
    requests = transaction(
        (Op.EXPECT, [b"a", b""]),
        (Op.SET, [b"a", b"1"]),
        (Op.EXPECT, [b"a", b"1"]),
        (Op.COMPARE_SET, [b"b", b"", b"2"]),
        (Op.DELETE, [b"a"]),
        (Op.MULTI_GET, [b"a", b"b"]),
    )
    answer = kept.answer(Op.TRANSACT, requests, None)
    assert answer == [b"1", b"", b"0", b"1", b"1", b"1", b"2", b"1", b"1", b"2", None, b"2"]


def test_a_transaction_ends_at_what_was_not_expected() -> None:
    kept = KeyValueStore()
    kept.answer(Op.SET, [b"life", b"2"], None)
    requests = transaction((Op.SET, [b"before", b""]), (Op.EXPECT, [b"life", b"1"]), (Op.SET, [b"a", b"1"]))
    assert kept.answer(Op.TRANSACT, requests, None) == [b"0", b"1", b"2"]
    assert kept.answer(Op.CHECK, [b"before", b"a"], None) == [b"1", b"0"]


@pytest.mark.parametrize(("op", "key"), [right for right in RIGHTS if right[0] in KeyValueStore.TRANSACTED])
def test_in_a_transaction_each_may_do_what_it_may_do_alone(op: Op, key: str) -> None:
    more = {Op.SET: [b"1"], Op.COMPARE_SET: [b"", b"1"]}.get(op, [])
    kept = KeyValueStore()
    requests = transaction((Op.SET, [b"at/@clinic-a", b"here"]), (op, [key.encode(), *more]))
    if RIGHTS[op, key]:
        kept.answer(Op.TRANSACT, requests, "clinic-a")
        return
    with pytest.raises(RefusedError, match="clinic-a"):
        kept.answer(Op.TRANSACT, requests, "clinic-a")
    assert len(kept) == 0, "a refused transaction was half done"


def test_a_transaction_over_a_limit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeyValueStore()
    for key, value in ((b"old", b"1"), (b"gone", b"2"), (b"more", b"3")):
        kept.answer(Op.SET, [key, value], None)
    monkeypatch.setattr(key_value_store, "MAX_KEYS", 4)
    before, size_bytes = dict(kept._values), kept._size_bytes
    requests = [(Op.SET, [b"old", b"new"]), (Op.DELETE, [b"gone"]), (Op.SET, [b"one", b""])]
    refused = [(Op.SET, [b"two", b""]), (Op.SET, [b"three", b""])]
    with pytest.raises(RefusedError, match="There are 4 keys already"):
        kept.answer(Op.TRANSACT, transaction(*requests, *refused), None)
    assert (kept._values, kept._size_bytes) == (before, size_bytes)
    kept.answer(Op.TRANSACT, transaction(*requests, refused[0]), None)
    assert sorted(kept._values) == [b"more", b"old", b"one", b"two"]


def test_what_cannot_be_part_of_a_transaction_is_no_request() -> None:
    for request in (
        (Op.ADD, [b"n", b"1"]),  # an answer that is lost would count it twice
        (Op.TRANSACT, []),
        (Op.AWAIT, [b"1", b"a", b""]),
        (99, [b"a"]),
        (Op.SET, [b"a"]),
        (Op.MULTI_GET, [b"a"] * frames.MAX_FIELDS),
    ):
        kept = KeyValueStore()
        with pytest.raises(FrameError):
            kept.answer(Op.TRANSACT, [pack_body(Op.SET, [b"a", b"1"]), pack_body(*request)], None)
        assert len(kept) == 0
    for body in (b"", None, b"\1\0\0"):
        with pytest.raises(FrameError):
            KeyValueStore().answer(Op.TRANSACT, [body], None)


def test_answers_of_a_transaction_fit_into_a_frame() -> None:
    kept = KeyValueStore()
    kept.answer(Op.SET, [b"large", bytes(frames.MAX_VALUE_BYTES)], None)
    get = (Op.MULTI_GET, [b"large"] * 3)
    answer = kept.answer(Op.TRANSACT, transaction((Op.EXPECT, [b"none", b""]), get), None)
    assert answer[2] == b"2", "the client asks for the rest"
    assert length(pack(0, answer)[:4])
    swap = (Op.COMPARE_SET, [b"large", b"", b""])
    with pytest.raises(RefusedError, match="do not fit into a frame"):
        kept.answer(Op.TRANSACT, transaction((Op.SET, [b"a", b""]), swap, swap, swap), None)
    assert len(kept) == 1


# ---- waiting


def waiting(key: bytes, known: bytes | None, seconds: float) -> bytes:
    return pack(Op.AWAIT, [b"%d" % (1000 * seconds), key, known])


@pytest.mark.parametrize("known", [None, b"old"])
def test_who_waits_is_answered_when_something_changes(either: RendezvousServer, known: bytes | None) -> None:
    client = client_of(either)
    client.delete_key("@clinic-a/x") if known is None else client.set("@clinic-a/x", known)
    with raw(either, name="clinic-b") as sock:
        assert sock.recv(100) == HELLO
        sock.sendall(waiting(b"@clinic-a/x", known, 20))
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(100)
        began = time.monotonic()
        client.set("@clinic-a/x", "new")
        sock.settimeout(5)
        assert sock.recv(100) == pack(0, [b"new"])
        assert time.monotonic() - began < SOON_S
        sock.sendall(waiting(b"@clinic-a/x", known, 20))  # what has changed before is answered at once
        assert sock.recv(100) == pack(0, [b"new"])
    client.delete_key("@clinic-a/x")


def test_a_wait_ends_with_its_time(either: RendezvousServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_handler, "_MAX_AWAIT_S", 0.2)
    client = client_of(either)
    with raw(either, name="clinic-b") as sock:
        assert sock.recv(100) == HELLO
        for seconds in (0, 0.1, 1000):
            sock.sendall(waiting(b"nothing", None, seconds))
            assert not client.check(["x"]), "the others are served"
            assert sock.recv(100) == pack(0, [None])


def test_who_waits_and_is_cut_is_forgotten(plain: RendezvousServer) -> None:
    socks = [raw(plain) for _ in range(3)]
    for sock in socks:
        assert sock.recv(100) == HELLO
        sock.sendall(waiting(b"nothing", None, 25))
    until(lambda: len(plain._handler._store._watches.get(b"nothing", ())) == 3)
    sessions = list(plain._handler._sessions.values())
    for connection in [one for session in sessions for one in session.connections]:  # who is cut leaves them
        plain._handler._loop.call_soon_threadsafe(connection.cut)  # type: ignore[union-attr]
    until(lambda: not plain._handler._store._watches)
    for sock in socks:
        assert ended(sock) == b""


@pytest.mark.parametrize(
    "request_",
    [[], [b"1"], [b"1", b"a"], [b"1", None, b""], [b"x", b"a", b""], [None, b"a", b""], [b"-1", b"a", b""]],
)
def test_what_is_no_request_to_wait_is_no_frame(request_: list[bytes | None]) -> None:
    with pytest.raises(FrameError):
        KeyValueStore().answer(Op.AWAIT, request_, None)


def test_a_request_that_waits_is_small() -> None:
    with pytest.raises(RefusedError, match="has 65536 bytes at most"):
        KeyValueStore().answer(Op.AWAIT, [b"1", b"a", bytes(64 << 10)], None)


def test_the_server_knows_who_writes(encrypted: RendezvousServer) -> None:
    a, b = client_of(encrypted, "clinic-a"), client_of(encrypted, "clinic-b")
    a.set("at/@clinic-a", "here")
    assert b.get("at/@clinic-a") == b"here"
    with pytest.raises(FederationError, match="belongs to another party than clinic-b"):
        b.set("at/@clinic-a", "gone")
    with pytest.raises(FederationError, match="belongs to another party than clinic-b"):
        b.delete_key("at/@clinic-a")
    with pytest.raises(FederationError, match="Use compare_set, or a key under @clinic-b"):
        b.set("plan", "mine")
    assert b.compare_set("plan", "", "mine") == b"mine"
    assert a.compare_set("plan", "", "yours") == b"mine"
    assert a.delete_key("plan")
    assert a.get("at/@clinic-a") == b"here"


# ---- strangers


def test_strangers_get_no_answer(encrypted: RendezvousServer) -> None:
    def plain_client() -> bytes:
        sock = socket.create_connection(("127.0.0.1", port_of(encrypted)), 5)
        sock.sendall(HELLO)
        return ended(sock)

    def foreign() -> bytes:
        sock = socket.create_connection(("127.0.0.1", port_of(encrypted)), 5)
        context = tls_of("clinic-a", "theirs").client_context
        context.verify_mode = ssl.CERT_NONE
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            sock = context.wrap_socket(sock)
            sock.sendall(HELLO)
        return ended(sock)

    assert ended(raw(encrypted, name="clinic-x")) == b""
    assert ended(raw(encrypted, name="rendezvous")) == b""
    assert HELLO[:8] not in plain_client()
    assert foreign() == b""


@pytest.mark.parametrize("hello", [b"GET / HTTP/1.1\r\n\r\n", bytes(10), b"pellm-xx\0\1"])
def test_who_says_something_else_than_hello_gets_no_answer(either: RendezvousServer, hello: bytes) -> None:
    assert ended(raw(either, hello)) == b""


def test_another_version_is_told_ours(either: RendezvousServer) -> None:
    assert ended(raw(either, HELLO[:-2] + b"\0\x07")) == HELLO


def test_silent_strangers_block_nobody(either: RendezvousServer) -> None:
    client = client_of(either)
    alone = slowest(lambda: client.check(["x"]))
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(either)), 5))
        until(lambda: len(either._handler._unauthenticated) > 200)
        assert slowest(lambda: client.check(["x"])) < SOON_S + alone
        start = time.perf_counter()
        client_of(either, "clinic-b").check(["x"])
        assert time.perf_counter() - start < 4 * SOON_S, "who comes after the strangers waits"
        assert len(either._handler._unauthenticated) <= connection_handler.MAX_UNAUTHENTICATED
    until(lambda: not either._handler._unauthenticated)


def test_strangers_are_shown_out(either: RendezvousServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_handler, "_HELLO_S", 0.2)
    with socket.create_connection(("127.0.0.1", port_of(either)), 5) as silent:
        silent.sendall(b"\x16" if either._encrypted else HELLO[:3])  # the beginning of something
        with contextlib.suppress(ConnectionError):
            assert silent.recv(1) == b""
    until(lambda: not either._handler._unauthenticated)


def test_half_a_frame_is_not_waited_for(either: RendezvousServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_handler, "_FRAME_S", 0.2)
    request = pack(Op.SET, [b"@clinic-a", b"1234"])
    for sent in (1, 4, 9, len(request) - 1):
        assert ended(raw(either, HELLO + request[:sent])) == HELLO
    with raw(either) as idle:
        assert idle.recv(100) == HELLO
        time.sleep(0.4)  # who is silent between two frames may stay
        idle.sendall(pack(Op.CHECK, [b"@clinic-a"]))
        assert idle.recv(100) == pack(0, [b"0"])


def test_who_takes_no_answer_is_shown_out(either: RendezvousServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_handler, "_FRAME_S", 0.3)
    client = client_of(either)
    client.set("@clinic-a/large", bytes(4 << 20))
    reader = raw(either, HELLO + pack(Op.CHECK, [b"x"]))
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    while not reader.recv(100).endswith(b"0"):
        pass
    seated = guests_of(either)
    tracemalloc.start()
    with contextlib.suppress(OSError):
        for _ in range(100):
            reader.sendall(pack(Op.MULTI_GET, [b"@clinic-a/large"] * 2))
    until(lambda: guests_of(either) < seated)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20  # not 100 answers of 8 MiB
    tracemalloc.stop()
    reader.close()
    assert client.delete_key("@clinic-a/large")


def test_answers_that_nobody_takes_are_not_piled_up(plain: RendezvousServer) -> None:
    client = client_of(plain)
    client.set("large", bytes(4 << 20))
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(raw(plain)) for _ in range(20)]
        for guest in guests:
            assert guest.recv(10) == HELLO
        tracemalloc.start()
        for guest in guests:
            guest.sendall(pack(Op.MULTI_GET, [b"large"] * 2))
        time.sleep(0.2)
        client.check(["x"])  # who comes after them is served
        assert tracemalloc.get_traced_memory()[1] < 32 << 20  # one answer of 8 MiB and its copies, not 20
        tracemalloc.stop()
    assert client.delete_key("large")


def test_the_newest_connections_of_a_party_win(encrypted: RendezvousServer) -> None:
    socks = [raw(encrypted, name="clinic-b") for _ in range(connection_handler.MAX_CONNECTIONS_PER_NAME + 2)]
    for sock in socks:
        assert sock.recv(10) == HELLO
    for sock in socks[:2]:
        assert ended(sock) == b""
    for sock in socks[2:]:
        sock.sendall(pack(Op.NUM_KEYS, []))
        assert sock.recv(100)
        sock.close()
    until(lambda: "clinic-b" not in encrypted._handler._sessions)


def test_what_was_buffered_before_a_cut_is_not_done() -> None:
    # Its sender gets no answer and will ask again; an addition must not count twice.
    async def attend() -> int:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            connection = connection_handler._Connection(*await asyncio.open_connection(sock=ours))
            connection.reader.feed_data(pack(Op.ADD, [b"n", b"1"]))
            connection.cut()
            with pytest.raises(ConnectionResetError):
                await handler._serve_requests(connection_handler._Session(None, "host"), connection)
        return len(handler._store)

    handler = connection_handler.ConnectionHandler(frozenset(), None)
    assert asyncio.run(attend()) == 0


def test_idle_guests_make_room(plain: RendezvousServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_handler, "MAX_CONNECTIONS", 5)
    busy = client_of(plain)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(raw(plain)).recv(10)
            assert not busy.check(["x"]), "who is heard stays"
        until(lambda: guests_of(plain) <= 5)


def test_loud_guests_leave_others_their_turn(either: RendezvousServer) -> None:
    client = client_of(either, "clinic-b")
    stop, shouted = threading.Event(), list[int]()

    def shout() -> None:
        requests, answers = pack(Op.CHECK, [b"x"]) * 2000, pack(0, [b"0"]) * 2000
        with raw(either) as sock:
            assert sock.recv(len(HELLO)) == HELLO
            while not stop.is_set():
                sock.sendall(requests)
                left = len(answers)
                while left:
                    left -= len(sock.recv(left))
                shouted.append(1)

    threads = [threading.Thread(target=shout) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(shouted) > 1)
        assert slowest(lambda: client.check(["x"]), times=20) < SOON_S
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# ---- noise


REQUESTS = [
    pack(Op.SET, [b"@clinic-a/n", b"1"]),
    pack(Op.COMPARE_SET, [b"@clinic-a/n", b"", b"2"]),
    pack(Op.ADD, [b"@clinic-a/n", b"5"]),
    pack(Op.DELETE, [b"@clinic-a/n"]),
    pack(Op.MULTI_GET, [b"@clinic-a/n", b"y"]),
    pack(Op.TRANSACT, transaction((Op.EXPECT, [b"y", b""]), (Op.SET, [b"@clinic-a/n", b"1"]))),
    pack(Op.AWAIT, [b"1", b"@clinic-a/n", None, b"y", b"z"]),
]


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """Requests, then cut, or with some bytes changed."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=4))))
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


def harmless(server: RendezvousServer, data: bytes) -> None:
    """Send noise, and see that the server only closes this one connection."""
    sock = socket.create_connection(("127.0.0.1", port_of(server)), 5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave no TIME_WAIT behind
    with sock, contextlib.suppress(ConnectionError):
        sock.sendall(data)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.recv(1000)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300) | spoiled().map(lambda data: HELLO + data) | spoiled())
def test_noise_changes_nothing(plain: RendezvousServer, data: bytes) -> None:
    harmless(plain, data)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.binary(max_size=300) | st.binary(max_size=300).map(lambda data: b"\x16\x03\x01\x01\x00" + data)
)
def test_noise_before_the_handshake_changes_nothing(encrypted: RendezvousServer, data: bytes) -> None:
    harmless(encrypted, data)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=spoiled())
def test_noise_of_a_member_changes_nothing(encrypted: RendezvousServer, data: bytes) -> None:
    with raw(encrypted, HELLO + data):
        pass


def test_after_all_that_the_servers_are_as_before(
    plain: RendezvousServer, encrypted: RendezvousServer
) -> None:
    for server in (plain, encrypted):
        with contextlib.closing(client_of(server)) as client:
            assert slowest(lambda client=client: client.check(["x"])) < SOON_S
            assert client.num_keys() < 20
        until(lambda server=server: not server._handler._sessions and not server._handler._unauthenticated)
        until(lambda server=server: not server._handler._tasks)
        assert server._thread
        assert server._thread.is_alive()


# ---- starting and stopping


def test_close_is_clean_and_idempotent() -> None:
    server = RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=tls_of("rendezvous"))
    with pytest.raises(RuntimeError, match=r"Call start\(\) first"):
        _ = server.address
    server.start()
    client = client_of(server)
    stranger = socket.create_connection(("127.0.0.1", port_of(server)), 5)
    client.set("@clinic-a", "x")
    with pytest.raises(RuntimeError, match="was started before"):
        server.start()
    server.close()
    server.close()
    assert ended(stranger) == b""
    assert server._thread
    assert not server._thread.is_alive()
    client.close()


def test_close_before_start_is_no_harm() -> None:
    server = RendezvousServer("127.0.0.1", 0)
    server.close()
    server.start()
    server.close()


def test_serving_in_this_thread_ends_with_close() -> None:
    server = RendezvousServer("127.0.0.1", 0)
    timer = threading.Timer(0.2, server.close)
    timer.start()
    server.serve_forever()
    timer.join()


def test_a_port_in_use_is_an_error(plain: RendezvousServer) -> None:
    with pytest.raises(OSError, match="in use"):
        RendezvousServer("127.0.0.1", port_of(plain)).start()


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    server = RendezvousServer("::1", 0)
    try:
        server.start()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with contextlib.closing(server):
        assert server.address.startswith("[::1]:")
        assert RendezvousStore(server.address, retry_s=5).num_keys() == 0


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"host is empty.*0\.0\.0\.0"):
        RendezvousServer("", 0)
    with pytest.raises(ValueError, match="port=65536"):
        RendezvousServer("127.0.0.1", 65536)
    with pytest.raises(ValueError, match="without a roster"):
        RendezvousServer("127.0.0.1", 0, tls=tls_of("rendezvous"))
    with pytest.raises(ValueError, match=r"is named 'clinic-a', but parties trust only"):
        RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=tls_of("clinic-a"))
    with pytest.raises(ValueError, match="No party can be called 'rendezvous'"):
        RendezvousServer("127.0.0.1", 0, roster=["rendezvous"])
    with pytest.raises(ValueError, match="is no party's name"):
        RendezvousServer("127.0.0.1", 0, roster=["a b"])


def test_an_open_server_warns(caplog: pytest.LogCaptureFixture) -> None:
    # 127.0.0.0/8 is this host; an address of all interfaces is not. It is bound, but nobody is served.
    server = RendezvousServer("0.0.0.0", 0)
    server._bind().close()
    assert "is open to everybody who reaches it" in caplog.text


def test_members_come_and_go_in_the_log(
    encrypted: RendezvousServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first, second = client_of(encrypted, "clinic-b"), client_of(encrypted, "clinic-b")
    first.close()
    second.close()
    until(lambda: "[clinic-b] disconnected" in caplog.text)
    assert caplog.text.count("[clinic-b] connected") == caplog.text.count("[clinic-b] disconnected") == 1


def test_parties_are_named_without_certificates_also(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with RendezvousServer("127.0.0.1", 0) as server:
        stores = [RendezvousStore(server.address) for _ in range(3)]
        for store, party in zip(stores, ("a", "a", "b"), strict=True):
            store.set(f"life/at/@{party}", "here")
            store.set(f"life/at/@{party}", "again")
        for store in stores[1:]:
            store.close()
        until(lambda: "[b] disconnected" in caplog.text)
        assert "[a] disconnected" not in caplog.text
        stores[0].close()
        until(lambda: "[a] disconnected" in caplog.text)
    own = [message for message in caplog.messages if message.startswith("[")]
    assert sorted(own[:2]) == ["[a] connected from 127.0.0.1", "[b] connected from 127.0.0.1"]
    assert len(own) == 4
