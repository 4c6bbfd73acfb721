"""Who lives, as this party sees it."""

from collections.abc import Mapping
from typing import Any

from pellm_lightning.comm.elastic.heartbeat import Heartbeat
from pellm_lightning.comm.elastic.quorum_view import QuorumMember, QuorumView
from pellm_lightning.comm.errors import FederationError


class Peers:
    """The processes behind the names: each that ran under a name is another incarnation of the party.

    Args:
        heartbeat: Of this party, which watches those of the others.
        name: This party.
        incarnation: This process.
    """

    def __init__(self, heartbeat: Heartbeat, name: str, incarnation: str) -> None:
        self._heartbeat = heartbeat
        self._name = name
        self._incarnation = incarnation

    def check_alone(self, sign: Any = None) -> None:
        """Raise if another process has taken this one's place; there must never be two.

        Args:
            sign: The sign of life that stands under this party's name, if it was just looked up.

        Raises:
            FederationError: If it is another process'.
        """
        if self._heartbeat.is_foreign(sign):
            self._heartbeat.is_replaced = True
        if self._heartbeat.is_replaced:
            raise FederationError(
                f"Another process has taken the place of party {self._name} while this one showed no sign of"
                " life; this one stops. Give every party a name of its own, and start each once."
            )

    def hear(self, entries: Mapping[str, QuorumMember]) -> None:
        """Take note of processes whose heartbeat was not seen yet."""
        for name, entry in entries.items():
            self._heartbeat.hear(name, entry.incarnation)

    def lives(self, name: str, incarnation: str) -> bool:
        """Tell whether the process that a party once was still runs."""
        if name == self._name:
            return incarnation == self._incarnation
        return self._heartbeat.alive(name) and self._heartbeat.seen(name).get("incarnation") == incarnation

    def alive(self, name: str) -> bool:
        """Tell whether any process of a party shows signs of life."""
        return self._heartbeat.alive(name)

    def is_member(self, name: str) -> bool:
        """Tell whether a party lives that has been part of a plan."""
        return self.alive(name) and bool(self._heartbeat.seen(name).get("member"))

    def dead(self, view: QuorumView) -> list[str]:
        """Return which members of a plan have died since."""
        return [name for name, entry in view.entries.items() if not self.lives(name, entry.incarnation)]

    def phase(self, name: str) -> str:
        """Return what a party does, for people who watch."""
        sign, silence = self._heartbeat.seen(name), self._heartbeat.silence(name)
        if "left" in sign:
            return "left"
        if silence is None:
            return "not seen yet"
        if not self.alive(name):
            return f"silent for {silence:.0f} s"
        return str(sign.get("phase", "busy"))

    def fate(self, name: str) -> str:
        """Return what is known about a party that is not here."""
        sign = self._heartbeat.seen(name)
        if "left" in sign:
            return f"it left while {sign['left']}"
        silence = self._heartbeat.silence(name)
        if silence is None:
            return "it was never seen"
        if self.alive(name):
            return f"it did not come (it was last seen {sign.get('phase', 'busy')})"
        return f"it has shown no sign of life for {silence:.1f} s ({sign.get('phase', 'busy')})"
