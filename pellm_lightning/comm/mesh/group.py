"""Group: the members of a mesh, and the errors that can happen between them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pellm_lightning.comm.errors import FederationError, MismatchError, PartyLostError
from pellm_lightning.comm.mesh.frames import Kind, Label
from pellm_lightning.comm.mesh.handshake import GREETING_BYTES
from pellm_lightning.comm.mesh.stall_detector import MIN_BYTES_PER_S
from pellm_lightning.comm.sockets import is_loopback, split_address

# The bit mask of a failure notice has as many bits.
_MAX_MEMBERS = 128


@dataclass(frozen=True)
class Group:
    """Members of a mesh.

    Args:
        name: Name of the group, unique to each mesh.
        rank: This party's index in ``names``.
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
        for address in self.addresses:
            split_address(address)

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.names)

    @property
    def me(self) -> str:
        """This party's name."""
        return self.names[self.rank]

    def dials(self, peer: int) -> bool:
        """Tell whether this member opens the connection with a peer.

        The higher rank does, unless that could not work: it alone is reached from other hosts. Both members
        conclude the same from the same addresses.
        """
        only_higher = self._is_local(min(self.rank, peer)) and not self._is_local(max(self.rank, peer))
        return (self.rank > peer) != only_higher

    def split(self) -> tuple[list[int], list[int]]:
        """Return the ranks that this member dials, and those that dial it."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        return [rank for rank in others if self.dials(rank)], [r for r in others if not self.dials(r)]

    def _is_local(self, rank: int) -> bool:
        return is_loopback(split_address(self.addresses[rank])[0])

    def called(self, ranks: Iterable[int]) -> str:
        """Return names and addresses of members, for a message."""
        return " and ".join(f"{self.names[rank]} ({self.addresses[rank]})" for rank in ranks)

    def names_of(self, ranks: Iterable[int]) -> list[str]:
        """Return the names of members."""
        return [self.names[rank] for rank in ranks]

    # ---- errors; ``here`` is what this party was doing

    def absent(
        self, ranks: Iterable[int], timeout_s: float, failures: Mapping[int, str], rejected: str
    ) -> PartyLostError:
        """Return the error for members that did not connect in time.

        Args:
            ranks: The members.
            timeout_s: How long this party has waited.
            failures: Last errors of each member that this party has dialed, or met at a relay.
            rejected: Whose connection was rejected last and why, empty if none was.
        """
        ranks = list(ranks)
        here = self.called([self.rank])
        silent = f"it has not connected to {here}" + (f", or was rejected ({rejected})" if rejected else "")
        found = {
            rank: [failures[rank]] if self.dials(rank) else [silent, *filter(None, [failures.get(rank)])]
            for rank in ranks
        }
        reasons = "; ".join(f"{self.called([rank])}: {', '.join(why)}" for rank, why in found.items())
        return self._lost(
            ranks,
            f"Not all members of group {self.name} connected within {timeout_s:g} s. {reasons}. Check that"
            " these parties run, that each address can be reached from here and is not blocked, and that all"
            " parties use TLS and have the same ca.pem, or none uses TLS.",
        )

    def gone(self, rank: int, why: str, here: str) -> PartyLostError:
        """Return the error for a member that has disconnected."""
        return self._lost(
            [rank],
            f"{self.called([rank])} left while {here}: {why}. Its process ended or it aborted this group:"
            " look at the end of its log.",
        )

    def late(self, ranks: Sequence[int], timeout_s: float, here: str) -> PartyLostError:
        """Return the error for members that have stalled."""
        return self._lost(
            ranks,
            f"Nothing moved between {self.me} and {self.called(ranks)} for {timeout_s:g} s, or fewer than"
            f" {MIN_BYTES_PER_S} bytes per second, while {here}. Look at their logs, check the network"
            " between, or raise timeout_s above the time by which the slowest party's local steps outlast the"
            " fastest's.",
        )

    def unexpected(
        self, rank: int, label: Label | None, length: int, expected: Label, here: str
    ) -> FederationError:
        """Return the error for an unexpected frame, or for a failure notice."""
        if label is not None and label.kind in (Kind.LOST, Kind.MISMATCH):
            return self._notified(rank, label, here)
        sent = "bytes that are no frame" if label is None else f"{label} (frame of {length} bytes)"
        return MismatchError(
            f"{self.called([rank])} sent {sent} while {here}, which expects {expected}. Give every party the"
            " same parameters, schedule and version.",
            parties=[self.names[rank]],
        )

    def failure_notice(self, error: FederationError, sequence: int) -> tuple[list[int], Label]:
        """Return the members that an error blames, and the label that tells the others."""
        blamed = [rank for rank, name in enumerate(self.names) if name in error.parties]
        mask = sum(1 << rank for rank in blamed)
        kind = Kind.MISMATCH if isinstance(error, MismatchError) else Kind.LOST
        return blamed, Label(kind, 0, 0, sequence, mask & (1 << 64) - 1, mask >> 64)

    def _notified(self, by: int, label: Label, here: str) -> FederationError:
        """Return the error for a failure notice of a peer."""
        mask = label.whole | label.size << 64
        ranks = [rank for rank in range(self.size) if mask >> rank & 1 and rank != self.rank]
        if mask >> self.rank & 1 or not ranks:
            ranks = [by]
            why = "aborted because of this party: it was late, or what it sent did not fit"
        elif label.kind == Kind.LOST:
            why = f"has lost {self.called(ranks)}"
        else:
            why = f"got something unexpected from {self.called(ranks)}"
        message = f"{self.called([by])} {why}, while {here}. Look at the logs of these parties."
        kind = PartyLostError if label.kind == Kind.LOST else MismatchError
        blamed = [self.names[rank] for rank in ranks]
        return kind(message, parties=blamed, by=None if ranks == [by] else self.names[by])

    def _lost(self, ranks: Iterable[int], message: str) -> PartyLostError:
        return PartyLostError(message, parties=self.names_of(ranks))
