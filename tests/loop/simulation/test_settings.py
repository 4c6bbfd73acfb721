"""Who takes part in a round depends on the settings and its index only."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellm_lightning import Simulation


@settings(max_examples=40, deadline=None)
@given(
    parties=st.integers(1, 60),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
    round=st.integers(0, 500),
    availability=st.floats(0.3, 1.0),
    failure_rate=st.floats(0.0, 0.7),
)
def test_a_draw_has_its_size_and_somebody_trains(
    parties: int, share: float, seed: int, round: int, availability: float, failure_rate: float
) -> None:
    simulation = Simulation(parties, share, seed, None, availability, failure_rate)
    draw = simulation.draw(round)
    assert len(draw.parties) == simulation.places == len({*draw.parties})
    assert list(draw.parties) == sorted(draw.parties)
    assert draw.training
    assert draw.training <= {*draw.parties} <= {*range(parties)}
    assert draw == Simulation(parties, share, seed, None, availability, failure_rate).draw(round)
    if availability == 1 and failure_rate == 0:
        assert draw.training == {*draw.parties}


def test_draws_are_uniform_or_follow_the_weights() -> None:
    rounds = 3000
    alike = Simulation(num_parties=5, sampled=2)
    counts = Counter(party for r in range(rounds) for party in alike.draw(r).parties)
    # Each is drawn in 2/5 of the rounds: 1200 of 3000, with a standard deviation of 27.
    assert all(abs(counts[party] - 1200) < 120 for party in range(5))
    weighted = Simulation(num_parties=4, sampled=1, weights=[0, 1, 2, 5])
    counts = Counter(party for r in range(rounds) for party in weighted.draw(r).parties)
    assert counts[0] == 0
    assert [counts[party] / rounds for party in (1, 2, 3)] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.04)


def test_some_fail_and_some_cannot_be_drawn() -> None:
    simulation = Simulation(num_parties=10, sampled=10, availability=0.6, failure_rate=0.5)
    # Of ten that would be drawn six are available, and three of them do not fail.
    trained = sum(len(simulation.draw(r).training) for r in range(1000)) / 1000
    assert trained == pytest.approx(3.0, abs=0.2)


def test_parties_have_seeds_of_their_own() -> None:
    seeds = [
        Simulation(num_parties=1000, seed=seed).party_seed(party) for seed in (0, 1) for party in range(500)
    ]
    assert len({*seeds}) == 1000


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_parties": 0}, "num_parties=0"),
        ({"sampled": 11}, "sampled=11"),
        ({"sampled": 0}, "sampled=0"),
        ({"sampled": 1.5}, "sampled=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"availability": 0.0}, "availability=0.0"),
        ({"failure_rate": 1.0}, "failure_rate=1.0"),
        ({"memory_gb": -1.0}, "memory_gb=-1.0"),
        ({"weights": [1.0]}, "1 numbers for num_parties=10"),
        ({"weights": [1.0] * 9 + [-1.0]}, "at least 0"),
        ({"sampled": 3, "weights": [1.0] * 2 + [0.0] * 8}, "2 numbers above 0"),
    ],
)
def test_arguments_out_of_range(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Simulation(**({"num_parties": 10, "sampled": 3} | wrong))  # type: ignore[arg-type]


def test_a_number_and_a_share() -> None:
    assert Simulation(num_parties=1000, sampled=1).places == 1
    assert Simulation(num_parties=1000, sampled=1.0).places == 1000
    assert Simulation(num_parties=1000, sampled=0.0001).places == 1
