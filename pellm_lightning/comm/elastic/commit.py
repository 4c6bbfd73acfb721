"""Commit protocol: votes, the one decision on each attempt, and the step to the next term."""

from collections.abc import Callable, Mapping
from typing import Any

from pellm_lightning.comm.elastic.heartbeat import Heartbeat
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.quorum_view import QuorumView
from pellm_lightning.comm.elastic.register import KEPT_TERMS, Register, RestartedError
from pellm_lightning.comm.polling import polls

Decision = dict[str, Any]


class CommitProtocol:
    """Atomic commitment over write-once registers: each view gets one decision, to commit or to abort.

    Any member that sees all votes, or that a voter is dead, writes the decision; the first one stands.

    Args:
        register: Where votes and decisions are written.
        peers: Who is alive.
        me: This party.

    Example::

        protocol.vote(view, digest)
        decision = protocol.await_decision(view, timeout_s=60)
    """

    def __init__(self, register: Register, peers: Heartbeat, me: LocalParty) -> None:
        self._register, self._peers, self._me = register, peers, me

    def vote(self, view: QuorumView, digest: str) -> None:
        """Vote for a result."""
        vote = {"term": view.term, "incarnation": self._me.incarnation, "digest": digest}
        self._register.write(f"vote/@{self._me.name}", vote)

    def await_decision(self, view: QuorumView, timeout_s: float) -> Decision:
        """Return the decision on a view, which this party helps to make.

        Raises:
            RestartedError: If it cannot be known any more.
        """
        key = _key(view)
        vote_keys = [f"vote/@{name}" for name in view.members]
        for _ in polls(timeout_s):
            now, decision, *votes = self._register.read("term", key, *vote_keys)
            if isinstance(decision, dict):
                return decision
            if not isinstance(now, int) or now > view.term + KEPT_TERMS:
                raise RestartedError  # this party has missed the decision: it is in doubt
            digests = {name: _vote(vote, view, name) for name, vote in zip(view.members, votes, strict=True)}
            verdict = self._verdict(view, digests)
            if verdict:
                self._register.claim(key, verdict)
        late = [name for name, digest in digests.items() if digest is None]
        return self.abort(view, f"party {', '.join(late)} did not vote in time", late, self._me.name)

    def abort(
        self, view: QuorumView, reason: str, blamed: list[str] | None = None, by: str | None = None
    ) -> Decision:
        """Decide to abort an attempt, unless it is decided already; return the decision that stands.

        Args:
            view: The attempt's.
            reason: For the message at all members.
            blamed: Parties that could not be reached although they are alive.
            by: The party that could not reach them.
        """
        verdict = {"abort": reason, "blamed": blamed or [], "by": by}
        decision = self._register.claim(_key(view), verdict)
        return decision if isinstance(decision, dict) else verdict

    def read_decision(self, view: QuorumView) -> Decision | None:
        """Return the decision if there is one."""
        (decision,) = self._register.read(_key(view))
        return decision if isinstance(decision, dict) else None

    def await_end(self, view: QuorumView, poll_s: float, interrupt: Callable[[], None]) -> None:
        """Wait until a term is over that continues without this party; end it if its members are dead."""
        while view.exchanges:
            for _ in polls(poll_s):
                interrupt()
                now, decision = self._register.read("term", _key(view))
                if decision is not None or now != view.term:
                    self.end(view)
                    return
            dead = self._peers.dead(view)
            if dead:
                self.abort(view, self._lost(dead[0]))
        self.end(view)

    def end(self, view: QuorumView) -> None:
        """Advance to the next term, unless another party has done so."""
        self._register.swap("term", view.term, view.term + 1)
        if self._me.name in view.entries and view.members[view.term % len(view.members)] == self._me.name:
            # Twice, by two members: the first may have died instead.
            for old in (view.term - KEPT_TERMS, view.term - 2 * KEPT_TERMS - 1):
                self._register.delete(f"view/{old}", f"decision/{old}")

    def _verdict(self, view: QuorumView, digests: Mapping[str, str | None]) -> Decision | None:
        if None not in digests.values():
            if len(set(digests.values())) == 1:
                return {"commit": next(iter(digests.values()))}
            return {"diverged": ", ".join(f"party {name}: {digest}" for name, digest in digests.items())}
        dead = [name for name in self._peers.dead(view) if digests[name] is None]
        return {"abort": self._lost(dead[0]), "blamed": []} if dead else None

    def _lost(self, name: str) -> str:
        return f"party {name} was lost: {self._peers.fate(name)}"


def _key(view: QuorumView) -> str:
    return f"decision/{view.term}"


def _vote(value: Any, view: QuorumView, name: str) -> str | None:
    """Return the digest that a member has voted for in a view, None if it has not."""
    if not isinstance(value, dict):
        return None
    voter = value.get("term"), value.get("incarnation")
    return str(value.get("digest")) if voter == (view.term, view.entries[name].incarnation) else None
