"""Connections between the members of a quorum, and the failures that end an exchange over them."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

from pellm_lightning.comm.elastic.commit import decision_key
from pellm_lightning.comm.elastic.heartbeat import Heartbeat
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.quorum_view import QuorumView
from pellm_lightning.comm.elastic.register import RestartedError
from pellm_lightning.comm.errors import FederationError, MismatchError, PartyLostError
from pellm_lightning.comm.mesh.mesh import Listener, Mesh
from pellm_lightning.comm.relay.client import RelayRoute
from pellm_lightning.comm.tls import TLS

log = logging.getLogger(__name__)

# A line that loses packets answers late.
_MIN_SILENCE_S = 3.0


class MemberConnections:
    """The mesh of the present view's members, kept from round to round as long as these are the same.

    Args:
        listener: Accepts the other members' connections.
        me: This party.
        peers: Who is alive, and whether another member has aborted the attempt.
        tls: This party's certificate, and the authority that must have signed the others'.
        relay: The way to members that cannot be dialed; None if there is none.

    Example::

        connections.connect(view, life)
        with connections.exchanging() as mesh:
            mesh.all_reduce(x)
    """

    def __init__(
        self,
        listener: Listener,
        me: LocalParty,
        peers: Heartbeat,
        tls: TLS | None,
        relay: RelayRoute | None = None,
    ) -> None:
        self._listener, self._me, self._peers, self._tls = listener, me, peers, tls
        self._relay = relay
        self._ways = ""
        self._mesh: Mesh | None = None
        self._view: QuorumView | None = None
        self.missing: dict[str, list[str]] = {}
        """Whom this party had long waited for when its last attempt failed; it says so as it joins again."""

    @property
    def group(self) -> str:
        """Name of the connections that are open, empty if none are, or one has ended meanwhile."""
        if self._mesh is not None and not self._mesh.is_intact:
            self.drop()
        return self._view.group if self._view and self._mesh else ""

    def connect(self, view: QuorumView, life: str) -> None:
        """Connect the members of a view, unless they are connected.

        Args:
            view: The view.
            life: The life of the rendezvous in which its decision will be made.

        Raises:
            PartyLostError: If a member cannot be reached.
            MismatchError: If a member sends something else than it must.
        """
        kept = self._mesh is not None and view.group == view.entries[self._me.name].group
        if not kept:
            self.drop()
        self._view, self.missing = view, {}
        self._peers.watch(decision_key(view), life)
        if not kept:
            self._mesh = self._formed(view)

    @property
    def relayed(self) -> list[str]:
        """Members with which this party is connected by the relay."""
        return self._mesh.relayed if self._mesh else []

    def _formed(self, view: QuorumView) -> Mesh:
        try:
            mesh = Mesh(
                self._listener,
                view.group,
                view.members.index(self._me.name),
                view.members,
                [entry.address for entry in view.entries.values()],
                timeout_s=self._me.membership.exchange_timeout_s,
                watch=self.check,
                tls=self._tls,
                relay=self._relay,
                silence_s=max(self._me.membership.heartbeat_ttl_s, _MIN_SILENCE_S),
            )
        except FederationError as error:
            self.missing = error.missing
            raise
        self._log_ways([name for name in view.members if name != self._me.name], mesh.relayed)
        return mesh

    def _log_ways(self, others: Sequence[str], relayed: Sequence[str]) -> None:
        """Log which members are reached how, if that is new."""
        direct = [name for name in others if name not in relayed]
        parts = [("directly", direct), ("by the relay", relayed)]
        ways = ", ".join(f"{way} with {' and '.join(names)}" for way, names in parts if names)
        if ways and ways != self._ways:
            log.info("[party %s] is connected %s", self._me.name, ways)
        self._ways = ways

    def drop(self) -> None:
        """Close the connections."""
        if self._mesh is not None:
            self._mesh.abort()
            self._mesh = None

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[Mesh]:
        """Lend the mesh; a member that sends out of turn is lost if the others can do without it.

        Raises:
            FederationError: If the members are not connected.
        """
        if self._mesh is None or self._view is None:
            raise FederationError(f"Party {self._me.name} is not connected: call join_quorum first.")
        try:
            yield self._mesh
        except FederationError as error:
            self.missing = error.missing
            others = len(self._view.members) - len(error.parties)
            if not isinstance(error, MismatchError) or others < self._me.quorum:
                raise
            raise PartyLostError(str(error), parties=error.parties, by=error.by) from error

    def check(self) -> None:
        """Raise when a member of the view has died, or another one has aborted the attempt."""
        self._peers.check_not_replaced()
        if self._view is None:
            return
        self._raise_if_aborted()
        dead = self._peers.dead(self._view)
        if dead:
            raise PartyLostError(f"Party {dead[0]} was lost: {self._peers.fate(dead[0])}", parties=dead)

    def _raise_if_aborted(self) -> None:
        try:
            decision = self._peers.watched()
        except RestartedError as error:
            raise PartyLostError("The rendezvous was restarted: nobody can vote on this attempt.") from error
        if isinstance(decision, dict):
            raise PartyLostError(f"Another party has aborted: {decision.get('abort')}")
