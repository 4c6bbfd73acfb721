"""Quorum protocol: who continues together in a term, and how long the others are waited for."""

import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pellm_lightning.comm.communicator import Version
from pellm_lightning.comm.elastic.handshake import SpecExchange
from pellm_lightning.comm.elastic.heartbeat import Heartbeat
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.quorum_view import (
    QuorumMember,
    QuorumView,
    belonging,
    blocker,
    fits,
    holders_needed,
    is_count,
    newest_version,
    stage,
)
from pellm_lightning.comm.elastic.reachability import ReachabilityTracker
from pellm_lightning.comm.elastic.register import (
    KEPT_TERMS,
    Action,
    Register,
    Swap,
    UnreachableError,
    Write,
)
from pellm_lightning.comm.elastic.revoked_members import RevokedMembers
from pellm_lightning.comm.errors import (
    FederationError,
    PartyLostError,
    TooFewPartiesError,
)
from pellm_lightning.comm.polling import ROUND_S, Reminder

log = logging.getLogger(__name__)

RESULT = (
    "the other parties have its result: the adapter and the last checkpoint in their run folders are also"
    " this party's. Copy them from there."
)
"""Where the result of a federation is that ended while a party was away."""


class VoidViewError(Exception):
    """A view with which this party cannot continue.

    Args:
        message: What is wrong with it.
        others: Whether it is of others alone, who may continue with it; else its term is given up.
    """

    def __init__(self, message: str, *, others: bool) -> None:
        super().__init__(message)
        self.others = others


