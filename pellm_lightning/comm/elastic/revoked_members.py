"""Revoked members: revocation lists pass from party to party as they join, and leave out whom they name."""

import logging
from collections.abc import Iterable, Mapping
from typing import TypeVar

from pellm_lightning.comm.elastic.quorum_view import MAX_LIST, QuorumMember
from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.tls import TLS

log = logging.getLogger(__name__)

_Entry = TypeVar("_Entry", bound=QuorumMember)


class RevokedMembers:
    """Parties whose certificates the federation's authority has revoked.

    A party joins with the newest revocation list that it knows; the others take it over, since the authority
    has signed it. So a list that one party has counts at all in the round after.

    Args:
        name: This party.
        tls: Its certificate and the authority; None where nothing can be revoked.
    """

    def __init__(self, name: str, tls: TLS | None) -> None:
        self._name, self._tls = name, tls
        self._file = None if tls is None else tls.revocations
        self._names: set[str] = set()
        self._seen = self.number
        self._is_long = False

    @property
    def serial(self) -> str:
        """Serial number of this party's certificate, as it shows it; empty without."""
        return "" if self._tls is None else f"{self._tls.serial:x}"

    @property
    def pem(self) -> str:
        """The newest list, as this party shows it; empty if there is none, or it is too long to be read."""
        newest = None if self._file is None else self._file.newest
        if self._file is None or newest is None:
            return ""
        if len(newest.pem) <= MAX_LIST:
            return newest.pem.decode()
        if not self._is_long:
            self._is_long = True
            log.warning(
                "[party %s] %s has %d characters, more than %d, so it is too long to pass on: put it next to"
                " ca.pem at every party.",
                self._name,
                self._file.path,
                len(newest.pem),
                MAX_LIST,
            )
        return ""

    @property
    def number(self) -> int:
        """Number of the newest list, 0 if there is none."""
        if self._file is None:
            return 0
        self._file.refresh()
        return 0 if self._file.newest is None else self._file.newest.number

    def has_changed(self) -> bool:
        """Tell whether there is a newer list than when this was asked last: who is connected may be on it."""
        before, self._seen = self._seen, self.number
        if self._file is not None and self._file.problem:
            log.warning("[party %s] %s is not used: %s", self._name, self._file.path, self._file.problem)
        return self._seen > before

    def take(self, entries: Iterable[QuorumMember]) -> None:
        """Take over what others have joined with.

        Raises:
            FederationError: If this party's own certificate is revoked.
        """
        if self._file is None or self._tls is None:
            return
        for text in {entry.revoked for entry in entries} - {"", self.pem}:
            try:
                if self._file.take(text.encode()):
                    log.warning("[party %s] received revocation list %d", self._name, self.number)
                    self._file.keep()
            except ValueError as error:
                log.warning(
                    "[party %s] received a revocation list that does not count: %s", self._name, error
                )
        if self._tls.serial in self._file.serials:
            raise FederationError(
                f"The certificate of party {self._name} was revoked by the federation's authority, so the"
                " others continue without it. Ask the administrator; with a new one the party can come back."
            )

    def without(self, entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
        """Return those who have joined with a certificate that is not revoked."""
        good = {name: entry for name, entry in entries.items() if not self._is_revoked(entry)}
        for name in entries.keys() - good.keys() - self._names:
            log.warning("[party %s] continues without party %s: its certificate is revoked", self._name, name)
        self._names = (self._names | entries.keys()) - good.keys()
        return good

    def __contains__(self, name: str) -> bool:
        """Tell whether a party joined last with a revoked certificate."""
        return name in self._names

    def _is_revoked(self, entry: QuorumMember) -> bool:
        if self._file is None:
            return False
        try:
            return int(entry.serial, 16) in self._file.serials
        except ValueError:  # no number; its connections show its certificate
            return False
