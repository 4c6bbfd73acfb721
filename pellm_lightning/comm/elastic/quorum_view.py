"""Quorum members and the view on which they agree: who continues together. Pure, but for JSON."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, Literal, TypeGuard

from pellm_lightning.comm.communicator import Intent, Metadata, QuorumResult, Version, will_exchange
from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.rendezvous.frames import MAX_VALUE_BYTES
from pellm_lightning.comm.sockets import split_address

_VIEW_FIELDS = {"attempt", "group", "run_id", "members", "newest", "state"}
_INTENTS = ("exchange", "metadata", "rest")
# Longer than any name, address or digest.
_MAX_TEXT = 256
# Of a revocation list with about a thousand entries.
MAX_LIST = 1 << 16
# Numbers of attempts differ by less between parties, whatever has happened to them.
_MAX_ATTEMPTS_APART = 10**9


@dataclass(frozen=True)
class QuorumMember:
    """Message with which a party joins the quorum of a term.

    Example:
        >>> member = QuorumMember(1, "now", "host:1", "digest", None, 0, "", "exchange", "", False, {})
        >>> QuorumMember.from_json(member.to_json()) == member
        True
    """

    term: int
    """The term that it joins."""
    incarnation: str
    """Which of the processes that ran under this name it is (SWIM)."""
    address: str
    """Where it can be reached."""
    digest: str
    """Of what all parties must share: names, shapes, dtypes, configuration."""
    version: Version | None
    """Its global parameters, None if it has just begun."""
    attempt: int
    """The greatest attempt it knows of."""
    run_id: str
    """Of that attempt: a first attempt that was aborted is made again under the same name."""
    intent: Intent
    group: str
    """Name of the connections it has from the last round, empty if none."""
    member: bool
    """Whether this process has been part of a quorum before."""
    metadata: Metadata
    state: str = ""
    """Digest of the global state of this version, for which the parties have voted."""
    audits: bool = False
    """Whether it has seen results differ, so that all must compare what they receive."""
    serial: str = ""
    """Serial number of its certificate, in hexadecimal digits; empty without TLS."""
    revoked: str = ""
    """The newest revocation list that it knows, PEM; empty for none."""
    missing_parts: list[str] = field(default_factory=list)
    """Members whose parts it has long missed when its last attempt failed."""
    missing_sums: list[str] = field(default_factory=list)
    """Members whose sums it has missed, and no part."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        return vars(self) | {"version": list(self.version) if self.version else None}

    @classmethod
    def from_json(cls, value: Any) -> "QuorumMember | None":
        """Return what a peer wrote, or None if it is malformed."""
        if not isinstance(value, dict) or value.keys() != cls.__annotations__.keys():
            return None
        texts = [
            value[key] for key in ("incarnation", "address", "digest", "run_id", "group", "state", "serial")
        ]
        numbers = [value["term"], value["attempt"]]
        version = value["version"]
        if (
            not all(_is_text(text) for text in texts)
            or not _is_address(value["address"])
            or not all(is_count(number) for number in numbers)
            or not (version is None or _is_version(version))
            or value["intent"] not in _INTENTS
            or not isinstance(value["member"], bool)
            or not isinstance(value["audits"], bool)
            or not isinstance(value["metadata"], dict)
            or not _is_text(value["revoked"], MAX_LIST)
            or not all(_are_texts(value[key]) for key in ("missing_parts", "missing_sums"))
        ):
            return None
        return cls(**value | {"version": Version(*version) if version else None})


