"""Interface to the parties of a federation: quorum, metadata and commit, in addition to collectives."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from pellm_lightning.comm.collectives import Collectives

Intent = Literal["exchange", "metadata", "rest"]
"""What a party joins a quorum for: to exchange tensors, only metadata, or nothing any more."""
Metadata: TypeAlias = dict[str, Any]
"""What a party tells all members of a quorum, as JSON."""
PartySpec: TypeAlias = dict[str, Any]
"""What a party shows of itself before the first quorum: parameters, base model, configuration."""
Difference: TypeAlias = Callable[[Sequence[PartySpec], Sequence[str]], str | None]
"""Describes the first difference between party specs, given their parties' names."""


class Version(NamedTuple):
    """Version of the global parameters; of one run the greater is the newer.

    Example:
        >>> Version("run", round=3, attempt=5) > Version("run", round=3, attempt=4)
        True
    """

    run_id: str
    """Drawn when the federation first began; two runs never share one."""
    round: int
    """Rounds that are in them."""
    attempt: int
    """Number of the attempt that made them, greater than that of every attempt before."""


@dataclass(frozen=True)
class QuorumResult:
    """Members of a quorum, and the metadata with which each has joined it.

    Example:
        >>> QuorumResult({"a": {"round": 3}, "b": {"round": 3}}).members
        ['a', 'b']
    """

    metadata: dict[str, Metadata]
    """By member, in the order of the roster."""
    exchanges: bool = True
    """Whether tensors will be exchanged."""
    behind: frozenset[str] = frozenset()
    """Members that lack the newest version of the global parameters."""
    attempt: int = 0
    """Number of this attempt at a round."""
    state: str = ""
    """Digest of the global state of that version; "" where parties do not come and go."""
    round: int | None = None
    """Rounds in that version; None without one."""

    @property
    def members(self) -> list[str]:
        """Names of the members, in the order of the roster."""
        return list(self.metadata)


class Communicator(Collectives):
    """All that one party shares with the others of its federation, however they are launched and connected.

    In each round every party calls ``join_quorum``, then the same collectives, then ``commit``; if one of
    these fails, ``abort_attempt`` tells whether to join again. A new kind of federation is a subclass.

    Example:
        >>> from torch.distributed import HashStore
        >>> from pellm_lightning import Federation
        >>> communicator = Federation(HashStore(), party=0, num_parties=1)
        >>> communicator.gather_json("device", "cpu"), communicator.may_lose_parties
        (['cpu'], False)
        >>> communicator.close()
    """

    roster: Sequence[str]
    """Names of all parties that may ever take part, present or not."""
    timeout_s: float
    """Seconds a party may be late."""
    quorum: int
    """Number of parties that must join a quorum."""
    may_lose_parties: bool = False
    """Whether parties may be lost and come back; then an attempt at a round may fail and is made again."""
    interrupt: Callable[[], None]
    """Called repeatedly while this party polls for others; what it raises ends the waiting."""
    keep_votes: Callable[[Mapping[str, Sequence[Mapping[str, Any]]]], str] = staticmethod(lambda votes: "")
    """Called with the votes of members whose results differ; returns a sentence that names who, and where."""

    @property
    def settings(self) -> dict[str, str | int | float | None]:
        """Settings of the federation that must be the same at all parties, in addition to the engine's."""
        return {}

    @property
    def relayed(self) -> list[str]:
        """Members with which this party is connected by a relay; none where all are reached directly."""
        return []

    @abstractmethod
    def enter(self, phase: str) -> None:
        """Publish what this party does from now on, so that errors at any party can tell where each was."""

    def phases(self) -> dict[str, str]:
        """Return what each party does, by name, as far as it is known here; any thread may ask."""
        return {}

    @abstractmethod
    def gather_json(self, key: str, value: object) -> list[Any]:
        """Return the value of every party, in order; every party must call it with the same key.

        For small things that must be compared before any tensor moves; no pickle is involved.

        Raises:
            PartyLostError: If a party does not answer within ``timeout_s``.
        """

    @abstractmethod
    def handshake(self, spec: PartySpec, digest: str, difference: Difference) -> dict[str, PartySpec]:
        """Publish this party's spec before it joins its first quorum; return those known, by name, in order.

        Args:
            spec: Plain containers.
            digest: Of that part of it which must be the same at all parties.
            difference: Used where digests differ, for the error.
        """

    @abstractmethod
    def party_specs(self) -> list[PartySpec]:
        """Return the specs of the members of the present quorum, in their order.

        Raises:
            PartyLostError: If a member has been replaced by another process meanwhile.
        """

    @abstractmethod
    def join_quorum(
        self, intent: Intent, version: Version | None, metadata: Metadata, state: str = ""
    ) -> QuorumResult:
        """Join the next quorum; when it returns, its members are connected if they will exchange tensors.

        Args:
            intent: What this party joins for.
            version: Version of the global parameters that this party has; None before the first.
            metadata: What this party tells the other members; small.
            state: Digest of the global state of that version.

        Raises:
            MismatchError: If this party differs from the others in what all must share.
            FederationError: If too few parties join for too long, or one was lost and that shall stop all.
        """

    # ---- memory that the parties share, where they are of one host

    def share_memory(self, size_bytes: int, *, willing: bool = True) -> Tensor | None:
        """Return zeroed memory that all parties have mapped, (size_bytes,) uint8; None if one cannot.

        Every party must call it, and all get memory or none does.

        Args:
            size_bytes: Size; the same at all parties.
            willing: Whether this party wants it.
        """
        return None

    def barrier(self, written: Sequence[Tensor] = ()) -> None:
        """Wait until all parties are here: what they have written into shared memory can be read then.

        Other collectives, and ``join_quorum``, are such a barrier as well.

        Args:
            written: What this party has written there for the others, to be counted as sent.

        Raises:
            PartyLostError: If a party is lost or too late.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave together, when no party needs the others any more. Every party must call it."""

    @abstractmethod
    def abort(self, reason: str | None = None) -> None:
        """Leave at once: what others wait for fails in seconds, not after the timeout, and gives the reason.

        Args:
            reason: What happened here; None if the others know already. After ``close()`` nothing happens.
        """

    # ---- parties that may be lost; as follows they may not, and a failed attempt ends the federation

    def version(self, round: int) -> Version | None:
        """Return the version that the present attempt makes; None where no attempt is made twice."""
        return None

    def commit(self, digest: str, signature: str = "", statement: str = "") -> Mapping[str, Any]:
        """Vote for the result that this party has made durable; return once it is committed.

        Args:
            digest: Of the result, which must be the same at all members.
            signature: This party's of the round, for the others; empty for none.
            statement: What it has signed, for the others if results differ.

        Returns:
            The members' signatures by name, as peers have sent them. Empty if the decision is not known.

        Raises:
            PartyLostError: If the attempt was aborted; nothing may be kept of it.
            FederationError: If the members' results differ.
        """
        return {}

    def abort_attempt(self, error: Exception) -> bool:
        """Abort this attempt at all members; return whether another one can be made.

        Without the parties that a ``FaultyPartyError`` names, if they are not needed for a quorum.
        """
        return False

    def skip_attempts(self, attempt: int) -> None:
        """Number attempts above those in which this party may have taken part before it was restarted."""

    def mark_ended(self, version: Version) -> None:
        """Record that the federation is complete, for parties that come later."""


def will_exchange(intents: Collection[Intent]) -> bool:
    """Tell whether members exchange tensors: not if one wants metadata first, or all want nothing."""
    return "metadata" not in intents and "exchange" in intents
