"""Membership policy of separate jobs: timeouts, quorum, and what to do when a party is lost."""

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pellm_lightning.comm.errors import did_you_mean
from pellm_lightning.comm.quorum import Quorum, resolve_quorum
from pellm_lightning.comm.sockets import is_unspecified, split_address
from pellm_lightning.comm.tls import check_name


@dataclass(frozen=True)
class Membership:
    """Policy by which separate jobs continue without a party, wait for one, or stop.

    Args:
        round_timeout_s: Seconds a party that is alive may be late for a round before the others continue
            without it: more than the time by which the slowest party's local steps outlast the fastest's.
        wait_s: Seconds to wait while fewer than a quorum have joined, or the rendezvous is away; and, at
            the very first start, for the whole roster.
        exchange_timeout_s: Seconds that an exchange may make no progress, although all its parties are alive,
            before it is tried again, without a party to which this happens repeatedly.
        heartbeat_ttl_s: Seconds without a heartbeat after which a party counts as dead. The others lose
            about as much time when one dies. Over the internet take 10 or more.
        on_party_loss: Continue without a party that was lost ("continue"), or stop all ("stop").
        accept_split_brain: Allow a ``quorum`` below the majority of the roster: a network that falls apart
            may then leave two federations that both continue (split brain).

    Example:
        >>> Membership(heartbeat_ttl_s=10).quorum("majority", ["a", "b", "c"])
        2
    """

    round_timeout_s: float = 1800
    wait_s: float = 1800
    exchange_timeout_s: float = 60
    heartbeat_ttl_s: float = 5
    on_party_loss: Literal["continue", "stop"] = "continue"
    accept_split_brain: bool = False

    def __post_init__(self) -> None:
        for name in ("round_timeout_s", "wait_s", "exchange_timeout_s", "heartbeat_ttl_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive, in seconds.")
        if self.on_party_loss not in ("continue", "stop"):
            raise ValueError(f"on_party_loss={self.on_party_loss!r} must be 'continue' or 'stop'.")

    @property
    def patience_s(self) -> float:
        """Seconds that a request waits at the rendezvous, until this party looks at who is alive."""
        return min(0.5, self.heartbeat_ttl_s / 10)

    def quorum(self, quorum: Quorum, roster: Collection[str]) -> int:
        """Return how many parties of a roster must join a quorum.

        Raises:
            ValueError: If that is more than there are; or less than the majority, which nobody has accepted.
        """
        needed, majority = resolve_quorum(quorum, len(roster)), resolve_quorum("majority", len(roster))
        if needed < majority and not self.accept_split_brain:
            raise ValueError(
                f"quorum={needed} is below {majority}, the majority of the {len(roster)} parties: if the"
                " network falls apart, two groups could both continue, each with parameters of its own. Raise"
                " it, or accept that by membership.accept_split_brain=true."
            )
        return needed


@dataclass(frozen=True)
class LocalParty:
    """This process in its federation, as all parts of the protocol know it."""

    name: str
    roster: Sequence[str]
    """Names of all parties, in an order that is the same at each."""
    quorum: int
    """Number of parties that must join."""
    membership: Membership
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))
    """Which of the processes that ever ran under this name it is (SWIM)."""


def check_roster(name: str, roster: Sequence[str]) -> None:
    """Check the names of a federation.

    Raises:
        ValueError: If a name is malformed or appears twice, or this party's is missing.
    """
    if isinstance(roster, str):
        raise ValueError(f"roster={roster!r} must be a list of names, such as {roster.split(',')}.")
    for other in roster:
        check_name(other)
    doubled = sorted({other for other in roster if list(roster).count(other) > 1})
    if doubled:
        raise ValueError(f"The roster names {doubled[0]!r} twice; every party needs a name of its own.")
    if name not in roster:
        raise ValueError(
            f"Party {name!r} is not in the roster ({', '.join(roster)}). Give all the same roster."
            + did_you_mean(name, roster)
        )


def check_addresses(name: str, listen: str, advertise: str | None) -> None:
    """Check where a party listens, and what it tells the others.

    Raises:
        ValueError: If no other party could reach it there.
    """
    if advertise is not None:
        split_address(advertise)
    announced, key = (listen, "listen") if advertise is None else (advertise, "advertise")
    host = announced.rpartition(":")[0]
    if is_unspecified(host):
        raise ValueError(
            f"{key}={announced!r} of party {name} stands for all interfaces of a host, which is no address"
            " that another party can dial. Give the address of one interface, or, to listen on all, also"
            " advertise='host:port', at which the others reach this party."
        )
