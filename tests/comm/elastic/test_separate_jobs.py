"""How a party's job is told its name, its roster and where to join."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from certificates import tls_of

from pellm_lightning import FederatedAveraging, SeparateJobs
from pellm_lightning.comm import Membership, Quorum
from pellm_lightning.comm.topology import Topology

ROSTER = ("a", "b", "c")
PARTY = {"rendezvous": "tcp://h:1", "name": "a", "roster": ROSTER}
VARIABLES = {"PELLM_RENDEZVOUS": "tcp://host:1", "PELLM_PARTY": "b", "PELLM_ROSTER": "a,b,c"}


@pytest.fixture(autouse=True)
def environ() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PELLM_")]:
            patch.delenv(name)
        yield patch


def test_without_a_rendezvous_there_are_no_separate_jobs() -> None:
    assert SeparateJobs.from_env() is None
    assert SeparateJobs.from_config(None) is None
    assert FederatedAveraging().jobs is None


def test_variables_complete_arguments(environ: pytest.MonkeyPatch) -> None:
    for name, value in (VARIABLES | {"PELLM_LISTEN": "10.0.0.1:5"}).items():
        environ.setenv(name, value)
    expected = SeparateJobs("tcp://host:1", "b", ROSTER, listen="10.0.0.1:5")
    assert SeparateJobs.from_env() == expected
    assert FederatedAveraging().jobs == expected
    assert SeparateJobs(name="c") == replace(expected, name="c")
    given = {"rendezvous": "tcp://other:2", "roster": ["b", "d"], "membership": {"wait_s": 7.0}, "tls": None}
    assert SeparateJobs.from_config(given) == SeparateJobs(
        "tcp://other:2", "b", ["b", "d"], listen="10.0.0.1:5", membership=Membership(wait_s=7.0)
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ({"name": "a", "roster": ["a"]}, {}, "no rendezvous: give jobs.rendezvous"),
        ({}, {"PELLM_ROSTER": "a"}, "no rendezvous: give jobs.rendezvous"),
        (
            {"rendezvous": "tcp://h:1", "roster": ["a"]},
            {},
            "party's name: give jobs.name, or set PELLM_PARTY",
        ),
        ({"rendezvous": "tcp://h:1", "name": "a"}, {}, "roster: give jobs.roster, or set PELLM_ROSTER"),
        (PARTY | {"name": "d"}, {}, r"Party 'd' is not in the roster \(a, b, c\)"),
        (PARTY | {"roster": ["a", "b", "a"]}, {}, "names 'a' twice"),
        (PARTY | {"roster": "a,b"}, {}, r"roster='a,b' must be a list of names, such as \['a', 'b'\]"),
        (PARTY | {"roster": ["a", "b/c"]}, {}, "'b/c' is no party's name"),
        (PARTY, {"PELLM_TLS_KEY": "k"}, "all three of PELLM_TLS_CERT"),
    ],
)
def test_what_is_missing_or_malformed_is_named(
    arguments: dict[str, Any], variables: dict[str, str], message: str, environ: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environ.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        SeparateJobs(**arguments)
    if not arguments:
        with pytest.raises(ValueError, match=message):
            SeparateJobs.from_env()


def test_the_certificate_is_the_partys_own(environ: pytest.MonkeyPatch) -> None:
    mine = tls_of("a")
    with pytest.raises(ValueError, match="is of 'a', but this party is 'b'"):
        SeparateJobs("tcp://h:1", "b", ROSTER, tls=mine)
    given = SeparateJobs("tcp://h:1", "a", ROSTER, tls=mine)
    for part in ("CERT", "KEY", "CA"):
        environ.setenv(f"PELLM_TLS_{part}", getattr(mine, part.lower()))
    assert SeparateJobs("tcp://h:1", "a", ROSTER) == given


def test_the_launchers_ranks_are_those_inside_the_party() -> None:
    job = SeparateJobs("tcp://host:1", "b", ROSTER)
    assert job.topology({"RANK": "1", "WORLD_SIZE": "2"}) == Topology(1, 3, 1, 2, "b")
    assert job.topology({}) == Topology(1, 3, 0, 1, "b")
    assert job.topology({}).name == "b"


@pytest.mark.parametrize(
    ("settings", "quorum", "roster", "needed"),
    [
        (Membership(), "majority", 1, 1),
        (Membership(), "majority", 2, 2),
        (Membership(), "majority", 3, 2),
        (Membership(), "majority", 4, 3),
        (Membership(), "majority", 24, 13),
        (Membership(), 4, 4, 4),
        (Membership(accept_split_brain=True), 2, 4, 2),
    ],
)
def test_a_round_needs_the_majority(settings: Membership, quorum: Quorum, roster: int, needed: int) -> None:
    assert settings.quorum(quorum, [str(party) for party in range(roster)]) == needed


@pytest.mark.parametrize(
    ("quorum", "message"),
    [
        (2, "below 3, the majority of the 4 parties"),
        (0, "must be 'majority' or a whole number"),
        (5, "more than the 4 parties"),
    ],
)
def test_fewer_than_the_majority_must_be_accepted(quorum: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedAveraging(quorum=quorum, jobs=SeparateJobs("tcp://h:1", "a", ("a", "b", "c", "d")))


@pytest.mark.parametrize("field", ["round_timeout_s", "wait_s", "exchange_timeout_s", "heartbeat_ttl_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_times_are_positive(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* must be positive"):
        Membership(**{field: value})  # type: ignore[arg-type]


def test_on_party_loss_has_two_choices() -> None:
    with pytest.raises(ValueError, match="must be 'continue' or 'stop'"):
        Membership(on_party_loss="ignore")  # type: ignore[arg-type]
