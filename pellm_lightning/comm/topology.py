"""Topology: the launcher's ranks as (party, rank in the party). Pure: starts and connects nothing."""

import os
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_hidden: dict[str, str] = {}


def launch_environ() -> Mapping[str, str]:
    """Return the environment as the launcher made it, of which others may have changed what is kept."""
    return ChainMap(_hidden, os.environ)  # no copy: Lightning asks for its ranks several times a batch


@dataclass(frozen=True)
class Topology:
    """Position of this process: its party, and its rank among the party's processes.

    Consecutive ranks form a party: with 4 processes and 2 parties, ranks 0 and 1 are party 0, ranks 2 and 3
    party 1.

    Args:
        party: Index of the party, 0-based.
        num_parties: Number of parties in the federation.
        rank_in_party: Index of this process among the party's processes, 0-based.
        party_size: Number of processes of a party.
        label: What the party is called; its index if empty.

    Example:
        >>> Topology.from_env(2, {"RANK": "3", "WORLD_SIZE": "4"})
        Topology(party=1, num_parties=2, rank_in_party=1, party_size=2, label='')
    """

    party: int = 0
    num_parties: int = 1
    rank_in_party: int = 0
    party_size: int = 1
    label: str = ""

    @property
    def name(self) -> str:
        """What the party is called in messages."""
        return self.label or str(self.party)

    @property
    def is_leader(self) -> bool:
        """Whether this process is its party's leader: only its rank 0 communicates with other parties."""
        return self.rank_in_party == 0

    @classmethod
    def from_env(cls, num_parties: int | None = None, environ: Mapping[str, str] | None = None) -> "Topology":
        """Read ``RANK`` and ``WORLD_SIZE`` as torchrun sets them; without a rank, a federation of one.

        Args:
            num_parties: Number of parties; None makes every process a party.
            environ: The environment to read, by default as the launcher made it.

        Raises:
            ValueError: If the world size is not divisible by ``num_parties``.
        """
        environ = launch_environ() if environ is None else environ
        # Lightning gives the processes that it starts itself a world size, but no rank.
        world_size = int(environ.get("WORLD_SIZE", 1)) if "RANK" in environ else 1
        rank = int(environ.get("RANK", 0))
        num_parties = world_size if num_parties is None else num_parties
        if num_parties < 1 or world_size % num_parties:
            raise ValueError(
                f"num_parties={num_parties} does not divide the {world_size} launched process(es) (rank"
                f" {rank}): every party needs the same number of processes. Launch a multiple of"
                f" {num_parties}, for example `torchrun --nproc-per-node {max(num_parties, 1)}`, or change"
                " num_parties."
            )
        party_size = world_size // num_parties
        return cls(rank // party_size, num_parties, rank % party_size, party_size)

    def local_rank(self, environ: Mapping[str, str] | None = None) -> int:
        """Index of this process among its party's processes on this host, which is what picks its device."""
        environ = launch_environ() if environ is None else environ
        # Ranks are consecutive on a host and in a party; counting starts where the later of the two begins.
        return min(int(environ.get("LOCAL_RANK", self.rank_in_party)), self.rank_in_party)


def keep_launch() -> Mapping[str, str]:
    """Keep what the launcher has set, whatever is written into the environment later; return all of it.

    DeepSpeed's strategy of Lightning writes there the party's ranks in place of the launch's.
    """
    launched = launch_environ()
    _hidden.update({name: launched[name] for name in _LAUNCHER if name in launched})
    return launched


def hide_launch(topology: Topology) -> None:
    """Let libraries that make one world of a launch see this party's processes only.

    This package continues to read what the launcher has set.

    Args:
        topology: Party and rank of this process.
    """
    launched = keep_launch()
    if topology.party_size == 1:
        for name in _LAUNCHER:
            os.environ.pop(name, None)
        return
    own = {
        "RANK": topology.rank_in_party,
        "WORLD_SIZE": topology.party_size,
        "LOCAL_RANK": topology.local_rank(),
        "LOCAL_WORLD_SIZE": min(topology.party_size, int(launched.get("LOCAL_WORLD_SIZE", 1))),
    }
    os.environ.update({name: str(value) for name, value in own.items()})
