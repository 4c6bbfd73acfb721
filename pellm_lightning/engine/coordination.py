"""Coordination of a round: headers and metrics as metadata of a quorum, and the commit of the result."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from pellm_lightning.comm import (
    Communicator,
    FaultyPartyError,
    FederationError,
    Intent,
    MismatchError,
    PartyLostError,
    QuorumResult,
    Version,
)
from pellm_lightning.comm.elastic.quorum_view import is_count
from pellm_lightning.engine import compatibility, metrics
from pellm_lightning.engine.compatibility import PartySpec
from pellm_lightning.engine.metrics import MAX_WEIGHT
from pellm_lightning.exchange import Exchange
from pellm_lightning.tensors import snapshot
from pellm_lightning.tensors.snapshot import SnapshotDir

log = logging.getLogger(__name__)

_SAME_VERSION = "Install the same version of pellm-lightning at all parties."


class Purpose(IntEnum):
    """What a party joins a quorum for."""

    ROUND = 1
    METRICS = 2
    DONE = 3
    JOIN = 4


@dataclass(frozen=True)
class Header:
    """Metadata with which a party joins a quorum; the same few fields whatever follows.

    Example:
        >>> Header.from_metadata("b", Header(Purpose.ROUND, 3, 2.5).to_metadata()).weight
        2.5
    """

    purpose: Purpose
    round: int
    weight: float
    """How much the party counts; where the exchange hides that, 1 if it counts at all."""
    fine: bool = True
    """Whether all values of the party are finite, as far as it knows yet."""
    tag: str = ""
    """Of the party's present values: another one after each round, and in each process."""
    exposed: tuple[str, ...] = ()
    """Whose values were in a sum with its present ones that it has revealed, in an attempt that failed then;
    as ``values_of`` says."""
    releases: int = 0
    """Noisy releases of the party in attempts at this round that failed."""
    loss: float = math.nan
    """Training loss of the party since the last round; NaN if it is not to be shown, or unknown."""
    distance: float = math.nan
    """2-norm of the party's parameters minus the result, in the round before; NaN as above."""
    steps_left: float = math.nan
    """Optimizer steps that the party still has to make; NaN as above."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Which certificates the party has, and its signatures of those that lack some; as it was sent."""
    behind: bool = False
    """Whether the party lacks the newest global parameters, and so needs them and counts 0."""

    def values_of(self, name: str) -> str:
        """Return the name of the present values of the party, which is called ``name``."""
        return f"{name}/{self.tag}"

    def to_metadata(self) -> dict[str, Any]:
        """Return what ``from_metadata`` reads, but ``behind``."""
        said = {
            "purpose": int(self.purpose),
            "round": self.round,
            "weight": self.weight,
            "fine": self.fine,
            "tag": self.tag,
            "exposed": list(self.exposed),
            "releases": self.releases,
        } | ({"evidence": dict(self.evidence)} if self.evidence else {})
        figures = {"loss": self.loss, "distance": self.distance, "steps_left": self.steps_left}
        # JSON has no NaN.
        return said | {name: value if math.isfinite(value) else None for name, value in figures.items()}

    @classmethod
    def from_metadata(
        cls, name: str, metadata: Mapping[str, Any], *, behind: bool = False, newest: int | None = None
    ) -> "Header":
        """Return the header of party ``name``, which may have sent anything.

        Args:
            name: The party.
            metadata: What it has sent.
            behind: Whether it lacks the newest global parameters.
            newest: The round of these, None if there are none.

        Raises:
            FaultyPartyError: If it is malformed, or tells of another round than its global parameters.
        """
        purpose, round, weight = metadata.get("purpose"), metadata.get("round"), _number(metadata, "weight")
        tag, exposed, releases = (
            metadata.get(field, default) for field, default in (("tag", ""), ("exposed", []), ("releases", 0))
        )
        loss, distance, left = (
            _number(metadata, field, missing=math.nan) for field in ("loss", "distance", "steps_left")
        )
        if (
            purpose not in list(Purpose)
            or not is_count(round)
            or weight is None
            or not 0 <= weight <= MAX_WEIGHT
            or not isinstance(exposed, list)
            or not isinstance(tag, str)
            or not is_count(releases)
            or loss is None
            or distance is None
            or left is None
        ):
            raise FaultyPartyError(
                f"Party {name} joined with {dict(metadata)!r:.200}, which is no purpose, round and weight of"
                f" 0 to {MAX_WEIGHT:g}. {_SAME_VERSION}",
                parties=(name,),
            )
        if not behind and newest not in (None, round):
            raise FaultyPartyError(
                f"Party {name} joined for round {round} with the global parameters of round {newest}."
                f" {_SAME_VERSION}",
                parties=(name,),
            )
        fine = metadata.get("fine", True) is True
        names = tuple(map(str, exposed))
        said = metadata.get("evidence")
        evidence = said if isinstance(said, dict) else {}
        return cls(
            Purpose(purpose),
            round,
            weight,
            fine,
            tag,
            names,
            releases,
            loss,
            distance,
            left,
            evidence,
            behind,
        )


