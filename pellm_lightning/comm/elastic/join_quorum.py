"""From the call of the roll to the plan: who goes on together, and how long the others are waited for."""

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pellm_lightning.comm.elastic.handshake import SpecExchange, alike
from pellm_lightning.comm.elastic.membership import Membership
from pellm_lightning.comm.elastic.peers import Peers
from pellm_lightning.comm.elastic.quorum_view import QuorumMember, QuorumView, is_count, stage
from pellm_lightning.comm.elastic.reachability import ReachabilityTracker
from pellm_lightning.comm.elastic.register import KEPT_TERMS, Register, UnreachableError
from pellm_lightning.comm.errors import (
    FederationError,
    MismatchError,
    PartyLostError,
    TooFewPartiesError,
)
from pellm_lightning.comm.polling import polls


class QuorumProtocol:
    """Waits for the parties and makes the plan, if no other party is quicker.

    Args:
        register: Where the roll is called.
        peers: Who lives.
        specs: What the parties have shown of themselves.
        reachability: Who cannot reach whom.
        name: This party.
        roster: All parties.
        quorum: How many are needed.
        membership: How long to wait for whom.
    """

    def __init__(
        self,
        register: Register,
        peers: Peers,
        specs: SpecExchange,
        reachability: ReachabilityTracker,
        name: str,
        roster: Sequence[str],
        quorum: int,
        membership: Membership,
    ) -> None:
        self._register = register
        self._peers = peers
        self._specs = specs
        self._reachability = reachability
        self._name = name
        self._roster = roster
        self._membership = membership
        self._needed = quorum
        self.partners: Collection[str] = ()
        """Members of the last plan."""
        self.interrupt: Callable[[], None] = lambda: None
        """Called again and again while waiting; what it raises ends the waiting."""

    def call(self, mine: QuorumMember, deadline: "QuorumDeadline") -> QuorumView | None:
        """Come to a term; return its plan as soon as there is one, None if the term is over."""
        self._register.write(f"member/@{self._name}", mine.to_json())
        deadline.begin()
        term = mine.term
        for _ in polls():
            self.interrupt()
            keys = [f"member/@{name}" for name in self._roster]
            end = f"ended/{mine.version.run_id if mine.version else ''}"
            now, viewed, ended, *said = self._register.read("term", f"view/{term}", end, *keys)
            if isinstance(now, int) and now > term + KEPT_TERMS:
                return None  # this party has slept; what it would find or write there is nobody's any more
            if viewed is not None:
                return self._read(viewed, mine)
            if now != term:
                return None
            entries = self._present(
                term, dict(zip(self._roster, map(QuorumMember.from_json, said), strict=True))
            )
            if mine.version and is_count(ended) and len(entries) == 1:
                if mine.version.round < ended:
                    raise FederationError(
                        f"The federation ended after {ended} rounds while party {self._name} was away, which"
                        f" knows {mine.version.round}. The others have the result. To go on from checkpoints"
                        " of all parties that are older, start the rendezvous again."
                    )
                if mine.wants == "rest":
                    return QuorumView.of(term, mine.version.run_id, entries)  # it was late, but lacks nothing
            ready = self._ready(entries, mine, deadline)
            if ready:
                new = f"{self._register.life}/{term}/{secrets.token_hex(4)}"
                view = QuorumView.of(term, new, ready, self._last_attempt(term))
                self._register.claim(f"view/{term}", view.to_json())
        raise AssertionError("polls without end have ended")

    def _last_attempt(self, term: int) -> int:
        """Return the number of the plan before, which perhaps none of those who go on knows any more."""
        (last,) = self._register.read(f"view/{term - 1}")
        attempt = last.get("attempt") if isinstance(last, dict) else None
        return attempt if is_count(attempt) else 0

    def _read(self, value: Any, mine: QuorumMember) -> QuorumView:
        term = mine.term
        view = QuorumView.from_json(term, value)
        if view is not None and not alike(*view.entries.values(), mine):
            self._specs.check_alike(view.entries, mine)
        if view is None or not set(view.members) <= set(self._roster):
            raise MismatchError(
                f"Party {self._name} cannot read what another party has written as the plan of term {term}."
                " Install the same version of pellm-lightning and give the same roster at all parties."
            )
        return view

    def _present(self, term: int, entries: Mapping[str, QuorumMember | None]) -> dict[str, QuorumMember]:
        """Return what those said who have come to this term, and still live."""
        came = {name: entry for name, entry in entries.items() if entry is not None and entry.term == term}
        self._peers.hear(came)
        return {name: entry for name, entry in came.items() if self._peers.lives(name, entry.incarnation)}

    def _ready(
        self, entries: dict[str, QuorumMember], mine: QuorumMember, deadline: "QuorumDeadline"
    ) -> dict[str, QuorumMember] | None:
        """Return who can go on together now, or None if somebody is to be waited for."""
        same = {name: entry for name, entry in entries.items() if alike(entry, mine)}
        reachable_group = self._reachability.reachable_group(same)
        if len(reachable_group) >= self._needed:
            same = {name: same[name] for name in reachable_group}
        if self._name not in same:
            same = {}  # the others may plan without this party, it cannot
        deadline.complain()
        awaited = self._awaited(entries, deadline)
        if deadline.is_over(entries):
            # New processes must not begin anew while one that has the global state still lives.
            known = any(entry.version for entry in entries.values())
            awaited = [name for name in awaited if not known and self._peers.is_member(name)]
        deadline.looks(entries, awaited)
        if awaited:
            return None
        try:
            if len(same) >= self._needed:
                self._check_begun(same)
                return same
            if len(entries) >= self._needed:
                self._specs.check_alike(entries, mine)
        except FederationError as mismatch:
            deadline.differs(mismatch)
        return None

    def _awaited(self, entries: Mapping[str, QuorumMember], deadline: "QuorumDeadline") -> list[str]:
        """Return those who have not come yet, but will."""
        missing = [name for name in self._roster if name not in entries]
        where = stage(entries, self._needed)
        if where == "beginning":
            return missing
        alive = [name for name in missing if self._peers.alive(name)]
        if where == "resuming":
            # Those who were started together come together, give or take.
            return missing if deadline.waited_s < 2 * self._membership.heartbeat_ttl_s else alive
        # Who is still starting up will not come before the others have done their next local steps.
        return [name for name in alive if name in self.partners or self._peers.is_member(name)]

    def _check_begun(self, entries: Mapping[str, QuorumMember]) -> None:
        """Raise if it is not clear whether the federation begins or resumes: too few have its state."""
        begun = [name for name, entry in entries.items() if entry.version]
        if begun and stage(entries, self._needed) == "beginning":
            raise FederationError(
                f"Party {', '.join(begun)} has the state of an unfinished federation, the others have none:"
                f" fewer than the {self._needed} that make a majority. To begin anew, remove its state (it"
                " was written under its state_dir); to go on from it, copy it to the others."
            )

    def deadline(self) -> "QuorumDeadline":
        """Return the patience of one muster."""
        return QuorumDeadline(self._peers, self._name, self._roster, self._needed, self._membership)