class QuorumProtocol:
    """Waits for the parties and writes the quorum view of a term, unless another party is quicker.

    Whoever joins last sees all that have joined, and writes the view; the others wait at the rendezvous for
    that. So it is two trips for each, however many they are. In between each looks now and then who is alive.

    Args:
        register: Where members and views are written.
        peers: Who is alive.
        specs: The parties' specs.
        reachability: Who cannot reach whom.
        me: This party, and how long it waits for whom.
        revoked: Whose certificates are revoked.
    """

    def __init__(
        self,
        register: Register,
        peers: Heartbeat,
        specs: SpecExchange,
        reachability: ReachabilityTracker,
        me: LocalParty,
        revoked: RevokedMembers | None = None,
    ) -> None:
        self._revoked = revoked or RevokedMembers(me.name, None)
        self._register, self._peers, self._specs = register, peers, specs
        self._reachability, self._me = reachability, me
        self.partners: Collection[str] = ()
        """Members of the last view."""
        self.interrupt: Callable[[], None] = lambda: None
        """Called repeatedly while waiting; what it raises ends the waiting."""
        self._last: tuple[str, int] = ("", 0)
        """Life and term of the last view that was read."""

    def join(
        self, mine: QuorumMember, deadline: "QuorumDeadline", before: Sequence[Action] = ()
    ) -> QuorumView | None:
        """Join the quorum of a term; return its view as soon as there is one, None if the term is over.

        Args:
            mine: What this party joins with.
            deadline: How long it waits for whom.
            before: What is to be written before that, in the same trip.
        """
        term, key = mine.term, f"view/{mine.term}"
        end = f"ended/{mine.version.run_id if mine.version else ''}"
        keys = ["term", key, end, *(f"member/@{name}" for name in self._me.roster)]
        joining = [*before, Write(f"member/@{self._me.name}", mine.to_json())]
        now, written, ended, *members = self._register.transact(joining, keys)[1]
        deadline.restart()
        while True:
            self.interrupt()
            if isinstance(now, int) and now > term + KEPT_TERMS:
                return None  # this party was suspended; what it would find or write there is stale
            if written is not None:
                return self._read(written, mine)
            if now != term:
                return None
            entries = self._present(
                term, dict(zip(self._me.roster, map(QuorumMember.from_json, members), strict=True))
            )
            alone = self._alone(entries, mine, ended, deadline)
            if alone is not None:
                return alone
            ready = self._ready(entries, mine, deadline)
            if ready:
                new = f"{self._register.life}/{term}/{secrets.token_hex(4)}"
                entries = self._shown(ready)
                view = QuorumView.of(term, new, entries, self._last_attempt(term), self._newest(ready))
                (written,), (now,) = self._register.transact([Swap(key, None, view.to_json())], ["term"])
                if now == term:
                    return self._read(written, mine)
                continue
            now, written = self._register.wait(self._me.membership.patience_s, "term", key)
            if written is None and now == term:
                now, written, ended, *members = self._register.read(*keys)

    def _alone(
        self,
        entries: Mapping[str, QuorumMember],
        mine: QuorumMember,
        ended: Any,
        deadline: "QuorumDeadline",
    ) -> QuorumView | None:
        """Return the view of a party that comes after the end of its federation, and lacks nothing.

        Raises:
            FederationError: If it lacks the result.
        """
        deadline.ended = mine.version is None and is_count(ended)
        if not mine.version or not is_count(ended) or len(entries) > 1:
            return None
        if mine.version.round < ended:
            raise FederationError(
                f"The federation ended after {ended} rounds while party {self._me.name} was away, which knows"
                f" {mine.version.round}; {RESULT} To resume older checkpoints of all parties instead, restart"
                " the rendezvous."
            )
        return QuorumView.of(mine.term, mine.version.run_id, entries) if mine.intent == "rest" else None

    def _last_attempt(self, term: int) -> int:
        """Return the number of the attempt before, which perhaps none of those who continue still knows."""
        if self._last == (self._register.life, term - 1):
            return 0  # this party does
        (last,) = self._register.read(f"view/{term - 1}")
        attempt = last.get("attempt") if isinstance(last, dict) else None
        return attempt if is_count(attempt) else 0

    def _newest(self, entries: Mapping[str, QuorumMember]) -> tuple[Version, str] | None:
        """Return the version from which all continue."""
        return newest_version(entries, holders_needed(entries, len(self._me.roster), self._me.quorum))

    def _read(self, value: Any, mine: QuorumMember) -> QuorumView:
        """Return the view that was written.

        Raises:
            VoidViewError: If it cannot be that of parties that belong together.
            MismatchError: If this party is not among them, and does not belong to them.
        """
        self._last = self._register.life, mine.term
        view = QuorumView.from_json(mine.term, value)
        outside = view is not None and not view.includes(self._me.name, self._me.incarnation)
        if view is not None and outside and self._is_published(view):
            self._specs.check_alike(view.entries, mine)
        if view is None or not self._is_sound(view):
            raise VoidViewError(
                f"What a party has written as the view of term {mine.term} cannot be that of parties that"
                " belong together. Install the same version of pellm-lightning, and give the same roster, at"
                " all.",
                others=outside,
            )
        self._reachability.leave_out({blocker(view.entries)} - {""})
        self._reachability.begin()
        return view

    def _is_published(self, view: QuorumView) -> bool:
        """Tell whether most members of a view have joined with the settings that it tells of them."""
        names = [name for name in view.members if name in self._me.roster]
        joined = map(QuorumMember.from_json, self._register.read(*(f"member/@{name}" for name in names)))
        same = [
            e is not None and e.digest == view.entries[n].digest for n, e in zip(names, joined, strict=True)
        ]
        return 2 * sum(same) > len(view.members)

    def _is_sound(self, view: QuorumView) -> bool:
        """Tell whether a view is of a quorum that belongs together, and continues what it has."""
        newest = self._newest(view.entries)
        return (
            set(view.members) <= set(self._me.roster)
            and len(view.members) >= self._me.quorum
            and len(belonging(view.entries, self._me.quorum)) == len(view.entries)
            and (view.newest, view.state) == (newest or (None, ""))
        )

    def _present(self, term: int, entries: Mapping[str, QuorumMember | None]) -> dict[str, QuorumMember]:
        """Return those who have joined this term and are still alive."""
        excluded = self._reachability.excluded
        joined = {
            name: entry
            for name, entry in entries.items()
            if entry is not None
            and entry.term == term
            and name not in excluded
            and fits(entry.metadata, len(entries))
        }
        self._peers.note_incarnations(joined)
        alive = {name: entry for name, entry in joined.items() if self._peers.runs(name, entry.incarnation)}
        self._revoked.take(alive.values())
        return self._revoked.without(alive)

    def _shown(self, entries: Mapping[str, QuorumMember]) -> dict[str, QuorumMember]:
        """Return what a view shows of its members: the newest revocation list stands there once."""
        newest = {self._me.name: self._revoked.pem}
        return {
            name: replace(
                entry,
                revoked=newest.get(name, ""),
                missing_parts=[n for n in self._me.roster if n in entry.missing_parts],
                missing_sums=[n for n in self._me.roster if n in entry.missing_sums],
            )
            for name, entry in entries.items()
        }

    def _ready(
        self, entries: dict[str, QuorumMember], mine: QuorumMember, deadline: "QuorumDeadline"
    ) -> dict[str, QuorumMember] | None:
        """Return who can continue together now, or None if a party is to be waited for."""
        group = belonging(entries, self._me.quorum)
        awaited = self._awaited(entries, group, deadline)
        blocking = {blocker(entries)} - {""}
        # All have said whom they have missed; it had the time to do so.
        is_heard = blocking <= entries.keys() or deadline.waited_s > self._me.membership.heartbeat_ttl_s
        if blocking.issuperset(awaited) and is_heard:
            self._reachability.leave_out(blocking)
            awaited = []
        same = dict(group)
        reachable_group = self._reachability.reachable_group(same)
        if len(reachable_group) >= self._me.quorum:
            same = {name: same[name] for name in reachable_group}
        if self._me.name not in same:
            same = {}  # the others may continue without this party, it cannot without them
        deadline.raise_mismatch()
        if deadline.is_over(group):
            awaited = self._holders(awaited, group, deadline)
        deadline.note(group, awaited)
        if awaited:
            return None
        try:
            if len(same) >= self._me.quorum:
                self._check_begun(same)
                return same
            if len(entries) >= self._me.quorum:
                self._check_belongs(entries, group, mine)
        except FederationError as mismatch:
            deadline.keep_mismatch(mismatch)
        return None

    def _check_belongs(
        self, entries: Mapping[str, QuorumMember], group: Mapping[str, QuorumMember], mine: QuorumMember
    ) -> None:
        """Raise if this party does not belong to the others; one that was a member waits for its own.

        Raises:
            MismatchError: If it does not.
        """
        belongs, decided = self._me.name in group, len(group) >= self._me.quorum
        if not mine.member or (decided and not belongs):
            self._specs.check_alike(entries if belongs and not decided else group, mine)

    def _holders(
        self, awaited: Sequence[str], group: Mapping[str, QuorumMember], deadline: "QuorumDeadline"
    ) -> list[str]:
        """Return for whom a party waits that has waited long enough for the others.

        New processes must not start over while one that has the global state is still alive; nor must those
        do so who have an old state, while others are in a quorum.
        """
        known = stage(group, self._me.quorum) != "beginning"
        return [] if known or deadline.is_hopeless() else [n for n in awaited if self._peers.is_member(n)]

    def _awaited(
        self,
        entries: Mapping[str, QuorumMember],
        group: Mapping[str, QuorumMember],
        deadline: "QuorumDeadline",
    ) -> list[str]:
        """Return those who have not joined yet, but are expected to."""
        excluded = self._reachability.excluded
        missing = [
            name
            for name in self._me.roster
            if name not in entries and name not in excluded and name not in self._revoked
        ]
        current = stage(group, self._me.quorum)
        if current == "beginning":
            return missing
        alive = [n for n in missing if self._peers.alive(n) and self._reachability.is_awaited(n)]
        if current == "resuming":
            # Those who were started together join at about the same time.
            return missing if deadline.waited_s < 2 * self._me.membership.heartbeat_ttl_s else alive
        # A party that is still starting up will not join before the others have made their next local steps.
        return [name for name in alive if name in self.partners or self._peers.is_member(name)]

    def _check_begun(self, entries: Mapping[str, QuorumMember]) -> None:
        """Raise if it is not clear whether the federation begins or resumes: too few have its state."""
        begun = [name for name, entry in entries.items() if entry.version]
        if begun and stage(entries, self._me.quorum) == "beginning":
            raise FederationError(
                f"Party {', '.join(begun)} has the state of an unfinished federation, the others have none:"
                f" fewer than the {self._me.quorum} that a round needs. To resume it, start those that have"
                " the state also, or restore their state_dir from their own backups; to start over instead,"
                " and lose its rounds, move the state_dir away at all."
            )

    def deadline(self) -> "QuorumDeadline":
        """Return the deadline of joining one quorum."""
        reminder = Reminder(ROUND_S if self.partners else None)
        return QuorumDeadline(self._peers, self._me, reminder, self._reachability.excluded)


