"""From the votes to the decision, which stands once it is written, and on to the next epoch."""

from collections.abc import Callable, Mapping
from typing import Any

from pellm_lightning.comm.elastic.peers import Peers
from pellm_lightning.comm.elastic.quorum_view import Plan
from pellm_lightning.comm.elastic.register import KEPT_EPOCHS, Register, RestartedError
from pellm_lightning.comm.polling import polls

Decision = dict[str, Any]


class Decisions:
    """Makes, with the others, the one decision on each plan.

    Args:
        register: Where votes and decisions are written.
        peers: Who lives.
        name: This party.
        incarnation: This process.
    """

    def __init__(self, register: Register, peers: Peers, name: str, incarnation: str) -> None:
        self._register = register
        self._peers = peers
        self._name = name
        self._incarnation = incarnation

    def vote(self, plan: Plan, digest: str) -> None:
        """Vote for a result."""
        vote = {"epoch": plan.epoch, "incarnation": self._incarnation, "digest": digest}
        self._register.write(f"vote/@{self._name}", vote)

    def come_to(self, plan: Plan, timeout_s: float) -> Decision:
        """Return the decision on a plan, which this party helps to make.

        Raises:
            RestartedError: If it cannot be known any more.
        """
        key = _key(plan)
        votes = [f"vote/@{name}" for name in plan.members]
        for _ in polls(timeout_s):
            now, decision, *cast = self._register.read("epoch", key, *votes)
            if isinstance(decision, dict):
                return decision
            if not isinstance(now, int) or now > plan.epoch + KEPT_EPOCHS:
                raise RestartedError  # this party has slept through the decision: it is in doubt
            digests = {name: _vote(vote, plan, name) for name, vote in zip(plan.members, cast, strict=True)}
            verdict = self._verdict(plan, digests)
            if verdict:
                self._register.claim(key, verdict)
        late = [name for name, digest in digests.items() if digest is None]
        return self.abort(plan, f"party {', '.join(late)} did not vote in time", late, self._name)

    def abort(
        self, plan: Plan, reason: str, blamed: list[str] | None = None, by: str | None = None
    ) -> Decision:
        """Decide to give up an attempt, unless it is decided already; return what stands.

        Args:
            plan: The attempt's.
            reason: In words, for all.
            blamed: Parties that could not be reached although they live.
            by: The party that could not reach them.
        """
        verdict = {"abort": reason, "blamed": blamed or [], "by": by}
        decision = self._register.claim(_key(plan), verdict)
        return decision if isinstance(decision, dict) else verdict

    def known(self, plan: Plan) -> Decision | None:
        """Return the decision if there is one."""
        (decision,) = self._register.read(_key(plan))
        return decision if isinstance(decision, dict) else None

    def await_end(self, plan: Plan, look_s: float, interrupt: Callable[[], None]) -> None:
        """Wait until an epoch is over that goes on without this party; end it if its members are gone."""
        while plan.exchanges:
            for _ in polls(look_s):
                interrupt()
                now, decision = self._register.read("epoch", _key(plan))
                if decision is not None or now != plan.epoch:
                    self.end(plan)
                    return
            dead = self._peers.dead(plan)
            if dead:
                self.abort(plan, self._lost(dead[0]))
        self.end(plan)

    def end(self, plan: Plan) -> None:
        """Turn to the next epoch, unless another party has done so."""
        self._register.swap("epoch", plan.epoch, plan.epoch + 1)
        if self._name in plan.rolls and plan.members[plan.epoch % len(plan.members)] == self._name:
            # Twice, by two members: the first may have died instead.
            for old in (plan.epoch - KEPT_EPOCHS, plan.epoch - 2 * KEPT_EPOCHS - 1):
                self._register.delete(f"plan/{old}", f"decision/{old}")

    def _verdict(self, plan: Plan, digests: Mapping[str, str | None]) -> Decision | None:
        if None not in digests.values():
            if len(set(digests.values())) == 1:
                return {"commit": next(iter(digests.values()))}
            return {"diverged": ", ".join(f"party {name}: {digest}" for name, digest in digests.items())}
        dead = [name for name in self._peers.dead(plan) if digests[name] is None]
        return {"abort": self._lost(dead[0]), "blamed": []} if dead else None

    def _lost(self, name: str) -> str:
        return f"party {name} was lost: {self._peers.fate(name)}"


def _key(plan: Plan) -> str:
    return f"decision/{plan.epoch}"


def _vote(value: Any, plan: Plan, name: str) -> str | None:
    """Return the digest that a member has voted for in a plan, None if it has not."""
    if not isinstance(value, dict):
        return None
    cast_in = value.get("epoch"), value.get("incarnation")
    return str(value.get("digest")) if cast_in == (plan.epoch, plan.rolls[name].incarnation) else None
