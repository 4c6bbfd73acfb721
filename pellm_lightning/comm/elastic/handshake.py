"""Handshake: the specs that parties publish before their first quorum, and the check that they agree."""

import contextlib
from collections.abc import Mapping, Sequence

from pellm_lightning.comm.communicator import Difference, PartySpec
from pellm_lightning.comm.elastic.heartbeat import Heartbeat
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.quorum_view import QuorumMember
from pellm_lightning.comm.elastic.register import Register, RestartedError, UnreachableError
from pellm_lightning.comm.errors import MismatchError, PartyLostError


class SpecExchange:
    """The specs of the parties, each published under its party's name.

    Args:
        register: Where they are published.
        me: This party.
    """

    def __init__(self, register: Register, me: LocalParty) -> None:
        self._register, self._me = register, me
        self._published_in = ""
        self._spec: PartySpec = {}
        self._difference: Difference = lambda *_: None
        self._known: dict[tuple[str, str], PartySpec] = {}

    def set(self, party_spec: PartySpec, difference: Difference) -> None:
        """Set the spec of this party, and what describes the difference of two specs."""
        self._spec, self._difference, self._published_in = party_spec, difference, ""

    def publish(self) -> None:
        """Publish this party's spec, unless that was done in this life of the rendezvous."""
        if self._published_in != self._register.life:
            value = {"incarnation": self._me.incarnation, "party_spec": self._spec}
            self._register.write(_key(self._me.name), value)
            self._published_in = self._register.life

    def of(self, processes: Sequence[tuple[str, str]]) -> list[PartySpec | None]:
        """Return the specs of processes (party and incarnation), None where another has taken its place.

        All that are not known yet are read in one trip.
        """
        new = [process for process in processes if process not in self._known]
        values = self._register.read(*(_key(name) for name, _ in new)) if new else []
        for (name, incarnation), value in zip(new, values, strict=True):
            if not isinstance(value, dict) or value.get("incarnation") != incarnation:
                continue
            if isinstance(value.get("party_spec"), dict):
                self._known = {key: value for key, value in self._known.items() if key[0] != name}
                self._known[name, incarnation] = value["party_spec"]
        return [self._known.get(process) for process in processes]

    def of_members(self, entries: Mapping[str, QuorumMember]) -> list[PartySpec]:
        """Return the specs of the members of a view, in their order.

        Raises:
            PartyLostError: If one has been replaced by another process meanwhile.
        """
        try:
            found = self.of([(name, entry.incarnation) for name, entry in entries.items()])
        except (RestartedError, UnreachableError) as error:
            raise PartyLostError("The rendezvous went away in the round.") from error
        for name, spec in zip(entries, found, strict=True):
            if spec is None:
                raise PartyLostError(f"Party {name} was restarted meanwhile.", parties=(name,))
        return [spec for spec in found if spec is not None]

    def published(self, peers: Heartbeat) -> dict[str, PartySpec]:
        """Publish this party's spec; return it and those of the parties that are alive."""
        known: dict[str, PartySpec | None] = {}
        # If the rendezvous is away, the first quorum publishes it again.
        with contextlib.suppress(RestartedError, UnreachableError):
            self.publish()
            others = [name for name in self._me.roster if name != self._me.name and peers.alive(name)]
            specs = self.of([(name, peers.incarnation(name)) for name in others])
            known = dict(zip(others, specs, strict=True))
        known[self._me.name] = self._spec
        return {name: found for name in self._me.roster if (found := known.get(name)) is not None}

    def check_alike(self, entries: Mapping[str, QuorumMember], mine: QuorumMember) -> None:
        """Raise the difference between this party and the first of the others that does not agree with it.

        Raises:
            MismatchError: If one differs.
        """
        for name, entry in entries.items():
            if entry.digest != mine.digest:
                (other,) = self.of([(name, entry.incarnation)])
                difference = other and self._difference([other, self._spec], [name, self._me.name])
                raise MismatchError(
                    difference or f"Parties {name} and {self._me.name} are configured differently."
                )
            if entry.version and mine.version and entry.version.run_id != mine.version.run_id:
                raise MismatchError(
                    f"Parties {name} and {self._me.name} hold the state of different federations, which began"
                    f" apart. Party {self._me.name} is refused: move its state_dir away, and let it resume no"
                    " checkpoint: it then receives the state of the others."
                )


def _key(name: str) -> str:
    return f"party_spec/@{name}"
