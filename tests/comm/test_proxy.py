"""HTTP proxies between a party and its rendezvous: which one is taken, and what it may answer."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from certificates import tls_of
from connect_proxy import Forwarder

from pellm_lightning import SeparateJobs
from pellm_lightning.comm.proxy import Proxy, proxy_to
from pellm_lightning.comm.relay.client import meet
from pellm_lightning.comm.relay.server import RelayQuotas
from pellm_lightning.comm.rendezvous.client import RendezvousStore
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.comm.sockets import connected, split_address

HUB = "hub.example:443"


@pytest.fixture(autouse=True)
def environ() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("https_proxy", "no_proxy", "HTTPS_PROXY", "NO_PROXY"):
            patch.delenv(name, raising=False)
        yield patch


def test_the_environment_names_the_proxy_unless_the_setting_does(environ: pytest.MonkeyPatch) -> None:
    assert proxy_to(HUB) is None
    environ.setenv("https_proxy", "http://me:p%40ss@proxy:3128/")
    assert proxy_to(HUB) == Proxy("proxy", 3128, "me", "p@ss")
    assert proxy_to(HUB, "other:8080") == Proxy("other", 8080)
    assert proxy_to(HUB, "none") is None
    assert proxy_to("127.0.0.1:29400") is proxy_to("[::1]:29400") is proxy_to("localhost:1") is None
    environ.setenv("no_proxy", "intra.example,.example")
    assert proxy_to(HUB) is None
    assert proxy_to("hub.elsewhere:443") is not None


@pytest.mark.parametrize("url", ["https://p:1", "socks5://p:1", "http://", "http://p:x", "http://p:1/path"])
def test_what_is_no_http_proxy_is_refused(url: str, environ: pytest.MonkeyPatch) -> None:
    job = {"rendezvous": f"tcp://{HUB}", "name": "a", "roster": ["a"]}
    with pytest.raises(ValueError, match=r"jobs\.proxy names .* give http://host:port"):
        SeparateJobs(**job, proxy=url)  # type: ignore[arg-type]
    environ.setenv("https_proxy", url.replace("//", "//user:secret@"))
    with pytest.raises(ValueError, match="https_proxy names ") as raised:
        SeparateJobs(**job)  # type: ignore[arg-type]
    assert "secret" not in str(raised.value)
    assert "secret" not in repr(SeparateJobs(**job, proxy="http://user:secret@p:1"))  # type: ignore[arg-type]


@pytest.mark.parametrize("account", ["", "clinic:pass word"])
def test_rendezvous_and_relay_are_reached_by_the_proxy(account: str) -> None:
    user, _, password = account.partition(":")
    with (
        RendezvousServer(
            *("127.0.0.1", 0), roster=["a", "b"], tls=tls_of("rendezvous"), relay=RelayQuotas()
        ) as server,
        Forwarder(account=account) as proxy,
    ):
        by = Proxy(*split_address(proxy.address), user, password)
        ends: list[socket.socket] = []
        for me, peer in (("a", "b"), ("b", "a")):
            store = RendezvousStore(server.address, tls=tls_of(me), retry_s=5, proxy=by)
            with contextlib.closing(store), contextlib.closing(store.clone()) as other:
                other.compare_set("x", "", "1")
                assert store.compare_set("x", "", "2") == b"1"
                access = store.relay_access(me)
            ends.append(connected(access.endpoint, 5))
            thread = threading.Thread(target=lambda e=ends[-1], a=access, p=peer: [*meet(e, a, p, "g")])
            thread.start()
        thread.join()
        ends[0].sendall(b"through both")
        assert ends[1].recv(100) == b"through both"
        for end in ends:
            end.close()
        assert proxy.asked == [server.address] * 6  # each client, each clone, each end of the relayed pair


@pytest.mark.parametrize(
    ("user", "message"),
    [("", "answers '407 .*Give user and password, as in https_proxy"), ("wrong", "answers '407 ")],
)
def test_a_proxy_that_refuses_is_told_of(user: str, message: str) -> None:
    with RendezvousServer("127.0.0.1", 0) as server, Forwarder(account="clinic:secret") as proxy:
        by = Proxy(*split_address(proxy.address), user, "not the secret")
        with pytest.raises(dist.DistNetworkError, match=message) as raised:
            RendezvousStore(server.address, retry_s=0.5, proxy=by)
    assert "not the secret" not in str(raised.value)
    assert f"through the proxy {by}" in str(raised.value)


@pytest.mark.parametrize("answer", [b"pellm-rv\x00\x03\r\n\r\n", b"HTTP/1.1 20", b"HTTP/1.1 " + bytes(9000)])
def test_what_answers_no_connect_is_no_proxy(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(OSError, match="does not answer CONNECT as an HTTP proxy"):
            [*Proxy("p", 1).tunnel(ours, HUB)]
