"""The members of a mesh: who they are, and the words for what can go wrong between them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pellm_lightning.comm.errors import FederationError, MismatchError, PartyLostError
from pellm_lightning.comm.mesh.frames import Kind, Label
from pellm_lightning.comm.mesh.handshake import GREETING_BYTES, split_address

# The mask of the lost in a farewell has as many bits.
_MAX_MEMBERS = 128


@dataclass(frozen=True)
class Group:
    """Who is in a mesh.

    Args:
        name: What the group is called, its own for each mesh that is ever formed.
        rank: This party's place in ``names``.
        names: Names of the members, the same at each of them.
        addresses: Where each member's listener is reached, "host:port".

    Raises:
        ValueError: If these do not fit each other.
    """

    name: str
    rank: int
    names: Sequence[str]
    addresses: Sequence[str]

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size <= _MAX_MEMBERS:
            raise ValueError(
                f"rank={self.rank} must lie in 0..{self.size - 1}, and {_MAX_MEMBERS} members are the most."
            )
        if len(set(self.names)) < self.size or len(self.addresses) != self.size:
            raise ValueError(
                f"names={list(self.names)} must be different from each other, and each needs one of the"
                f" {len(self.addresses)} addresses={list(self.addresses)}."
            )
        if any(len(json.dumps({"from": name, "group": self.name})) > GREETING_BYTES for name in self.names):
            raise ValueError(
                f"group={self.name[:40]!r}… has {len(self.name)} characters. Give a shorter name."
            )
        for address in self.addresses[: self.rank]:
            split_address(address)

    @property
    def size(self) -> int:
        """How many the members are."""
        return len(self.names)

    @property
    def me(self) -> str:
        """This party's name."""
        return self.names[self.rank]

    def called(self, ranks: Iterable[int]) -> str:
        """Return who these are and where, in words."""
        return " and ".join(f"{self.names[rank]} ({self.addresses[rank]})" for rank in ranks)

    # ---- what goes wrong; ``here`` says what this party was doing

    def absent(
        self, ranks: Iterable[int], timeout_s: float, troubles: Mapping[int, str], rebuffed: str
    ) -> PartyLostError:
        """Return the error for members that were not there in time.

        Args:
            ranks: Theirs.
            timeout_s: How long they were waited for.
            troubles: What came of it where this party was to call.
            rebuffed: Who has called and was hung up on, if anybody was.
        """
        ranks = list(ranks)
        uncalled = f"it has not called, or was hung up on ({rebuffed})" if rebuffed else "it has not called"
        told = "; ".join(f"{self.called([rank])}: {troubles.get(rank, uncalled)}" for rank in ranks)
        return self._lost(
            ranks,
            f"Not all members of group {self.name} were there within {timeout_s:g} s. {told}. Check that"
            " these parties run, that each address can be reached from here and is not blocked, and that all"
            " parties use TLS and have the same ca.pem, or none uses TLS.",
        )

    def gone(self, rank: int, why: str, here: str) -> PartyLostError:
        """Return the error for a member that has hung up."""
        return self._lost(
            [rank],
            f"{self.called([rank])} left while {here}: {why}. Its process ended or it gave up this group:"
            " look at the end of its log.",
        )

    def late(self, ranks: Sequence[int], timeout_s: float, here: str) -> PartyLostError:
        """Return the error for members that are silent."""
        return self._lost(
            ranks,
            f"Nothing moved between {self.me} and {self.called(ranks)} for {timeout_s:g} s while {here}. Look"
            " at their logs, check the network between, or raise timeout_s above the time by which the"
            " slowest party's local steps outlast the fastest's.",
        )

    def unexpected(
        self, rank: int, label: Label | None, length: int, expected: Label, here: str
    ) -> FederationError:
        """Return the error for a frame that must not come, or for a farewell."""
        if label is not None and label.kind in (Kind.LOST, Kind.MISMATCH):
            return self._told(rank, label, here)
        sent = "bytes that are no frame" if label is None else f"{label} (frame of {length} bytes)"
        return MismatchError(
            f"{self.called([rank])} sent {sent} while {here}, which expects {expected}. Give every party the"
            " same parameters, schedule and version.",
            parties=[self.names[rank]],
        )

    def farewell(self, error: FederationError, sequence: int) -> tuple[list[int], Label]:
        """Return whose fault an error is, and how to tell the others."""
        blamed = [rank for rank, name in enumerate(self.names) if name in error.parties]
        mask = sum(1 << rank for rank in blamed)
        kind = Kind.MISMATCH if isinstance(error, MismatchError) else Kind.LOST
        return blamed, Label(kind, 0, 0, sequence, mask & (1 << 64) - 1, mask >> 64)

    def _told(self, by: int, label: Label, here: str) -> FederationError:
        """Return the error for what a peer said before it hung up."""
        mask = label.whole | label.size << 64
        ranks = [rank for rank in range(self.size) if mask >> rank & 1 and rank != self.rank]
        if mask >> self.rank & 1 or not ranks:
            ranks = [by]
            why = "gave up on this party: it was late, or what it sent did not fit"
        elif label.kind == Kind.LOST:
            why = f"has lost {self.called(ranks)}"
        else:
            why = f"got something unexpected from {self.called(ranks)}"
        message = f"{self.called([by])} {why}, while {here}. Look at the logs of these parties."
        kind = PartyLostError if label.kind == Kind.LOST else MismatchError
        blamed = [self.names[rank] for rank in ranks]
        return kind(message, parties=blamed, by=None if ranks == [by] else self.names[by])

    def _lost(self, ranks: Iterable[int], message: str) -> PartyLostError:
        return PartyLostError(message, parties=[self.names[rank] for rank in ranks])
