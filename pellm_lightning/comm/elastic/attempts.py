"""Limit of attempts at a round that fail one after the other, although the parties are alive."""

import logging
import time

from pellm_lightning.comm.communicator import Version
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.errors import TooFewPartiesError

log = logging.getLogger(__name__)

# A long exchange may be cut short once or twice by deaths; more failures in a row have another cause.
_MIN_ATTEMPTS = 3
_MAX_REASONS = 3


class AttemptLimit:
    """Ends the attempts at a round ``wait_s`` after the first has failed, if nobody committed one since.

    All parties may be alive and join each time, and still never complete a round: a link between two of them
    is broken, and the others are too few without either. Nothing else would end that. A party that is left
    out while the others make progress waits for its link instead.

    Args:
        me: This party, and how long it waits.

    Example:
        >>> from pellm_lightning.comm import Membership
        >>> limit = AttemptLimit(LocalParty("a", ["a", "b"], 2, Membership()))
        >>> limit.failed("a cannot reach b")
        >>> limit.committed()
    """

    def __init__(self, me: LocalParty) -> None:
        self._me = me
        self._began = 0.0
        self._failures = 0
        self._reasons: dict[str, None] = {}
        self._newest: Version | None = None

    def saw(self, newest: Version | None) -> None:
        """Note the version from which the members of a view continue: another one was committed."""
        if newest != self._newest:
            self._newest = newest
            self.committed()

    def committed(self) -> None:
        """Note that an attempt was committed."""
        self._failures, self._reasons = 0, {}

    def failed(self, reason: str) -> None:
        """Note that an attempt has failed.

        Raises:
            TooFewPartiesError: If it was one too many.
        """
        now = time.monotonic()
        if not self._failures:
            self._began = now
        self._failures += 1
        self._reasons.pop(reason, None)
        self._reasons[reason] = None
        waited = now - self._began
        if waited > self._me.membership.wait_s and self._failures >= _MIN_ATTEMPTS:
            raise TooFewPartiesError(
                f"Party {self._me.name} has taken part in {self._failures} attempts at a round in"
                f" {waited:.0f} s (wait_s), and the parties have completed none: {self._said()}. Repair what"
                " this names, and start this party again: the federation continues where it was."
            )

    def _said(self) -> str:
        """Return the last reasons; parties tell the same failure from both of its ends."""
        return "; ".join(reason.rstrip(".") for reason in [*self._reasons][-_MAX_REASONS:])
