"""Commit protocol: votes, the one decision on each attempt, and the step to the next term."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pellm_lightning.comm.elastic.heartbeat import Heartbeat
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.quorum_view import QuorumView
from pellm_lightning.comm.elastic.register import (
    KEPT_TERMS,
    Action,
    Delete,
    Register,
    RestartedError,
    Swap,
    Write,
)

Decision = dict[str, Any]

# What a member has written goes into a value of all: Ed25519's signature in base64, and words for people.
_MAX_SIGNATURE = 128
_MAX_REASON = 4096
# Votes of one member in one attempt that are remembered: an honest one has one.
_MAX_VOTES = 4


class CommitProtocol:
    """Atomic commitment over write-once registers: each view gets one decision, to commit or to abort.

    Any member that sees all votes, or that a voter is dead, writes the decision; the first one stands.

    Args:
        register: Where votes and decisions are written.
        peers: Who is alive.
        me: This party.

    Example::

        found = protocol.vote(view, digest)
        decision = protocol.await_decision(view, timeout_s=60, found=found)
    """

    def __init__(self, register: Register, peers: Heartbeat, me: LocalParty) -> None:
        self._register, self._peers, self._me = register, peers, me
        self._seen: dict[str, list[dict[str, Any]]] = {}

    def vote(self, view: QuorumView, digest: str, signature: str = "", statement: str = "") -> list[Any]:
        """Vote for a result; return what ``await_decision`` takes for ``found``.

        Args:
            view: The view.
            digest: Of the result.
            signature: This party's of the round, which the decision passes on; empty for none.
            statement: What it has signed.
        """
        self._seen = {name: [] for name in view.members}
        vote = {"term": view.term, "incarnation": self._me.incarnation, "digest": digest}
        vote |= {"signature": signature, "statement": statement} if signature else {}
        return self._register.transact([Write(f"vote/@{self._me.name}", vote)], _keys(view))[1]

    def await_decision(self, view: QuorumView, timeout_s: float, found: list[Any] | None = None) -> Decision:
        """Return the decision on a view, which this party helps to make.

        Whoever votes last sees all votes, and decides; the others wait at the rendezvous for that. So it is
        two trips for each, however many they are.

        Args:
            view: The view.
            timeout_s: How long to wait for the votes.
            found: What was read with this party's vote.

        Raises:
            RestartedError: If it cannot be known any more.
        """
        key, deadline = decision_key(view), time.monotonic() + timeout_s
        now, decision, *votes = self._register.read(*_keys(view)) if found is None else found
        while True:
            if isinstance(decision, dict):
                return decision
            if not isinstance(now, int) or now > view.term + KEPT_TERMS:
                raise RestartedError  # this party has missed the decision: it is in doubt
            digests = self._digests(view, votes)
            verdict = self._verdict(view, digests)
            if verdict:
                verdict |= _signatures(verdict, view, votes)
                decision = self._decide(view, verdict)
                if isinstance(decision, dict):
                    return decision
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            now, decision = self._register.wait(min(self._me.membership.patience_s, left_s), "term", key)
            if not isinstance(decision, dict):
                now, decision, *votes = self._register.read(*_keys(view))
        late = [name for name, digest in digests.items() if digest is None]
        said = f"party {', '.join(late)} did not vote within {timeout_s:g} s"
        return self.abort(view, said, late, self._me.name, late=True)

    def _decide(self, view: QuorumView, verdict: Decision) -> Any:
        """Write a decision, and end the term, in one trip; return the decision that stands."""
        deciding: list[Action] = [Swap(decision_key(view), None, verdict), *self.ending(view)]
        return self._register.transact(deciding)[0][0]

    def abort(
        self,
        view: QuorumView,
        reason: str,
        blamed: list[str] | None = None,
        by: str | None = None,
        *,
        late: bool = False,
    ) -> Decision:
        """Decide to abort an attempt, unless it is decided already; return the decision that stands.

        Args:
            view: The attempt's.
            reason: For the message at all members.
            blamed: Parties that could not be reached although they are alive.
            by: The party that could not reach them.
            late: Whether only their votes are missing.
        """
        verdict = {"abort": reason[:_MAX_REASON], "blamed": blamed or [], "by": by} | (
            {"late": True} if late else {}
        )
        decision = self._register.claim(decision_key(view), verdict)
        return decision if isinstance(decision, dict) else verdict

    def dissenters(self, view: QuorumView) -> list[str] | None:
        """Return the members whose votes differ from the majority's; None if there is no majority."""
        digests = self._digests(view, self._register.read(*_keys(view))[2:])
        digest, count = Counter(digests.values()).most_common(1)[0]
        if digest is None or 2 * count <= len(digests):
            return None
        return [name for name, other in digests.items() if other not in (None, digest)]

    def seen(self, view: QuorumView) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Return by member all its votes in a view that this party has read: it may have written another."""
        self._digests(view, self._register.read(*_keys(view))[2:])
        return self._seen

    def _digests(self, view: QuorumView, votes: Sequence[Any]) -> dict[str, str | None]:
        """Return by member the digest that it has voted for, None without, and remember its vote."""
        digests = {name: _vote(vote, view, name) for name, vote in zip(view.members, votes, strict=True)}
        for (name, digest), vote in zip(digests.items(), votes, strict=True):
            seen = self._seen.setdefault(name, [])
            if digest is not None and len(seen) < _MAX_VOTES and vote not in seen:
                seen.append(vote)
        return digests

    def await_end(self, view: QuorumView, poll_s: float, interrupt: Callable[[], None]) -> None:
        """Wait until a term is over that continues without this party; end it if its members are dead."""
        while view.exchanges:
            deadline = time.monotonic() + poll_s
            now, decision = self._register.read("term", decision_key(view))
            while decision is None and now == view.term:
                interrupt()
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                patience_s = min(self._me.membership.patience_s, left_s)
                now, decision = self._register.wait(patience_s, "term", decision_key(view))
            else:
                break
            dead = self._peers.dead(view)
            if dead:
                self.abort(view, self._lost(dead[0]))
        self.end(view)

    def end(self, view: QuorumView) -> Any:
        """Advance to the next term, unless another party has done so; return the term that is now."""
        return self._register.transact(self.ending(view))[0][0]

    def ending(self, view: QuorumView) -> list[Action]:
        """Return what advances to the next term, and removes what is old."""
        actions: list[Action] = [Swap("term", view.term, view.term + 1)]
        if self._me.name in view.entries and view.members[view.term % len(view.members)] == self._me.name:
            # Twice, by two members: the first may have died instead.
            for old in (view.term - KEPT_TERMS, view.term - 2 * KEPT_TERMS - 1):
                actions += [Delete(f"view/{old}"), Delete(f"decision/{old}")] if old > 0 else []
        return actions

    def _verdict(self, view: QuorumView, digests: Mapping[str, str | None]) -> Decision | None:
        if None not in digests.values():
            if len(set(digests.values())) == 1:
                return {"commit": next(iter(digests.values()))}
            said = ", ".join(f"party {name}: {digest:.16}" for name, digest in digests.items())
            return {"abort": f"the parties computed different results ({said})", "diverged": True}
        dead = [name for name in self._peers.dead(view) if digests[name] is None]
        return {"abort": self._lost(dead[0]), "blamed": []} if dead else None

    def _lost(self, name: str) -> str:
        return f"party {name} was lost: {self._peers.fate(name)}"


def decision_key(view: QuorumView) -> str:
    """Return the key of the decision on a view."""
    return f"decision/{view.term}"


def _keys(view: QuorumView) -> list[str]:
    return ["term", decision_key(view), *(f"vote/@{name}" for name in view.members)]


def _signatures(verdict: Decision, view: QuorumView, votes: Sequence[Any]) -> dict[str, dict[str, str]]:
    """Return what a decision to commit passes on: the signatures of those who voted for it, by name."""
    if "commit" not in verdict:
        return {}
    signed = {
        name: vote.get("signature")
        for name, vote in zip(view.members, votes, strict=True)
        if _vote(vote, view, name) == verdict["commit"]
    }
    fit = {n: text for n, text in signed.items() if isinstance(text, str) and len(text) <= _MAX_SIGNATURE}
    return {"signatures": fit} if fit else {}


def _vote(value: Any, view: QuorumView, name: str) -> str | None:
    """Return the digest that a member has voted for in a view, None if it has not."""
    if not isinstance(value, dict):
        return None
    voter = value.get("term"), value.get("incarnation")
    return str(value.get("digest")) if voter == (view.term, view.entries[name].incarnation) else None
