"""The client of the rendezvous: a torch Store that survives restarts, and errors that say what to do."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from certificates import files, tls_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from party_threads import in_threads
from ports import free_port
from store_agreement import agree, steps

import pellm_lightning
from pellm_lightning.comm import FederationError
from pellm_lightning.comm.keys import make_ca, make_certificate
from pellm_lightning.comm.rendezvous import frames
from pellm_lightning.comm.rendezvous.client import RendezvousStore, connect
from pellm_lightning.comm.rendezvous.frames import DONE, HELLO, pack, unpack
from pellm_lightning.comm.rendezvous.key_value_store import KeyValueStore
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.comm.tls import TLS
from pellm_lightning.comm.torchrun.gloo import GlooGroup

ROSTER = ["clinic-a", "clinic-b"]
PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def plain() -> Iterator[RendezvousServer]:
    with RendezvousServer("127.0.0.1", 0) as server:
        yield server


@pytest.fixture(scope="module")
def encrypted() -> Iterator[RendezvousServer]:
    with RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=tls_of("rendezvous")) as server:
        yield server


@pytest.fixture(params=["plain", "encrypted"])
def store(request: pytest.FixtureRequest) -> Iterator[RendezvousStore]:
    server: RendezvousServer = request.getfixturevalue(request.param)
    tls = tls_of("clinic-a") if request.param == "encrypted" else None
    with contextlib.closing(RendezvousStore(server.address, tls=tls, timeout_s=5, retry_s=5)) as store:
        yield store


LIGHT = """
import sys, types
for name in ("pellm_lightning", "pellm_lightning.comm"):  # without the weight of what they import
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [sys.argv[1] + name.removeprefix("pellm_lightning").replace(".", "/")]
"""
PACKAGE = str(Path(pellm_lightning.__file__).parent)

# ---- as torch's own stores


@PROPERTY
@given(steps=steps)
def test_as_a_hash_store(store: RendezvousStore, steps: list[tuple[Any, ...]]) -> None:
    agree(store, dist.HashStore(), steps)


@settings(PROPERTY, max_examples=15)
@given(steps=steps)
def test_as_a_tcp_store(store: RendezvousStore, tcp_store: dist.Store, steps: list[tuple[Any, ...]]) -> None:
    agree(store, tcp_store, steps)


@pytest.fixture(scope="module")
def tcp_store() -> dist.Store:
    listener = socket.create_server(("127.0.0.1", 0))
    port, descriptor = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(
        "127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=descriptor, use_libuv=False
    )


def test_values_are_bytes(store: RendezvousStore) -> None:
    value = bytes(range(256))
    store.set("@clinic-a/bytes", value)
    assert store.get("@clinic-a/bytes") == value
    assert store.compare_set("@clinic-a/bytes", value, "ü") == "ü".encode()
    assert store.try_get("@clinic-a/bytes") == "ü".encode()
    assert store.try_multi_get(["@clinic-a/bytes", "none"]) == ["ü".encode(), None]
    store.multi_set(["@clinic-a/1", "@clinic-a/2"], ["1", b"2"])
    assert store.multi_get(["@clinic-a/2", "@clinic-a/1"]) == [b"2", b"1"]
    assert not store.has_extended_api()


def test_more_than_fits_into_one_answer(store: RendezvousStore) -> None:
    large = bytes(frames.MAX_VALUE_BYTES)
    store.set("@clinic-a/large", large)
    assert store.compare_set("@clinic-a/large", large, large) == large  # the largest request there is
    many = ["@clinic-a/large", "none"] * 4 + [f"none/{i}" for i in range(2500)]
    assert store.try_multi_get(many) == [large, None] * 4 + [None] * 2500
    assert not store.check(many)
    assert store.check(["@clinic-a/large"] * 2500)
    assert store.delete_key("@clinic-a/large")


def test_a_transaction_is_one_trip(store: RendezvousStore) -> None:
    key = b"@clinic-a/t"
    answers = store.transact(
        [
            (frames.Op.SET, [key, b"1"]),
            (frames.Op.COMPARE_SET, [key, b"1", b"2"]),
            (frames.Op.MULTI_GET, [key, b"none"]),
            (frames.Op.EXPECT, [key, b"1"]),
            (frames.Op.DELETE, [key]),
        ]
    )
    assert answers == [[], [b"2"], [b"2", None], [b"2"]]
    assert store.transact([(frames.Op.DELETE, [key])]) == [[b"1"]]
    with pytest.raises(FederationError, match="refuses: The key"):
        store.transact([(frames.Op.SET, [b"k" * 600, b""])])
    assert store.num_keys() >= 0, "the connection is as good as before"


def test_who_waits_is_woken_by_another_client(store: RendezvousStore) -> None:
    store.delete_key("@clinic-a/w")
    with contextlib.closing(store.clone()) as other:
        timer = threading.Timer(0.2, lambda: store.set("@clinic-a/w", "now"))
        timer.start()
        began = time.monotonic()
        assert other.await_change({"@clinic-a/w": None, "none": None}, 2) == [b"now", None]
        assert 0.1 < time.monotonic() - began < 1.5
        assert other.await_change({"@clinic-a/w": b"now"}, 0.1) == [b"now"]
        assert other.await_change({"@clinic-a/w": b"then"}, 2) == [b"now"]
        timer.join()
    store.delete_key("@clinic-a/w")


def test_who_waits_for_more_than_fits_into_one_answer_gets_all(store: RendezvousStore) -> None:
    large = bytes(frames.MAX_VALUE_BYTES)
    keys = [f"@clinic-a/large/{i}" for i in range(3)]
    for key in keys:
        store.set(key, large)
    known: dict[str, bytes | None] = dict.fromkeys(["none", *keys, "last"])
    assert store.await_change(known, 1) == [None, large, large, large, None]
    for key in keys:
        store.delete_key(key)


class InterruptedError_(BaseException):
    """What a signal handler raises."""


def test_an_interrupted_wait_leaves_no_answer_behind(store: RendezvousStore) -> None:
    def interrupt(*_: Any) -> None:
        raise InterruptedError_

    store.set("@clinic-a/a", "1")
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        began = time.monotonic()
        with pytest.raises(InterruptedError_):
            store.await_change({"none": None}, 1.2)
        assert time.monotonic() - began < 1.0
    finally:
        signal.signal(signal.SIGUSR1, before)
    time.sleep(1.2)  # by now the answer to the wait would be there
    assert store.get("@clinic-a/a") == b"1"
    assert store.delete_key("@clinic-a/a")


@pytest.mark.parametrize(
    "answer", [[], [b"2", b"x"], [b"x"], [b"0", b"0"], [b"1", None], [b"-1", b"1", b"1"]]
)
def test_an_answer_to_a_transaction_is_checked(liar: Any, answer: list[bytes | None]) -> None:
    server, answers = liar
    store = RendezvousStore(server.address, retry_s=1)
    answers[:] = [pack(DONE, answer)]
    try:
        with pytest.raises(FederationError, match="is not this federation's rendezvous"):
            store.transact([(frames.Op.COMPARE_SET, [b"a", b"", b"1"])])
    finally:
        answers.clear()
        store.close()


def test_limits_are_told_before_anything_is_sent(store: RendezvousStore) -> None:
    before = store.num_keys()
    with pytest.raises(ValueError, match="of 513 bytes must have 1 to 512"):
        store.set("@clinic-a/" + "x" * 503, "")
    with pytest.raises(ValueError, match="of 0 bytes"):
        store.check([""])
    with pytest.raises(
        ValueError, match=r"4194305 bytes, more than .* Tensors cross between parties directly"
    ):
        store.set("@clinic-a", bytes(frames.MAX_VALUE_BYTES + 1))
    store.set("@clinic-a/x", "x")
    with pytest.raises(FederationError, match=r"refuses: Only whole numbers"):
        store.add("@clinic-a/x", 1)
    assert store.delete_key("@clinic-a/x")
    assert store.num_keys() == before


def test_waiting(store: RendezvousStore) -> None:
    store.delete_key("@clinic-a/late")
    other = store.clone()
    timer = threading.Timer(0.2, lambda: other.set("@clinic-a/late", "now"))
    timer.start()
    assert store.get("@clinic-a/late") == b"now"
    store.wait(["@clinic-a/late"])
    timer.join()
    for act in (
        lambda: store.wait(["@clinic-a/late", "never"], timedelta(seconds=0.1)),
        lambda: dist.PrefixStore("p", store).wait(["never"], timedelta(seconds=0.1)),
    ):
        with pytest.raises(dist.DistStoreError, match=r"never within 0\.1 s"):
            act()
    dist.PrefixStore("p", store).set_timeout(timedelta(seconds=0.1))
    with pytest.raises(dist.DistStoreError, match=r"Nobody has set all of never within 0\.1 s"):
        store.get("never")
    assert store.clone().timeout == timedelta(seconds=0.1)


def test_many_threads_count_right(store: RendezvousStore) -> None:
    def count() -> None:
        own = store.clone()
        for i in range(50):
            (own if i % 2 else store).add("@clinic-a/count", 1)
            while True:
                now = own.try_get("@clinic-a/swap") or b""
                if own.compare_set("@clinic-a/swap", now, str(int(now or b"0") + 1)) != now:
                    break

    def win() -> None:
        won.append(store.compare_set("@clinic-a/won", "", str(threading.get_ident())))

    won: list[bytes] = []
    store.delete_key("@clinic-a/count")
    in_threads([count] * 8)
    in_threads([win] * 8)
    assert store.get("@clinic-a/count") == b"400"
    assert len(set(won)) == 1
    for swept in ("count", "swap", "won"):
        store.delete_key(f"@clinic-a/{swept}")


def test_swaps_are_not_lost(store: RendezvousStore) -> None:
    def swap(index: int) -> None:
        own = store.clone()
        done = 0
        while done < 40:
            now = own.try_get("@clinic-a/s") or b""
            mine = f"{int(now.partition(b'/')[0] or b'0') + 1}/{index}/{done}"
            done += own.compare_set("@clinic-a/s", now, mine) == mine.encode()

    store.delete_key("@clinic-a/s")
    in_threads([lambda i=i: swap(i) for i in range(8)])
    # Each of the 8 * 40 that won has found the count of the one before.
    assert store.get("@clinic-a/s").startswith(b"320/")


def test_gloo_meets_over_it(plain: RendezvousServer) -> None:
    tensors = [torch.full((5,), rank + 1.0) for rank in range(2)]
    stores = [RendezvousStore(plain.address, timeout_s=10) for _ in range(2)]

    def reduce(rank: int) -> None:
        group = GlooGroup(dist.PrefixStore("gloo", stores[rank]), rank, 2, 10)
        group.all_reduce(tensors[rank]).wait()
        group.abort()

    in_threads([lambda rank=rank: reduce(rank) for rank in range(2)])
    assert all(torch.equal(tensor, torch.full((5,), 3.0)) for tensor in tensors)


def test_errors_pass_through_torch(plain: RendezvousServer) -> None:
    store = RendezvousStore(plain.address, retry_s=0.2)
    prefixed = dist.PrefixStore("p", store)
    store.close()
    with pytest.raises(dist.DistNetworkError, match="this client was closed"):
        prefixed.set("a", "b")


# ---- restarts

SERVE = """
import signal
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.comm.tls import TLS
tls = TLS(*sys.argv[3:6]) if len(sys.argv) > 3 else None
server = RendezvousServer("127.0.0.1", int(sys.argv[2]), roster=["clinic-a", "clinic-b"], tls=tls)
signal.signal(signal.SIGTERM, lambda *_: server.close())
server.serve_forever()
"""


@contextlib.contextmanager
def served(port: int, tls: TLS | None = None) -> Iterator[subprocess.Popen[bytes]]:
    words = [str(port)] if tls is None else [str(port), tls.cert, tls.key, tls.ca]
    with subprocess.Popen(
        [sys.executable, "-c", LIGHT + SERVE, PACKAGE, *words], stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("name", [None, "clinic-a"])
def test_clients_survive_a_restart(name: str | None) -> None:
    port, tls = free_port(), tls_of(name) if name else None
    server_tls = tls_of("rendezvous") if name else None
    with served(port, server_tls) as process:
        store = RendezvousStore(f"127.0.0.1:{port}", tls=tls, retry_s=20)  # it waits for the start, too
        store.set("@clinic-a/x", "1")
        waiting: list[bytes] = []
        other = store.clone()
        thread = threading.Thread(target=lambda: waiting.append(other.get("@clinic-a/y")))
        thread.start()
        process.kill()
        process.wait()
    with served(port, server_tls) as process:  # at once, on the same port
        assert store.try_get("@clinic-a/x") is None, "it keeps nothing"
        store.set("@clinic-a/y", "2")
        thread.join()
        assert waiting == [b"2"]
        process.terminate()
        assert process.wait(10) == 0
        assert process.stderr
        assert process.stderr.read() == b""
    store._retry_s = 0.3
    start = time.monotonic()
    with pytest.raises(
        dist.DistNetworkError, match=rf"127\.0\.0\.1:{port} is out of reach.*Check that it runs"
    ):
        store.get("@clinic-a/y")
    assert 0.3 <= time.monotonic() - start < 3


def test_a_forgotten_client_is_closed_without_a_word(plain: RendezvousServer) -> None:
    store = RendezvousStore(plain.address)
    assert store._channel
    sock = store._channel._socket
    del store
    gc.collect()
    assert sock.fileno() == -1
    script = f"""
