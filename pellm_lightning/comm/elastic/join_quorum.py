"""From the call of the roll to the plan: who goes on together, and how long the others are waited for."""

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pellm_lightning.comm.elastic.handshake import Introductions, alike
from pellm_lightning.comm.elastic.membership import Membership
from pellm_lightning.comm.elastic.peers import Peers
from pellm_lightning.comm.elastic.quorum_view import Plan, Roll, is_count, stage
from pellm_lightning.comm.elastic.reachability import Rifts
from pellm_lightning.comm.elastic.register import KEPT_EPOCHS, Register, UnreachableError
from pellm_lightning.comm.errors import (
    FederationError,
    MismatchError,
    PartyLostError,
    TooFewPartiesError,
)
from pellm_lightning.comm.polling import polls


class RollCall:
    """Waits for the parties and makes the plan, if no other party is quicker.

    Args:
        register: Where the roll is called.
        peers: Who lives.
        introductions: What the parties have shown of themselves.
        rifts: Who cannot reach whom.
        name: This party.
        roster: All parties.
        quorum: How many are needed.
        membership: How long to wait for whom.
    """

    def __init__(
        self,
        register: Register,
        peers: Peers,
        introductions: Introductions,
        rifts: Rifts,
        name: str,
        roster: Sequence[str],
        quorum: int,
        membership: Membership,
    ) -> None:
        self._register = register
        self._peers = peers
        self._introductions = introductions
        self._rifts = rifts
        self._name = name
        self._roster = roster
        self._membership = membership
        self._needed = quorum
        self.partners: Collection[str] = ()
        """Members of the last plan."""
        self.interrupt: Callable[[], None] = lambda: None
        """Called again and again while waiting; what it raises ends the waiting."""

    def call(self, mine: Roll, patience: "Patience") -> Plan | None:
        """Come to an epoch; return its plan as soon as there is one, None if the epoch is over."""
        self._register.write(f"roll/@{self._name}", mine.to_json())
        patience.begin()
        epoch = mine.epoch
        for _ in polls():
            self.interrupt()
            keys = [f"roll/@{name}" for name in self._roster]
            end = f"ended/{mine.version.lineage if mine.version else ''}"
            now, planned, ended, *said = self._register.read("epoch", f"plan/{epoch}", end, *keys)
            if isinstance(now, int) and now > epoch + KEPT_EPOCHS:
                return None  # this party has slept; what it would find or write there is nobody's any more
            if planned is not None:
                return self._read(planned, mine)
            if now != epoch:
                return None
            rolls = self._present(epoch, dict(zip(self._roster, map(Roll.from_json, said), strict=True)))
            if mine.version and is_count(ended) and len(rolls) == 1:
                if mine.version.round < ended:
                    raise FederationError(
                        f"The federation ended after {ended} rounds while party {self._name} was away, which"
                        f" knows {mine.version.round}. The others have the result. To go on from checkpoints"
                        " of all parties that are older, start the rendezvous again."
                    )
                if mine.wants == "rest":
                    return Plan.of(epoch, mine.version.lineage, rolls)  # it was late, but lacks nothing
            ready = self._ready(rolls, mine, patience)
            if ready:
                new = f"{self._register.life}/{epoch}/{secrets.token_hex(4)}"
                plan = Plan.of(epoch, new, ready, self._last_attempt(epoch))
                self._register.claim(f"plan/{epoch}", plan.to_json())
        raise AssertionError("polls without end have ended")

    def _last_attempt(self, epoch: int) -> int:
        """Return the number of the plan before, which perhaps none of those who go on knows any more."""
        (last,) = self._register.read(f"plan/{epoch - 1}")
        attempt = last.get("attempt") if isinstance(last, dict) else None
        return attempt if is_count(attempt) else 0

    def _read(self, value: Any, mine: Roll) -> Plan:
        epoch = mine.epoch
        plan = Plan.from_json(epoch, value)
        if plan is not None and not alike(*plan.rolls.values(), mine):
            self._introductions.check_alike(plan.rolls, mine)
        if plan is None or not set(plan.members) <= set(self._roster):
            raise MismatchError(
                f"Party {self._name} cannot read what another party has written as the plan of epoch {epoch}."
                " Install the same version of pellm-lightning and give the same roster at all parties."
            )
        return plan

    def _present(self, epoch: int, rolls: Mapping[str, Roll | None]) -> dict[str, Roll]:
        """Return what those said who have come to this epoch, and still live."""
        came = {name: roll for name, roll in rolls.items() if roll is not None and roll.epoch == epoch}
        self._peers.hear(came)
        return {name: roll for name, roll in came.items() if self._peers.lives(name, roll.incarnation)}

    def _ready(self, rolls: dict[str, Roll], mine: Roll, patience: "Patience") -> dict[str, Roll] | None:
        """Return who can go on together now, or None if somebody is to be waited for."""
        same = {name: roll for name, roll in rolls.items() if alike(roll, mine)}
        passable = self._rifts.passable(same)
        if len(passable) >= self._needed:
            same = {name: same[name] for name in passable}
        if self._name not in same:
            same = {}  # the others may plan without this party, it cannot
        patience.complain()
        awaited = self._awaited(rolls, patience)
        if patience.is_over(rolls):
            # New processes must not begin anew while one that has the global state still lives.
            known = any(roll.version for roll in rolls.values())
            awaited = [name for name in awaited if not known and self._peers.is_member(name)]
        patience.looks(rolls, awaited)
        if awaited:
            return None
        try:
            if len(same) >= self._needed:
                self._check_begun(same)
                return same
            if len(rolls) >= self._needed:
                self._introductions.check_alike(rolls, mine)
        except FederationError as mismatch:
            patience.differs(mismatch)
        return None

    def _awaited(self, rolls: Mapping[str, Roll], patience: "Patience") -> list[str]:
        """Return those who have not come yet, but will."""
        missing = [name for name in self._roster if name not in rolls]
        where = stage(rolls, self._needed)
        if where == "beginning":
            return missing
        alive = [name for name in missing if self._peers.alive(name)]
        if where == "resuming":
            # Those who were started together come together, give or take.
            return missing if patience.waited_s < 2 * self._membership.heartbeat_ttl_s else alive
        # Who is still starting up will not come before the others have done their next local steps.
        return [name for name in alive if name in self.partners or self._peers.is_member(name)]

    def _check_begun(self, rolls: Mapping[str, Roll]) -> None:
        """Raise if it is not clear whether the federation begins or resumes: too few have its state."""
        begun = [name for name, roll in rolls.items() if roll.version]
        if begun and stage(rolls, self._needed) == "beginning":
            raise FederationError(
                f"Party {', '.join(begun)} has the state of an unfinished federation, the others have none:"
                f" fewer than the {self._needed} that make a majority. To begin anew, remove its state (it"
                " was written under its state_dir); to go on from it, copy it to the others."
            )

    def patience(self) -> "Patience":
        """Return the patience of one muster."""
        return Patience(self._peers, self._name, self._roster, self._needed, self._membership)


class Patience:
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
        """Seconds since this party came to the epoch."""
        return time.monotonic() - self._began

    def begin(self) -> None:
        """Begin a new epoch."""
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

    def looks(self, rolls: Mapping[str, Roll], awaited: Sequence[str]) -> None:
        """Take note of who is there.

        Raises:
            TooFewPartiesError: If too few have been there for too long.
        """
        self._reached = time.monotonic()
        if len({*rolls, *filter(self._peers.alive, awaited)}) >= self._needed:
            self._enough = time.monotonic()
        waited = time.monotonic() - self._enough
        if waited > self._membership.wait_s:
            missing = [name for name in self._roster if name not in rolls]
            fates = ", ".join(f"{name} ({self._peers.fate(name)})" for name in missing)
            raise TooFewPartiesError(
                f"Party {self._name} has waited {waited:.0f} s (wait_s) for {self._needed} of the"
                f" {len(self._roster)} parties; missing: {fates}. Start them, or look at their logs, and"
                " start this party again: the federation goes on where it was.",
                parties=tuple(missing),
            )

    def is_over(self, rolls: Mapping[str, Roll]) -> bool:
        """Tell whether those who have not come are to be left out."""
        beginning = stage(rolls, self._needed) == "beginning"
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
