"""The masked exchange as users configure it; what it does is in ``sums.py``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from pellm_lightning.comm import Collectives, Communicator, FederationError
from pellm_lightning.exchange.base import Exchange
from pellm_lightning.exchange.error_feedback import ErrorFeedback

if TYPE_CHECKING:
    from pellm_lightning.exchange.secure.signing_keys import SigningKey

# Of a sum over two, each sees what the other has.
MIN_PARTIES = 3


class SecureAggregation(Exchange):
    """Sum the parties' values so that nobody sees anything but the sum: secure aggregation.

    Everything that a round adds up goes through it: parameters, weights, losses, metrics. Parties, the
    rendezvous and the network see numbers that are uniformly random. What it does not hide, and from whom it
    does not protect, is in docs/privacy.md.

    Args:
        identity: Path of this party's private key, as ``python -m pellm_lightning keys new`` makes it;
            "{party}" stands for the party's name.
        peers: Public key of each party by its name, or the folder with all ``<name>.pub`` files.
        fractional_bits: Binary digits behind the point; the mean over N parties of total weight W is off by
            at most ``N / (2 W) * 2^-fractional_bits``.
        bits: 64, or 32 to send no more bytes than ``Plain()``; then a weighted update must stay below
            ``2^(31 - fractional_bits) / N``.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: If the package ``cryptography`` is not installed.
    """

    is_secure = True
    exact = False
    supports = "sums"
    min_counting = MIN_PARTIES

    def __init__(
        self,
        identity: str | Path,
        peers: Mapping[str, str] | str | Path,
        fractional_bits: int = 24,
        bits: int = 64,
    ) -> None:
        if bits not in (32, 64):
            raise ValueError(f"bits={bits!r} must be 32 or 64: whole numbers of that size are sent.")
        if isinstance(fractional_bits, bool) or not 1 <= fractional_bits <= bits - 8:
            raise ValueError(
                f"fractional_bits={fractional_bits!r} must be a whole number from 1 to {bits - 8}: of {bits}"
                " bits some must be left before the point."
            )
        self.identity = str(identity)
        self.bits = bits
        self.fractional_bits = fractional_bits
        from pellm_lightning.exchange.secure.signing_keys import TrustedKeys

        self._peers = TrustedKeys(peers)

    @override
    def check(self, federation: Communicator) -> None:
        """Refuse a federation with fewer than three parties, or parties without keys.

        Raises:
            ValueError: If there are too few, a key is missing or this party's is not the pinned one.
        """
        too_few = (
            "With two, each would see the other's values by subtracting its own from the sum. Federate three"
            " or more parties, or use Plain()."
        )
        if len(federation.roster) < MIN_PARTIES:
            raise ValueError(
                f"A masked sum needs {MIN_PARTIES} parties, here are {len(federation.roster)}. {too_few}"
            )
        if federation.quorum < MIN_PARTIES:
            raise ValueError(
                f"A masked sum needs {MIN_PARTIES} parties, but rounds would go on with {federation.quorum}."
                f" {too_few} Set quorum to {MIN_PARTIES} or more."
            )
        missing = [name for name in federation.roster if self._peers.of(name) is None]
        if missing:
            raise ValueError(
                f"peers has no public key of party {', '.join(missing)}. Parties are called"
                f" {', '.join(federation.roster)}; make a key for each by `python -m pellm_lightning keys"
                " new`."
            )
        self._identity_of(federation.name)

    @override
    def open(
        self,
        federation: Collectives,
        revealing: Callable[[], None],
        view: str = "",
        error_feedback: ErrorFeedback | None = None,
    ) -> Collectives:
        """Agree on fresh keys; return sums that are masked by them.

        Raises:
            FederationError: If fewer than three parties meet, or one is not who it says.
        """
        from pellm_lightning.exchange.secure import key_agreement
        from pellm_lightning.exchange.secure.collectives import SecAggCollectives

        if federation.num_parties < MIN_PARTIES:
            raise FederationError(
                f"Only {federation.num_parties} parties meet, too few for a masked sum: it needs"
                f" {MIN_PARTIES}."
            )
        identity = self._identity_of(federation.name)
        keys = key_agreement.agree(federation, identity, self._peers, f"{self!r} {view}")
        return SecAggCollectives(federation, keys, self.bits, self.fractional_bits, revealing)

    def __repr__(self) -> str:
        return (
            f"SecureAggregation(peers={self._peers.fingerprint}, fractional_bits={self.fractional_bits},"
            f" bits={self.bits})"
        )

    def _identity_of(self, name: str) -> "SigningKey":
        from pellm_lightning.exchange.secure.signing_keys import SigningKey

        identity = SigningKey(self.identity.replace("{party}", name))
        if identity.public != self._peers.of(name):
            raise ValueError(
                f"The identity {str(identity.path)!r} of party {name} has the public key {identity.public},"
                f" but peers says {self._peers.of(name)}. Give the party its own key, or correct peers at all"
                " parties."
            )
        return identity
