"""Configuration of a party that is a job of its own: name, rendezvous, roster."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from pellm_lightning.comm.elastic.federation import ElasticFederation
from pellm_lightning.comm.elastic.membership import Membership, check_roster
from pellm_lightning.comm.quorum import Quorum
from pellm_lightning.comm.rendezvous.polling_store import PollingStore
from pellm_lightning.comm.rendezvous.prefix_store import PrefixStore
from pellm_lightning.comm.tls import TLS
from pellm_lightning.comm.topology import Topology

_VARIABLES = {
    "rendezvous": "PELLM_RENDEZVOUS",
    "name": "PELLM_PARTY",
    "roster": "PELLM_ROSTER",
    "listen": "PELLM_LISTEN",
    "advertise": "PELLM_ADVERTISE",
}


@dataclass(frozen=True)
class SeparateJobs:
    """Settings with which one party joins the others.

    Args:
        rendezvous: "tcp://host:port" of ``python -m pellm_lightning rendezvous``, or "etcd://host:port".
        name: This party.
        roster: Names of all parties, the same and in the same order at each.
        listen: "host:port" at which the other parties reach this one.
        advertise: "host:port" to tell them instead, where an address is translated on the way.
        tls: This party's certificate and the federation's authority.
        membership: How long to wait for whom.
        quorum: How many parties are needed.

    Raises:
        ValueError: If something is missing or malformed.

    Example::

        communicator = SeparateJobs("tcp://hub:29400", "clinic-a", ("clinic-a", "clinic-b")).join()
    """

    rendezvous: str
    name: str
    roster: tuple[str, ...]
    listen: str = "127.0.0.1:0"
    advertise: str | None = None
    tls: TLS | None = None
    membership: Membership = field(default_factory=Membership)
    quorum: Quorum = "majority"

    def __post_init__(self) -> None:
        check_roster(self.name, self.roster)
        self.membership.quorum(self.quorum, self.roster)
        if self.tls is not None and self.tls.name != self.name:
            raise ValueError(
                f"The certificate {self.tls.cert} is of {self.tls.name!r}, but this party is {self.name!r}."
                " Pass the party's own certificate."
            )

    @classmethod
    def configured(
        cls,
        rendezvous: str | None,
        name: str | None,
        roster: Sequence[str] | None,
        listen: str | None = None,
        advertise: str | None = None,
        tls: TLS | None = None,
        membership: Membership | None = None,
        quorum: Quorum = "majority",
        environ: Mapping[str, str] | None = None,
    ) -> "SeparateJobs | None":
        """Return the job that arguments and ``PELLM_...`` variables describe; None without a rendezvous.

        Raises:
            ValueError: If the name or the roster is missing, or something is malformed.
        """
        environ = os.environ if environ is None else environ
        given = {"rendezvous": rendezvous, "name": name, "listen": listen, "advertise": advertise}
        found = {key: value or environ.get(_VARIABLES[key]) for key, value in given.items()}
        roster = list(roster or filter(None, environ.get(_VARIABLES["roster"], "").split(",")))
        if not found["rendezvous"]:
            if name or roster:
                raise ValueError(
                    "A party's name or roster is given, but no rendezvous: pass"
                    " rendezvous='tcp://host:port' or set PELLM_RENDEZVOUS."
                )
            return None
        for key, value in (("name", found["name"]), ("roster", roster)):
            if not value:
                raise ValueError(
                    f"rendezvous={found['rendezvous']!r} joins separate jobs, which needs this party's {key}:"
                    f" pass {key}=... or set {_VARIABLES[key]}."
                )
        return cls(
            rendezvous=str(found["rendezvous"]),
            name=str(found["name"]),
            roster=tuple(roster),
            listen=found["listen"] or "127.0.0.1:0",
            advertise=found["advertise"],
            tls=tls or _tls_of(environ),
            membership=membership or Membership(),
            quorum=quorum,
        )

    def topology(self, environ: Mapping[str, str] | None = None) -> Topology:
        """Return the topology of this process; the launcher's ranks are those inside the party."""
        environ = os.environ if environ is None else environ
        return Topology(
            party=self.roster.index(self.name),
            num_parties=len(self.roster),
            rank_in_party=int(environ.get("RANK", 0)),
            party_size=int(environ.get("WORLD_SIZE", 1)),
            label=self.name,
        )

    def join(self) -> ElasticFederation:
        """Join the other parties.

        Raises:
            PartyLostError: If the rendezvous cannot be reached.
        """
        return self._joined(self.connect, self.membership)

    def rehearse(self, prefix: str, wait_s: float) -> ElasticFederation:
        """Join the other parties under a prefix of the rendezvous, so that no federation is disturbed.

        Args:
            prefix: The same at all parties, and never used before.
            wait_s: Seconds to wait for a party, at most.

        Raises:
            PartyLostError: If the rendezvous cannot be reached.
        """
        brief = replace(self.membership, wait_s=wait_s, round_timeout_s=wait_s, exchange_timeout_s=wait_s / 2)
        return self._joined(lambda: PrefixStore(self.connect(), prefix), brief)

    def connect(self) -> PollingStore:
        """Return a client of the rendezvous.

        Raises:
            torch.distributed.DistNetworkError: If it is out of reach.
            FederationError: If it does not admit this party.
        """
        from pellm_lightning.comm.rendezvous.client import connect

        return connect(self.rendezvous, tls=self.tls)

    def _joined(self, connect: Callable[[], dist.Store], membership: Membership) -> ElasticFederation:
        return ElasticFederation(
            connect,
            self.name,
            self.roster,
            quorum=self.quorum,
            membership=membership,
            listen=self.listen,
            advertise=self.advertise,
            tls=self.tls,
        )


def _tls_of(environ: Mapping[str, str]) -> TLS | None:
    paths = [environ.get(f"PELLM_TLS_{part}") for part in ("CERT", "KEY", "CA")]
    if not any(paths):
        return None
    cert, key, ca = paths
    if not (cert and key and ca):
        raise ValueError("Set all three of PELLM_TLS_CERT, PELLM_TLS_KEY and PELLM_TLS_CA, or none.")
    return TLS(cert, key, ca)