from pellm_lightning.comm.rendezvous.client import RendezvousStore
stores = [RendezvousStore({plain.address!r}) for _ in range(3)]
stores.append(stores)
"""
    words = [sys.executable, "-W", "default::ResourceWarning", "-c", LIGHT + script, PACKAGE]
    done = subprocess.run(words, capture_output=True, timeout=60, check=True)
    assert b"Exception ignored" not in done.stderr
    assert b"unclosed" not in done.stderr


# ---- servers that misbehave


class Impostor:
    """A server of one's own making: ``act(connection)`` for each caller."""

    def __init__(self, act: Callable[[socket.socket], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._act = act
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> "Impostor":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        self._listener.settimeout(0.05)
        while not self._stop.is_set():
            with contextlib.suppress(OSError):
                sock, _ = self._listener.accept()
                with sock:
                    sock.settimeout(1)
                    self._act(sock)


def forgetful(times: int) -> tuple[list[int], KeyValueStore, Callable[[socket.socket], None]]:
    """A server that does what it is asked for but closes without an answer, the first few times."""
    heard: list[int] = []
    kept = KeyValueStore()

    def act(sock: socket.socket) -> None:
        sock.sendall(HELLO)
        sock.recv(len(HELLO))
        while request := sock.recv(1000):
            op, fields = unpack(request[4:])
            answer = kept.answer(op, fields, None)
            if op != frames.Op.NUM_KEYS:
                heard.append(op)
                if len(heard) <= times:
                    return
            sock.sendall(pack(DONE, answer))

    return heard, kept, act


def test_a_lost_answer_of_compare_set_is_found_again() -> None:
    heard, _, act = forgetful(3)
    with Impostor(act) as server, contextlib.closing(RendezvousStore(server.address, retry_s=5)) as store:
        assert store.compare_set("a", "", "mine") == b"mine"
        assert len(heard) == 4
        store.set("b", "x")
        assert len(heard) == 5


def test_add_is_asked_again_only_once() -> None:
    heard, kept, act = forgetful(100)
    with Impostor(act) as server, contextlib.closing(RendezvousStore(server.address, retry_s=5)) as store:
        with pytest.raises(dist.DistNetworkError, match="out of reach"):
            store.add("n", 1)
        assert len(heard) == 2
        assert kept.answer(frames.Op.MULTI_GET, [b"n"], None) == [b"2"]


@pytest.mark.parametrize("hello", [b"", HELLO])
def test_a_silent_server_is_given_up(hello: bytes) -> None:
    def act(sock: socket.socket) -> None:
        sock.sendall(hello)
        while sock.recv(1000):
            pass

    start = time.monotonic()
    with Impostor(act) as server, pytest.raises(dist.DistNetworkError, match="timed out"):
        RendezvousStore(server.address, retry_s=0.4)
    assert time.monotonic() - start < 4


def test_closing_ends_a_wait() -> None:
    def act(sock: socket.socket) -> None:
        sock.sendall(HELLO)
        sock.recv(len(HELLO))
        sock.recv(1000)
        sock.sendall(pack(DONE, [b"0"]))
        sock.recv(1000)
        time.sleep(0.3)

    def wait() -> None:
        try:
            store.get("x")
        except dist.DistNetworkError as error:
            errors.append(str(error))

    errors: list[str] = []
    with Impostor(act) as server:
        store = RendezvousStore(server.address, retry_s=20)
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        store.close()
        thread.join(5)
        assert not thread.is_alive()
    assert "is out of reach" in errors[0]


ANSWERS = [
    pack(DONE, []),
    pack(DONE, [None]),
    pack(DONE, [b"x"] * 3),
    pack(9, [b"1"]),
    b"\xff" * 4,
    b"\0" * 8,
]


@settings(PROPERTY, max_examples=40)
@given(answer=st.binary(max_size=60) | st.sampled_from(ANSWERS))
def test_a_lying_server_harms_nobody(liar: Any, answer: bytes) -> None:
    server, answers = liar
    store = RendezvousStore(server.address, retry_s=0.05)
    answers[:] = [answer]
    for act in (
        lambda: store.try_get("x"),
        lambda: store.compare_set("x", "", "y"),
        lambda: store.add("x", 1),
        lambda: store.delete_key("x"),
        store.num_keys,
        lambda: store.await_change({"x": None}, 0.01),
        lambda: store.transact([(frames.Op.EXPECT, [b"x", b""]), (frames.Op.MULTI_GET, [b"x"])]),
    ):
        with contextlib.suppress(FederationError, dist.DistNetworkError):
            act()
    answers.clear()
    store.close()


@pytest.fixture(scope="module")
def liar() -> Iterator[Any]:
    answers: list[bytes] = []

    def act(sock: socket.socket) -> None:
        sock.sendall(HELLO)
        sock.recv(len(HELLO))
        while sock.recv(1000):
            sock.sendall(answers[0] if answers else pack(DONE, [b"0"]))
            if answers:
                return

    with Impostor(act) as server:
        yield server, answers


@pytest.mark.parametrize(
    ("hello", "said"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "sends something else than hello"),
        (HELLO[:-1] + b"\x07", "has version 7, not 3"),
    ],
)
def test_another_service_is_recognized(hello: bytes, said: str) -> None:
    with Impostor(lambda sock: sock.sendall(hello)) as server, pytest.raises(FederationError, match=said):
        RendezvousStore(server.address, retry_s=5)


# ---- who is not admitted


def test_a_party_that_is_not_on_the_roster_is_told_so(encrypted: RendezvousServer) -> None:
    with pytest.raises(FederationError, match=r"does not admit this party \(as 'clinic-x', by .*Check that"):
        RendezvousStore(encrypted.address, tls=tls_of("clinic-x"))


def test_a_party_of_another_authority_is_told_so(encrypted: RendezvousServer, tmp_path: Path) -> None:
    # It distrusts the server first, unless it has our ca.pem.
    with pytest.raises(FederationError, match=r"its certificate is not accepted: .*the same ca\.pem"):
        RendezvousStore(encrypted.address, tls=tls_of("clinic-a", "theirs"))
    store = RendezvousStore(encrypted.address, tls=tls_of("clinic-a"))
    foreign = tls_of("clinic-a", "theirs")
    store._context = foreign.client_context
    store._context.load_verify_locations(tls_of("clinic-a").ca)
    store._disconnect()
    with pytest.raises(FederationError, match=r"does not admit this party.*(UNKNOWN_CA|without an answer)"):
        store.num_keys()


def test_an_expired_certificate_is_told_so(tmp_path: Path) -> None:
    make_ca(tmp_path)
    make_certificate(tmp_path, "rendezvous")
    make_certificate(tmp_path, "clinic-a", days=1.5 / 86400)
    tls = files(tmp_path, "clinic-a")  # good still
    with RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=files(tmp_path, "rendezvous")) as server:
        time.sleep(2.6)
        with pytest.raises(FederationError, match=r"does not admit this party.*(EXPIRED|without an answer)"):
            RendezvousStore(server.address, tls=tls)


