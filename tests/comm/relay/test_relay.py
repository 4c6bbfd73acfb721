"""The relay: two who cannot dial each other sum through it; others neither learn nor spoil anything."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import tls_of
from connect_proxy import Forwarder
from ports import free_port

from pellm_lightning import Aggregator, SeparateJobs
from pellm_lightning.comm import TLS, FederationError, Membership, PartyLostError
from pellm_lightning.comm.mesh.mesh import Listener, Mesh
from pellm_lightning.comm.relay.client import NoRelayError, RelayAccess, RelayRoute, meet
from pellm_lightning.comm.relay.frames import CHALLENGE_BYTES, HELLO, JOINED, Ticket, request
from pellm_lightning.comm.relay.server import RelayQuotas
from pellm_lightning.comm.rendezvous import connection_handler
from pellm_lightning.comm.rendezvous.client import RendezvousStore
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.comm.sockets import connected, split_address

ROSTER = ["a", "b", "c"]
NOWHERE = "127.0.0.1:9"
"""An address at which nobody listens."""
SECRET = torch.tensor([1.2345678, -8.7654321], dtype=torch.float64).repeat(100)


def in_threads(number: int, act: Callable[[int], Any]) -> list[Any]:
    """What as many threads return; raises what the first of them raised."""
    with ThreadPoolExecutor(number) as pool:
        return [*pool.map(act, range(number), timeout=40)]


@pytest.fixture(scope="module")
def encrypted() -> Iterator[RendezvousServer]:
    with serving(tls_of("rendezvous")) as server:
        yield server


@contextlib.contextmanager
def serving(tls: TLS | None = None, **quotas: Any) -> Iterator[RendezvousServer]:
    with RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=tls, relay=RelayQuotas(**quotas)) as server:
        yield server


def access_of(server: RendezvousServer, name: str) -> RelayAccess:
    """What the rendezvous lets a party use."""
    tls = tls_of(name) if server._encrypted else None
    with contextlib.closing(RendezvousStore(server.address, tls=tls, retry_s=5)) as store:
        return store.relay_access(name)


def met(access: RelayAccess, peer: str, group: str) -> socket.socket:
    """A connection to a peer, in the hands of the test."""
    sock = connected(access.address, 5)
    try:
        for _ in meet(sock, access, peer, group):
            pass
    except BaseException:
        sock.close()
        raise
    return sock


def pair(server: RendezvousServer, group: str, *names: str) -> list[socket.socket]:
    """The two ends of a relayed connection."""
    names = names or ("a", "b")
    ends = [partial(met, access_of(server, me), peer, group) for me, peer in (names, names[::-1])]
    return in_threads(2, lambda index: ends[index]())


def form(
    routes: list[RelayRoute | None],
    group: str,
    *,
    secure: bool = True,
    addresses: list[str] | None = None,
    timeout_s: float = 20,
) -> list[Mesh]:
    """A mesh of members that announce an address at which nobody listens, or the given ones."""
    names = ROSTER[: len(routes)]
    tls = [tls_of(name) if secure else None for name in names]

    def member(rank: int) -> Mesh:
        listener = Listener("127.0.0.1", name=names[rank], roster=names, tls=tls[rank])
        with contextlib.closing(listener):
            given = addresses or [NOWHERE] * len(names)
            return Mesh(
                *(listener, group, rank, names, given), timeout_s=timeout_s, tls=tls[rank], relay=routes[rank]
            )

    return in_threads(len(names), member)


def route(server: RendezvousServer, name: str, **changed: Any) -> RelayRoute:
    tls = tls_of(name) if server._encrypted else None
    return RelayRoute(lambda: replace(access_of(server, name), **changed), tls)


def ended(sock: socket.socket) -> bytes:
    """Everything that comes until the other end closes."""
    heard = b""
    sock.settimeout(5)
    with sock, contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            heard += piece
    return heard


def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def test_members_that_cannot_be_dialed_sum_by_the_relay(encrypted: RendezvousServer) -> None:
    routes: list[RelayRoute | None] = [route(encrypted, name) for name in ROSTER]
    for mesh in form(routes, "sums"):
        mesh.abort()
    meshes = form(routes, "more sums")  # now they need not try the direct way first
    assert [mesh.relayed for mesh in meshes] == [["b", "c"], ["a", "c"], ["a", "b"]]
    parts = [torch.full((300_001,), rank + 1.0) for rank in range(3)]
    in_threads(3, lambda rank: meshes[rank].all_reduce(parts[rank]))
    assert all(torch.equal(part, torch.full((300_001,), 6.0)) for part in parts)
    assert all(mesh.is_intact for mesh in meshes)
    meshes[0].abort()
    until(lambda: not meshes[1].is_intact, 5)
    with pytest.raises(PartyLostError, match=r"a .* left while"):
        in_threads(2, lambda rank: meshes[1 + rank].broadcast(parts[rank], 0))
    for mesh in meshes:
        mesh.abort()


def test_the_direct_way_comes_first(encrypted: RendezvousServer) -> None:
    asked: list[str] = []

    def ask() -> RelayAccess:
        asked.append("ticket")
        raise NoRelayError("none")

    listeners = [Listener("127.0.0.1", name=name, roster=ROSTER, tls=tls_of(name)) for name in ROSTER[:2]]
    addresses = [listener.address for listener in listeners]
    routes = [RelayRoute(ask, tls_of(name)) for name in ROSTER[:2]]
    meshes = in_threads(
        2,
        lambda rank: Mesh(
            *(listeners[rank], "direct", rank, ROSTER[:2], addresses),
            timeout_s=20,
            tls=tls_of(ROSTER[rank]),
            relay=routes[rank],
        ),
    )
    assert [mesh.relayed for mesh in meshes] == [[], []]
    assert not asked
    for mesh, listener in zip(meshes, listeners, strict=True):
        mesh.abort()
        listener.close()


@pytest.mark.parametrize("secure", [True, False])
def test_what_passes_the_relay_is_encrypted(secure: bool) -> None:
    """Seen by a tap before the relay; without TLS, on loopback, the tap would see everything."""
    with serving(tls_of("rendezvous") if secure else None) as server, Forwarder(server.address) as tap:
        routes: list[RelayRoute | None] = [route(server, name, address=tap.address) for name in ROSTER[:2]]
        meshes = form(routes, "the secret group", secure=secure)
        tensors = [SECRET.clone() for _ in meshes]
        in_threads(2, lambda rank: meshes[rank].all_reduce(tensors[rank]))
        for mesh in meshes:
            mesh.abort()
        assert torch.equal(tensors[0], 2 * SECRET)
        seen = bytes(tap.copy)
    assert HELLO in seen
    assert JOINED in seen
    for data in (SECRET.numpy().tobytes()[:16], (2 * SECRET).numpy().tobytes()[:16], b"the secret group"):
        assert (data in seen) != secure


def test_a_relay_that_joins_the_wrong_two_is_found_out() -> None:
    """Party c holds a genuine certificate, and a relay lets it answer for a."""
    context = tls_of("c").server_context

    def answer(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.recv(len(HELLO))
            sock.sendall(HELLO + bytes(CHALLENGE_BYTES))
            sock.recv(1024)
            sock.sendall(b"AJ")
            with context.wrap_socket(sock, server_side=True) as wrapped:
                wrapped.recv(100)

    def serve(liar: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                answer(liar.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as liar:
        thread = threading.Thread(target=serve, args=(liar,), daemon=True)
        thread.start()
        false = RelayAccess(f"127.0.0.1:{liar.getsockname()[1]}", Ticket(b"1 b", b""))
        lied_to = RelayRoute(lambda: false, tls_of("b"))
        listener = Listener("127.0.0.1", name="b", roster=ROSTER, tls=tls_of("b"))
        with contextlib.closing(listener), pytest.raises(PartyLostError, match="its certificate says 'c'"):
            Mesh(
                *(listener, "lies", 1, ["a", "b"], [NOWHERE] * 2),
                timeout_s=1.5,
                tls=tls_of("b"),
                relay=lied_to,
            )
        liar.shutdown(socket.SHUT_RDWR)
        thread.join()


# ---- who is not admitted


def asked_with(change: Callable[[RelayAccess, bytes], bytes]) -> Callable[[socket.socket, RelayAccess], None]:
    """Ask for a meeting as a change of the genuine access, and the challenge, says."""

    def ask(sock: socket.socket, access: RelayAccess) -> None:
        sock.sendall(HELLO)
        challenge = b""
        while len(challenge) < len(HELLO) + CHALLENGE_BYTES:
            challenge += sock.recv(100)
        sock.sendall(change(access, challenge[len(HELLO) :]))

    return ask


def other_name(access: RelayAccess, challenge: bytes) -> bytes:
    text = access.ticket.text.replace(b" a", b" b")
    return request(Ticket(text, access.ticket.key), challenge, "c", "g")


def out_of_date(access: RelayAccess, challenge: bytes) -> bytes:
    return request(Ticket(b"1 a", access.ticket.key), challenge, "b", "g")


ATTACKS: dict[str, Callable[[socket.socket, RelayAccess], None]] = {
    "silence": lambda sock, access: None,
    "one byte": lambda sock, access: sock.sendall(HELLO[:1]),
    "garbage": lambda sock, access: sock.sendall(b"R" + bytes(1000)),
    "another version": lambda sock, access: sock.sendall(HELLO[:-1] + b"\x09"),
    "nothing after hello": asked_with(lambda access, challenge: b""),
    "a huge prefix": asked_with(lambda access, challenge: struct.pack("!I", 2**32 - 1) + bytes(4096)),
    "a large prefix": asked_with(lambda access, challenge: struct.pack("!I", 100_000) + bytes(4096)),
    "half a request": asked_with(lambda access, challenge: request(access.ticket, challenge, "b", "g")[:50]),
    "no fields": asked_with(lambda access, challenge: struct.pack("!I", 1) + b"\x00"),
    "no ticket": asked_with(lambda access, challenge: request(Ticket(b"", b""), challenge, "b", "g")),
    "a made-up key": asked_with(
        lambda access, challenge: request(replace(access.ticket, key=bytes(32)), challenge, "b", "g")
    ),
    "a replay": asked_with(lambda access, challenge: request(access.ticket, bytes(16), "b", "g")),
    "another's name": asked_with(other_name),
    "an old ticket": asked_with(out_of_date),
    "itself": asked_with(lambda access, challenge: request(access.ticket, challenge, "a", "g")),
    "a stranger": asked_with(lambda access, challenge: request(access.ticket, challenge, "nobody", "g")),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_who_asks_wrongly_is_disconnected(
    name: str, encrypted: RendezvousServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_handler, "_HELLO_S", 0.5)
    with connected(encrypted.address, 5) as sock:
        ATTACKS[name](sock, access_of(encrypted, "a"))
        heard = ended(sock)
    assert heard in (b"", HELLO + heard[len(HELLO) :][:CHALLENGE_BYTES]), "neither admitted nor joined"
    assert not encrypted._handler._relay._ends  # type: ignore[union-attr]


def test_many_idle_connections_keep_nobody_out(encrypted: RendezvousServer) -> None:
    with contextlib.ExitStack() as opened:
        for number in range(400):
            sock = opened.enter_context(socket.create_connection(split_address(encrypted.address)))
            sock.sendall(HELLO[: number % 3])
        for sock in pair(encrypted, "in the crowd"):
            opened.enter_context(sock)


def test_a_third_party_cannot_enter_the_room_of_two(encrypted: RendezvousServer) -> None:
    intruder = connected(encrypted.address, 5)
    access = access_of(encrypted, "c")
    intruder.sendall(HELLO)
    challenge = intruder.recv(100)[len(HELLO) :]
    intruder.sendall(request(access.ticket, challenge, "b", "private"))
    for end in pair(encrypted, "private"):
        end.close()
    intruder.settimeout(0.2)
    heard = b""
    with intruder, contextlib.suppress(TimeoutError):
        heard = intruder.recv(10)
        heard += intruder.recv(10)
    assert heard == b"A", "it was admitted, and waits for b to ask for it"


def test_a_relay_is_used_only_where_there_is_one_and_what_it_passes_is_encrypted() -> None:
    with (
        RendezvousServer("127.0.0.1", 0) as server,
        contextlib.closing(RendezvousStore(server.address)) as store,
        pytest.raises(FederationError, match=r"relays nothing\. Start it with --relay"),
    ):
        store.relay_access("a")
    plain = RelayRoute(lambda: RelayAccess("192.0.2.1:1", Ticket(b"", b"")), None)
    with pytest.raises(NoRelayError, match="is not used without TLS"):
        plain.access()
    with pytest.raises(ValueError, match=r"host='0\.0\.0\.0' without TLS .* Give tls"):
        RendezvousServer("0.0.0.0", 0, relay=RelayQuotas())
    with pytest.raises(ValueError, match="idle_s=0 of the relay's quotas must be positive"):
        RelayQuotas(idle_s=0)


def test_two_that_cannot_meet_are_told_why() -> None:
    """Both dial out only, and the rendezvous relays nothing."""
    with RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=tls_of("rendezvous")) as server:

        def ask(name: str) -> RelayAccess:
            try:
                return access_of(server, name)
            except RuntimeError as error:
                raise NoRelayError(str(error)) from error

        routes: list[RelayRoute | None] = [RelayRoute(partial(ask, n), tls_of(n)) for n in ROSTER[:2]]
        with pytest.raises(PartyLostError) as raised:
            form(routes, "in vain", timeout_s=1.5)
    message = str(raised.value)
    assert "give party a 'listen'" in message or "it has not connected" in message


# ---- quotas


def test_one_connection_too_many_closes_the_partys_oldest() -> None:
    with serving(tls_of("rendezvous"), connections=2) as server:
        first, second, third = (pair(server, group) for group in "123")
        for sock in first:
            assert ended(sock) == b""
        for ends in (second, third):
            ends[0].sendall(b"x")
            ends[1].settimeout(5)
            assert ends[1].recv(1) == b"x"
            for sock in ends:
                sock.close()


def test_a_party_sends_no_faster_than_its_quota() -> None:
    with serving(tls_of("rendezvous"), bytes_per_s=1e6) as server:
        a, b = pair(server, "g")
        began = time.monotonic()
        sender = threading.Thread(target=a.sendall, args=(bytes(700_000),))
        sender.start()
        left = 700_000
        while left:
            left -= len(b.recv(65536))
        sender.join()
        assert time.monotonic() - began > 0.4
        a.close()
        b.close()


def test_a_pair_that_is_silent_is_disconnected() -> None:
    with serving(tls_of("rendezvous"), idle_s=0.6) as server:
        a, b = pair(server, "g")
        for _ in range(4):
            a.sendall(b"x")
            assert b.recv(1) == b"x"
            time.sleep(0.3)
        assert ended(a) == ended(b) == b""


def test_who_does_not_read_stops_who_sends(encrypted: RendezvousServer) -> None:
    """Nothing piles up at the relay: it holds one buffer, the rest is what the systems hold."""
    a, b = pair(encrypted, "slow")
    a.setblocking(False)
    sent, still = 0, 0
    while still < 20:
        try:
            sent += a.send(bytes(1 << 20))
            still = 0
        except BlockingIOError:
            still += 1
            time.sleep(0.02)
    assert sent < 64 << 20
    a.setblocking(True)
    a.shutdown(socket.SHUT_WR)  # what is on its way arrives, and then the end
    assert len(ended(b)) == sent
    a.close()


def test_one_end_that_leaves_ends_the_other(encrypted: RendezvousServer) -> None:
    a, b = pair(encrypted, "bye")
    a.sendall(b"last words")
    a.close()
    assert ended(b) == b"last words"
    relay = encrypted._handler._relay
    assert relay is not None
    until(lambda: not relay._ends)


# ---- whole rounds


def test_rounds_go_on_after_the_relay_was_killed_in_one(tmp_path: Path) -> None:
    """It is killed while tensors are on their way, with the rendezvous, and started again."""
    port, done = free_port(), []
    started = partial(
        *(RendezvousServer, "127.0.0.1", port),
        roster=ROSTER,
        tls=tls_of("rendezvous"),
        relay=RelayQuotas(bytes_per_s=20e6),
    )

    def take_part(index: int) -> torch.Tensor:
        name = ROSTER[index]
        federation = SeparateJobs(
            *(f"tcp://127.0.0.1:{port}", name, ROSTER),
            advertise=NOWHERE,
            tls=tls_of(name),
            membership=Membership(heartbeat_ttl_s=2, exchange_timeout_s=10, wait_s=60),
        ).join()
        w = torch.zeros(1_000_000)
        aggregator = Aggregator(federation, {"w": w}, state_dir=tmp_path / name)
        aggregator.start()
        while aggregator.round < 4:
            w += index + 1.0
            done.append(aggregator.step(1.0))
        assert federation.relayed == [other for other in ROSTER if other != name]
        for _ in aggregator.drain():
            pass
        federation.close()
        return w

    first = started().start()
    with ThreadPoolExecutor(3) as pool:
        parties = [pool.submit(take_part, index) for index in range(3)]
        relay = first._handler._relay
        assert relay is not None

        def moved() -> int:
            return sum(end.bytes_sent for ends in [*relay._ends.values()] for end in [*ends])

        until(lambda: len(done) >= 3)
        before = moved()
        until(lambda: moved() > before + 1_000_000)  # of the 24 MB of the second round
        first.close()
        with started():
            sums = [party.result(60) for party in parties]
    # Each of four rounds adds the mean of 1, 2 and 3.
    assert all(torch.equal(total, torch.full((1_000_000,), 8.0)) for total in sums)
