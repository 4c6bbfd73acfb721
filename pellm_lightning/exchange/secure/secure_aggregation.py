"""Secure aggregation as users configure it; the protocol is in ``collectives.py``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from pellm_lightning.comm import Collectives, Communicator, FederationError
from pellm_lightning.exchange.base import Exchange
from pellm_lightning.exchange.error_feedback import ErrorFeedback

if TYPE_CHECKING:
    from pellm_lightning.comm.signing_keys import CertifiedKeys, SigningKey, TrustedKeys

# With two parties each could subtract its own value from the sum.
MIN_PARTIES = 3


class SecureAggregation(Exchange):
    """Secure aggregation exchange: parties, rendezvous and network see sums only, no single party's values.

    It covers everything that a round sums: parameters, weights, losses, metrics. All that is sent is
    uniformly random. The threat model and what is not hidden are in docs/secure_aggregation.md.

    Args:
        signing_key: Path of this party's private key, as ``pellm keys new`` creates it;
            "{party}" stands for the party's name. By default the key of ``jobs.tls``.
        trusted_keys: Public key of each party by its name, or the folder with ``<name>.csr`` or
            ``<name>.pem`` of all: these keys are pinned. By default each party shows its certificate, and
            the authority of ``jobs.tls`` is trusted, which could impersonate a party.
        fractional_bits: Number of fractional bits; the mean over N parties of total weight W has an error of
            at most ``N / (2 W) * 2^-fractional_bits``.
        bits: 64, or 32 to send no more bytes than ``Plain()``; then a weighted update must stay below
            ``2^(31 - fractional_bits) / N``.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: If the package ``cryptography`` is not installed.

    Example:
        >>> from pellm_lightning.comm.keys import make_key
        >>> for name in ("clinic-a", "clinic-b", "clinic-c"):
        ...     path, public_key = make_key("keys", name)
        >>> exchange = SecureAggregation(signing_key="keys/{party}.key", trusted_keys="keys")
    """

    is_secure = True
    exact = False
    supports = "sums"
    min_participants = MIN_PARTIES

    def __init__(
        self,
        signing_key: str | Path | None = None,
        trusted_keys: Mapping[str, str] | str | Path | None = None,
        fractional_bits: int = 24,
        bits: int = 64,
    ) -> None:
        if bits not in (32, 64):
            raise ValueError(f"bits={bits!r} must be 32 or 64, the width of the integers that are sent.")
        if isinstance(fractional_bits, bool) or not 1 <= fractional_bits <= bits - 8:
            raise ValueError(
                f"fractional_bits={fractional_bits!r} must be an integer from 1 to {bits - 8}: some of the"
                f" {bits} bits are needed for the integer part."
            )
        self.signing_key = None if signing_key is None else str(signing_key)
        self.bits = bits
        self.fractional_bits = fractional_bits
        from pellm_lightning.comm.signing_keys import TrustedKeys

        self._pinned = None if trusted_keys is None else TrustedKeys(trusted_keys)

    @override
    def check(self, federation: Communicator) -> None:
        """Validate that three or more parties take part, each with a key as far as it is pinned.

        Raises:
            ValueError: If there are too few, a key is missing or this party's is not the trusted one.
        """
        too_few = (
            "With two, each could compute the other's values by subtracting its own from the sum. Federate"
            " three or more parties, or use Plain()."
        )
        if len(federation.roster) < MIN_PARTIES:
            raise ValueError(
                f"Secure aggregation needs {MIN_PARTIES} parties, not {len(federation.roster)}. {too_few}"
            )
        if federation.quorum < MIN_PARTIES:
            raise ValueError(
                f"Secure aggregation needs {MIN_PARTIES} parties, but the quorum is {federation.quorum}."
                f" {too_few} Set quorum to {MIN_PARTIES} or more."
            )
        pinned = self._pinned
        missing = [name for name in federation.roster if pinned and pinned.get(name) is None]
        if missing:
            raise ValueError(
                f"trusted_keys has no public key of party {', '.join(missing)}. The parties are"
                f" {', '.join(federation.roster)}; create a key for each by `pellm keys"
                " new`."
            )
        self.credentials(federation)

    @override
    def open(
        self,
        federation: Collectives,
        on_reveal: Callable[[], None],
        view: str = "",
        error_feedback: ErrorFeedback | None = None,
    ) -> Collectives:
        """Agree on ephemeral keys; return collectives whose sums are masked by them.

        Raises:
            FederationError: If fewer than three parties take part, or one cannot be authenticated.
        """
        from pellm_lightning.exchange.secure import key_agreement
        from pellm_lightning.exchange.secure.collectives import SecAggCollectives

        if federation.num_parties < MIN_PARTIES:
            raise FederationError(
                f"Secure aggregation needs {MIN_PARTIES} parties, only {federation.num_parties} take part."
            )
        keys = key_agreement.agree(federation, *self.credentials(federation), f"{self!r} {view}")
        return SecAggCollectives(federation, keys, self.bits, self.fractional_bits, on_reveal)

    def __repr__(self) -> str:
        return (
            f"SecureAggregation(trusted_keys={self._pinned.fingerprint if self._pinned else None},"
            f" fractional_bits={self.fractional_bits}, bits={self.bits})"
        )

    def credentials(self, federation: Collectives) -> "tuple[SigningKey, TrustedKeys | CertifiedKeys]":
        """Return this party's key, and how it knows those of the others."""
        from pellm_lightning.comm.signing_keys import CertifiedKeys, SigningKey

        name, tls = federation.name, federation.tls
        trusted: TrustedKeys | CertifiedKeys
        if self.signing_key is not None:
            key = SigningKey(self.signing_key.replace("{party}", name))
        elif tls is not None:
            key = SigningKey(tls.key, tls.contents["key"])
        else:
            raise _missing("signing_key")
        if self._pinned is not None:
            trusted = self._pinned
        elif tls is not None:
            trusted = CertifiedKeys(tls)
        else:
            raise _missing("trusted_keys")
        if key.public_key != trusted.get(name):
            raise ValueError(
                f"The signing key {str(key.path)!r} of party {name} has the public key {key.public_key}, but"
                f" trusted_keys, or its certificate, has {trusted.get(name)}. Give the party its own key, or"
                " correct trusted_keys at all parties."
            )
        return key, trusted


def _missing(argument: str) -> ValueError:
    return ValueError(
        f"SecureAggregation has no {argument}, and there are no certificates of jobs.tls to take instead."
        f" Make keys by `pellm keys new`, and give {argument}, or jobs.tls."
    )
