"""Certificates: made with care, read with care, and the name in them counts."""

import copy
import importlib
import shutil
import socket
import ssl
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from certificates import authority, files, tls_of
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pellm_lightning.comm import certs
from pellm_lightning.comm.certs import make_ca, make_certificate
from pellm_lightning.comm.tls import TLS, check_name, peer_name

REFUSED = (ssl.SSLError, ConnectionError)


@contextmanager
def accepting(context: ssl.SSLContext) -> Iterator[tuple[int, list[str | None]]]:
    """A port that shakes hands with one caller and notes its name."""
    names: list[str | None] = []

    def accept() -> None:
        with suppress(OSError):
            sock, _ = listener.accept()
            sock.settimeout(5)
            with context.wrap_socket(sock, server_side=True) as encrypted:
                names.append(peer_name(encrypted))
                encrypted.sendall(b"welcome")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1], names
        thread.join()


def call(port: int, context: ssl.SSLContext) -> tuple[str | None, bytes]:
    """Shake hands; return the other end's name and its first words."""
    sock = socket.create_connection(("127.0.0.1", port), 5)
    with closing(context.wrap_socket(sock)) as encrypted:
        return peer_name(encrypted), encrypted.recv(7)


# ---- the contexts


def test_files_are_read_once(tmp_path: Path) -> None:
    """A connection in the middle of a run must not depend on a file that is just being renewed."""
    kept = tls_of("clinic-a")
    own = TLS(*(shutil.copy(path, tmp_path) for path in (kept.cert, kept.key, kept.ca)))
    for path in tmp_path.iterdir():
        path.write_text("half of a")
    with accepting(tls_of("rendezvous").server_context) as (port, names):
        assert call(port, own.client_context) == ("rendezvous", b"welcome")
    assert names == ["clinic-a"]


def test_another_process_reads_the_files_itself() -> None:
    own = tls_of("clinic-a")
    other = copy.deepcopy(own)
    assert other == own
    assert other.name == "clinic-a"
    assert other.client_context is not own.client_context


def test_both_ends_learn_each_others_name() -> None:
    with accepting(tls_of("rendezvous").server_context) as (port, names):
        assert call(port, tls_of("clinic-a").client_context) == ("rendezvous", b"welcome")
    assert names == ["clinic-a"]
    assert tls_of("clinic-a").name == "clinic-a"


def test_a_client_without_a_certificate_gets_nothing() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with accepting(tls_of("rendezvous").server_context) as (port, names), pytest.raises(REFUSED):
        assert call(port, context)[1] == b"welcome"
    assert names == []


def test_foreign_authorities_are_refused_on_both_ends() -> None:
    with accepting(tls_of("rendezvous").server_context) as (port, names), pytest.raises(REFUSED):
        call(port, tls_of("clinic-a", "theirs").client_context)
    assert names == []
    refused = pytest.raises(ssl.SSLCertVerificationError)
    with accepting(tls_of("rendezvous", "theirs").server_context) as (port, _), refused:
        call(port, tls_of("clinic-a").client_context)


def test_only_the_newest_version_is_spoken() -> None:
    context = tls_of("clinic-a").client_context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with accepting(tls_of("rendezvous").server_context) as (port, _), pytest.raises(REFUSED):
        call(port, context)


# ---- files that cannot be used


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
def test_a_missing_file_is_named(missing: str) -> None:
    paths = {part: getattr(tls_of("clinic-a"), part) for part in ("cert", "key", "ca")}
    with pytest.raises(ValueError, match=r"the file /nowhere/x, which cannot be read: No such file"):
        TLS(**{**paths, missing: "/nowhere/x"})


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    ours = tls_of("clinic-a")
    noise = tmp_path / "noise"
    noise.write_text("noise")
    with pytest.raises(ValueError, match=r"ca=.*noise is no certificate in PEM"):
        TLS(ours.cert, ours.key, str(noise))
    with pytest.raises(ValueError, match=r"cert=.*noise and key=.* are no certificate and its key"):
        TLS(str(noise), ours.key, ours.ca)
    with pytest.raises(ValueError, match=r"are no certificate and its key"):
        TLS(ours.cert, tls_of("clinic-b").key, ours.ca)
    with pytest.raises(ValueError, match=r"not accepted by the authority .*: unable to get local issuer"):
        TLS(ours.cert, ours.key, tls_of("clinic-a", "theirs").ca)
    with pytest.raises(ValueError, match=r"not accepted by the authority .*: unsuitable certificate purpose"):
        TLS(ours.ca, str(authority() / "ca.key"), ours.ca)