@dataclass(frozen=True)
class Committed:
    """Outcome of a commit."""

    digest: str
    """Of the global state for which the members have voted."""
    signatures: Mapping[str, Any]
    """The members' of the round by name, as peers have sent them, as far as they are known already."""


class Coordinator:
    """Coordinates an aggregator with those of the other parties: who takes part, and whose result stands.

    Args:
        communicator: The joined parties.
        exchange: How metrics are summed.
        state_dir: Where this party keeps the global state through its own death, where parties may be lost
            and come back; None keeps it in memory.
    """

    def __init__(
        self, communicator: Communicator, exchange: Exchange, state_dir: SnapshotDir | None = None
    ) -> None:
        self._communicator = communicator
        self._exchange = exchange
        self._state_dir = state_dir if communicator.may_lose_parties else None
        self.newest_state = ""
        """Digest of the global state from which the members that meet continue; "" if unknown."""
        self.attempt = 0
        """Number of the attempt for which they meet."""

    def handshake(self, mine: PartySpec) -> None:
        """Compare what all parties must share.

        Raises:
            MismatchError: If parties differ; no parameter was touched.
        """
        communicator = self._communicator
        mine = mine | {"config": mine["config"] | communicator.settings}
        shared = json.dumps(compatibility.common(mine), sort_keys=True)
        if self._state_dir is not None:
            self._state_dir.claim()
            communicator.skip_attempts(self._state_dir.reserved())
        digest = hashlib.sha256(shared.encode()).hexdigest()
        shown = mine
        if communicator.may_lose_parties:  # the rendezvous sees it, and need not know the paths of a host
            shown = mine | {"files": sorted(_hidden(path) for path in mine["files"])}
        specs = communicator.handshake(shown, digest, _difference)
        difference = self._first_difference(shown, specs, mine["files"])
        if difference:
            raise MismatchError(difference)

    def _first_difference(
        self, shown: PartySpec, specs: Mapping[str, PartySpec], files: Sequence[str]
    ) -> str | None:
        """Return what this party should know that differs from the others, None if nothing does.

        Where parties come and go, those that agree take part, and the digest tells who does. A path that two
        of the others share is theirs to find out.
        """
        communicator = self._communicator
        if not communicator.may_lose_parties:
            with _readable(*specs):
                return compatibility.first_difference([*specs.values()], [*specs])
        me, difference = communicator.name, None
        for name, spec in specs.items():
            try:
                with _readable(name):
                    difference = name != me and compatibility.shared_file([spec, shown], [name, me])
            except FaultyPartyError as error:  # this party is not to end by that
                log.warning("[party %s] %s", me, error)
            if difference:
                for path in files:
                    difference = difference.replace(_hidden(path), path)
                return difference
        return None

    def party_specs(self) -> list[PartySpec]:
        """Return the specs of the members, in their order."""
        specs = [dict(spec) for spec in self._communicator.party_specs()]
        for name, spec in zip(self._communicator.names, specs, strict=True):
            with _readable(name):
                spec["lora"] = {
                    str(pair): [int(rank), float(scaling), int(experts)]
                    for pair, (rank, scaling, experts) in spec["lora"].items()
                }
                mine = specs[self._communicator.party]
                if compatibility.experts(spec) != compatibility.experts(mine):
                    raise ValueError("other pairs")
        return specs

    def meet(self, mine: Header, version: Version | None, state: str = "") -> list[Header]:
        """Join the next quorum, and return the members' headers; sum the metrics of others first.

        Parties are uneven: one validates while another is already in its next round.

        Args:
            mine: What this party says of itself.
            version: Of the global parameters that it has.
            state: Digest of the global state of that version.
        """
        intent: Intent = "rest" if mine.purpose is Purpose.DONE else "exchange"
        metadata = mine.to_metadata()
        while True:
            self._communicator.enter(f"meeting for round {mine.round}")
            joined = self._communicator.join_quorum(intent, version, metadata, state)
            headers = self._headers(joined, metadata)
            if headers is None:
                continue
            if self._state_dir is not None:
                self._state_dir.reserve(joined.attempt)  # before any member can make its result durable
            if all(header.purpose is not Purpose.METRICS for header in headers):
                self._communicator.enter(f"in round {mine.round}")
                self.newest_state, self.attempt = joined.state, joined.attempt
                return headers
            if joined.exchanges:
                self._sum_metrics(joined, {})

    def mean(
        self, values: Mapping[str, tuple[float, float]], round: int, version: Version | None
    ) -> dict[str, float]:
        """Return the weighted mean over the parties of each named (value, weight), equal on all parties."""
        header = {"purpose": int(Purpose.METRICS), "round": round, "weight": 0.0}
        self._communicator.enter("averaging metrics")
        if self._exchange.is_secure:
            return self._secure_mean(values, header, version)
        metadata = header | {"metrics": dict(values)}
        joined = self._communicator.join_quorum("metadata", version, metadata)
        while self._headers(joined, metadata) is None:
            joined = self._communicator.join_quorum("metadata", version, metadata)
        of_parties = [
            metrics.read_metrics(name, said.get("metrics", {})) for name, said in joined.metadata.items()
        ]
        return metrics.mean_of(of_parties, self._communicator)

    def commit(
        self, round: int, state: Mapping[str, Any], signature: str = "", statement: str = ""
    ) -> Committed:
        """Make the result of this attempt durable, and agree with the others that it stands.

        Args:
            round: Index of the next round.
            state: The global state.
            signature: This party's of the round, for the others; empty for none.
            statement: What it has signed.

        Raises:
            PartyLostError: If it does not; nothing may be kept of it.
        """
        if self._state_dir is not None:
            self._state_dir.keep(round, state)
        digest = snapshot.digest(state)
        return Committed(digest, self._communicator.commit(digest, signature, statement))

    def restored(self) -> dict[str, Any] | None:
        """Return the state that this party made durable before it was restarted, None if there is none."""
        return None if self._state_dir is None else self._state_dir.newest()

    def finished(self, version: Version | None) -> None:
        """Delete what was kept for coming back, since the federation has ended."""
        if version is not None:
            self._communicator.mark_ended(version)
        if self._state_dir is not None:
            self._state_dir.clear()

    def _headers(self, joined: QuorumResult, metadata: dict[str, Any]) -> list[Header] | None:
        """Return the headers of a quorum; None if one cannot be, so that the others join again without it.

        Each member reads all that any of them reads, so that all leave out the same.
        """
        self._check_unchanged(joined, metadata)
        try:
            return [_header(name, said, joined) for name, said in joined.metadata.items()]
        except FaultyPartyError as error:
            if not self._communicator.abort_attempt(error):
                raise
            return None

    def _check_unchanged(self, joined: QuorumResult, metadata: dict[str, Any]) -> None:
        """Refuse a quorum in which a masked exchange would depend on what somebody has changed on the way."""
        if self._exchange.is_secure and joined.metadata[self._communicator.name] != metadata:
            raise _changed(self._communicator.name)

    def _secure_mean(
        self, values: Mapping[str, tuple[float, float]], header: dict[str, Any], version: Version | None
    ) -> dict[str, float]:
        """Sum metrics as a round sums parameters: no party's own values may be revealed."""
        values = dict(values)
        while True:
            metadata = header | {"names": metrics.names_of(values)}
            joined = self._communicator.join_quorum("exchange", version, metadata)
            headers = self._headers(joined, metadata)
            mean = None if headers is None else self._sum_metrics(joined, values)
            if mean is not None:
                return mean

    def _sum_metrics(
        self, joined: QuorumResult, values: dict[str, tuple[float, float]]
    ) -> dict[str, float] | None:
        """Sum the metrics that the members have; None if the attempt failed.

        What a sum may have shown already is not summed again with others: their difference would show more.
        """
        names = [metrics.read_names(name, said.get("names", {})) for name, said in joined.metadata.items()]
        revealed = False

        def revealing() -> None:
            nonlocal revealed
            revealed = True

        try:
            mean = metrics.secure_mean(values, names, self._communicator, self._exchange, revealing)
            self._communicator.commit(snapshot.digest({"metrics": sorted(mean.items())}))
        except PartyLostError as error:
            if not self._communicator.abort_attempt(error):
                raise
            if revealed:
                values.clear()
            return None
        return mean