@dataclass(frozen=True)
class QuorumView:
    """The members that continue together in a term; written once, so that all read the same.

    Example:
        >>> member = QuorumMember(1, "now", "host:1", "digest", None, 0, "", "exchange", "", False, {})
        >>> view = QuorumView.of(1, "unused name", {"a": member})
        >>> view.members, view.attempt, view.exchanges
        (['a'], 1, True)
    """

    term: int
    attempt: int
    """Number of the attempt, greater than any that a member knew of."""
    group: str
    """Name of their connections; those of the last round, if all members still have them."""
    run_id: str
    """Of the global parameters that come of it."""
    entries: dict[str, QuorumMember]
    """What each member joined with, in the order of the roster."""
    newest: Version | None = None
    """The version that all continue from; None at the beginning."""
    state: str = ""
    """Digest of its global state."""

    @property
    def members(self) -> list[str]:
        """Names of the members, in the order of the roster."""
        return list(self.entries)

    @property
    def exchanges(self) -> bool:
        """Whether tensors will be exchanged."""
        return will_exchange({entry.intent for entry in self.entries.values()})

    @property
    def result(self) -> QuorumResult:
        """What callers of ``join_quorum`` need of it."""
        up_to_date = (self.newest, self.state)
        behind = frozenset(
            n for n, entry in self.entries.items() if (entry.version, entry.state) != up_to_date
        )
        metadata = {name: entry.metadata for name, entry in self.entries.items()}
        round = None if self.newest is None else self.newest.round
        return QuorumResult(metadata, self.exchanges, behind, self.attempt, self.state, round)

    def includes(self, name: str, incarnation: str) -> bool:
        """Tell whether a process is a member."""
        return name in self.entries and self.entries[name].incarnation == incarnation

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        entries = [[name, entry.to_json()] for name, entry in self.entries.items()]
        return {
            "attempt": self.attempt,
            "group": self.group,
            "run_id": self.run_id,
            "members": entries,
            "newest": list(self.newest) if self.newest else None,
            "state": self.state,
        }

    @classmethod
    def from_json(cls, term: int, value: Any) -> "QuorumView | None":
        """Return what a peer wrote, or None if it is malformed."""
        if not isinstance(value, dict) or value.keys() != _VIEW_FIELDS:
            return None
        if not is_count(value["attempt"]) or not isinstance(value["members"], list) or not value["members"]:
            return None
        newest = value["newest"]
        if not all(_is_text(value[key]) for key in ("group", "run_id", "state")):
            return None
        if newest is not None and not _is_version(newest):
            return None
        entries = {}
        for item in value["members"]:
            if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
                return None
            entry = QuorumMember.from_json(item[1])
            if entry is None:
                return None
            entries[item[0]] = entry
        version = Version(*newest) if newest else None
        return cls(term, value["attempt"], value["group"], value["run_id"], entries, version, value["state"])

    @classmethod
    def of(
        cls,
        term: int,
        new: str,
        entries: Mapping[str, QuorumMember],
        attempt_before: int = 0,
        newest: tuple[Version, str] | None = None,
    ) -> "QuorumView":
        """Return the view of those who joined.

        Args:
            term: The term.
            new: A name that was never used before.
            entries: Who continues, in the order of the roster.
            attempt_before: Number of the attempt before.
            newest: Version and state from which all continue; by default the newest of theirs.
        """
        groups = {entry.group for entry in entries.values()}
        version, state = newest or newest_version(entries, needed=1) or (None, "")
        last = max(entries.values(), key=lambda entry: entry.attempt)
        # Connections may be those of more parties than continue now.
        between = "/" + hashlib.sha256(" ".join(entries).encode()).hexdigest()[:16]
        return cls(
            term=term,
            attempt=1 + max(last_attempt([entry.attempt for entry in entries.values()]), attempt_before),
            group=groups.pop()
            if len(groups) == 1 and all(g.endswith(between) for g in groups)
            else new + between,
            run_id=version.run_id if version else last.run_id or new,
            entries=dict(entries),
            newest=version,
            state=state,
        )


def stage(entries: Mapping[str, QuorumMember], needed: int) -> Literal["beginning", "resuming", "running"]:
    """Return where a federation is: not begun, begun and to be resumed by new processes, or running.

    It has begun only if as many say so as a round needs: state that a single party has left may be of
    another run.
    """
    if any(entry.member for entry in entries.values()):
        return "running"
    return (
        "resuming" if sum(entry.version is not None for entry in entries.values()) >= needed else "beginning"
    )


# ---- majorities decide, not pairs


def belonging(entries: Mapping[str, QuorumMember], quorum: int) -> dict[str, QuorumMember]:
    """Return those who can continue together: with the settings, and the state of the run, that most have.

    A party without a state belongs to any run. It is the same at all that see the same, so nobody who belongs
    is judged by one who does not.
    """
    same = _largest(entries, lambda entry: entry.digest, quorum)
    fresh = sum(entry.version is None for entry in same.values())
    with_state = {name: entry for name, entry in same.items() if entry.version}
    of_run = _largest(with_state, lambda entry: entry.version and entry.version.run_id, quorum - fresh)
    return {name: entry for name, entry in same.items() if not entry.version or name in of_run}


