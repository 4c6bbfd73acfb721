"""Signing keys: Ed25519 (RFC 8032), and the public keys of all parties, pinned or certified."""

import base64
import binascii
import hashlib
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timezone
from pathlib import Path

from pellm_lightning.comm.tls import RENDEZVOUS, TLS

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    from pellm_lightning.comm.keys import KEY_PREFIX, public_key_of, public_text, read_public_key
    from pellm_lightning.comm.revocation import MALFORMED
except ImportError as error:
    raise ImportError(
        "Signatures need the package cryptography: pip install 'pellm-lightning[keys]'."
    ) from error

# Bytes in which a party shows its certificate; ours have about 500.
_CERTIFICATE_BYTES = 2048
_LENGTH_BYTES = 2


class SigningKey:
    """A party's private signing key.

    Args:
        path: PEM file written by ``make_key``.
        pem: What was read from it already; None reads it.

    Raises:
        ValueError: If the file cannot be read, or holds something else.

    Example:
        >>> from pellm_lightning.comm.keys import make_key
        >>> path, public_key = make_key("keys", "clinic-a")
        >>> SigningKey(path).public_key == public_key
        True
    """

    def __init__(self, path: str | Path, pem: bytes | None = None) -> None:
        self.path = Path(path)
        try:
            key = serialization.load_pem_private_key(pem or self.path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"The signing key {str(path)!r} cannot be read: {error}. Create one by"
                " `pellm keys new`, and give each party its own."
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(
                f"The signing key {str(path)!r} is no Ed25519 key, but {type(key).__name__}. Create one by"
                " `pellm keys new`."
            )
        self._key = key

    @property
    def public_key(self) -> str:
        """The public key as text."""
        return public_text(self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Return the signature, 64 bytes; the message must begin with what it is for, as TLS uses the key."""
        return self._key.sign(message)


class TrustedKeys:
    """The pinned public keys of all parties, by name: whoever signed certificates of others is not trusted.

    Args:
        keys: Public key of each party as text ("ed25519:..."), or a folder with the requests or certificates
            of all, ``<name>.csr`` or ``<name>.pem``.

    Raises:
        ValueError: If a key is malformed, two parties have the same, or there are none.

    Example:
        >>> from pellm_lightning.comm.keys import make_key
        >>> path, public_key = make_key("keys", "clinic-b")
        >>> trusted = TrustedKeys({"clinic-b": public_key})
        >>> trusted.verify("clinic-b", SigningKey(path).sign(b"message"), b"message")
        True
    """

    shown = b""
    """What this party shows of itself to the others, who know its key already."""

    def __init__(self, keys: Mapping[str, str] | str | Path) -> None:
        texts = dict(keys) if isinstance(keys, Mapping) else _keys_in(Path(keys))
        if not texts:
            raise ValueError(
                f"trusted_keys={str(keys)!r} holds no public keys. Give each party's as name:"
                " 'ed25519:...', or the folder with <name>.csr or <name>.pem of all."
            )
        self._keys = {name: _parse_key(name, text) for name, text in texts.items()}
        self._texts = {name: public_text(key) for name, key in self._keys.items()}
        first: dict[str, str] = {}
        for name, text in self._texts.items():
            if first.setdefault(text, name) != name:
                raise ValueError(
                    f"Parties {first[text]} and {name} have the same public key. Each needs its own."
                )

    def __reduce__(self) -> "tuple[type[TrustedKeys], tuple[dict[str, str]]]":
        """Pickle the keys as text: the library's objects cannot be pickled."""
        return TrustedKeys, (dict(self._texts),)

    @property
    def fingerprint(self) -> str:
        """A digest of all names and keys, 16 hex digits."""
        lines = "\n".join(f"{name} {self._texts[name]}" for name in sorted(self._texts))
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    @property
    def names(self) -> list[str]:
        """The parties, sorted."""
        return sorted(self._texts)

    def get(self, name: str) -> str | None:
        """Return a party's public key as text, None if unknown."""
        return self._texts.get(name)

    def verified(self, shown: Mapping[str, bytes]) -> "TrustedKeys":
        """Return the keys of those who take part, whatever they show."""
        return self

    def refusal(self, name: str, key: str, certificate: bytes | None) -> str | None:
        """Return why a key is not accepted as a party's; None if it is the pinned one."""
        return None if key == self.get(name) else f"it is {key}, the pinned one is {self.get(name)}"

    def verify(self, name: str, signature: bytes, message: bytes) -> bool:
        """Return whether a signature of a message is a party's."""
        try:
            self._keys[name].verify(signature, message)
        except InvalidSignature:
            return False
        return True


class Authorities:
    """The authorities that certify public keys: each of them could certify a key of its own under any name.

    Args:
        pem: Their certificates.
        revoked: Returns the serial numbers of revoked certificates.

    Raises:
        ValueError: If these are no certificates.
    """

    def __init__(self, pem: bytes, revoked: Callable[[], Collection[int]] = tuple) -> None:
        self._certificates = x509.load_pem_x509_certificates(pem)
        self._revoked = revoked

    def key(self, name: str, der: bytes, now: datetime | None = None) -> Ed25519PublicKey:
        """Return the key in a certificate issued for that name and this use, and good at that time.

        Raises:
            MALFORMED: If it is not accepted.
        """
        certificate = x509.load_der_x509_certificate(der)
        issuer = next((ca for ca in self._certificates if _issued(certificate, ca)), None)
        if issuer is None:
            raise ValueError("the federation's authority has not issued it")
        if certificate.serial_number in self._revoked():
            raise ValueError("the authority has revoked it")
        for of in (certificate, issuer):
            if now and not of.not_valid_before_utc <= now <= of.not_valid_after_utc:
                raise ValueError(f"it is good from {of.not_valid_before_utc} to {of.not_valid_after_utc}")
        try:
            signs = certificate.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
        except x509.ExtensionNotFound:
            signs = True
        if not signs:
            raise ValueError("its key is not meant for signatures")
        return public_key_of(certificate, name)

    def refusal(self, name: str, key: str, certificate: bytes | None) -> str | None:
        """Return why a key is not accepted as a party's; None if an authority certifies it, at any time."""
        if certificate is None:
            return "it comes without a certificate: pin the parties' keys instead"
        try:
            certified = public_text(self.key(name, certificate))
        except MALFORMED as error:
            return f"of its certificate: {error}"
        return None if certified == key else "its certificate has another key"


class CertifiedKeys:
    """The public keys that the federation's authority certifies: each party shows its certificate.

    Args:
        tls: This party's certificate, and the authority.

    Raises:
        ValueError: If they do not suit for signing.
    """

    def __init__(self, tls: TLS) -> None:
        self._authorities = Authorities(tls.contents["ca"], lambda: tls.revoked)
        der = x509.load_pem_x509_certificate(tls.contents["cert"]).public_bytes(serialization.Encoding.DER)
        self.certificate = der
        """This party's certificate, DER."""
        try:
            if len(der) > _CERTIFICATE_BYTES - _LENGTH_BYTES:
                raise ValueError(f"it has {len(der)} bytes, which is too long to show")
            # Not its dates: in the middle of a run all find these over together, and say so.
            self._own = tls.name, public_text(self._authorities.key(tls.name, der))
        except MALFORMED as error:
            raise ValueError(
                f"The certificate {tls.cert} cannot be used for secure aggregation: {error}. Make the key by"
                " `pellm keys new` and have it signed, or give signing_key and"
                " trusted_keys."
            ) from error
        self.shown = (len(der).to_bytes(_LENGTH_BYTES, "big") + der).ljust(_CERTIFICATE_BYTES, b"\0")
        """This party's certificate, as it is shown to the others."""

    def get(self, name: str) -> str | None:
        """Return the public key as text if the party is this one."""
        return self._own[1] if name == self._own[0] else None

    def refusal(self, name: str, key: str, certificate: bytes | None) -> str | None:
        """Return why a key is not accepted as a party's; None if the authority certifies it."""
        return self._authorities.refusal(name, key, certificate)

    def verified(self, shown: Mapping[str, bytes]) -> TrustedKeys:
        """Return the keys of those who take part, by their certificates.

        Raises:
            ValueError: If a certificate is not that party's, or not good.
        """
        keys, now = {}, datetime.now(timezone.utc)
        for name, part in shown.items():
            end = _LENGTH_BYTES + int.from_bytes(part[:_LENGTH_BYTES], "big")
            try:
                keys[name] = public_text(self._authorities.key(name, part[_LENGTH_BYTES:end], now))
            except MALFORMED as error:
                raise ValueError(f"the certificate of party {name} is not accepted: {error}") from error
        return TrustedKeys(keys)


def is_signature(name: str, key: str, signature: bytes, message: bytes) -> bool:
    """Tell whether a signature of a message is by a party's key, given as text."""
    try:
        _parse_key(name, key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def decode_certificate(text: str) -> bytes:
    """Return the DER of a certificate in base64.

    Raises:
        ValueError: If it is no base64, or not the one way to write it.
    """
    der = base64.b64decode(text, validate=True)
    if base64.b64encode(der).decode() != text:
        raise ValueError("its certificate is not written as base64 is")
    return der


def key_in(certificate: bytes, name: str) -> str:
    """Return the public key in a certificate of that name, as text.

    Raises:
        ValueError: If it is malformed, or of another name.
    """
    try:
        return public_text(public_key_of(x509.load_der_x509_certificate(certificate), name))
    except MALFORMED as error:
        raise ValueError(f"of its certificate: {error}") from error


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Tell whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
        return authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (*MALFORMED, InvalidSignature):
        return False


def _keys_in(folder: Path) -> dict[str, str]:
    """Return the public keys in the requests and certificates of a folder."""
    texts: dict[str, str] = {}
    for path in sorted([*folder.glob("*.csr"), *folder.glob("*.pem")]):
        if path.stem in ("ca", RENDEZVOUS):  # no party can be called so
            continue
        text = public_text(read_public_key(path))
        if texts.setdefault(path.stem, text) != text:
            raise ValueError(
                f"{path} has another key than the {path.stem}.csr there. Remove the one that is not in use."
            )
    return texts


def _parse_key(name: str, text: str) -> Ed25519PublicKey:
    try:
        if not text.startswith(KEY_PREFIX):
            raise ValueError(f"it does not begin with {KEY_PREFIX!r}")
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text[len(KEY_PREFIX) :], validate=True))
    except (ValueError, binascii.Error, AttributeError) as error:
        raise ValueError(
            f"The public key of party {name} is no key ({error}). Copy the line that"
            " `pellm keys new` printed, or pass the folder with <name>.csr of all."
        ) from error
