"""Ranks read as parties: by hand, and for any launch."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.comm.topology import Topology, hide_launch


def test_processes_without_a_rank_are_alone() -> None:
    """Lightning gives those that it starts itself a world size: they are one party."""
    assert Topology.from_env(environ={"WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Topology()


def environment(rank: int, world_size: int, per_host: int | None = None) -> dict[str, str]:
    """What torchrun sets for a process when each host has ``per_host`` of them."""
    per_host = world_size if per_host is None else per_host
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % per_host),
        "LOCAL_WORLD_SIZE": str(per_host),
    }


@pytest.mark.parametrize(
    ("num_parties", "seen"),
    [
        (4, {}),
        (2, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}),
    ],
)
def test_what_is_hidden_from_others_is_read_on_here(num_parties: int, seen: dict[str, str]) -> None:
    launched = environment(3, 4)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launched.items():
            patch.setenv(name, value)
        own = Topology.from_env(num_parties)
        for _ in range(2):  # a second time it must not take what it has shown for what was launched
            hide_launch(own)
            assert {name: os.environ[name] for name in launched if name in os.environ} == seen
            assert Topology.from_env(num_parties) == own


# Four processes: as two parties, ranks 0 and 1 are party 0, ranks 2 and 3 party 1; as four, each is its own.
@pytest.mark.parametrize(
    ("rank", "num_parties", "expected"),
    [
        (0, 2, Topology(party=0, num_parties=2, rank_in_party=0, party_size=2)),
        (1, 2, Topology(party=0, num_parties=2, rank_in_party=1, party_size=2)),
        (2, 2, Topology(party=1, num_parties=2, rank_in_party=0, party_size=2)),
        (3, 2, Topology(party=1, num_parties=2, rank_in_party=1, party_size=2)),
        (3, None, Topology(party=3, num_parties=4, rank_in_party=0, party_size=1)),
        (3, 1, Topology(party=0, num_parties=1, rank_in_party=3, party_size=4)),
    ],
)
def test_consecutive_ranks_form_a_party(rank: int, num_parties: int | None, expected: Topology) -> None:
    assert Topology.from_env(num_parties, environment(rank, 4)) == expected


def test_first_rank_of_a_party_speaks_for_it() -> None:
    speakers = [Topology.from_env(2, environment(rank, 6)).is_leader for rank in range(6)]
    assert speakers == [True, False, False, True, False, False]


def test_without_a_launcher_there_is_one_party() -> None:
    assert Topology.from_env(None, {}) == Topology(party=0, num_parties=1, rank_in_party=0, party_size=1)


def test_reads_the_process_environment_by_default() -> None:
    with pytest.MonkeyPatch.context() as process:
        for name, value in environment(5, 6).items():
            process.setenv(name, value)
        assert Topology.from_env(3) == Topology(party=2, num_parties=3, rank_in_party=1, party_size=2)
        assert Topology.from_env(1).local_rank() == 5


@pytest.mark.parametrize(("world_size", "num_parties"), [(4, 3), (2, 4), (4, 0), (4, -1)])
def test_parties_of_unequal_size_are_refused(world_size: int, num_parties: int) -> None:
    message = f"num_parties={num_parties} does not divide the {world_size} .*torchrun"
    with pytest.raises(ValueError, match=message):
        Topology.from_env(num_parties, environment(1, world_size))


def test_two_parties_without_a_launcher_are_told_how_to_launch() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        Topology.from_env(2, {})


# Parties of 3 processes, hosts of 4: party 0 is ranks 0-2; party 1 is rank 3 on host 0 and ranks 4, 5 on
# host 1; party 2 is ranks 6, 7 on host 1 and rank 8 on host 2. On each host a party counts from 0.
@pytest.mark.parametrize(
    ("rank", "expected"), [(0, 0), (2, 2), (3, 0), (4, 0), (5, 1), (6, 0), (7, 1), (8, 0), (11, 2)]
)
def test_local_rank_counts_a_partys_processes_on_a_host(rank: int, expected: int) -> None:
    environ = environment(rank, 12, per_host=4)
    assert Topology.from_env(4, environ).local_rank(environ) == expected


def test_local_rank_without_a_launcher_is_the_rank_in_the_party() -> None:
    assert Topology(rank_in_party=1, party_size=2).local_rank({}) == 1


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 8))
def test_every_launch_is_cut_into_whole_parties(num_parties: int, party_size: int, per_host: int) -> None:
    world_size = num_parties * party_size
    places, local_ranks = [], {}
    for rank in range(world_size):
        environ = environment(rank, world_size, per_host)
        topology = Topology.from_env(num_parties, environ)
        places.append((topology.party, topology.rank_in_party))
        local_ranks.setdefault((rank // per_host, topology.party), []).append(topology.local_rank(environ))
    assert places == [(party, rank) for party in range(num_parties) for rank in range(party_size)]
    # Two processes of a party must not pick the same device, nor one beyond the devices they need.
    assert all(ranks == list(range(len(ranks))) for ranks in local_ranks.values())
