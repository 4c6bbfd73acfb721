"""Certificates: a federation's own certificate authority, and a certificate for each name.

Certificates are X.509 v3 as of RFC 5280, with keys on the curve P-256, for both ends of TLS 1.3 (RFC 8446).
"""

import ipaddress
import os
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from pellm_lightning.comm.tls import check_name

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID
except ImportError as error:
    raise ImportError(
        "Making certificates needs the package cryptography: pip install 'pellm-lightning[certs]'. Only the"
        " host that makes them needs it."
    ) from error

_CA_NAME = "pellm-lightning federation"
_CA_DAYS = 3650
# Clocks of different hosts disagree: a certificate is good from a little before it is made.
_CLOCK_SKEW = timedelta(minutes=5)


def make_ca(directory: str | Path) -> Path:
    """Make a certificate authority: ``ca.pem``, which all members need, and ``ca.key``, which none may have.

    Whoever has ``ca.key`` can join under any name: keep it away from the hosts that take part.

    Args:
        directory: Folder for the two files; made if missing, then closed to all but its owner.

    Returns:
        Path of ``ca.pem``.

    Raises:
        FileExistsError: If either file is there already.
    """
    directory = Path(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _named(_CA_NAME)
    certificate = (
        _blank(name, name, key, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _write(directory, "ca", certificate, key)


def make_certificate(
    directory: str | Path, name: str, days: float = 365, *, hosts: Sequence[str] = ()
) -> Path:
    """Make the certificate of ``name``, signed by the directory's authority: ``<name>.pem``, ``<name>.key``.

    Args:
        directory: Folder with ``ca.pem`` and ``ca.key``.
        name: The party's name, or "rendezvous".
        days: How long the certificate is good.
        hosts: Host names and addresses to put into it; the federation ignores them, etcd's clients do not.

    Returns:
        Path of ``<name>.pem``.

    Raises:
        ValueError: If ``name`` or ``days`` is out of range, or the authority cannot be read.
        FileExistsError: If either file is there already.
    """
    if check_name(name).lower() == "ca":
        raise ValueError(f"The name {name!r} is taken by the authority's own files. Choose another.")
    if not days > 0:
        raise ValueError(f"days={days} must be positive.")
    directory = Path(directory)
    ca, ca_key = _authority(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _blank(_named(name), ca.subject, key, ca_key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        certificate = certificate.add_extension(names, critical=False)
    return _write(directory, name, certificate.sign(ca_key, hashes.SHA256()), key)


def _authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Read the authority's certificate and key."""
    try:
        certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"The authority's files ca.pem and ca.key in {directory} cannot be read: {error}. Make them"
            " first, with make_ca, or name the folder that holds them."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError(f"{directory / 'ca.key'} is not the key of ca.pem beside it. Give the pair.")
    return certificate, key


def _blank(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: float,
) -> x509.CertificateBuilder:
    """Return what every certificate has (RFC 5280, 4.1 and 4.2.1.1-2), not yet signed."""
    now = datetime.now(timezone.utc)
    subject_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(subject_id, critical=False)
        .add_extension(issuer_id, critical=False)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    """Return what the key may do (RFC 5280, 4.2.1.3): sign certificates, or sign in handshakes."""
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(
    directory: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> Path:
    """Write ``<name>.key``, readable by its owner only, and ``<name>.pem``; return the path of the latter."""
    key_path, path = directory / f"{name}.key", directory / f"{name}.pem"
    for taken in (key_path, path):
        if taken.exists():
            raise FileExistsError(
                f"{taken} is there already and is not overwritten: its users would be rejected. Move"
                " it away first if it is to be replaced."
            )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    _create(key_path, key.private_bytes(pem, pkcs8, serialization.NoEncryption()), mode=0o600)
    _create(path, certificate.public_bytes(pem), mode=0o644)
    return path


def _create(path: Path, data: bytes, mode: int) -> None:
    """Write a new file with its mode from the start: a key must not be readable even for a moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
