"""The commands beside training."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from certificates import files, tls_of

from pellm_lightning.cli import commands
from pellm_lightning.cli.errors import UsageError
from pellm_lightning.cli.main import main
from pellm_lightning.comm.rendezvous.client import RendezvousStore
from pellm_lightning.comm.signing_keys import SigningKey, TrustedKeys


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def tls_words(name: str) -> list[str]:
    tls = tls_of(name)
    return [f"--tls.cert={tls.cert}", f"--tls.key={tls.key}", f"--tls.ca={tls.ca}"]


def test_trial_makes_the_authority_and_what_is_missing(tmp_path: Path) -> None:
    commands.main(["certs", f"--directory={tmp_path}", "--names=rendezvous, clinic-a"])
    assert files(tmp_path, "clinic-a").name == "clinic-a"
    ca = (tmp_path / "ca.pem").read_bytes()
    commands.main(["certs", f"--directory={tmp_path}", "--names=clinic-b", "--days=1"])
    assert (tmp_path / "ca.pem").read_bytes() == ca
    assert files(tmp_path, "clinic-b").name == "clinic-b"


def test_sign_prints_what_the_party_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.main(["keys", "new", f"--directory={tmp_path}", "--names=clinic-a,clinic-b"])
    of_parties = yaml.safe_load(capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"clinic-c\.csr gives no public key"):
        commands.main(["keys", "sign", f"--directory={tmp_path}", "--names=clinic-a,clinic-c"])
    assert not (tmp_path / "ca.pem").exists(), "nothing is made if one request is not there"
    commands.main(["keys", "sign", f"--directory={tmp_path}", "--names=clinic-a,clinic-b", "--days=1"])
    assert yaml.safe_load(capsys.readouterr().out) == of_parties
    assert files(tmp_path, "clinic-b").name == "clinic-b"


def test_keys_prints_what_belongs_into_the_peers_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        commands.main(["keys", "new", f"--directory={tmp_path / 'new'}", "--names=clinic-a, 0"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed.keys() == {"clinic-a", "0"}
    for name, public in printed.items():
        private = tmp_path / f"new/{name}.key"
        assert SigningKey(private).public_key == public
        assert f"made {private}; keep it secret" in caplog.text
    assert TrustedKeys(printed).fingerprint == TrustedKeys(tmp_path / "new").fingerprint
    with pytest.raises(FileExistsError, match=r"clinic-a\.key is there already and is not overwritten"):
        commands.main(["keys", "new", f"--directory={tmp_path / 'new'}", "--names=clinic-a"])
    with pytest.raises(ValueError, match="name"):
        commands.main(["keys", "new", f"--directory={tmp_path}", "--names=../a"])


def test_keys_revokes_and_another_certificate_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"--directory={tmp_path}"
    commands.main(["certs", folder, "--names=clinic-a,clinic-b"])
    own = files(tmp_path, "clinic-a")
    serial = files(tmp_path, "clinic-b").serial
    for nobody in (",", "clinic-b,../b"):
        with pytest.raises(ValueError, match="name"):
            commands.main(["keys", "revoke", folder, f"--names={nobody}"])
        assert not (tmp_path / "ca.crl").exists()
    commands.main(["keys", "revoke", folder, "--names=clinic-b,clinic-b"])
    assert capsys.readouterr().out == f"{tmp_path / 'ca.crl'}\n"
    assert own.revoked == {serial}
    commands.main(["keys", "sign", folder, "--names=clinic-b"])
    assert files(tmp_path, "clinic-b").serial not in own.revoked


def test_keys_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pellm_lightning.comm.keys", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ImportError, match=r"pip install 'pellm-lightning\[keys\]'"):
        commands.main(["keys", "new", f"--directory={tmp_path}", "--names=a"])


def test_what_goes_wrong_is_told_in_words(tmp_path: Path) -> None:
    words = ["certs", f"--directory={tmp_path}", "--names=a"]
    commands.main(words)
    with pytest.raises(FileExistsError, match=r"a\.pem is there already and is not overwritten"):
        commands.main(words)
    with pytest.raises(ValueError, match="'nowhere' is no address"):
        commands.main(["rendezvous", "--listen=nowhere"])
    with pytest.raises(UsageError, match="without a roster"):
        commands.main(["rendezvous", "--listen=127.0.0.1:1", *tls_words("rendezvous")])
    with pytest.raises(UsageError, match=r"relay at host='0\.0\.0\.0' without TLS .* Give tls"):
        commands.main(["rendezvous", "--relay", "--listen", "0.0.0.0:1"])
    with pytest.raises(UsageError, match=r"Quotas are given, but no relay .* Add --relay"):
        commands.main(["rendezvous", "--listen=127.0.0.1:1", "--quotas.idle_s=5", "--relay", "false"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"--listen=127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"cannot listen on 127.*: Address already in use\. Stop what"):
            commands.main(["rendezvous", listen])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_rendezvous_serves_until_a_signal(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    answers: list[Any] = []

    def visit() -> None:
        try:
            store = RendezvousStore(f"127.0.0.1:{port}", tls=tls_of("clinic-a"), retry_s=10)
            answers.append(store.compare_set("x", "", "1"))
            assert store.relay_access("clinic-a").address == f"127.0.0.1:{port}"
            store.close()
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=visit)
    words = [
        "rendezvous",
        f"--listen=127.0.0.1:{port}",
        "--relay",
        "--roster=clinic-a,clinic-b",
        *tls_words("rendezvous"),
    ]
    monkeypatch.setattr(sys, "argv", ["pellm_lightning", *words])
    thread.start()
    assert main() == 0
    thread.join()
    assert answers == [b"1"]


@pytest.mark.torchrun
def test_the_rendezvous_as_a_process(tmp_path: Path) -> None:
    port = free_port()
    tls = tls_of("rendezvous")
    config = tmp_path / "rendezvous.yaml"
    config.write_text(
        f"listen: 127.0.0.1:{port}\nroster: clinic-a\ntls:"
        f" {{cert: {tls.cert}, key: {tls.key}, ca: {tls.ca}}}\n"
    )
    words = ["rendezvous", f"--config={config}"]
    with subprocess.Popen(
        [sys.executable, "-m", "pellm_lightning", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            store = RendezvousStore(f"127.0.0.1:{port}", tls=tls_of("clinic-a"), retry_s=60)
            store.compare_set("x", "", "1")
            process.terminate()
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert out == b""
    lines = [line.split(b" INFO ")[1] for line in err.splitlines()]
    assert lines == [
        f"the rendezvous listens on 127.0.0.1:{port} with TLS".encode(),
        b"[clinic-a] connected",
        b"[clinic-a] disconnected",
        b"the rendezvous has closed",
    ]
    with contextlib.closing(socket.create_server(("127.0.0.1", port))):
        pass  # its port is free again, at once
    store.close()
