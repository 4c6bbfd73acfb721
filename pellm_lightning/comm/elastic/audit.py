"""Audit: members compare what each has received from each, once their results have differed.

Each piece of a sum is computed by one member, which sends it to all. One that sends different numbers to some
makes their results differ, and its victims look guilty: which of two results is right cannot be seen
from the results. So from then on the members publish digests of what they have received, after each exchange.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.comm.elastic.heartbeat import Heartbeat
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.quorum_view import QuorumView
from pellm_lightning.comm.elastic.reachability import ReachabilityTracker
from pellm_lightning.comm.elastic.register import Register, RestartedError, UnreachableError, Write
from pellm_lightning.comm.errors import FederationError, PartyLostError

log = logging.getLogger(__name__)

# A member may read what was said of one exchange when another has said what it received in the next.
_KEPT = 2


class Audit:
    """Comparison of what the members of an attempt have received, after each of its exchanges.

    It costs two trips to the rendezvous and a SHA-256 of what was received, so it begins only when results
    have differed, and stays for the run.

    Args:
        register: Where the members publish.
        reachability: Where it is recorded who contradicts whom.
        me: This party.
        check: Called while this party waits; what it raises ends the waiting.

    Example::

        audit.begin(view)
        audit.compare({"a": part_of_a, "b": part_of_b})
    """

    def __init__(
        self,
        register: Register,
        reachability: ReachabilityTracker,
        me: LocalParty,
        check: Callable[[], None],
    ) -> None:
        self._register, self._reachability, self._me, self._check = register, reachability, me, check
        self._view: QuorumView | None = None
        self._said: list[list[Any]] = []
        self._number = 0
        self.is_active = False
        """Whether the members compare, from the next attempt on."""

    def share(self, peers: Heartbeat) -> None:
        """Tell the others whom this party excludes; exclude whom a majority of the roster excludes.

        A process that was started again learns so of what has happened before.

        Raises:
            FederationError: If it is this party.
        """
        said = [names for names in peers.said("excluded") if isinstance(names, list)]
        counts = Counter(str(name) for names in said for name in set(map(str, names)))
        for name in self._me.roster:
            if 2 * counts[name] > len(self._me.roster):
                self._reachability.exclude(name, "a majority of the parties excludes it")
        excluded = self._reachability.excluded
        if excluded:
            peers.set_status(excluded=sorted(excluded))
        if self._me.name in excluded:
            raise FederationError(
                f"Party {self._me.name} is excluded for the rest of this run: {excluded[self._me.name]}. Look"
                " at the logs of the others. It can take part again once these, too, were restarted."
            )

    def begin(self, view: QuorumView) -> None:
        """Begin an attempt; all compare if one of them has seen results differ."""
        self.is_active |= any(entry.audits for entry in view.entries.values())
        self._view, self._said, self._number = view, [], 0

    def judge(self, dissenters: Callable[[], list[str] | None], proof: Callable[[], str]) -> None:
        """Act on results that differ: have the members compare, or else exclude who is wrong.

        Args:
            dissenters: Returns who differs from the majority; None without one.
            proof: Keeps what the members have signed; returns a sentence that says where, "" if nowhere.

        Raises:
            PartyLostError: If the rendezvous goes away meanwhile.
            FederationError: If it is this party, or cannot be determined.
        """
        with _reached():
            kept = proof()
        if not self.is_active:
            self.is_active = True
            log.warning(
                "[party %s] The parties computed different results. The round is repeated, and from now on"
                " they compare what they receive, to find out which of them is wrong.%s",
                self._me.name,
                kept,
            )
            return
        with _reached():
            wrong = dissenters()
        if wrong is None or self._me.name in wrong:
            who = "The parties" if wrong is None else f"Party {self._me.name} and the majority of the parties"
            raise FederationError(
                f"{who} computed different results from the same values. No parameter was changed. Install"
                " the same versions of torch and pellm-lightning at all, look for a fault of memory or"
                " processor, and start again: a party that was excluded takes part once the others, too, were"
                f" restarted.{kept}"
            )
        proof_is = f".{kept.rstrip('.')}" if kept else ""
        for name in wrong:
            self._reachability.exclude(
                name, f"it computed another result than the majority from the same values{proof_is}"
            )

    def compare_sum(self, tensor: Tensor) -> None:
        """Compare a sum, of which member j of N has sent the j-th piece. Raises as ``compare``."""
        if self.is_active and self._view is not None:
            flat, members = tensor.detach().reshape(-1), self._view.members
            bounds = [flat.numel() * j // len(members) for j in range(len(members) + 1)]
            self.compare({name: flat[a:b] for name, (a, b) in zip(members, pairwise(bounds), strict=True)})

    def compare(self, received: Mapping[str, Tensor]) -> None:
        """Compare what each of some members has sent to all.

        Args:
            received: By the member that has sent it; a member "receives" its own as it has sent it.

        Raises:
            PartyLostError: If two members contradict each other, or one says nothing.
        """
        view = self._view
        if not self.is_active or view is None:
            return
        self._number += 1
        mine = {name: _digest(part) for name, part in received.items()}
        self._said = [*self._said, [self._number, mine]][-_KEPT:]
        with _reached():
            heard = self._heard(view)
        contradictions = contradicted(heard)
        if contradictions:
            raise self._blame(contradictions, len(heard))

    def _heard(self, view: QuorumView) -> dict[str, Mapping[str, Any]]:
        """Publish what this party has received, and return what all say of the same exchange."""
        said = {"term": view.term, "incarnation": self._me.incarnation, "received": self._said}
        keys = [f"heard/@{name}" for name in view.members]
        values = self._register.transact([Write(f"heard/@{self._me.name}", said)], keys)[1]
        deadline = time.monotonic() + self._me.membership.exchange_timeout_s
        while True:
            heard = {n: self._read(v, view, n) for n, v in zip(view.members, values, strict=True)}
            missing = [name for name, of_member in heard.items() if of_member is None]
            if not missing:
                return {name: of_member or {} for name, of_member in heard.items()}
            self._check()
            if time.monotonic() > deadline:
                raise PartyLostError(
                    f"Party {', '.join(missing)} does not say what it has received.", parties=missing
                )
            values = self._register.wait(self._me.membership.patience_s, *keys)

    def _read(self, value: Any, view: QuorumView, name: str) -> Mapping[str, Any] | None:
        """Return what a member says of this exchange, None if it has not, or is not to be understood."""
        if not isinstance(value, dict) or not isinstance(value.get("received"), list):
            return None
        if (value.get("term"), value.get("incarnation")) != (view.term, view.entries[name].incarnation):
            return None
        for said in value["received"]:
            if isinstance(said, list) and len(said) == 2 and said[0] == self._number:
                return said[1] if isinstance(said[1], dict) else None
        return None

    def _blame(self, contradictions: Mapping[str, list[str]], members: int) -> PartyLostError:
        """Record who contradicts whom; exclude who is contradicted by most of the others."""
        for sender, by in contradictions.items():
            for name in by:
                self._reachability.note({"by": name, "blamed": [sender]})
            if len(by) > 1 and 2 * len(by) > members - 1:
                self._reachability.exclude(sender, f"it sent other numbers to party {', '.join(by)}")
        pairs = [f"party {', '.join(by)} got others than party {s} says" for s, by in contradictions.items()]
        return PartyLostError(f"The members have not received the same numbers: {'; '.join(pairs)}.")


def contradicted(heard: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return by sender which receivers contradict what it says that it has sent to all.

    Args:
        heard: By member, the digest of what it has received from each sender, and sent itself.

    Example:
        >>> contradicted({"a": {"a": "1", "b": "2"}, "b": {"a": "1", "b": "2"}, "c": {"a": "3", "b": "2"}})
        {'a': ['c']}
    """
    found = {
        sender: [name for name, said in heard.items() if said.get(sender) != heard[sender].get(sender)]
        for sender in heard
    }
    return {sender: by for sender, by in found.items() if by}


@contextmanager
def _reached() -> Iterator[None]:
    """Let the attempt be repeated if the rendezvous goes away."""
    try:
        yield
    except (RestartedError, UnreachableError) as error:
        raise PartyLostError("The rendezvous went away while the members compared.") from error


def _digest(part: Tensor) -> str:
    data: Any = part.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()
