"""What the parties write down to meet: where each stands, and who goes on together. Pure, but for JSON."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

from pellm_lightning.comm.mesh.handshake import split_address

Intent = Literal["exchange", "words", "rest"]
_WANTS = ("exchange", "words", "rest")
# Longer than any name, address or digest.
_MAX_TEXT = 256


class Version(NamedTuple):
    """Which global parameters a party has; of one lineage the greater is the newer."""

    run_id: str
    """Drawn when the federation first began; two runs never share one."""
    round: int
    """Rounds that are in them."""
    attempt: int
    """Number of the plan that made them, greater than that of every plan which came before."""


@dataclass(frozen=True)
class QuorumMember:
    """What a party says when it comes to meet the others."""

    term: int
    """The meeting it comes to."""
    incarnation: str
    """Which of the processes that ran under this name it is."""
    address: str
    """Where it can be reached."""
    digest: str
    """Of what all parties must share: names, shapes, dtypes, configuration."""
    version: Version | None
    """Its global parameters, None if it has just begun."""
    attempt: int
    """The greatest plan it knows of."""
    run_id: str
    """Of that plan: a first meeting that was given up is made again by the same name."""
    wants: Intent
    """To exchange tensors, only words, or nothing any more."""
    group: str
    """The connections it has from the last round, or nothing."""
    member: bool
    """Whether this process has been part of a plan before."""
    words: dict[str, Any]
    """What it has to say to the others."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        return asdict(self) | {"version": list(self.version) if self.version else None}

    @classmethod
    def from_json(cls, value: Any) -> "QuorumMember | None":
        """Return what a peer wrote, or None if it is no roll."""
        if not isinstance(value, dict) or value.keys() != cls.__annotations__.keys():
            return None
        texts = [value[key] for key in ("incarnation", "address", "digest", "run_id", "group")]
        numbers = [value["term"], value["attempt"]]
        version = value["version"]
        if (
            not all(_is_text(text) for text in texts)
            or not _is_address(value["address"])
            or not all(is_count(number) for number in numbers)
            or not (version is None or _is_version(version))
            or value["wants"] not in _WANTS
            or not isinstance(value["member"], bool)
            or not isinstance(value["words"], dict)
        ):
            return None
        return cls(**value | {"version": Version(*version) if version else None})


@dataclass(frozen=True)
class QuorumView:
    """Who goes on together in a term; written once, so that all read the same."""

    term: int
    attempt: int
    """Number of the plan, greater than any that a member knew of."""
    group: str
    """Name of their connections; those of the last round, if all members still have them."""
    run_id: str
    """Of the global parameters that come of it."""
    entries: dict[str, QuorumMember]
    """What each member said, in the order of the roster."""

    @property
    def members(self) -> list[str]:
        """Names of those who go on together, in the order of the roster."""
        return list(self.entries)

    @property
    def digest(self) -> str:
        """The members' digest of what all must share."""
        return next(iter(self.entries.values())).digest

    @property
    def exchanges(self) -> bool:
        """Whether tensors will cross: not if somebody wants words first, or all want nothing."""
        wants = {entry.wants for entry in self.entries.values()}
        return "words" not in wants and "exchange" in wants

    @property
    def newest(self) -> Version | None:
        """The newest version among the members'."""
        return max((entry.version for entry in self.entries.values() if entry.version), default=None)

    def includes(self, name: str, incarnation: str) -> bool:
        """Tell whether a process is a member."""
        return name in self.entries and self.entries[name].incarnation == incarnation

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        entries = [[name, entry.to_json()] for name, entry in self.entries.items()]
        return {"attempt": self.attempt, "group": self.group, "run_id": self.run_id, "rolls": entries}

    @classmethod
    def from_json(cls, term: int, value: Any) -> "QuorumView | None":
        """Return what a peer wrote, or None if it is no plan."""
        if not isinstance(value, dict) or value.keys() != {"attempt", "group", "run_id", "rolls"}:
            return None
        if not is_count(value["attempt"]) or not isinstance(value["rolls"], list) or not value["rolls"]:
            return None
        if not _is_text(value["group"]) or not _is_text(value["run_id"]):
            return None
        entries = {}
        for item in value["rolls"]:
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
        """Return the plan by which those who called go on.

        Args:
            term: The meeting.
            new: A name that nothing has had before.
            rolls: Who goes on, in the order of the roster.
            last_attempt: Number of the plan before.
        """
        groups = {entry.group for entry in entries.values()}
        versions = [entry.version for entry in entries.values() if entry.version]
        last = max(entries.values(), key=lambda entry: entry.attempt)
        # Connections may be those of more parties than go on now.
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

    That it has begun counts only if as many say so as a round needs: state that a single party has left may
    be of another run.
    """
    if any(entry.member for entry in entries.values()):
        return "running"
    return (
        "resuming" if sum(entry.version is not None for entry in entries.values()) >= needed else "beginning"
    )


def is_count(value: Any) -> TypeGuard[int]:
    """Tell whether something is a whole number of decent size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


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