def test_only_the_rendezvous_is_trusted() -> None:
    # A member has a certificate of our authority, too, but that does not make it the rendezvous.
    def act(sock: socket.socket) -> None:
        with tls_of("clinic-b").server_context.wrap_socket(sock, server_side=True) as encrypted:
            encrypted.recv(10)

    with Impostor(act) as server, pytest.raises(FederationError, match="named 'clinic-b', not 'rendezvous'"):
        RendezvousStore(server.address, tls=tls_of("clinic-a"))


def test_mixing_tls_and_plain_is_told(plain: RendezvousServer, encrypted: RendezvousServer) -> None:
    told = "it and all parties use TLS, or none does"
    for server, tls in ((encrypted, None), (plain, tls_of("clinic-a"))):
        with pytest.raises((dist.DistNetworkError, FederationError), match=told):
            RendezvousStore(server.address, tls=tls, retry_s=0.5)


# ---- arguments


def test_connect_reads_the_url(plain: RendezvousServer, encrypted: RendezvousServer) -> None:
    store = connect(f"tcp://{plain.address}", timeout_s=7)
    assert isinstance(store, RendezvousStore)
    assert store.timeout == timedelta(seconds=7)
    assert isinstance(connect(f"tcp://{encrypted.address}", tls_of("clinic-a")), RendezvousStore)
    for url in ("127.0.0.1:29400", "http://127.0.0.1:1", "", "tcp:/127.0.0.1:1"):
        with pytest.raises(ValueError, match="names no rendezvous: give tcp://host:port or etcd://host:port"):
            connect(url)


def test_arguments_are_checked() -> None:
    for address in ("nowhere", ":1", "host:", "host:x", "host:0", "host:65536"):
        with pytest.raises(ValueError, match="is no address"):
            RendezvousStore(address)
    with pytest.raises(ValueError, match="retry_s=0 must be positive"):
        RendezvousStore("127.0.0.1:1", retry_s=0)


def test_an_unknown_host_is_out_of_reach() -> None:
    with pytest.raises(dist.DistNetworkError, match=r"no\.such\.host\.invalid:1 is out of reach"):
        RendezvousStore("no.such.host.invalid:1", retry_s=0.1)