class QuorumDeadline:
    """How long a party has waited in one muster, and for what.

    Args:
        peers: Who lives.
        name: This party.
        roster: All parties.
        quorum: How many are needed.
        membership: How long to wait for whom.
    """

    def __init__(
        self, peers: Peers, name: str, roster: Sequence[str], quorum: int, membership: Membership
    ) -> None:
        self._peers = peers
        self._name = name
        self._roster = roster
        self._membership = membership
        self._needed = quorum
        self._began = self._enough = self._reached = self._differed = time.monotonic()
        self._mismatch: FederationError | None = None

    @property
    def waited_s(self) -> float:
        """Seconds since this party came to the term."""
        return time.monotonic() - self._began

    def begin(self) -> None:
        """Begin a new term."""
        self._began = time.monotonic()
        self._mismatch = None

    def differs(self, mismatch: FederationError) -> None:
        """Keep in mind why this party cannot go on with the others."""
        if self._mismatch is None:
            self._mismatch, self._differed = mismatch, time.monotonic()

    def complain(self) -> None:
        """Raise why this party cannot go on, once the others have had the time to see it here.

        If it left at once, they would wait for it: those who can go on without it, and those who cannot.

        Raises:
            FederationError: If it differs from the others, or too few have the federation's state.
        """
        grace_s = self._membership.heartbeat_ttl_s / 2
        if self._mismatch is not None and time.monotonic() - self._differed > grace_s:
            raise self._mismatch

    def looks(self, entries: Mapping[str, QuorumMember], awaited: Sequence[str]) -> None:
        """Take note of who is there.

        Raises:
            TooFewPartiesError: If too few have been there for too long.
        """
        self._reached = time.monotonic()
        if len({*entries, *filter(self._peers.alive, awaited)}) >= self._needed:
            self._enough = time.monotonic()
        waited = time.monotonic() - self._enough
        if waited > self._membership.wait_s:
            missing = [name for name in self._roster if name not in entries]
            fates = ", ".join(f"{name} ({self._peers.fate(name)})" for name in missing)
            raise TooFewPartiesError(
                f"Party {self._name} has waited {waited:.0f} s (wait_s) for {self._needed} of the"
                f" {len(self._roster)} parties; missing: {fates}. Start them, or look at their logs, and"
                " start this party again: the federation goes on where it was.",
                parties=tuple(missing),
            )

    def is_over(self, entries: Mapping[str, QuorumMember]) -> bool:
        """Tell whether those who have not come are to be left out."""
        beginning = stage(entries, self._needed) == "beginning"
        return self.waited_s > (self._membership.wait_s if beginning else self._membership.round_timeout_s)

    def without_rendezvous(self, error: UnreachableError) -> None:
        """Wait a moment for the rendezvous to come back.

        Raises:
            PartyLostError: If it has been away for too long.
        """
        waited = time.monotonic() - self._reached
        if waited > self._membership.wait_s:
            raise PartyLostError(
                f"Party {self._name} has waited {waited:.0f} s (wait_s) for the rendezvous: {error}. Start it"
                " again; the parties go on where they were."
            ) from error
        time.sleep(0.1)
