"""Communicator of separate jobs: parties die, stall and come back, and every round is all or nothing.

A *term* is one attempt at one round. In each, through registers of the rendezvous that are written once:

1. every party *joins* the quorum: that it is alive, which global parameters it has, what it intends;
2. when all that are alive have joined, whoever sees it first writes the *view*: who continues together;
3. the members exchange tensors among each other, make the result durable, and *vote*;
4. whoever sees all votes writes the *decision* to commit; whoever sees a failure, to abort.

Nothing here is decided by time alone: a party that was taken for dead finds a term that continued without
it, and joins the next. A view needs the majority of the roster, and each member makes its result durable
before it votes, so of two rounds that follow each other one party knows both, and the newest version is never
lost. The scheme is that of an atomic commitment over single-decree registers; the safety argument is in
docs/reliability.md.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm.collectives import concatenated, staged
from pellm_lightning.comm.communicator import (
    Communicator,
    Difference,
    Intent,
    Metadata,
    PartySpec,
    QuorumResult,
    Version,
)
from pellm_lightning.comm.elastic.attempts import AttemptLimit
from pellm_lightning.comm.elastic.audit import Audit
from pellm_lightning.comm.elastic.commit import CommitProtocol, Decision
from pellm_lightning.comm.elastic.connections import MemberConnections
from pellm_lightning.comm.elastic.handshake import SpecExchange
from pellm_lightning.comm.elastic.join_quorum import QuorumDeadline, QuorumProtocol, VoidViewError
from pellm_lightning.comm.elastic.joining import join_rendezvous
from pellm_lightning.comm.elastic.membership import LocalParty, Membership, check_addresses, check_roster
from pellm_lightning.comm.elastic.quorum_view import QuorumMember, QuorumView, check_fits, is_count
from pellm_lightning.comm.elastic.reachability import ReachabilityTracker
from pellm_lightning.comm.elastic.register import RestartedError, UnreachableError
from pellm_lightning.comm.elastic.revoked_members import RevokedMembers
from pellm_lightning.comm.errors import FaultyPartyError, FederationError, MismatchError, PartyLostError
from pellm_lightning.comm.mesh.mesh import Listener
from pellm_lightning.comm.quorum import Quorum
from pellm_lightning.comm.tls import TLS

log = logging.getLogger(__name__)


class ElasticFederation(Communicator):
    """Separate jobs that join over a rendezvous and continue without those that are lost.

    Args:
        connect: Makes a client of the rendezvous' store; called twice, since heartbeats need their own.
        name: This party.
        roster: Names of all parties of the federation, the same and in the same order at each.
        quorum: How many parties must take part: more than half of the roster ("majority"), or a number.
        membership: How long to wait for whom, and whether to continue without a lost one.
        listen: "host:port" at which the other parties reach this one; only that interface is bound. Port 0
            takes a free one. On loopback it dials out only, but for parties of the same host.
        advertise: "host:port" to tell the others instead, where an address is translated on the way.
        tls: This party's certificate, and the authority that must have signed the others'.
        prefix: What all keys at the rendezvous begin with.

    Raises:
        ValueError: If a name, an address or ``membership`` is malformed.
        PartyLostError: If the rendezvous cannot be reached.

    Example:
        >>> import torch
        >>> from torch.distributed import HashStore
        >>> store = HashStore()
        >>> federation = ElasticFederation(lambda: store, "a", ["a"])
        >>> federation.join_quorum("exchange", None, {}).members
        ['a']
        >>> federation.all_reduce_(torch.ones(2))
        tensor([1., 1.])
        >>> federation.close()
    """

    may_lose_parties = True

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
        prefix: str = "",
    ) -> None:
        check_roster(name, roster)
        check_addresses(name, listen, advertise)
        self.membership = membership or Membership()
        self.quorum, self.roster = self.membership.quorum(quorum, roster), list(roster)
        self.bytes_sent = 0
        self.interrupt = lambda: None
        self.timeout_s = self.membership.round_timeout_s
        self._name, self.tls = name, tls
        self._me = LocalParty(name, self.roster, self.quorum, self.membership)
        self._phase, self._digest, self._attempt = "joining", "", 0
        self._view: QuorumView | None = None
        self._resting, self._next_term = set[str](), ("", 0)
        self._ended: tuple[str, QuorumView] | None = None
        """Life and view of the last commit; the next quorum ends its term, if whoever decided could not."""
        self._closed = False
        host, _, port = listen.rpartition(":")
        self._listener = Listener(host, int(port), name=name, roster=roster, tls=tls)
        self._address = advertise or self._listener.address
        try:
            self._registers, self._peers = join_rendezvous(connect, self._me, prefix, self._phase)
        except BaseException:
            self._listener.close()
            raise
        self._register = self._registers[0]
        self._reachability = ReachabilityTracker(roster)
        self._limit = AttemptLimit(self._me)
        self._specs = SpecExchange(self._register, self._me)
        self._commit_protocol = CommitProtocol(self._register, self._peers, self._me)
        self._revoked = RevokedMembers(name, tls)
        self._quorum_protocol = QuorumProtocol(
            self._register, self._peers, self._specs, self._reachability, self._me, self._revoked
        )
        self._quorum_protocol.interrupt = self._check_waiting
        relay = self._register.relay_route(name, tls)
        self._connections = MemberConnections(self._listener, self._me, self._peers, tls, relay)
        self._audit = Audit(self._register, self._reachability, self._me, self._connections.check)

    # ---- membership

    @property
    def party(self) -> int:  # type: ignore[override]
        """Index of this party among the members of the present view."""
        return self.names.index(self._name)

    @property
    def names(self) -> list[str]:  # type: ignore[override]
        """Members of the present view, in the order of the roster; before the first, this party alone."""
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
    @override
    def relayed(self) -> list[str]:
        return self._connections.relayed

    @property
    @override
    def settings(self) -> dict[str, str | int | float | None]:
        return {"roster": ", ".join(self.roster), "quorum": self.quorum, "tls": self.tls is not None}

    @override
    def enter(self, phase: str) -> None:
        self._phase = phase
        self._peers.set_status(phase=phase)

    @override
    def phases(self) -> dict[str, str]:
        return {name: self._phase if name == self._name else self._peers.phase(name) for name in self.roster}

    @override
    def handshake(self, spec: PartySpec, digest: str, difference: Difference) -> dict[str, PartySpec]:
        """Publish this party's spec; return it and those of the parties that are alive."""
        self._digest = digest
        self._specs.set(spec, difference)
        return self._specs.published(self._peers)

    @override
    def party_specs(self) -> list[PartySpec]:
        return self._specs.of_members(self._current_view.entries)

    @override
    def gather_json(self, key: str, value: object) -> list[Any]:
        """Return the value of every member of a quorum, in order."""
        while True:
            said = self.join_quorum("metadata", None, {key: value}).metadata.values()
            if all(key in of_party for of_party in said):
                return [of_party[key] for of_party in said]

    @override
    def join_quorum(
        self, intent: Intent, version: Version | None, metadata: Metadata, state: str = ""
    ) -> QuorumResult:
        check_fits(self._name, metadata, len(self.roster))
        entry = partial(self._entry, intent, version, metadata, state)
        deadline = self._quorum_protocol.deadline()
        restarted = False
        while True:
            try:
                if restarted and self._register.renew():
                    log.warning("[party %s] the rendezvous was restarted; the parties join again", self._name)
                restarted = False
                view = self._join_term(entry, deadline)
            except RestartedError:
                restarted = True
                continue
            except UnreachableError as error:
                self.interrupt()
                deadline.wait_for_rendezvous(error)
                continue
            if view is not None:
                return view.result

    @override
    def version(self, round: int) -> Version:
        view = self._current_view
        return Version(view.run_id, round, view.attempt)

    @override
    def commit(self, digest: str, signature: str = "", statement: str = "") -> Mapping[str, Any]:
        """Vote for the result that this party has made durable; return once it is committed.

        If the rendezvous is lost after the vote, the result stands: the others have made the same durable,
        or will learn of it as the newest version.
        """
        view, protocol = self._current_view, self._commit_protocol
        self._peers.check_not_replaced()
        try:
            self._peers.watched()
        except RestartedError as error:
            raise PartyLostError("The rendezvous was restarted before the vote.") from error
        try:
            found = protocol.vote(view, digest, signature, statement)
            decision = protocol.await_decision(view, self.timeout_s, found)
        except (RestartedError, UnreachableError):
            log.warning("[party %s] the rendezvous went away after the vote; its result stands", self._name)
            self._connections.drop()
            return {}
        if "diverged" in decision:
            self._audit.judge(lambda: protocol.dissenters(view), lambda: self.keep_votes(protocol.seen(view)))
        if "abort" in decision:
            raise PartyLostError(f"The attempt at the round was aborted: {decision['abort']}")
        self._reachability.connected(view.members)
        self._limit.committed()
        self._ended = self._next_term[0], view
        signatures = decision.get("signatures")
        return signatures if isinstance(signatures, dict) else {}

    @override
    def abort_attempt(self, error: Exception) -> bool:
        view = self._current_view
        self._connections.drop()
        blamed, by = list(getattr(error, "parties", ())), getattr(error, "by", None) or self._name
        faulty = blamed if isinstance(error, FaultyPartyError) else []  # all see it: nobody's word is needed
        log.info("[party %s] aborts this attempt at the round: %s", self._name, error)
        decide = partial(self._commit_protocol.abort, view, str(error), [] if faulty else blamed, by)
        self._try(lambda: self._note_abort(view, decide()))
        self._limit.failed(str(error))
        self._reachability.leave_out(faulty)
        if len(view.members) - len(faulty) < self.quorum:
            time.sleep(self.membership.patience_s)  # until another party comes
        return self._name not in faulty and len(self.roster) - len(faulty) >= self.quorum

    @override
    def skip_attempts(self, attempt: int) -> None:
        self._attempt = max(self._attempt, attempt)

    @override
    def mark_ended(self, version: Version) -> None:
        def claim() -> None:
            for run_id in (version.run_id, ""):  # a party that lost its state no longer knows of which run
                self._register.claim(f"ended/{run_id}", version.round)

        self._try(claim)

    # ---- tensors

    @override
    def all_reduce_(self, x: Tensor) -> Tensor:
        with staged(x) as copy, self._connections.exchanging() as mesh:
            self.bytes_sent += copy.nbytes if self.num_parties > 1 else 0
            mesh.all_reduce(copy.view(-1))
            self._audit.compare_sum(copy)
        return x

    @override
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.all_reduce_(tensor)

    @override
    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        with staged(x) as copy, self._connections.exchanging() as mesh:
            self.bytes_sent += copy.nbytes if source == self.party and self.num_parties > 1 else 0
            mesh.broadcast(copy.view(-1), source)
            self._audit.compare({self.names[source]: copy})
        return x

    @override
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        sent = concatenated(parts)
        out = sent.new_empty(sum(sizes))
        self.bytes_sent += sent.nbytes - parts[self.party].nbytes
        with self._connections.exchanging() as mesh:
            mesh.all_to_all(out, sent, list(sizes), [part.numel() for part in parts])
        return list(out.split(list(sizes)))

    @override
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return every party's ``x``, in order, on the CPU: all connections are used at once."""
        mine = x.detach().to("cpu").contiguous()
        out = mine.new_empty(sum(sizes))
        self.bytes_sent += mine.nbytes if self.num_parties > 1 else 0
        with self._connections.exchanging() as mesh:
            mesh.all_to_all(out, mine.repeat(len(sizes)), list(sizes), [len(mine)] * len(sizes))
            self._audit.compare(dict(zip(self.names, out.split(list(sizes)), strict=True)))
        return list(out.split(list(sizes)))

    # ---- leaving

    @override
    def close(self) -> None:
        """Leave, since all have agreed that nobody needs the others any more."""
        self._leave(None)

    @override
    def abort(self, reason: str | None = None) -> None:
        """Leave at once; the others continue without this party, or stop, by ``on_party_loss``."""
        self._leave(f"{self._phase}: {reason}" if reason else f"{self._phase}")

    def _leave(self, reason: str | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._connections.drop()
        self._peers.stop(reason=reason)
        if not self._peers.is_replaced:
            own = [f"{key}/@{self._name}" for key in ("member", "vote", "heard", "party_spec", "owner")]
            self._try(lambda: self._register.delete(*own))
        self._listener.close()
        for register in self._registers:
            register.close()

    # ---- joining a quorum

    def _join_term(self, entry: Callable[[], QuorumMember], deadline: QuorumDeadline) -> QuorumView | None:
        """Join the present term; return its view, or None if it continued without this party."""
        if self._closed:
            raise FederationError(f"Party {self._name} has left this federation. Join it again.")
        self._peers.check_not_replaced()
        if self._revoked.has_changed():
            self._connections.drop()  # new ones are made with those alone whose certificates still count
        self._audit.share(self._peers)
        mine, (life, last) = entry(), self._ended or ("", None)
        ending = self._commit_protocol.ending(last) if last and life == self._register.life else []
        self._specs.publish()
        try:
            view = self._quorum_protocol.join(mine, deadline, ending)
        except VoidViewError as void:
            log.warning("[party %s] %s", self._name, void)
            if void.others:
                time.sleep(self.membership.patience_s)
            else:
                self._register.swap("term", mine.term, mine.term + 1)
            self._limit.failed(str(void))
            return None
        self._next_term = ("", 0)
        if view is None:
            return None
        self._limit.saw(view.newest)
        self._attempt = max(self._attempt, view.attempt)
        self._peers.note_incarnations(view.entries)
        self._revoked.take(view.entries.values())  # also of a view without this party: it may say why
        if not view.includes(self._name, self._me.incarnation):
            self._commit_protocol.await_end(view, self.membership.heartbeat_ttl_s, self._check_waiting)
            return None
        unfit = self._unfit(view, mine.attempt)
        if unfit:
            self._commit_protocol.abort(view, unfit)
            self._commit_protocol.end(view)
            self._limit.failed(unfit)
            return None
        self._next_term = self._register.life, view.term + 1
        self._accept(view)
        self._audit.begin(view)
        if not view.exchanges:
            self._commit_protocol.end(view)
        elif not self._connected_to(view):
            return None
        return view

    def _unfit(self, view: QuorumView, known: int) -> str | None:
        """Return why this party takes no part in a view that includes it; None if it does."""
        if len(self._revoked.without(view.entries)) < len(view.entries):
            return "a member's certificate is revoked"
        if view.attempt <= known:  # it lost the rendezvous in the middle; what it made durable stands
            # Nor does a false view make it sign two statements of one attempt.
            return f"party {self._name} was in doubt"
        return None

    def _entry(self, intent: Intent, version: Version | None, metadata: Metadata, state: str) -> QuorumMember:
        """Return the message with which this party joins the present term."""
        life, term = self._next_term
        term = term if life == self._register.life else self._register.claim("term", 1)
        if not is_count(term):
            raise FederationError(
                f"Party {self._name} finds {term!r:.100} where the number of the term must be. Use this"
                " rendezvous for one federation only, or restart it: the parties continue where they were."
            )
        return QuorumMember(
            term=term,
            incarnation=self._me.incarnation,
            address=self._address,
            digest=self._digest,
            version=version,
            attempt=max(self._attempt, version.attempt if version else 0),
            run_id=self._view.run_id if self._view else "",
            intent=intent,
            group=self._connections.group,
            member=self._view is not None,
            metadata=metadata,
            state=state,
            audits=self._audit.is_active,
            serial=self._revoked.serial,
            revoked=self._revoked.pem,
            **self._connections.missing,
        )

    def _accept(self, view: QuorumView) -> None:
        """Take a view as the present one, and log what has changed."""
        before = self._view.members if self._view else []
        lost = [name for name in before if name not in view.entries and name not in self._resting]
        new = [name for name in view.members if name not in before and name != self._name]
        self._view = view
        for name in lost:
            log.warning("[party %s] continues without party %s: %s", self._name, name, self._peers.fate(name))
        if before and new:
            log.info("[party %s] continues with party %s", self._name, ", ".join(new))
        if lost and self.membership.on_party_loss == "stop":
            raise FederationError(
                f"Party {lost[0]} was lost ({self._peers.fate(lost[0])}), and on_party_loss='stop'. Party"
                f" {self._name} also stops, its parameters are those of the last completed round plus its own"
                " local steps. Fix the cause and start all parties again."
            )
        self._quorum_protocol.partners = view.members
        self._resting = {name for name, entry in view.entries.items() if entry.intent == "rest"}
        self._peers.publish_status(member=True)

    def _note_abort(self, view: QuorumView, decision: Decision) -> None:
        """Note an aborted attempt, and end its term."""
        self._connections.drop()
        self._reachability.note(decision)
        self._commit_protocol.end(view)

    def _connected_to(self, view: QuorumView) -> bool:
        """Connect the members, if they are not; return whether that worked."""
        try:
            self._connections.connect(view, self._register.life)
        except (PartyLostError, MismatchError) as error:
            self.abort_attempt(error)
            return False
        return True

    @property
    def _current_view(self) -> QuorumView:
        if self._view is None:
            raise FederationError(f"Party {self._name} is in no quorum yet: call join_quorum first.")
        return self._view

    def _check_waiting(self) -> None:
        """Raise what ends the waiting for others."""
        self._peers.check_not_replaced()
        self.interrupt()

    def _try(self, act: Callable[[], None]) -> None:
        """Do what the next quorum would make good anyway, if the rendezvous can be reached."""
        try:
            act()
        except (UnreachableError, RestartedError, FederationError) as error:  # or it is refused
            log.debug("[party %s] %s", self._name, error)
