"""Signing keys of secure aggregation: Ed25519 (RFC 8032), and the pinned public keys of all parties."""

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from pellm_lightning.comm.tls import check_name

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
except ImportError as error:
    raise ImportError(
        "Secure aggregation needs the package cryptography: pip install 'pellm-lightning[masked]'."
    ) from error

_PREFIX = "ed25519:"


class SigningKey:
    """A party's private signing key.

    Args:
        path: PEM file written by ``generate_signing_key``.

    Raises:
        ValueError: If the file cannot be read, or holds something else.

    Example:
        >>> path, public_key = generate_signing_key("keys", "clinic-a")
        >>> SigningKey(path).public_key == public_key
        True
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            key = serialization.load_pem_private_key(self.path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"The signing key {str(path)!r} cannot be read: {error}. Create one by"
                " `python -m pellm_lightning keys new`, and give each party its own."
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(
                f"The signing key {str(path)!r} is no Ed25519 key, but {type(key).__name__}. Create one by"
                " `python -m pellm_lightning keys new`."
            )
        self._key = key

    @property
    def public_key(self) -> str:
        """The public key as text."""
        return _to_text(self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Return the signature, 64 bytes."""
        return self._key.sign(message)


class TrustedKeys:
    """The pinned public keys of all parties, by name.

    Args:
        keys: Public key of each party as text ("ed25519:..."), or the folder with all ``<name>.pub`` files.

    Raises:
        ValueError: If a key is malformed, two parties have the same, or there are none.

    Example:
        >>> path, public_key = generate_signing_key("keys", "clinic-b")
        >>> trusted = TrustedKeys({"clinic-b": public_key})
        >>> trusted.verify("clinic-b", SigningKey(path).sign(b"message"), b"message")
        True
    """

    def __init__(self, keys: Mapping[str, str] | str | Path) -> None:
        if isinstance(keys, Mapping):
            texts = dict(keys)
        else:
            texts = {path.stem: path.read_text().strip() for path in sorted(Path(keys).glob("*.pub"))}
        if not texts:
            raise ValueError(
                f"trusted_keys={str(keys)!r} holds no public keys. Give each party's as name:"
                " 'ed25519:...', or the folder with all <name>.pub files."
            )
        self._keys = {name: _parse_key(name, text) for name, text in texts.items()}
        self._texts = {name: _to_text(key) for name, key in self._keys.items()}
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

    def get(self, name: str) -> str | None:
        """Return a party's public key as text, None if unknown."""
        return self._texts.get(name)

    def verify(self, name: str, signature: bytes, message: bytes) -> bool:
        """Return whether a signature of a message is a party's."""
        try:
            self._keys[name].verify(signature, message)
        except InvalidSignature:
            return False
        return True


def generate_signing_key(directory: str | Path, name: str) -> tuple[Path, str]:
    """Generate a party's key pair: ``<name>.key``, to be kept secret, and ``<name>.pub``, which all need.

    Args:
        directory: Folder for the two files; created if missing.
        name: Name of the party.

    Returns:
        Path of the private key, and the public key as text.

    Raises:
        FileExistsError: If either file exists.
        ValueError: If the name is malformed.
    """
    check_name(name)
    directory = Path(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    for path in (private, public):
        if path.exists():
            raise FileExistsError(f"{path} exists already. Remove it first if this party gets a new key.")
    with open(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    text = _to_text(key.public_key())
    public.write_text(text + "\n")
    return private, text


def _to_text(key: Ed25519PublicKey) -> str:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return _PREFIX + base64.b64encode(raw).decode()


def _parse_key(name: str, text: str) -> Ed25519PublicKey:
    try:
        if not text.startswith(_PREFIX):
            raise ValueError(f"it does not begin with {_PREFIX!r}")
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text[len(_PREFIX) :], validate=True))
    except (ValueError, binascii.Error, AttributeError) as error:
        raise ValueError(
            f"The public key of party {name} is no key ({error}). Copy the line that"
            " `python -m pellm_lightning keys new` printed, or pass the folder with the .pub files."
        ) from error
