"""Quorum members and the view on which they agree: who continues together. Pure, but for JSON."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeGuard

from pellm_lightning.comm.communicator import Intent, Metadata, QuorumResult, Version, will_exchange
from pellm_lightning.comm.sockets import split_address

_INTENTS = ("exchange", "metadata", "rest")
# Longer than any name, address or digest.
_MAX_TEXT = 256
# Of a revocation list with about a thousand entries.
_MAX_LIST = 1 << 16


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
    serial: str = ""
    """Serial number of its certificate, in hexadecimal digits; empty without TLS."""
    revoked: str = ""
    """The newest revocation list that it knows, PEM; empty for none."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        return asdict(self) | {"version": list(self.version) if self.version else None}

    @classmethod
    def from_json(cls, value: Any) -> "QuorumMember | None":
        """Return what a peer wrote, or None if it is malformed."""
        if not isinstance(value, dict) or value.keys() != cls.__annotations__.keys():
            return None
        texts = [value[key] for key in ("incarnation", "address", "digest", "run_id", "group", "serial")]
        numbers = [value["term"], value["attempt"]]
        version = value["version"]
        if (
            not all(_is_text(text) for text in texts)
            or not _is_address(value["address"])
            or not all(is_count(number) for number in numbers)
            or not (version is None or _is_version(version))
            or value["intent"] not in _INTENTS
            or not isinstance(value["member"], bool)
            or not isinstance(value["metadata"], dict)
            or not _is_text(value["revoked"], _MAX_LIST)
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

    @property
    def members(self) -> list[str]:
        """Names of the members, in the order of the roster."""
        return list(self.entries)

    @property
    def exchanges(self) -> bool:
        """Whether tensors will be exchanged."""
        return will_exchange({entry.intent for entry in self.entries.values()})

    @property
    def newest(self) -> Version | None:
        """The newest version among the members'."""
        return max((entry.version for entry in self.entries.values() if entry.version), default=None)

    @property
    def result(self) -> QuorumResult:
        """What callers of ``join_quorum`` need of it."""
        behind = frozenset(name for name, entry in self.entries.items() if entry.version != self.newest)
        metadata = {name: entry.metadata for name, entry in self.entries.items()}
        return QuorumResult(metadata, self.exchanges, behind, self.attempt)

    def includes(self, name: str, incarnation: str) -> bool:
        """Tell whether a process is a member."""
        return name in self.entries and self.entries[name].incarnation == incarnation

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        entries = [[name, entry.to_json()] for name, entry in self.entries.items()]
        return {"attempt": self.attempt, "group": self.group, "run_id": self.run_id, "members": entries}

    @classmethod
    def from_json(cls, term: int, value: Any) -> "QuorumView | None":
        """Return what a peer wrote, or None if it is malformed."""
        if not isinstance(value, dict) or value.keys() != {"attempt", "group", "run_id", "members"}:
            return None
        if not is_count(value["attempt"]) or not isinstance(value["members"], list) or not value["members"]:
            return None
        if not _is_text(value["group"]) or not _is_text(value["run_id"]):
            return None
        entries = {}
        for item in value["members"]:
            if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
                return None
            entry = QuorumMember.from_json(item[1])
            if entry is None:
                return None
            entries[item[0]] = entry
        return cls(term, value["attempt"], value["group"], value["run_id"], entries)

    @classmethod
    def of(
        cls, term: int, new: str, entries: Mapping[str, QuorumMember], last_attempt: int = 0
    ) -> "QuorumView":
        """Return the view of those who joined.

        Args:
            term: The term.
            new: A name that was never used before.
            entries: Who continues, in the order of the roster.
            last_attempt: Number of the attempt before.
        """
        groups = {entry.group for entry in entries.values()}
        versions = [entry.version for entry in entries.values() if entry.version]
        last = max(entries.values(), key=lambda entry: entry.attempt)
        # Connections may be those of more parties than continue now.
        between = "/" + hashlib.sha256(" ".join(entries).encode()).hexdigest()[:16]
        return cls(
            term=term,
            attempt=1 + max(last.attempt, last_attempt),
            group=groups.pop()
            if len(groups) == 1 and all(g.endswith(between) for g in groups)
            else new + between,
            run_id=max(versions).run_id if versions else last.run_id or new,
            entries=dict(entries),
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


def is_count(value: Any) -> TypeGuard[int]:
    """Tell whether something is an integer of 0 to 2^53."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_text(value: Any, most: int = _MAX_TEXT) -> bool:
    return isinstance(value, str) and len(value) <= most


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
