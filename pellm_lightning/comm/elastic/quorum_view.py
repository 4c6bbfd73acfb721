"""What the parties write down to meet: where each stands, and who goes on together. Pure, but for JSON."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

from pellm_lightning.comm.mesh.handshake import split_address

Wants = Literal["exchange", "words", "rest"]
_WANTS = ("exchange", "words", "rest")
# Longer than any name, address or digest.
_MAX_TEXT = 256


class Version(NamedTuple):
    """Which global parameters a party has; of one lineage the greater is the newer."""

    lineage: str
    """Drawn when the federation first began; two runs never share one."""
    round: int
    """Rounds that are in them."""
    attempt: int
    """Number of the plan that made them, greater than that of every plan which came before."""


@dataclass(frozen=True)
class Roll:
    """What a party says when it comes to meet the others."""

    epoch: int
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
    lineage: str
    """Of that plan: a first meeting that was given up is made again by the same name."""
    wants: Wants
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
    def from_json(cls, value: Any) -> "Roll | None":
        """Return what a peer wrote, or None if it is no roll."""
        if not isinstance(value, dict) or value.keys() != cls.__annotations__.keys():
            return None
        texts = [value[key] for key in ("incarnation", "address", "digest", "lineage", "group")]
        numbers = [value["epoch"], value["attempt"]]
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
class Plan:
    """Who goes on together in an epoch; written once, so that all read the same."""

    epoch: int
    attempt: int
    """Number of the plan, greater than any that a member knew of."""
    group: str
    """Name of their connections; those of the last round, if all members still have them."""
    lineage: str
    """Of the global parameters that come of it."""
    rolls: dict[str, Roll]
    """What each member said, in the order of the roster."""

    @property
    def members(self) -> list[str]:
        """Names of those who go on together, in the order of the roster."""
        return list(self.rolls)

    @property
    def digest(self) -> str:
        """The members' digest of what all must share."""
        return next(iter(self.rolls.values())).digest

    @property
    def exchanges(self) -> bool:
        """Whether tensors will cross: not if somebody wants words first, or all want nothing."""
        wants = {roll.wants for roll in self.rolls.values()}
        return "words" not in wants and "exchange" in wants

    @property
    def newest(self) -> Version | None:
        """The newest version among the members'."""
        return max((roll.version for roll in self.rolls.values() if roll.version), default=None)

    def includes(self, name: str, incarnation: str) -> bool:
        """Tell whether a process is a member."""
        return name in self.rolls and self.rolls[name].incarnation == incarnation

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        rolls = [[name, roll.to_json()] for name, roll in self.rolls.items()]
        return {"attempt": self.attempt, "group": self.group, "lineage": self.lineage, "rolls": rolls}

    @classmethod
    def from_json(cls, epoch: int, value: Any) -> "Plan | None":
        """Return what a peer wrote, or None if it is no plan."""
        if not isinstance(value, dict) or value.keys() != {"attempt", "group", "lineage", "rolls"}:
            return None
        if not is_count(value["attempt"]) or not isinstance(value["rolls"], list) or not value["rolls"]:
            return None
        if not _is_text(value["group"]) or not _is_text(value["lineage"]):
            return None
        rolls = {}
        for item in value["rolls"]:
            if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
                return None
            roll = Roll.from_json(item[1])
            if roll is None:
                return None
            rolls[item[0]] = roll
        return cls(epoch, value["attempt"], value["group"], value["lineage"], rolls)

    @classmethod
    def of(cls, epoch: int, new: str, rolls: Mapping[str, Roll], last_attempt: int = 0) -> "Plan":
        """Return the plan by which those who called go on.

        Args:
            epoch: The meeting.
            new: A name that nothing has had before.
            rolls: Who goes on, in the order of the roster.
            last_attempt: Number of the plan before.
        """
        groups = {roll.group for roll in rolls.values()}
        versions = [roll.version for roll in rolls.values() if roll.version]
        last = max(rolls.values(), key=lambda roll: roll.attempt)
        # Connections may be those of more parties than go on now.
        between = "/" + hashlib.sha256(" ".join(rolls).encode()).hexdigest()[:16]
        return cls(
            epoch=epoch,
            attempt=1 + max(last.attempt, last_attempt),
            group=groups.pop()
            if len(groups) == 1 and all(g.endswith(between) for g in groups)
            else new + between,
            lineage=max(versions).lineage if versions else last.lineage or new,
            rolls=dict(rolls),
        )


def stage(rolls: Mapping[str, Roll], needed: int) -> Literal["beginning", "resuming", "running"]:
    """Return where a federation is: not begun, begun and to be resumed by new processes, or running.

    That it has begun counts only if as many say so as a round needs: state that a single party has left may
    be of another run.
    """
    if any(roll.member for roll in rolls.values()):
        return "running"
    return "resuming" if sum(roll.version is not None for roll in rolls.values()) >= needed else "beginning"


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
