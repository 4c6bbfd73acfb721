"""Liveness of the other parties, as this party sees it."""

from collections.abc import Mapping
from typing import Any

from pellm_lightning.comm.elastic.heartbeat import Heartbeat
from pellm_lightning.comm.elastic.quorum_view import QuorumMember, QuorumView
from pellm_lightning.comm.errors import FederationError


class Peers:
    """Failure detector for the processes behind the names: each process is another incarnation of its party.

    Args:
        heartbeat: Of this party, which watches those of the others.
        name: This party.
        incarnation: This process.

    Example::

        lost = [name for name in peers.dead(view)]
    """

    def __init__(self, heartbeat: Heartbeat, name: str, incarnation: str) -> None:
        self._heartbeat = heartbeat
        self._name = name
        self._incarnation = incarnation

    def check_not_replaced(self, heartbeat: Any = None) -> None:
        """Raise if another process has taken this one's place; there must never be two.

        Args:
            heartbeat: The one that stands under this party's name, if it was just read.

        Raises:
            FederationError: If it is another process'.
        """
        if self._heartbeat.is_foreign(heartbeat):
            self._heartbeat.is_replaced = True
        if self._heartbeat.is_replaced:
            raise FederationError(
                f"Another process has taken the place of party {self._name} while this one sent no"
                " heartbeat; this one stops. Give every party a name of its own, and start each once."
            )

    def note_incarnations(self, entries: Mapping[str, QuorumMember]) -> None:
        """Note processes whose heartbeat was not seen yet."""
        for name, entry in entries.items():
            self._heartbeat.note_incarnation(name, entry.incarnation)

    def incarnation(self, name: str) -> str:
        """Return which process of a party was seen last."""
        return str(self._heartbeat.status_of(name).get("incarnation"))

    def runs(self, name: str, incarnation: str) -> bool:
        """Tell whether a process of a party is still alive."""
        if name == self._name:
            return incarnation == self._incarnation
        return self._heartbeat.alive(name) and self.incarnation(name) == incarnation

    def alive(self, name: str) -> bool:
        """Tell whether any process of a party is alive."""
        return self._heartbeat.alive(name)

    def is_member(self, name: str) -> bool:
        """Tell whether a party is alive that has been part of a quorum."""
        return self.alive(name) and bool(self._heartbeat.status_of(name).get("member"))

    def dead(self, view: QuorumView) -> list[str]:
        """Return which members of a view have died since."""
        return [name for name, entry in view.entries.items() if not self.runs(name, entry.incarnation)]

    def phase(self, name: str) -> str:
        """Return what a party does, for display."""
        status, silence = self._heartbeat.status_of(name), self._heartbeat.silence_s(name)
        if "left" in status:
            return "left"
        if silence is None:
            return "not seen yet"
        if not self.alive(name):
            return f"silent for {silence:.0f} s"
        return str(status.get("phase", "busy"))

    def fate(self, name: str) -> str:
        """Return what is known about a party that has not joined."""
        status = self._heartbeat.status_of(name)
        if "left" in status:
            return f"it left while {status['left']}"
        silence = self._heartbeat.silence_s(name)
        if silence is None:
            return "it was never seen"
        if self.alive(name):
            return f"it did not join (it was last seen {status.get('phase', 'busy')})"
        return f"it has sent no heartbeat for {silence:.1f} s ({status.get('phase', 'busy')})"