def _largest(
    entries: Mapping[str, QuorumMember], key: Callable[[QuorumMember], object], quorum: int
) -> Mapping[str, QuorumMember]:
    """Return the entries of one key: that which a quorum has, or else most, or else most who were members."""
    groups: dict[object, dict[str, QuorumMember]] = {}
    for name, entry in entries.items():
        groups.setdefault(key(entry), {})[name] = entry

    def rank(group: Mapping[str, QuorumMember]) -> tuple[bool, int, int]:
        return len(group) >= quorum, len(group), sum(entry.member for entry in group.values())

    return max(groups.values(), key=rank, default={})


def holders_needed(entries: Mapping[str, QuorumMember], num_parties: int, quorum: int) -> int:
    """Return how many of these parties must have a version that was committed.

    A quorum has made it durable before it was committed; of these only those can lack it here who are not
    here, or have no state.
    """
    absent = num_parties - sum(entry.version is not None for entry in entries.values())
    return max(1, quorum - absent)


def newest_version(entries: Mapping[str, QuorumMember], needed: int) -> tuple[Version, str] | None:
    """Return the newest version that can have been committed, and the digest that most report of it.

    What fewer than ``needed`` have, at this version or above, was committed by nobody: one party alone cannot
    make all others take its state by claiming a newer version.

    Args:
        entries: Of one run.
        needed: As ``holders_needed`` returns it.
    """
    versions = [entry.version for entry in entries.values() if entry.version]
    committed = [v for v in versions if sum(other >= v for other in versions) >= needed]
    if not committed:
        return None
    newest = max(committed)
    states = Counter(entry.state for entry in entries.values() if entry.version == newest)
    return newest, states.most_common(1)[0][0]


def blocker(entries: Mapping[str, QuorumMember]) -> str:
    """Return the party that has held up the last attempt, by the word of two at least; "" if unclear.

    Who misses a part cannot send its sum, and is excused for that. One word alone may be a lie, or a broken
    link between two: of that the failures of several attempts decide.

    Example:
        >>> from dataclasses import replace
        >>> silent = QuorumMember(1, "now", "host:1", "digest", None, 0, "", "exchange", "", False, {})
        >>> misses = replace(silent, missing_parts=["c"])
        >>> blocker({"a": misses, "b": misses, "c": silent}), blocker({"a": misses, "b": silent, "c": silent})
        ('c', '')
    """
    excused = {name for name, entry in entries.items() if entry.missing_parts}
    counts = Counter(
        name
        for by, entry in entries.items()
        for name in {*entry.missing_parts, *entry.missing_sums} - {by}
        if name in entry.missing_parts or name not in excused
    )
    (name, most), (_, next_) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
    return name if most > max(next_, 1) else ""


def last_attempt(attempts: Sequence[int]) -> int:
    """Return the greatest attempt that the parties know of, but none that is out of all proportion."""
    return min(max(attempts), median_low(attempts) + _MAX_ATTEMPTS_APART)


# ---- what a peer has written


def fits(metadata: Metadata, num_parties: int) -> bool:
    """Tell whether a party's metadata leave room for those of the others in one view."""
    return len(json.dumps(metadata)) <= _metadata_bytes(num_parties)


def check_fits(name: str, metadata: Metadata, num_parties: int) -> None:
    """Refuse metadata of this party with which the others would not take part.

    Raises:
        FederationError: If they are too large.
    """
    if not fits(metadata, num_parties):
        raise FederationError(
            f"Party {name} would tell the others {len(json.dumps(metadata))} bytes ({', '.join(metadata)}),"
            f" more than the {_metadata_bytes(num_parties)} that each of {num_parties} parties may. Log fewer"
            " metrics, or under shorter names."
        )


def _metadata_bytes(num_parties: int) -> int:
    return MAX_VALUE_BYTES // 2 // num_parties


def is_count(value: Any) -> TypeGuard[int]:
    """Tell whether something is an integer of 0 to 2^53."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_text(value: Any, most: int = _MAX_TEXT) -> bool:
    return isinstance(value, str) and len(value) <= most


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_TEXT and all(map(_is_text, value))


def _is_address(value: str) -> bool:
    try:
        split_address(value)
    except ValueError:
        return False
    return True


def _is_version(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and _is_text(value[0])
        and all(is_count(number) for number in value[1:])
    )
