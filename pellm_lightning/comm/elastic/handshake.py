"""What the parties show of themselves before they meet, and what they must have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pellm_lightning.comm.elastic.quorum_view import QuorumMember
from pellm_lightning.comm.elastic.register import Register
from pellm_lightning.comm.errors import MismatchError

PartySpec = dict[str, Any]
Difference = Callable[[Sequence[PartySpec], Sequence[str]], str | None]


class SpecExchange:
    """The passports of the parties, each under its name.

    Args:
        register: Where they are shown.
        name: This party.
        incarnation: This process.
    """

    def __init__(self, register: Register, name: str, incarnation: str) -> None:
        self._register = register
        self._name = name
        self._incarnation = incarnation
        self._shown_in = ""
        self._passport: PartySpec = {}
        self._difference: Difference = lambda *_: None
        self._known: dict[tuple[str, str], PartySpec] = {}

    def handshake(self, party_spec: PartySpec, difference: Difference) -> None:
        """Take what this party is to show, and what tells two passports apart in words."""
        self._passport, self._difference, self._shown_in = party_spec, difference, ""

    def show(self) -> None:
        """Show the passport, unless it was shown in this life of the rendezvous."""
        if self._shown_in != self._register.life:
            told = {"incarnation": self._incarnation, "party_spec": self._passport}
            self._register.write(_key(self._name), told)
            self._shown_in = self._register.life

    def of(self, name: str, incarnation: str) -> PartySpec | None:
        """Return what a process has shown, None if another one has come in its place."""
        if (name, incarnation) not in self._known:
            (told,) = self._register.read(_key(name))
            if not isinstance(told, dict) or told.get("incarnation") != incarnation:
                return None
            if not isinstance(told.get("party_spec"), dict):
                return None
            self._known = {key: value for key, value in self._known.items() if key[0] != name}
            self._known[name, incarnation] = told["party_spec"]
        return self._known[name, incarnation]

    def check_alike(self, entries: Mapping[str, QuorumMember], mine: QuorumMember) -> None:
        """Raise what differs between this party and the first that is not like it.

        Raises:
            MismatchError: If one differs.
        """
        for name, entry in entries.items():
            if entry.digest != mine.digest:
                other = self.of(name, entry.incarnation)
                difference = other and self._difference([other, self._passport], [name, self._name])
                raise MismatchError(
                    difference or f"Parties {name} and {self._name} are configured differently."
                )
            if not alike(entry, mine):
                raise MismatchError(
                    f"Parties {name} and {self._name} hold the state of different federations, which began"
                    " apart. Remove the state of one of them (it was written under its state_dir), or let it"
                    " resume no checkpoint: it then takes over the other's."
                )


def alike(*entries: QuorumMember) -> bool:
    """Tell whether parties can go on together: what all must share is the same, and so is the lineage."""
    lineages = {entry.version.run_id for entry in entries if entry.version}
    return len({entry.digest for entry in entries}) == 1 and len(lineages) <= 1


def _key(name: str) -> str:
    return f"party_spec/@{name}"
