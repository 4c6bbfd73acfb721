"""Who a party is: an Ed25519 key (RFC 8032) of its own, and the pinned public keys of all parties."""

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
        "A masked exchange needs the package cryptography: pip install 'pellm-lightning[masked]'."
    ) from error

_PREFIX = "ed25519:"


class SigningKey:
    """A party's private key.

    Args:
        path: PEM file that ``make_identity`` has written.

    Raises:
        ValueError: If the file cannot be read, or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            key = serialization.load_pem_private_key(self.path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"The identity {str(path)!r} cannot be read: {error}. Make one by"
                " `python -m pellm_lightning keys new`, and give each party its own."
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(
                f"The identity {str(path)!r} is no Ed25519 key, but {type(key).__name__}. Make one by"
                " `python -m pellm_lightning keys new`."
            )
        self._key = key

    @property
    def public(self) -> str:
        """The public key in words."""
        return _in_words(self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Return the signature, 64 bytes."""
        return self._key.sign(message)


class TrustedKeys:
    """The public keys of all parties, by name; whoever else claims to be one of them is not.

    Args:
        keys: Public key of each party in words ("ed25519:..."), or the folder with all ``<name>.pub`` files.

    Raises:
        ValueError: If a key is malformed, two parties have the same, or there are none.
    """

    def __init__(self, keys: Mapping[str, str] | str | Path) -> None:
        if isinstance(keys, Mapping):
            words = dict(keys)
        else:
            words = {path.stem: path.read_text().strip() for path in sorted(Path(keys).glob("*.pub"))}
        if not words:
            raise ValueError(
                f"peers={str(keys)!r} holds no public keys. Give each party's as name: 'ed25519:...', or the"
                " folder with all <name>.pub files."
            )
        self._keys = {name: _key_of(name, text) for name, text in words.items()}
        self._words = {name: _in_words(key) for name, key in self._keys.items()}
        first: dict[str, str] = {}
        for name, text in self._words.items():
            if first.setdefault(text, name) != name:
                raise ValueError(
                    f"Parties {first[text]} and {name} have the same public key. Each needs its own."
                )

    def __reduce__(self) -> "tuple[type[TrustedKeys], tuple[dict[str, str]]]":
        """Pickle the keys in words: the library's own objects cannot be pickled."""
        return TrustedKeys, (dict(self._words),)

    @property
    def fingerprint(self) -> str:
        """A digest of all names and keys, 16 hex digits."""
        lines = "\n".join(f"{name} {self._words[name]}" for name in sorted(self._words))
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    def of(self, name: str) -> str | None:
        """Return a party's public key in words, None if it is not known."""
        return self._words.get(name)

    def signed(self, name: str, signature: bytes, message: bytes) -> bool:
        """Tell whether a party has signed a message."""
        try:
            self._keys[name].verify(signature, message)
        except InvalidSignature:
            return False
        return True


def make_identity(directory: str | Path, name: str) -> tuple[Path, str]:
    """Make a party's key: ``<name>.key``, which nobody else may have, and ``<name>.pub``, which all need.

    Args:
        directory: Folder for the two files; made if missing.
        name: The party.

    Returns:
        Path of the private key, and the public key in words.

    Raises:
        FileExistsError: If either file is there already.
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
    words = _in_words(key.public_key())
    public.write_text(words + "\n")
    return private, words


def _in_words(key: Ed25519PublicKey) -> str:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return _PREFIX + base64.b64encode(raw).decode()


def _key_of(name: str, words: str) -> Ed25519PublicKey:
    try:
        if not words.startswith(_PREFIX):
            raise ValueError(f"it does not begin with {_PREFIX!r}")
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(words[len(_PREFIX) :], validate=True))
    except (ValueError, binascii.Error, AttributeError) as error:
        raise ValueError(
            f"The public key of party {name} is no key ({error}). Copy the line that"
            " `python -m pellm_lightning keys new` printed, or pass the folder with the .pub files."
        ) from error