def test_an_encrypted_key_is_refused_without_a_prompt(tmp_path: Path) -> None:
    ours = tls_of("clinic-a")
    key = serialization.load_pem_private_key(Path(ours.key).read_bytes(), password=None)
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ValueError, match="not encrypted"):
        TLS(ours.cert, str(encrypted), ours.ca)


@pytest.mark.parametrize("common_names", [[], ["a", "b"], ["../a"]])
def test_a_certificate_needs_exactly_one_good_name(tmp_path: Path, common_names: list[str]) -> None:
    make_ca(tmp_path)
    ca, ca_key = certs._authority(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name) for name in common_names])
    certificate = certs._blank(subject, ca.subject, key, ca_key, 1).sign(ca_key, hashes.SHA256())
    certs._write(tmp_path, "odd", certificate, key)
    with pytest.raises(ValueError, match=r"exactly one common name|is no party's name"):
        files(tmp_path, "odd")


def test_an_expired_certificate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_ca(tmp_path)
    # Backdated by a day, a certificate of half a day is over.
    skew = certs._CLOCK_SKEW
    monkeypatch.setattr(certs, "datetime", _Yesterday)
    make_certificate(tmp_path, "late", days=0.5)
    assert skew.total_seconds() < 3600
    with pytest.raises(ValueError, match="certificate has expired"):
        files(tmp_path, "late")


class _Yesterday(certs.datetime):
    @classmethod
    def now(cls, tz: object = None) -> "certs.datetime":
        return certs.datetime.fromtimestamp(super().now(tz).timestamp() - 86400, tz)  # type: ignore[arg-type]


# ---- names


@pytest.mark.parametrize("name", ["a", "clinic-a", "Clinic_1.example.org", "0", "x" * 63])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a\n", "@a", "é", "x" * 64, "..", "a\0"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="is no party's name"):
        check_name(name)


# ---- making certificates


def test_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "certs"
    assert make_ca(directory) == directory / "ca.pem"
    assert make_certificate(directory, "clinic-a") == directory / "clinic-a.pem"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for name in ("ca.key", "clinic-a.key"):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600
    assert {path.name for path in directory.iterdir()} == {"ca.pem", "ca.key", "clinic-a.pem", "clinic-a.key"}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_ca(tmp_path)
    make_certificate(tmp_path, "a")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"ca\.key is there already"):
        make_ca(tmp_path)
    with pytest.raises(FileExistsError, match=r"a\.key is there already"):
        make_certificate(tmp_path, "a")
    (tmp_path / "a.key").unlink()
    with pytest.raises(FileExistsError, match=r"a\.pem is there already"):
        make_certificate(tmp_path, "a")
    assert not (tmp_path / "a.key").exists()
    assert all(path.read_bytes() == data for path, data in before.items() if path.exists())


def test_arguments_of_certificates_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ca\.pem and ca\.key in .* cannot be read"):
        make_certificate(tmp_path, "a")
    make_ca(tmp_path)
    with pytest.raises(ValueError, match="is no party's name"):
        make_certificate(tmp_path, "../a")
    with pytest.raises(ValueError, match="is taken by the authority"):
        make_certificate(tmp_path, "CA")
    with pytest.raises(ValueError, match="days=0 must be positive"):
        make_certificate(tmp_path, "a", days=0)
    (tmp_path / "ca.key").write_bytes((authority() / "ca.key").read_bytes())
    with pytest.raises(ValueError, match=r"is not the key of ca\.pem"):
        make_certificate(tmp_path, "a")


def test_hosts_are_written_down(tmp_path: Path) -> None:
    make_ca(tmp_path)
    path = make_certificate(tmp_path, "etcd", hosts=("127.0.0.1", "etcd.example.org"))
    found = x509.load_pem_x509_certificate(path.read_bytes()).extensions
    names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["127.0.0.1", "etcd.example.org"]


def test_strict_verification_accepts_what_we_make() -> None:
    # RFC 5280 to the letter, which newer versions of Python ask for by default.
    context = tls_of("clinic-a").client_context
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with accepting(tls_of("rendezvous").server_context) as (port, _):
        assert call(port, context) == ("rendezvous", b"welcome")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pellm_lightning.comm.certs"
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'pellm-lightning\[certs\]'"):
        importlib.import_module(name)
