"""TLS: every connection is encrypted, and both ends prove their names by certificate.

The name in a certificate (the subject's common name) is the identity, not the host: parties move between
hosts and VPN addresses. So host names are not checked; the code that accepts or opens a connection compares
``peer_name`` with the expected name.
"""

import contextlib
import re
import ssl
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pellm_lightning.comm.revocation import RevocationFile

RENDEZVOUS = "rendezvous"
"""Common name of the rendezvous' certificate."""

REVOKED = "the federation's authority has revoked it"
"""Why a certificate is not accepted that is on the revocation list."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str) -> str:
    """Return ``name`` if a party may be called so.

    Raises:
        ValueError: If not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no party's name: use 1 to 63 letters, digits, dots, hyphens and underscores, with"
            " a letter or digit first."
        )
    return name


@dataclass(frozen=True)
class TLS:
    """Certificate of this process, and the authority that must have signed those of others.

    Version 1.3 only (RFC 8446), and both ends must show a certificate. The files are read once: a run
    continues while they are renewed or removed; new ones are used from the next start. But for the
    authority's revocation list, ``ca.crl`` next to ``ca.pem``: it counts from the moment it is there.

    Args:
        cert: Path of this process' certificate, PEM.
        key: Path of its private key, PEM, not encrypted.
        ca: Path of the certificate of the federation's own authority, PEM.

    Raises:
        ValueError: If a file is missing or no PEM, if the key does not fit the certificate, or if the
            certificate is not the authority's, has expired or was revoked.

    Example:
        >>> from pathlib import Path
        >>> from pellm_lightning.comm.keys import make_ca, make_certificate
        >>> paths = make_ca(Path()), make_certificate(Path(), "clinic-a", days=1)
        >>> TLS("clinic-a.pem", "clinic-a.key", "ca.pem").name
        'clinic-a'
    """

    cert: str
    key: str
    ca: str

    def __post_init__(self) -> None:
        # A certificate that is not accepted fails here and not at another party.
        _ = self.name

    @cached_property
    def name(self) -> str:
        """The common name of ``cert``: the party that this process speaks for."""
        try:
            name = peer_name(_own_handshake(self.client_context, self.server_context))
        except ssl.SSLCertVerificationError as error:
            raise ValueError(
                f"The certificate {self.cert} is not accepted by the authority {self.ca}:"
                f" {error.verify_message}. Take the certificate that this authority issued for this host,"
                " check the host's clock, or have a new one signed: pellm keys sign."
            ) from error
        except ssl.SSLError as error:
            raise ValueError(
                f"The certificate {self.cert} cannot be used for TLS 1.3: {error}. Have a new one"
                " signed: pellm keys sign."
            ) from error
        if name is None:
            raise ValueError(
                f"The subject of the certificate {self.cert} must have exactly one common name, the party's"
                " name. Have a new one signed: pellm keys sign."
            )
        return check_name(name)

    @cached_property
    def contents(self) -> Mapping[str, bytes]:
        """What the files hold: ``cert``, ``key`` and ``ca``, for whoever signs with the same key."""
        return {part: _read(getattr(self, part)) for part in ("cert", "key", "ca")}

    @cached_property
    def revocations(self) -> "RevocationFile | None":
        """The authority's revocation list; None if none can be read, for lack of the package cryptography."""
        path = Path(self.ca).absolute().with_suffix(".crl")
        try:
            from pellm_lightning.comm.revocation import RevocationFile
        except ImportError:
            if path.exists():
                raise  # certificates were revoked
            return None
        return RevocationFile(path, self.contents["ca"])

    @property
    def revoked(self) -> Collection[int]:
        """Serial numbers of the certificates that are revoked now."""
        return () if self.revocations is None else self.revocations.serials

    @cached_property
    def serial(self) -> int:
        """Serial number of this process' certificate."""
        return _serial(_own_handshake(self.client_context, self.server_context))

    @cached_property
    def server_context(self) -> ssl.SSLContext:
        """Settings for accepting connections: the other end must show a certificate of ``ca``."""
        context = self._filled(_Context(ssl.PROTOCOL_TLS_SERVER))
        # Without tickets nothing is resumed: every connection shows its certificate.
        context.num_tickets = 0
        return context

    @cached_property
    def client_context(self) -> ssl.SSLContext:
        """Settings for opening connections: the other end must show a certificate of ``ca``."""
        return self._filled(_Context(ssl.PROTOCOL_TLS_CLIENT))

    def __getstate__(self) -> dict[str, str]:
        """Return the paths alone: another process reads the files for itself."""
        return {"cert": self.cert, "key": self.key, "ca": self.ca}

    def _filled(self, context: "_Context") -> ssl.SSLContext:
        context.revoked = lambda: self.revoked
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        _ = self.contents
        try:
            context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise ValueError(
                f"ca={self.ca} is no certificate in PEM: {error}. Give the path of ca.pem."
            ) from error
        try:
            # Without a password to give, OpenSSL would ask for one at the terminal.
            context.load_cert_chain(self.cert, self.key, password="")
        except ssl.SSLError as error:
            raise ValueError(
                f"cert={self.cert} and key={self.key} are no certificate and its key, in PEM and not"
                f" encrypted: {error}. Give the two files that were made together."
            ) from error
        return context


class _Context(ssl.SSLContext):
    """Settings of TLS that know which certificates are revoked.

    OpenSSL's own check would need a list of every authority in ``ca``, and fail once one is out of date.
    """

    revoked: Callable[[], Collection[int]] = tuple


def peer_name(sock: ssl.SSLSocket | ssl.SSLObject) -> str | None:
    """Return the common name in the other end's verified certificate; None if it has not exactly one.

    Raises:
        ssl.SSLCertVerificationError: If the certificate was revoked.
    """
    if is_revoked(sock):
        error = ssl.SSLCertVerificationError(REVOKED)
        error.verify_message = REVOKED
        raise error
    subject = (sock.getpeercert() or {}).get("subject", ())
    names = [pair[1] for part in subject for pair in part if pair[0] == "commonName"]
    return str(names[0]) if len(names) == 1 else None


def is_revoked(sock: ssl.SSLSocket | ssl.SSLObject) -> bool:
    """Tell whether the other end's certificate is revoked by now."""
    context = sock.context
    revoked = context.revoked() if isinstance(context, _Context) else ()
    return bool(revoked) and _serial(sock) in revoked


def _serial(sock: ssl.SSLSocket | ssl.SSLObject) -> int:
    return int(str((sock.getpeercert() or {}).get("serialNumber", "-1")), 16)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(
            f"TLS needs the file {path}, which cannot be read: {error.strerror}. Check the path and its"
            " permissions; the files are made by pellm keys."
        ) from error


def _own_handshake(client_context: ssl.SSLContext, server_context: ssl.SSLContext) -> ssl.SSLObject:
    """Run a TLS handshake of a certificate with itself, in memory; return the client's end.

    This verifies it exactly as other parties will: issuer, dates, purposes. The standard library has no
    public way to read a certificate from a file.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for end in (client, server, client, server):  # hello, hello and certificate, certificate, the end
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return client
