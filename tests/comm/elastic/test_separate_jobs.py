"""How a party's job is told its name, its roster and where to join."""

import pytest
from certificates import tls_of

from pellm_lightning.comm import Membership, Quorum
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.topology import Topology

ROSTER = ("a", "b", "c")
VARIABLES = {"PELLM_RENDEZVOUS": "tcp://host:1", "PELLM_PARTY": "b", "PELLM_ROSTER": "a,b,c"}


def test_without_a_rendezvous_there_is_no_job() -> None:
    assert SeparateJobs.configured(None, None, None, environ={}) is None
    assert SeparateJobs.configured(None, None, (), environ={}) is None


def test_variables_complete_arguments() -> None:
    job = SeparateJobs.configured(None, None, None, environ=VARIABLES | {"PELLM_LISTEN": "10.0.0.1:5"})
    assert job == SeparateJobs("tcp://host:1", "b", ROSTER, listen="10.0.0.1:5")
    job = SeparateJobs.configured(
        "tcp://other:2", "c", ["c", "d"], "10.0.0.2:7", "1.2.3.4:9", environ=VARIABLES
    )
    assert job == SeparateJobs("tcp://other:2", "c", ("c", "d"), listen="10.0.0.2:7", advertise="1.2.3.4:9")


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ((None, "a", ["a"]), {}, "no rendezvous: pass"),
        ((None, None, None), {"PELLM_ROSTER": "a"}, "no rendezvous: pass"),
        (("tcp://h:1", None, ["a"]), {}, "needs this party's name: pass name=... or set PELLM_PARTY"),
        (("tcp://h:1", "a", None), {}, "needs this party's roster: pass roster=... or set PELLM_ROSTER"),
        (("tcp://h:1", "d", ROSTER), {}, r"Party 'd' is not in the roster \(a, b, c\)"),
        (("tcp://h:1", "a", ["a", "b", "a"]), {}, "names 'a' twice"),
        (("tcp://h:1", "a", ["a", "b/c"]), {}, "'b/c' is no party's name"),
        (("tcp://h:1", "a", ["a"]), {"PELLM_TLS_KEY": "k"}, "all three of PELLM_TLS_CERT"),
    ],
)
def test_what_is_missing_or_malformed_is_named(
    arguments: tuple[object, ...], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SeparateJobs.configured(*arguments, environ=environ)  # type: ignore[arg-type]


def test_the_certificate_is_the_partys_own() -> None:
    mine = tls_of("a")
    assert SeparateJobs("tcp://h:1", "a", ROSTER, tls=mine).tls == mine
    paths = {f"PELLM_TLS_{part}": getattr(mine, part.lower()) for part in ("CERT", "KEY", "CA")}
    assert SeparateJobs.configured("tcp://h:1", "a", ROSTER, environ=paths) == SeparateJobs(
        "tcp://h:1", "a", ROSTER, tls=mine
    )
    with pytest.raises(ValueError, match="is of 'a', but this party is 'b'"):
        SeparateJobs("tcp://h:1", "b", ROSTER, tls=mine)


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
        SeparateJobs("tcp://h:1", "a", ("a", "b", "c", "d"), quorum=quorum)


@pytest.mark.parametrize("field", ["round_timeout_s", "wait_s", "exchange_timeout_s", "heartbeat_ttl_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_times_are_positive(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* must be positive"):
        Membership(**{field: value})  # type: ignore[arg-type]


def test_on_party_loss_has_two_choices() -> None:
    with pytest.raises(ValueError, match="must be 'continue' or 'stop'"):
        Membership(on_party_loss="ignore")  # type: ignore[arg-type]
