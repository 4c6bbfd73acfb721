"""The client of etcd, against a real one."""

import contextlib
import importlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from certificates import authority, tls_of
from hypothesis import HealthCheck, given, settings
from party_threads import in_threads
from ports import free_port
from store_agreement import agree, steps

from pellm_lightning.comm import FederationError
from pellm_lightning.comm.keys import make_certificate
from pellm_lightning.comm.rendezvous.client import connect
from pellm_lightning.comm.rendezvous.etcd import EtcdStore
from pellm_lightning.comm.tls import TLS

needs_etcd = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="no etcd here: install it, for instance Debian's etcd-server"
)


@contextlib.contextmanager
def etcd(directory: Path, port: int, *words: str, scheme: str = "http") -> Iterator[subprocess.Popen[bytes]]:
    peers = f"http://127.0.0.1:{free_port()}"
    command = [
        "etcd",
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls={scheme}://127.0.0.1:{port}",
        f"--advertise-client-urls={scheme}://127.0.0.1:{port}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        *words,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with etcd(tmp_path_factory.mktemp("etcd"), port):
        yield f"127.0.0.1:{port}"


@pytest.fixture
def store(address: str, request: pytest.FixtureRequest) -> Iterator[EtcdStore]:
    prefix = request.node.name
    store = EtcdStore(address, timeout_s=5, retry_s=20, prefix=prefix)
    with contextlib.closing(store):
        yield store


@needs_etcd
@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(steps=steps)
def test_as_a_hash_store(store: EtcdStore, steps: list[tuple[Any, ...]]) -> None:
    agree(store, dist.HashStore(), steps)


@needs_etcd
def test_values_are_bytes(store: EtcdStore) -> None:
    value = bytes(range(256))
    store.set("bytes", value)
    assert store.get("bytes") == value
    assert store.try_multi_get(["bytes", "none"] * 200) == [value, None] * 200
    store.multi_set(["1", "2"], ["", b"2"])
    assert store.multi_get(["2", "1"]) == [b"2", b""]
    assert store.compare_set("1", "", "is empty, so as good as missing") == b"is empty, so as good as missing"
    with pytest.raises(FederationError, match=r"refuses a request: .*larger than max"):
        store.set("large", bytes(4 << 20))


@needs_etcd
def test_federations_do_not_see_each_other(store: EtcdStore) -> None:
    other = EtcdStore(store.address, prefix="other", retry_s=20)
    store.set("a", "1")
    assert other.try_get("a") is None
    assert other.num_keys() == 0
    assert store.num_keys() == 1
    other.close()


@needs_etcd
def test_waiting(store: EtcdStore) -> None:
    other = store.clone()
    timer = threading.Timer(0.2, lambda: other.set("late", "now"))
    timer.start()
    assert store.get("late") == b"now"
    timer.join()
    with pytest.raises(dist.DistStoreError, match=r"Nobody has set all of never within 0\.1 s"):
        store.wait(["never"], timedelta(seconds=0.1))


@needs_etcd
def test_many_threads_count_right(store: EtcdStore) -> None:
    def count() -> None:
        with contextlib.closing(store.clone()) as own:
            for _ in range(10):
                own.add("count", 1)
            won.append(own.compare_set("won", "", str(threading.get_ident())))

    won: list[bytes] = []
    in_threads([count] * 8)
    assert store.get("count") == b"80"
    assert len(set(won)) == 1


@needs_etcd
def test_a_restart_is_survived(tmp_path: Path) -> None:
    port = free_port()
    with etcd(tmp_path, port) as process:
        store = connect(f"etcd://127.0.0.1:{port}")
        assert isinstance(store, EtcdStore)
        store._retry_s = 30
        store.set("a", "1")
        process.kill()
        process.wait()
    with etcd(tmp_path, port):
        assert store.get("a") == b"1", "etcd keeps what it was told"
    store._retry_s = 0.2
    with pytest.raises(dist.DistNetworkError, match=rf"etcd at 127\.0\.0\.1:{port} is out of reach"):
        store.get("a")
    store.close()
    with pytest.raises(dist.DistNetworkError, match="this client was closed"):
        store.get("a")


@needs_etcd
def test_certificates(tmp_path: Path) -> None:
    ours = authority()
    if not (ours / "etcd.pem").exists():
        make_certificate(ours, "etcd", hosts=["127.0.0.1"])
    port = free_port()
    files = [f"--{kind}-file={ours / name}" for kind, name in (("cert", "etcd.pem"), ("key", "etcd.key"))]
    trust = f"--trusted-ca-file={ours / 'ca.pem'}"
    with etcd(tmp_path, port, *files, trust, "--client-cert-auth", scheme="https"):
        address = f"127.0.0.1:{port}"
        with contextlib.closing(EtcdStore(address, tls=tls_of("clinic-a"), retry_s=20)) as store:
            store.set("a", "1")
            assert store.get("a") == b"1"
        # The environment's idea of whom to trust must not count.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REQUESTS_CA_BUNDLE", tls_of("clinic-a", "theirs").ca)
            with contextlib.closing(EtcdStore(address, tls=tls_of("clinic-a"))) as store:
                assert store.get("a") == b"1"
        # A stranger of another authority, even one that trusts this etcd.
        theirs = tls_of("clinic-a", "theirs")
        for tls in (theirs, None):
            with pytest.raises((FederationError, dist.DistNetworkError), match="etcd at"):
                EtcdStore(address, tls=tls, retry_s=0.5)
        both = tmp_path / "both.pem"
        both.write_bytes(Path(theirs.ca).read_bytes() + (ours / "ca.pem").read_bytes())
        with pytest.raises((FederationError, dist.DistNetworkError), match="etcd at"):
            EtcdStore(address, tls=TLS(theirs.cert, theirs.key, str(both)), retry_s=0.5)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="is no address"):
        EtcdStore("nowhere")
    with pytest.raises(ValueError, match="retry_s=0 must be positive"):
        EtcdStore("127.0.0.1:1", retry_s=0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "etcd3gw", None)
    monkeypatch.delitem(sys.modules, "pellm_lightning.comm.rendezvous.etcd")
    with pytest.raises(ImportError, match=r"pip install 'pellm-lightning\[etcd\]'"):
        importlib.import_module("pellm_lightning.comm.rendezvous.etcd")
