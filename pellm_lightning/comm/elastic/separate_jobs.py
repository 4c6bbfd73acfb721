"""Configuration of a party that is a job of its own: name, rendezvous, roster."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pellm_lightning.comm.elastic.federation import ElasticFederation
from pellm_lightning.comm.elastic.membership import Membership, check_addresses, check_roster
from pellm_lightning.comm.proxy import proxy_to
from pellm_lightning.comm.quorum import Quorum
from pellm_lightning.comm.rendezvous.polling_store import PollingStore
from pellm_lightning.comm.tls import TLS
from pellm_lightning.comm.topology import Topology

_VARIABLES = {
    "rendezvous": "PELLM_RENDEZVOUS",
    "name": "PELLM_PARTY",
    "roster": "PELLM_ROSTER",
    "listen": "PELLM_LISTEN",
    "advertise": "PELLM_ADVERTISE",
}


def _from_env(key: str) -> str:
    return os.environ.get(_VARIABLES[key], "")


def _roster_from_env() -> tuple[str, ...]:
    return tuple(filter(None, _from_env("roster").split(",")))


@dataclass(frozen=True)
class SeparateJobs:
    """Settings of a party that is a job of its own and joins the other parties at a rendezvous.

    What is not given is read from the environment when the object is made.

    On the command line each institution keeps its own file: ``--federated.jobs jobs/clinic-a.yaml``.

    Example:
        >>> jobs = SeparateJobs("tcp://hub:29400", name="clinic-a", roster=["clinic-a", "clinic-b"])
        >>> jobs.topology().party
        0

    Args:
        rendezvous: "tcp://host:port" of ``python -m pellm_lightning rendezvous``, or "etcd://host:port".
            Default: ``PELLM_RENDEZVOUS``.
        name: Name of this party. Default: ``PELLM_PARTY``.
        roster: Names of all parties, the same and in the same order at each. Default: ``PELLM_ROSTER``, with
            commas.
        listen: "host:port" at which the other parties reach this one. Default: ``PELLM_LISTEN``, or nowhere:
            this party then dials out only, to those that listen, and to the relay of the rendezvous to meet
            the others. Parties of the same host reach it in any case.
        advertise: "host:port" to tell the other parties instead, where an address is translated on the way.
            Default: ``PELLM_ADVERTISE``.
        proxy: HTTP proxy by which this party reaches the rendezvous and its relay, as
            "http://[user:password@]host:port", or "none". Default: ``https_proxy`` and ``no_proxy``, where a
            password is not copied into saved configurations.
        tls: This party's certificate and the federation's authority. Default: ``PELLM_TLS_CERT``,
            ``PELLM_TLS_KEY`` and ``PELLM_TLS_CA``; without any, nothing is encrypted.
        membership: How long to wait for which party, and whether to continue without a lost one.
        state_dir: Where this party keeps the global state through its own death. Default: ``federation/``
            below the Trainer's ``default_root_dir/party-<k>``.

    Raises:
        ValueError: If something is missing or malformed.
    """

    rendezvous: str = field(default_factory=partial(_from_env, "rendezvous"))
    name: str = field(default_factory=partial(_from_env, "name"))
    roster: Sequence[str] = field(default_factory=_roster_from_env)
    listen: str = field(default_factory=lambda: _from_env("listen") or "127.0.0.1:0")
    advertise: str | None = field(default_factory=lambda: _from_env("advertise") or None)
    proxy: str | None = field(default=None, repr=False)
    tls: TLS | None = None
    membership: Membership = field(default_factory=Membership)
    state_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.rendezvous:
            raise ValueError(
                "A party's name or roster is given, but no rendezvous: give jobs.rendezvous as"
                " 'tcp://host:port', or set PELLM_RENDEZVOUS."
            )
        if not self.rendezvous.startswith(("tcp://", "etcd://")):
            raise ValueError(
                f"rendezvous={self.rendezvous!r} names no rendezvous: give tcp://host:port or etcd://host:port."
            )
        for key in ("name", "roster"):
            if not getattr(self, key):
                raise ValueError(
                    f"rendezvous={self.rendezvous!r} joins separate jobs, which needs this party's {key}:"
                    f" give jobs.{key}, or set {_VARIABLES[key]}."
                )
        check_roster(self.name, self.roster)
        check_addresses(self.name, self.listen, self.advertise)
        proxy_to(self.rendezvous.partition("://")[2], self.proxy)
        if self.tls is None:  # not by a default factory, whose result a command line would have to print
            object.__setattr__(self, "tls", _tls_from_env())
        if self.tls is not None and self.tls.name != self.name:
            raise ValueError(
                f"The certificate {self.tls.cert} is of {self.tls.name!r}, but this party is {self.name!r}."
                " Pass the party's own certificate."
            )

    @classmethod
    def from_env(cls) -> "SeparateJobs | None":
        """Return the settings that the environment gives; None if it names no rendezvous.

        Raises:
            ValueError: If something is missing or malformed.
        """
        if any(_from_env(key) for key in ("rendezvous", "name", "roster")):
            return cls()
        return None

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> "SeparateJobs | None":
        """Return the settings of a parsed configuration, before anything is built of it.

        Args:
            config: Arguments by name, ``tls`` and ``membership`` by theirs; None for the environment's.

        Raises:
            ValueError: If something is missing or malformed.
        """
        if config is None:
            return cls.from_env()
        built = {"tls": TLS, "membership": Membership}
        given = {key: value for key, value in config.items() if value is not None}
        return cls(**{key: built[key](**value) if key in built else value for key, value in given.items()})

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

    def join(self, quorum: Quorum = "majority") -> ElasticFederation:
        """Join the other parties.

        Args:
            quorum: How many parties must meet.

        Raises:
            PartyLostError: If the rendezvous cannot be reached.
        """
        return self._joined(self.membership, quorum)

    def rehearse(self, prefix: str, wait_s: float, quorum: Quorum) -> ElasticFederation:
        """Join the other parties under a prefix of the rendezvous, so that no federation is disturbed.

        Args:
            prefix: The same at all parties, and never used before.
            wait_s: Seconds to wait for a party, at most.
            quorum: How many parties must meet.

        Raises:
            PartyLostError: If the rendezvous cannot be reached.
        """
        brief = replace(self.membership, wait_s=wait_s, round_timeout_s=wait_s, exchange_timeout_s=wait_s / 2)
        return self._joined(brief, quorum, f"{prefix}/")

    def connect(self) -> PollingStore:
        """Return a client of the rendezvous.

        Raises:
            torch.distributed.DistNetworkError: If it is out of reach.
            FederationError: If it does not admit this party.
        """
        from pellm_lightning.comm.rendezvous.client import connect

        return connect(self.rendezvous, tls=self.tls, proxy=self.proxy)

    def _joined(self, membership: Membership, quorum: Quorum, prefix: str = "") -> ElasticFederation:
        return ElasticFederation(
            self.connect,
            self.name,
            self.roster,
            quorum=quorum,
            membership=membership,
            listen=self.listen,
            advertise=self.advertise,
            tls=self.tls,
            prefix=prefix,
        )


def _tls_from_env() -> TLS | None:
    paths = [os.environ.get(f"PELLM_TLS_{part}") for part in ("CERT", "KEY", "CA")]
    if not any(paths):
        return None
    cert, key, ca = paths
    if not (cert and key and ca):
        raise ValueError("Set all three of PELLM_TLS_CERT, PELLM_TLS_KEY and PELLM_TLS_CA, or none.")
    return TLS(cert, key, ca)
