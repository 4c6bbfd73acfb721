"""A federation of separate jobs: parties die, stall and come back, and every round is all or nothing.

A meeting of the parties is a *term*, one attempt at one round. In each, through registers in the
rendezvous' store that stand once they are written:

1. every party calls the *roll*: that it is here, which global parameters it has, what it wants;
2. when all that are alive have called, whoever sees it first writes the *plan*: who goes on together;
3. the members exchange tensors among each other, keep what comes of it, and *vote*;
4. whoever sees all votes writes the *decision* to commit; whoever sees trouble, to abort.

Nothing here is decided by time alone: a party that was taken for dead finds a term that went on without
it, and comes to the next. A plan needs the majority of the roster, and each member makes its result durable
before it votes, so of two rounds that follow each other one party knows both, and the newest version is never
lost. The scheme is that of an atomic commitment over single-decree registers; the safety argument is in
docs/reliability.md.
"""

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm.collectives import Collectives
from pellm_lightning.comm.elastic.commit import CommitProtocol, Decision
from pellm_lightning.comm.elastic.handshake import Difference, PartySpec, SpecExchange
from pellm_lightning.comm.elastic.heartbeat import Heartbeat, sign_of
from pellm_lightning.comm.elastic.join_quorum import QuorumDeadline, QuorumProtocol
from pellm_lightning.comm.elastic.membership import Membership, check_roster
from pellm_lightning.comm.elastic.peers import Peers
from pellm_lightning.comm.elastic.quorum_view import Intent, QuorumMember, QuorumView, Version, is_count
from pellm_lightning.comm.elastic.reachability import ReachabilityTracker
from pellm_lightning.comm.elastic.register import Register, RestartedError, UnreachableError
from pellm_lightning.comm.errors import FederationError, MismatchError, PartyLostError
from pellm_lightning.comm.mesh.mesh import Listener, Mesh
from pellm_lightning.comm.polling import polls
from pellm_lightning.comm.quorum import Quorum
from pellm_lightning.comm.tls import TLS

log = logging.getLogger(__name__)

# Seconds between looks at whether an attempt was given up by others.
_LOOK_S = 0.5