def _header(name: str, said: Mapping[str, Any], joined: QuorumResult) -> Header:
    """Return the header of a member, if its metrics can also be read."""
    metrics.read_metrics(name, said.get("metrics", {}))
    metrics.read_names(name, said.get("names", {}))
    return Header.from_metadata(name, said, behind=name in joined.behind, newest=joined.round)


def _hidden(path: str) -> str:
    """Return what stands for a path, so that only who writes there recognises it."""
    return hashlib.sha256(path.encode()).hexdigest()[:32]


@contextmanager
def _readable(*names: str) -> Iterator[None]:
    """Name the party whose spec cannot be read, or those of which it is one."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FaultyPartyError(
            f"The spec of party {', '.join(names)} cannot be read ({error}). {_SAME_VERSION}", parties=names
        ) from error


def _difference(party_specs: Sequence[PartySpec], names: Sequence[str]) -> str | None:
    try:
        found = compatibility.first_difference(party_specs, names)
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"Party {names[0]} shows what party {names[1]} cannot read. Install the same version at both."
    unlike = [name for name, shown in zip(names, party_specs, strict=True) if shown["base"] is None]
    if found is None and len(unlike) == 1:
        return f"Party {unlike[0]} has check_frozen=False, the other has not. Give all parties the same."
    return found


def _number(metadata: Mapping[str, Any], field: str, missing: float | None = None) -> float | None:
    """Return a number that a peer has sent, ``missing`` if it sent none, or None if it is no such thing."""
    said = metadata.get(field)
    if said is None:
        return missing
    try:
        return float(said) if isinstance(said, int | float) else None
    except OverflowError:  # JSON knows whole numbers of any length
        return None


def _changed(name: str) -> FederationError:
    return FederationError(
        f"What party {name} sent as it joined the others came back changed. A masked exchange depends on what"
        " all send, so nothing was summed. The parties' messages are changed on the way: connect them by TLS,"
        " or by a network that you trust."
    )