class QuorumDeadline:
    """Timeouts of joining one quorum: for late parties, for too few parties, and for the rendezvous.

    Args:
        peers: Who is alive.
        me: This party, and how long it waits for whom.
        reminder: When to say for whom this party waits.
        excluded: Who is not waited for any more, and why.
    """

    def __init__(
        self, peers: Heartbeat, me: LocalParty, reminder: Reminder, excluded: Mapping[str, str]
    ) -> None:
        self._excluded = excluded
        self._peers, self._me, self._wait_s, self._reminder = peers, me, me.membership.wait_s, reminder
        self._started = self._had_quorum = self._reached_rendezvous = self._mismatched = time.monotonic()
        self._mismatch: FederationError | None = None
        self._is_short = False
        self.ended = False
        """Whether a federation has ended at this rendezvous, while this party knows of none."""

    @property
    def waited_s(self) -> float:
        """Seconds since this party joined the term."""
        return time.monotonic() - self._started

    def restart(self) -> None:
        """Start the time of a new term."""
        self._started = time.monotonic()
        self._mismatch = None

    def keep_mismatch(self, mismatch: FederationError) -> None:
        """Keep the reason why this party cannot continue with the others."""
        if self._mismatch is None:
            self._mismatch, self._mismatched = mismatch, time.monotonic()

    def raise_mismatch(self) -> None:
        """Raise why this party cannot continue, once the others have had the time to see it here.

        If it left at once, they would wait for it, whether they can continue without it or not.

        Raises:
            FederationError: If it differs from the others, or too few have the federation's state.
        """
        grace_s = self._me.membership.heartbeat_ttl_s / 2
        if self._mismatch is not None and time.monotonic() - self._mismatched > grace_s:
            raise self._mismatch

    def note(self, entries: Mapping[str, QuorumMember], awaited: Sequence[str]) -> None:
        """Note who has joined and who is expected.

        Raises:
            TooFewPartiesError: If too few have been there for too long.
        """
        self._reached_rendezvous = time.monotonic()
        enough = len({*entries, *filter(self._peers.alive, awaited)}) >= self._me.quorum
        if enough:
            self._had_quorum = time.monotonic()
        elif not self._is_short:
            self._reminder.hasten()
        self._is_short = not enough
        missing = [name for name in self._me.roster if name not in entries]
        if (awaited or not enough) and self._reminder.due():
            log.warning(
                "[party %s] waits for %s: %d of %d are here, up to %g s",
                self._me.name,
                ", ".join(awaited or missing),
                len(entries),
                len(self._me.roster),
                self._longest_s(entries) if enough else self._wait_s,
            )
        waited = time.monotonic() - self._had_quorum
        if waited > self._wait_s:
            fates = ", ".join(f"{n} ({self._excluded.get(n) or self._peers.fate(n)})" for n in missing)
            raise TooFewPartiesError(
                f"Party {self._me.name} has waited {waited:.0f} s (wait_s) for {self._me.quorum} of the"
                f" {len(self._me.roster)} parties; missing: {fates}. Start them, or look at their logs, and"
                " start this party again: the federation continues where it was."
                + (f" A federation has ended here; if it was this party's, {RESULT}" if self.ended else ""),
                parties=tuple(missing),
            )

    def is_over(self, entries: Mapping[str, QuorumMember]) -> bool:
        """Tell whether those who have not joined are to be left out."""
        return self.waited_s > self._longest_s(entries)

    def is_hopeless(self) -> bool:
        """Tell whether those who live, and do not come, have been waited for long enough."""
        return self.waited_s > self._wait_s + self._me.membership.round_timeout_s

    def _longest_s(self, entries: Mapping[str, QuorumMember]) -> float:
        """Return for how long those who have not joined are waited for."""
        beginning = stage(entries, self._me.quorum) == "beginning"
        return self._wait_s if beginning else self._me.membership.round_timeout_s

    def wait_for_rendezvous(self, error: UnreachableError) -> None:
        """Wait a moment for the rendezvous to come back.

        Raises:
            PartyLostError: If it has been away for too long.
        """
        waited = time.monotonic() - self._reached_rendezvous
        if waited > self._wait_s:
            raise PartyLostError(
                f"Party {self._me.name} has waited {waited:.0f} s (wait_s) for the rendezvous: {error}. Start"
                " it again; the parties continue where they were."
            ) from error
        if self._reminder.due():
            log.warning(
                "[party %s] waits for the rendezvous, up to %g s: %s", self._me.name, self._wait_s, error
            )
        time.sleep(0.1)