class ElasticFederation(Collectives):
    """The parties of a roster, each a job of its own, that join over a rendezvous and go on without the lost.

    Args:
        connect: Makes a client of the rendezvous' store; called twice, since heartbeats need their own.
        name: This party.
        roster: Names of all parties of the federation, the same and in the same order at each.
        quorum: How many parties must meet: more than half of the roster ("majority"), or a number.
        membership: How long to wait for whom, and whether to go on without a lost one.
        listen: "host:port" at which the other parties reach this one; only that interface is bound. Port 0
            takes a free one.
        advertise: "host:port" to tell the others instead, where an address is translated on the way.
        tls: This party's certificate, and the authority that must have signed the others'.

    Raises:
        ValueError: If a name, an address or ``membership`` is malformed.
        PartyLostError: If the rendezvous cannot be reached.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        name: str,
        roster: Sequence[str],
        *,
        quorum: Quorum = "majority",
        membership: Membership | None = None,
        listen: str = "127.0.0.1:0",
        advertise: str | None = None,
        tls: TLS | None = None,
    ) -> None:
        check_roster(name, roster)
        self.membership = membership or Membership()
        self.quorum = self.membership.quorum(quorum, roster)
        """How many parties must meet."""
        self.roster = list(roster)
        self.bytes_sent = 0
        self.interrupt: Callable[[], None] = lambda: None
        """Called again and again while this party waits for others; what it raises ends the waiting."""
        self.timeout_s = self.membership.round_timeout_s
        self._name = name
        self._tls = tls
        self._incarnation = secrets.token_hex(8)
        self._phase = "joining"
        self._digest = ""
        self._attempt = 0
        self._view: QuorumView | None = None
        self._resting: set[str] = set()
        self._mesh: Mesh | None = None
        self._ran = ("", 0)
        self._watched = 0.0
        self._closed = False
        host, _, port = listen.rpartition(":")
        self._listener = Listener(host, int(port), name=name, roster=roster, tls=tls)
        self._address = advertise or self._listener.address
        self._stores: list[dist.Store] = []
        try:
            self._register, hearts = self._connected(connect), self._connected(connect)
            signs = {"incarnation": self._incarnation, "member": False, "phase": self._phase}
            self._heartbeat = Heartbeat(hearts, name, roster, signs, self.membership.heartbeat_ttl_s)
        except BaseException as error:
            self._listener.close()
            for store in self._stores:
                _close(store)
            if not isinstance(error, UnreachableError | RestartedError):
                raise
            raise PartyLostError(
                f"Party {name} could not join. {str(error).rstrip('.')}. See that the rendezvous runs."
            ) from error
        self._peers = Peers(self._heartbeat, name, self._incarnation)
        self._reachability = ReachabilityTracker(roster)
        self._specs = SpecExchange(self._register, name, self._incarnation)
        self._commit_protocol = CommitProtocol(self._register, self._peers, name, self._incarnation)
        self._quorum_protocol = QuorumProtocol(
            self._register,
            self._peers,
            self._specs,
            self._reachability,
            name,
            roster,
            self.quorum,
            self.membership,
        )
        self._quorum_protocol.interrupt = self._wait

    # ---- who meets

    @property
    def party(self) -> int:  # type: ignore[override]
        """Index of this party among the members of the present plan."""
        return self.names.index(self._name)

    @property
    def names(self) -> list[str]:  # type: ignore[override]
        """Members of the present plan, in the order of the roster; before the first, this party alone."""
        return self._view.members if self._view else [self._name]

    @property
    @override
    def name(self) -> str:
        return self._name

    @property
    @override
    def place(self) -> tuple[int, int]:
        return self.roster.index(self._name), len(self.roster)

    @property
    @override
    def max_parties(self) -> int:
        return len(self.roster)

    @property
    @override
    def members(self) -> list[int]:
        return [self.roster.index(name) for name in self.names]

    @property
    def shared(self) -> dict[str, str | int | None]:
        """What this party was told of the federation, and must be the same at all."""
        return {"roster": ", ".join(self.roster), "quorum": self.quorum, "tls": self._tls is not None}

    def handshake(self, party_spec: PartySpec, digest: str, difference: Difference) -> dict[str, PartySpec]:
        """Say what this party is, before it comes to its first meeting; return what those alive have said.

        Args:
            party_spec: What the others may want to know, as plain containers.
            digest: Of that part of it which must be the same at all parties.
            difference: Returns in words what of two passports differs, given their owners' names.
        """
        self._digest = digest
        self._specs.handshake(party_spec, difference)
        try:
            self._specs.show()
            known = {
                name: self._specs.of(name, str(self._heartbeat.seen(name).get("incarnation")))
                for name in self.roster
                if name != self._name and self._peers.alive(name)
            }
        except (RestartedError, UnreachableError):
            return {}  # the first meeting shows it again
        return {name: shown for name, shown in known.items() if shown is not None}

    def spec_of(self, party: int) -> PartySpec:
        """Return what a member of the present plan has introduced itself with.

        Raises:
            PartyLostError: If it has been replaced by another process meanwhile.
        """
        name, found = self.names[party], None
        try:
            found = self._specs.of(name, self._current_view.entries[name].incarnation)
        except (RestartedError, UnreachableError) as error:
            raise PartyLostError("The rendezvous went away in the round.") from error
        if found is None:
            raise PartyLostError(f"Party {name} is no longer what it was.", parties=(name,))
        return found

    def join_quorum(self, wants: Intent, version: Version | None, words: dict[str, Any]) -> QuorumView:
        """Come to the next meeting that this party is part of; return who goes on together, and as what.

        If tensors will cross, the members are connected when it returns.

        Args:
            wants: What this party comes for.
            version: Which global parameters it has.
            words: What it has to say to the others; what all others say is in the plan.

        Raises:
            MismatchError: If this party differs from the others in what all must share.
            FederationError: If too few parties are there for too long, or one was lost and that shall stop
                all.
        """
        deadline = self._quorum_protocol.deadline()
        while True:
            try:
                if self._register.renew():
                    log.warning("[party %s] the rendezvous was restarted; the parties meet anew", self._name)
                view = self._met(wants, version, words, deadline)
            except RestartedError:
                continue
            except UnreachableError as error:
                self.interrupt()
                deadline.without_rendezvous(error)
                continue
            if view is not None:
                return view

    def commit(self, digest: str) -> None:
        """Vote for the result that this party has made durable; return when it is decided to commit.

        If the rendezvous is lost after the vote, the result stands: the others have made the same durable,
        or will learn of it as the newest version.

        Args:
            digest: Of the result, which must be the same at all members.

        Raises:
            PartyLostError: If it was decided to abort; the attempt shall be made again.
            FederationError: If the members' results differ.
        """
        view = self._current_view
        try:
            self._peers.check_alone(*self._register.read(sign_of(self._name)))
        except (RestartedError, UnreachableError) as error:
            raise PartyLostError("The rendezvous went away before the vote.") from error
        try:
            self._commit_protocol.vote(view, digest)
            decision = self._commit_protocol.await_decision(view, self.timeout_s)
        except (RestartedError, UnreachableError):
            log.warning(
                "[party %s] the rendezvous went away after the vote on the round; its result stands",
                self._name,
            )
            self._drop_mesh()
            return
        if "abort" in decision:
            self._try(lambda: self._aborted(view, decision))
            raise PartyLostError(f"The round's attempt was given up: {decision['abort']}")
        if "diverged" in decision:
            raise FederationError(
                f"The parties computed different results from the same values ({decision['diverged']}). No"
                " parameter was changed. Install the same versions of torch and pellm-lightning at all."
            )
        self._reachability.connected(view.members)
        self._try(lambda: self._commit_protocol.end(view))

    def remember(self, attempt: int) -> None:
        """Number attempts above those that this party may have taken part in before it died."""
        self._attempt = max(self._attempt, attempt)

    def ended(self, version: Version) -> None:
        """Say that all parties are through, for those who come too late to be told."""

        def claim() -> None:
            self._register.claim(f"ended/{version.run_id}", version.round)

        self._try(claim)

    def fail(self, error: Exception) -> None:
        """Give up this attempt at once, at all members; nothing of it was kept."""
        view = self._current_view
        self._drop_mesh()
        blamed, by = list(getattr(error, "parties", ())), getattr(error, "by", None) or self._name
        log.info("[party %s] gives up this attempt at the round: %s", self._name, error)
        self._try(lambda: self._aborted(view, self._commit_protocol.abort(view, str(error), blamed, by)))

    # ---- tensors

    @override
    def enter(self, phase: str) -> None:
        self._phase = phase
        self._heartbeat.say(phase=phase)

    @override
    def phases(self) -> dict[str, str]:
        return {name: self._phase if name == self._name else self._peers.phase(name) for name in self.roster}

    @override
    def all_reduce_(self, x: Tensor) -> Tensor:
        staged = x.detach().to("cpu").contiguous()
        self.bytes_sent += staged.nbytes if self.num_parties > 1 else 0
        with self._exchanging() as mesh:
            mesh.all_reduce(staged.view(-1))
        return x if staged.data_ptr() == x.data_ptr() else x.copy_(staged)

    @override
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.all_reduce_(tensor)

    @override
    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        staged = x.detach().to("cpu").contiguous()
        self.bytes_sent += staged.nbytes if source == self.party and self.num_parties > 1 else 0
        with self._exchanging() as mesh:
            mesh.broadcast(staged.view(-1), source)
        return x if staged.data_ptr() == x.data_ptr() else x.copy_(staged)

    @override
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        staged = torch.cat([part.detach().to("cpu") for part in parts])
        out = staged.new_empty(sum(sizes))
        self.bytes_sent += staged.nbytes - parts[self.party].nbytes
        with self._exchanging() as mesh:
            mesh.all_to_all(out, staged, list(sizes), [part.numel() for part in parts])
        return list(out.split(list(sizes)))

    @override
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return every party's ``x``, in order, on the CPU: all lines are used at once."""
        mine = x.detach().to("cpu").contiguous()
        out = mine.new_empty(sum(sizes))
        self.bytes_sent += mine.nbytes if self.num_parties > 1 else 0
        with self._exchanging() as mesh:
            mesh.all_to_all(out, mine.repeat(len(sizes)), list(sizes), [len(mine)] * len(sizes))
        return list(out.split(list(sizes)))

    # ---- going

    @override
    def close(self) -> None:
        """Leave, since all have agreed that nobody needs the others any more."""
        self._leave(None)

    @override
    def abort(self, reason: str | None = None) -> None:
        """Leave at once; the others go on without this party, or stop, as they were told."""
        self._leave(f"{self._phase}: {reason}" if reason else f"{self._phase}")

    def _leave(self, farewell: str | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._drop_mesh()
        self._heartbeat.stop(farewell=farewell)
        if not self._heartbeat.is_replaced:
            own = [f"{key}/@{self._name}" for key in ("member", "vote", "party_spec")]
            self._try(lambda: self._register.delete(*own))
        self._listener.close()
        for store in self._stores:
            _close(store)

    # ---- meeting

    def _met(
        self, wants: Intent, version: Version | None, words: dict[str, Any], deadline: QuorumDeadline
    ) -> QuorumView | None:
        """Come to the present term; return its plan, or None if it went on without this party."""
        if self._closed:
            raise FederationError(f"Party {self._name} has left this federation. Join it again.")
        entry = self._roll(wants, version, words)  # first, since it finds out who was replaced
        self._specs.show()
        view = self._quorum_protocol.call(entry, deadline)
        if view is None:
            return None
        self._attempt = max(self._attempt, view.attempt)
        self._peers.hear(view.entries)
        if not view.includes(self._name, self._incarnation):
            self._commit_protocol.await_end(view, self.membership.heartbeat_ttl_s, self._wait)
            return None
        if self._ran == (self._register.life, view.term):
            # It lost the rendezvous in the middle; what it made durable stands, whatever the others decided.
            self._commit_protocol.abort(view, f"party {self._name} was in doubt")
            self._commit_protocol.end(view)
            return None
        self._ran = self._register.life, view.term
        self._go_on(view)
        if not view.exchanges:
            self._commit_protocol.end(view)
        elif not self._connected_to(view):
            return None
        return view

    def _roll(self, wants: Intent, version: Version | None, words: dict[str, Any]) -> QuorumMember:
        """Return what this party says as it comes to the present term."""
        term, sign = self._register.read("term", sign_of(self._name))
        self._peers.check_alone(sign)
        term = self._register.claim("term", 1) if term is None else term
        if not is_count(term):
            raise FederationError(
                f"Party {self._name} finds {term!r:.100} where the number of the meeting must be."
                " Use this rendezvous for one federation only, or start it again: the parties go on where"
                " they were."
            )
        return QuorumMember(
            term=term,
            incarnation=self._incarnation,
            address=self._address,
            digest=self._digest,
            version=version,
            attempt=max(self._attempt, version.attempt if version else 0),
            run_id=self._view.run_id if self._view else "",
            wants=wants,
            group=self._view.group if self._view and self._mesh else "",
            member=self._view is not None,
            words=words,
        )

    def _go_on(self, view: QuorumView) -> None:
        """Take a plan as the present one, and say what has changed."""
        before = self._view.members if self._view else []
        lost = [name for name in before if name not in view.entries and name not in self._resting]
        new = [name for name in view.members if name not in before and name != self._name]
        self._view = view
        for name in lost:
            log.warning("[party %s] goes on without party %s: %s", self._name, name, self._peers.fate(name))
        if before and new:
            log.info("[party %s] goes on with party %s, too", self._name, ", ".join(new))
        if lost and self.membership.on_party_loss == "stop":
            raise FederationError(
                f"Party {lost[0]} was lost ({self._peers.fate(lost[0])}), and on_party_loss='stop'. Party"
                f" {self._name} stops too, its parameters are those of the last completed round plus its own"
                " local steps. Mend the cause and start all parties again."
            )
        self._quorum_protocol.partners = view.members
        self._resting = {name for name, entry in view.entries.items() if entry.wants == "rest"}
        self._heartbeat.say_now(member=True)

    def _aborted(self, view: QuorumView, decision: Decision) -> None:
        """Take note of an aborted attempt."""
        self._drop_mesh()
        self._reachability.note(decision)
        self._commit_protocol.end(view)

    # ---- connections

    def _connected_to(self, view: QuorumView) -> bool:
        """Connect the members, if they are not; return whether that worked."""
        if self._mesh is not None and view.group == view.entries[self._name].group:
            return True
        self._drop_mesh()
        try:
            self._mesh = Mesh(
                self._listener,
                view.group,
                self.party,
                view.members,
                [entry.address for entry in view.entries.values()],
                timeout_s=self.membership.exchange_timeout_s,
                watch=self._watch,
                tls=self._tls,
            )
        except (PartyLostError, MismatchError) as error:
            self.fail(error)
            return False
        return True

    def _watch(self) -> None:
        """Raise when a member of the plan has died, or another one has given up."""
        view = self._current_view
        self._peers.check_alone()
        if time.monotonic() - self._watched > _LOOK_S:
            self._watched = time.monotonic()
            decision = self._known_decision(view)
            if decision is not None:
                raise PartyLostError(f"Another party has given up: {decision.get('abort')}")
        dead = self._peers.dead(view)
        if dead:
            raise PartyLostError(f"Party {dead[0]} was lost: {self._peers.fate(dead[0])}", parties=dead)

    def _known_decision(self, view: QuorumView) -> Decision | None:
        try:
            return self._commit_protocol.known(view)
        except RestartedError as error:
            raise PartyLostError("The rendezvous was restarted: nobody can vote on this attempt.") from error
        except UnreachableError:
            return None  # the exchange needs no rendezvous

    def _drop_mesh(self) -> None:
        if self._mesh is not None:
            self._mesh.abort()
            self._mesh = None

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[Mesh]:
        """Lend the mesh; a member that speaks out of turn is lost to the others if they can do without it."""
        if self._mesh is None:
            raise FederationError(f"Party {self._name} is not connected to the others: it must muster first.")
        try:
            yield self._mesh
        except MismatchError as error:
            if self.num_parties - len(error.parties) < self.quorum:
                raise
            raise PartyLostError(str(error), parties=error.parties, by=error.by) from error

    @property
    def _current_view(self) -> QuorumView:
        if self._view is None:
            raise FederationError(f"Party {self._name} has met no other party yet: it must muster first.")
        return self._view

    # ---- small parts

    def _wait(self) -> None:
        """Raise what ends the waiting for others."""
        self._peers.check_alone()
        self.interrupt()

    def _connected(self, connect: Callable[[], dist.Store]) -> Register:
        """Return a register over a client of its own; the rendezvous may not be up yet."""
        told = False
        for _ in polls(self.membership.wait_s):
            store = None
            try:
                store = connect()
                register = Register(store)
                register.renew()
            except (dist.DistError, UnreachableError) as error:
                unreachable = UnreachableError(str(error))
                if not told:
                    log.warning("[party %s] waits for the rendezvous: %s", self._name, error)
                told = True
                _close(store)
                continue
            self._stores.append(store)
            return register
        raise unreachable

    def _try(self, act: Callable[[], None]) -> None:
        """Do what the next meeting would make good anyway, if the rendezvous is there."""
        try:
            act()
        except UnreachableError as error:
            log.debug("[party %s] %s", self._name, error)


def _close(store: dist.Store | None) -> None:
    """Close a client of the rendezvous; torch's own cannot be closed."""
    close = getattr(store, "close", None)
    if close is not None:
        close()
