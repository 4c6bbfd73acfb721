"""Revocation lists of the federation's authority: X.509 CRLs (RFC 5280, section 5), next to ``ca.pem``."""

import contextlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
except ImportError as error:
    raise ImportError(
        "Revocation lists need the package cryptography: pip install 'pellm-lightning[keys]'."
    ) from error

MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What a list or certificate raises that a peer has made up; some derive from Exception alone."""


@dataclass(frozen=True)
class RevocationList:
    """A revocation list that one of the federation's authorities has signed; or those of several, joined.

    Args:
        pem: The list.
        number: Its number (RFC 5280, 5.2.3); the greatest is the authority's newest. Of several the sum.
        serials: Serial numbers of the revoked certificates.
        issuer: Public key of the authority, DER; authorities may have the same name. Empty for several.
    """

    pem: bytes
    number: int
    serials: frozenset[int]
    issuer: bytes = b""

    @classmethod
    def parse(cls, pem: bytes, authorities: bytes) -> "RevocationList":
        """Return the list in PEM.

        Args:
            pem: What may come from anybody.
            authorities: Certificates of the authorities, PEM.

        Raises:
            ValueError: If it is none, or no authority has signed it.
        """
        try:
            found = x509.load_pem_x509_crl(pem)
            known = x509.load_pem_x509_certificates(authorities)
            issuer = next((ca.public_key() for ca in known if _signed_by(found, ca)), None)
        except MALFORMED as error:
            raise ValueError(f"it cannot be read: {error}") from error
        if issuer is None:  # what else is in it may be anything
            raise ValueError("the federation's authority has not signed it")
        try:
            number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            serials = frozenset(entry.serial_number for entry in found)
        except MALFORMED as error:
            raise ValueError(f"it cannot be read: {error}") from error
        der, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        key = issuer.public_bytes(der, form)
        return cls(found.public_bytes(serialization.Encoding.PEM), number, serials, key)

    @classmethod
    def joined(cls, lists: Sequence["RevocationList"]) -> "RevocationList":
        """Return the lists of several authorities as one."""
        serials = frozenset[int]().union(*(each.serials for each in lists))
        return cls(b"".join(each.pem for each in lists), sum(each.number for each in lists), serials)


class RevocationFile:
    """The newest revocation list of each authority that this process knows, and the file with them in a row.

    The file is read again whenever it has changed, so that a list takes effect while a job runs.

    Args:
        path: The file; it may be missing, and appear later.
        authorities: Certificates of the authorities, PEM.

    Raises:
        ValueError: If the file holds something else.
    """

    def __init__(self, path: Path, authorities: bytes) -> None:
        self.path, self._authorities = path, authorities
        self._seen: tuple[int, int] | None = None
        self._lists: dict[bytes, RevocationList] = {}
        self.newest: RevocationList | None = None
        """The lists of all authorities as one; None if nothing was ever revoked."""
        self.problem = ""
        """Why the file was not taken over when it changed last; empty if it was."""
        self.refresh()
        if self.problem:
            raise ValueError(
                f"The revocation list {path} cannot be used: {self.problem}. Take the ca.crl that `pellm keys"
                " revoke` has written with this ca.pem."
            )

    @property
    def serials(self) -> Collection[int]:
        """Serial numbers of the revoked certificates, by the file as it is now."""
        self.refresh()
        return frozenset() if self.newest is None else self.newest.serials

    def refresh(self) -> None:
        """Read the file if it has changed; an older list than the one known is not taken."""
        try:
            now = self.path.stat()
            if (now.st_mtime_ns, now.st_size) == self._seen:
                return
            self._seen = now.st_mtime_ns, now.st_size
            self.take(self.path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self.problem = str(error)
        else:
            self.problem = ""

    def take(self, pem: bytes) -> bool:
        """Take over lists that may come from anybody; return whether one is newer than its authority's known.

        Raises:
            ValueError: If one is none, or no authority has signed it; none is taken then.
        """
        first, *others = re.split(b"(?=-----BEGIN X509 CRL-----)", pem)
        found = [RevocationList.parse(part, self._authorities) for part in others or [first]]
        before = self.newest
        for each in found:
            known = self._lists.get(each.issuer)
            if known is None or each.number > known.number:
                self._lists[each.issuer] = each
                self.newest = RevocationList.joined([self._lists[key] for key in sorted(self._lists)])
        return self.newest is not before

    def keep(self) -> None:
        """Write the newest list into the file, for the next start, if that is allowed."""
        self.refresh()
        if self.newest is not None:
            with contextlib.suppress(OSError):
                replace_file(self.path, self.newest.pem)
            self.problem, self._seen = "", None


def replace_file(path: Path, data: bytes) -> None:
    """Write a public file in one step."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _signed_by(found: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    key: Any = authority.public_key()
    try:
        return found.issuer == authority.subject and found.is_signature_valid(key)
    except MALFORMED:  # or a key that signs no certificates
        return False
