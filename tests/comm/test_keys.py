"""Key files: a party's key never leaves its host, and the administrator signs names, not requests."""

import importlib
import stat
import sys
from pathlib import Path

import pytest
from certificates import authority, files
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pellm_lightning.comm.keys import (
    make_ca,
    make_certificate,
    make_key,
    public_text,
    read_public_key,
    sign_request,
)

PEM = serialization.Encoding.PEM


def request(name: str, key: object, algorithm: hashes.HashAlgorithm | None = None) -> bytes:
    """A request as another program might make it, with extensions that nobody should copy."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    wanted = x509.BasicConstraints(ca=True, path_length=None)
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(wanted, True)
    return builder.sign(key, algorithm).public_bytes(PEM)  # type: ignore[arg-type]


# ---- between hosts


def test_only_the_request_travels(tmp_path: Path) -> None:
    """A clinic makes its key; an office that never sees it signs; the clinic speaks TLS by both files."""
    clinic, office = tmp_path / "clinic", tmp_path / "office"
    private, public = make_key(clinic, "clinic-a")
    assert {path.name for path in clinic.iterdir()} == {"clinic-a.key", "clinic-a.csr"}
    assert "PRIVATE" not in (clinic / "clinic-a.csr").read_text()
    make_ca(office)
    (office / "clinic-a.csr").write_bytes((clinic / "clinic-a.csr").read_bytes())
    signed = sign_request(office, "clinic-a", days=2)
    assert not list(office.glob("clinic*.key"))
    for file in ("clinic-a.pem", "ca.pem"):
        (clinic / file).write_bytes((office / file).read_bytes())
    assert files(clinic, "clinic-a").name == "clinic-a"
    for path in (clinic / "clinic-a.csr", signed):
        assert public_text(read_public_key(path)) == public
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_the_administrator_names_whom_he_signs(tmp_path: Path) -> None:
    """clinic-b sends a request that says clinic-a: under its own name, or under the other's."""
    make_ca(tmp_path)
    mallory = Ed25519PrivateKey.generate()
    (tmp_path / "clinic-b.csr").write_bytes(request("clinic-a", mallory))
    with pytest.raises(ValueError, match=r"clinic-b\.csr gives no .*its common name is 'clinic-a'"):
        sign_request(tmp_path, "clinic-b")
    with pytest.raises(ValueError, match=r"clinic-a\.csr gives no public key.*No such file"):
        sign_request(tmp_path, "clinic-a")
    assert not list(tmp_path.glob("clinic*.pem"))


def test_what_a_request_asks_for_beyond_its_key_is_not_granted(tmp_path: Path) -> None:
    make_ca(tmp_path)
    (tmp_path / "a.csr").write_bytes(request("a", Ed25519PrivateKey.generate()))
    found = x509.load_pem_x509_certificate(sign_request(tmp_path, "a").read_bytes()).extensions
    assert not found.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not found.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_requests_that_cannot_be_signed_are_refused(tmp_path: Path) -> None:
    make_ca(tmp_path)
    path = tmp_path / "a.csr"
    path.write_text("words")
    with pytest.raises(ValueError, match=r"a\.csr gives no public key"):
        sign_request(tmp_path, "a")
    path.write_bytes(request("a", generate_private_key(SECP256R1()), hashes.SHA256()))
    with pytest.raises(ValueError, match="its key is no Ed25519 key"):
        sign_request(tmp_path, "a")
    good = x509.load_pem_x509_csr(request("a", Ed25519PrivateKey.generate()))
    der = bytearray(good.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    path.write_bytes(x509.load_der_x509_csr(bytes(der)).public_bytes(PEM))
    with pytest.raises(ValueError, match="it is not signed by the key in it"):
        sign_request(tmp_path, "a")
    assert not (tmp_path / "a.pem").exists()


# ---- files


def test_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "certs"
    assert make_ca(directory) == directory / "ca.pem"
    assert make_certificate(directory, "clinic-a") == directory / "clinic-a.pem"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for name in ("ca.key", "clinic-a.key"):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600
    assert {path.name for path in directory.iterdir()} == {
        *("ca.pem", "ca.key"),
        *("clinic-a.pem", "clinic-a.key", "clinic-a.csr"),
    }


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_ca(tmp_path)
    make_certificate(tmp_path, "a")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"ca\.key is there already"):
        make_ca(tmp_path)
    with pytest.raises(FileExistsError, match=r"a\.pem is there already"):
        make_certificate(tmp_path, "a")
    (tmp_path / "a.key").unlink()
    with pytest.raises(FileExistsError, match=r"a\.pem is there already"):
        make_certificate(tmp_path, "a")
    with pytest.raises(FileExistsError, match=r"a\.pem is there already"):
        sign_request(tmp_path, "a")
    with pytest.raises(FileExistsError, match=r"a\.csr is there already"):
        make_key(tmp_path, "a")
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
    with pytest.raises(ValueError, match=r"is not the key of the ca\.pem"):
        make_certificate(tmp_path, "a")


def test_hosts_are_written_down(tmp_path: Path) -> None:
    make_ca(tmp_path)
    path = make_certificate(tmp_path, "etcd", hosts=("127.0.0.1", "etcd.example.org"))
    found = x509.load_pem_x509_certificate(path.read_bytes()).extensions
    names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["127.0.0.1", "etcd.example.org"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pellm_lightning.comm.keys"
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'pellm-lightning\[keys\]'"):
        importlib.import_module(name)
