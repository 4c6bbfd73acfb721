"""Certificates of a federation for tests."""

import threading
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from pellm_lightning.comm import keys
from pellm_lightning.comm.keys import make_ca, make_certificate
from pellm_lightning.comm.tls import TLS

_making = threading.Lock()
_kept: list[TemporaryDirectory[str]] = []


def authority(which: str = "ours") -> Path:
    """The folder of a certificate authority, the same one for all tests of this process."""
    with _making:  # parties are threads
        return _authority(which)


@cache
def _authority(which: str) -> Path:
    _kept.append(TemporaryDirectory())
    directory = Path(_kept[-1].name)
    make_ca(directory)
    return directory


def tls_of(name: str, which: str = "ours") -> TLS:
    """The certificate of ``name``; another authority than "ours" is a stranger's."""
    directory = authority(which)
    with _making:
        if not (directory / f"{name}.pem").exists():
            make_certificate(directory, name)
    return files(directory, name)


def files(directory: Path, name: str) -> TLS:
    return TLS(*(str(directory / file) for file in (f"{name}.pem", f"{name}.key", "ca.pem")))


def unreadable_lists(directory: Path) -> list[bytes]:
    """Revocation lists by the directory's authority that no library writes: a number twice, an odd name."""
    ca, ca_key = keys._authority(directory)
    now, pem = datetime.now(timezone.utc), serialization.Encoding.PEM
    lists = []
    for arc, value in ((21, b"\x02\x01\x05"), (18, b"\x30\x02\xa3\x00")):
        odd = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"2.5.29.{arc}"), value)
        builder = x509.CertificateRevocationListBuilder(ca.subject, now, ca.not_valid_after_utc)
        builder = builder.add_extension(x509.CRLNumber(5), critical=False).add_extension(odd, critical=False)
        good = builder.sign(ca_key, None)
        body = good.tbs_certlist_bytes.replace(b"\x55\x1d\x15", b"\x55\x1d\x14")  # 21 to 20, the number's
        der = good.public_bytes(serialization.Encoding.DER).replace(good.tbs_certlist_bytes, body)
        found = x509.load_der_x509_crl(der.replace(good.signature, ca_key.sign(body)))
        lists.append(found.public_bytes(pem))
    return lists


def elliptic(directory: Path, name: str) -> TLS:
    """A certificate by the directory's authority, of a key on P-256, as institutions may have."""
    path, ca, ca_key = keys._check_signing(directory, name, 1)
    key = generate_private_key(SECP256R1())
    blank = keys._blank(keys._named(name), ca.subject, key.public_key(), ca_key, 1)  # type: ignore[arg-type]
    path.write_bytes(blank.sign(ca_key, None).public_bytes(serialization.Encoding.PEM))
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.with_suffix(".key").write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    return files(directory, name)
