"""Key files: each party's Ed25519 key, the request for its certificate, and the authority that signs these.

One key per party (RFC 8032) authenticates its TLS connections (certificates X.509 v3, RFC 5280 and 8410) and
signs in secure aggregation. It is generated where it is used: only the request leaves that host.
"""

import base64
import ipaddress
import os
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from pellm_lightning.comm.tls import check_name

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    from pellm_lightning.comm.revocation import RevocationFile, replace_file
except ImportError as error:
    raise ImportError(
        "Keys and certificates need the package cryptography: pip install 'pellm-lightning[keys]'."
    ) from error

# OpenSSL, so Python's ssl, takes Ed25519 certificates in TLS 1.3. BoringSSL does not: gRPC's Python wheels
# (1.85 tried) refuse the handshake, so whoever moves the rendezvous to gRPC needs keys on P-256.
KEY_PREFIX = "ed25519:"
"""Begins a public key as text; its 32 bytes in base64 follow."""

_CA_NAME = "pellm-lightning federation"
_CA_DAYS = 3650
# Clocks of different hosts disagree: a certificate is good from a little before it is made.
_CLOCK_SKEW = timedelta(minutes=5)
_PURPOSES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


def make_key(directory: str | Path, name: str) -> tuple[Path, str]:
    """Make a private key, ``<name>.key``, and the request for its certificate, ``<name>.csr``.

    The request is public: it has the name and the public key, signed by the private one (PKCS #10, RFC 2986).

    Args:
        directory: Folder for the two files; made if missing, then closed to all but its owner.
        name: The party's name, or "rendezvous".

    Returns:
        Path of the private key, and the public key as text.

    Raises:
        ValueError: If the name is malformed, or is the authority's.
        FileExistsError: If either file is there already.
    """
    directory = Path(directory)
    private, request = (_free(directory, name, kind) for kind in ("key", "csr"))
    key = Ed25519PrivateKey.generate()
    signed = x509.CertificateSigningRequestBuilder().subject_name(_named(name)).sign(key, None)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_key(private, key)
    _create(request, signed.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return private, public_text(key.public_key())


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
    private, path = (_unused(directory / f"ca.{kind}") for kind in ("key", "pem"))
    key = Ed25519PrivateKey.generate()
    name = _named(_CA_NAME)
    certificate = (
        _blank(name, name, key.public_key(), key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .sign(key, None)
    )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_key(private, key)
    _create(path, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return path


def sign_request(directory: str | Path, name: str, days: float = 365, *, hosts: Sequence[str] = ()) -> Path:
    """Sign ``<name>.csr`` with the directory's authority; write the certificate, ``<name>.pem``.

    Nothing in the request counts but its public key: the name is the administrator's word, who must know that
    the request came from that party.

    Args:
        directory: Folder with ``ca.pem``, ``ca.key`` and the request.
        name: The party's name, or "rendezvous".
        days: How long the certificate is good.
        hosts: Host names and addresses to put into it; the federation ignores them, etcd's clients do not.

    Returns:
        Path of ``<name>.pem``.

    Raises:
        ValueError: If ``name`` or ``days`` is out of range, the request is not that party's, or the authority
            cannot be read.
        FileExistsError: If there is a certificate already.
    """
    directory = Path(directory)
    path, ca, ca_key = _check_signing(directory, name, days)
    public_key = read_public_key(directory / f"{name}.csr")
    certificate = (
        _blank(_named(name), ca.subject, public_key, ca_key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_PURPOSES), critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        certificate = certificate.add_extension(names, critical=False)
    signed = certificate.sign(ca_key, None)
    _create(path, signed.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return path


def revoke(directory: str | Path, names: Sequence[str]) -> Path:
    """Add the certificates of names to the authority's revocation list, ``ca.crl``, and set them aside.

    The list is public; who has it next to ``ca.pem`` refuses these certificates from then on. Another one may
    be signed for the same name at once.

    Args:
        directory: Folder with ``ca.pem``, ``ca.key`` and the certificates ``<name>.pem``.
        names: Names whose certificates are revoked.

    Returns:
        Path of ``ca.crl``.

    Raises:
        ValueError: If the authority, its list or a certificate cannot be read.
    """
    directory = Path(directory)
    ca, ca_key = _authority(directory)
    path, now = directory / "ca.crl", datetime.now(timezone.utc)
    known = RevocationFile(path, ca.public_bytes(serialization.Encoding.PEM)).newest
    entries = (
        {} if known is None else {entry.serial_number: entry for entry in x509.load_pem_x509_crl(known.pem)}
    )
    for name in names:
        serial = _certificate_in(directory / f"{check_name(name)}.pem", name, ca).serial_number
        entries[serial] = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
    # As long as the authority: a list counts until there is a newer one.
    builder = x509.CertificateRevocationListBuilder(
        ca.subject, now - _CLOCK_SKEW, ca.not_valid_after_utc, revoked_certificates=[*entries.values()]
    ).add_extension(x509.CRLNumber(1 if known is None else known.number + 1), critical=False)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    signed = builder.add_extension(issuer_id, critical=False).sign(ca_key, None)
    replace_file(path, signed.public_bytes(serialization.Encoding.PEM))
    for name in set(names):
        (directory / f"{name}.pem").replace(directory / f"{name}.pem.revoked")
    return path


def make_certificate(
    directory: str | Path, name: str, days: float = 365, *, hosts: Sequence[str] = ()
) -> Path:
    """Make a key and its certificate on one host, for a trial: ``make_key``, then ``sign_request``."""
    _check_signing(Path(directory), name, days)
    make_key(directory, name)
    return sign_request(directory, name, days, hosts=hosts)


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Return the public key in a request (``.csr``) or a certificate (``.pem``) of the file's name.

    Who signed a certificate, and until when it is good, is not asked: the file itself is trusted.

    Raises:
        ValueError: If it is neither, of another name, or of another kind of key.
    """
    try:
        data = path.read_bytes()
        found: x509.Certificate | x509.CertificateSigningRequest
        if path.suffix == ".csr":
            found = x509.load_pem_x509_csr(data)
            if not found.is_signature_valid:
                raise ValueError("it is not signed by the key in it")
        else:
            found = x509.load_pem_x509_certificate(data)
        return public_key_of(found, path.stem)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} gives no public key: {error}. `pellm keys new` makes requests (.csr), `pellm keys"
            " sign` certificates (.pem): put there what it has made."
        ) from error


def public_key_of(found: x509.Certificate | x509.CertificateSigningRequest, name: str) -> Ed25519PublicKey:
    """Return the public key of a name.

    Raises:
        ValueError: If it is not Ed25519, or the common name is another one.
    """
    names = [attribute.value for attribute in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [name]:
        raise ValueError(f"its common name is {', '.join(map(str, names))!r:.100}, not {name!r}")
    key = found.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"its key is no Ed25519 key, but {type(key).__name__}")
    return key


def public_text(key: Ed25519PublicKey) -> str:
    """Return a public key as text, as it is printed and pinned."""
    return KEY_PREFIX + base64.b64encode(key.public_bytes_raw()).decode()


def _check_signing(
    directory: Path, name: str, days: float
) -> tuple[Path, x509.Certificate, Ed25519PrivateKey]:
    """Return the path of a new certificate, and the authority that signs it."""
    path = _free(directory, name, "pem")
    if not days > 0:
        raise ValueError(f"days={days} must be positive.")
    return path, *_authority(directory)


def _authority(directory: Path) -> tuple[x509.Certificate, Ed25519PrivateKey]:
    """Return the certificate and the key of a directory's authority."""
    try:
        certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"The authority's files ca.pem and ca.key in {directory} cannot be read: {error}. Make them"
            " first, with `pellm certs` or make_ca, or name the folder that holds them."
        ) from error
    if not isinstance(key, Ed25519PrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError(f"{directory / 'ca.key'} is not the key of the ca.pem there. Give the pair.")
    return certificate, key


def _certificate_in(path: Path, name: str, ca: x509.Certificate) -> x509.Certificate:
    """Return the certificate of a name that an authority has issued."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.verify_directly_issued_by(ca)
        public_key_of(certificate, name)
    except (OSError, ValueError, TypeError, InvalidSignature) as error:
        raise ValueError(
            f"{path} is no certificate of {name} that this authority has issued ({error}), so it cannot be"
            " revoked. Put there the certificate that `pellm keys sign` has written."
        ) from error
    return certificate


def _blank(
    subject: x509.Name,
    issuer: x509.Name,
    key: Ed25519PublicKey,
    issuer_key: Ed25519PrivateKey,
    days: float,
) -> x509.CertificateBuilder:
    """Return what every certificate has (RFC 5280, 4.1 and 4.2.1.1-2), not yet signed."""
    now = datetime.now(timezone.utc)
    subject_id = x509.SubjectKeyIdentifier.from_public_key(key)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(subject_id, critical=False)
        .add_extension(issuer_id, critical=False)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


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


def _free(directory: Path, name: str, kind: str) -> Path:
    """Return the path of a party's new file."""
    if check_name(name).lower() == "ca":
        raise ValueError(f"The name {name!r} is taken by the authority's own files. Choose another.")
    return _unused(directory / f"{name}.{kind}")


def _unused(path: Path) -> Path:
    if path.exists():
        raise FileExistsError(
            f"{path} is there already and is not overwritten: its users would be rejected. Move it away first"
            " if it is to be replaced."
        )
    return path


def _write_key(path: Path, key: Ed25519PrivateKey) -> None:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    _create(path, key.private_bytes(pem, pkcs8, serialization.NoEncryption()), mode=0o600)


def _create(path: Path, data: bytes, mode: int) -> None:
    """Write a new file with its mode from the start: a key must not be readable even for a moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
