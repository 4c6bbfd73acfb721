"""Errors between parties. Every message names the party, the thing and the fix."""

import difflib
from collections.abc import Iterable, Sequence


class FederationError(RuntimeError):
    """Base of all errors between parties; raised on every party that can still be reached.

    Args:
        message: What happened, where, and what to do.
        parties: Names of those who are lost or disagree, as far as they are known.
        by: Name of the party that noticed it, if it was not this one.
    """

    def __init__(self, message: str = "", *, parties: Sequence[str] = (), by: str | None = None) -> None:
        super().__init__(message)
        self.parties = tuple(parties)
        self.by = by
        self.missing: dict[str, list[str]] = {}
        """Of an exchange that failed: from whom this party had long missed a part, and from whom a sum."""


class MismatchError(FederationError):
    """The parties disagree about something they must share: parameters, base model, configuration, round."""


class PartyLostError(FederationError):
    """A party left, died, or did not arrive in time."""


class FaultyPartyError(PartyLostError):
    """A party has sent what cannot be, and all others see that alike; they can continue without it."""


class TooFewPartiesError(FederationError):
    """Fewer parties than the quorum have joined within the timeout."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the known name that is closest to one that is unknown; "" if none is close.

    Example:
        >>> did_you_mean("clinic-s", ["clinic-a", "hospital"])
        " Did you mean 'clinic-a'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
