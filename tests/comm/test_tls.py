"""TLS: certificates are read with care, and the name in them counts."""

import copy
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from certificates import authority, elliptic, files, tls_of
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pellm_lightning.comm import keys
from pellm_lightning.comm.keys import make_ca, make_certificate
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
    path, ca, ca_key = keys._check_signing(tmp_path, "odd", 1)
    key = Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name) for name in common_names])
    certificate = keys._blank(subject, ca.subject, key.public_key(), ca_key, 1).sign(ca_key, None)
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    keys._write_key(tmp_path / "odd.key", key)
    with pytest.raises(ValueError, match=r"exactly one common name|is no party's name"):
        files(tmp_path, "odd")


def test_an_expired_certificate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_ca(tmp_path)
    # Backdated by a day, a certificate of half a day is over.
    skew = keys._CLOCK_SKEW
    monkeypatch.setattr(keys, "datetime", _Yesterday)
    make_certificate(tmp_path, "late", days=0.5)
    assert skew.total_seconds() < 3600
    with pytest.raises(ValueError, match="certificate has expired"):
        files(tmp_path, "late")


class _Yesterday(keys.datetime):
    @classmethod
    def now(cls, tz: object = None) -> "keys.datetime":
        return keys.datetime.fromtimestamp(super().now(tz).timestamp() - 86400, tz)  # type: ignore[arg-type]


# ---- names


@pytest.mark.parametrize("name", ["a", "clinic-a", "Clinic_1.example.org", "0", "x" * 63])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a\n", "@a", "é", "x" * 64, "..", "a\0"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="is no party's name"):
        check_name(name)


def test_strict_verification_accepts_what_we_make() -> None:
    # RFC 5280 to the letter, which newer versions of Python ask for by default.
    context = tls_of("clinic-a").client_context
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with accepting(tls_of("rendezvous").server_context) as (port, _):
        assert call(port, context) == ("rendezvous", b"welcome")


def test_another_authoritys_kind_of_key_is_good_enough_for_tls(tmp_path: Path) -> None:
    """An institution may have its own authority; only secure aggregation needs Ed25519."""
    make_ca(tmp_path)
    own = elliptic(tmp_path, "clinic-a")
    with accepting(own.server_context) as (port, names):
        assert call(port, own.client_context) == ("clinic-a", b"welcome")
    assert names == ["clinic-a"]
