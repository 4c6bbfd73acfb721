"""What releases cost, against dp-accounting's own composition and the figures of the literature."""

import json
import math
import sys
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from pellm_lightning.privacy import PrivacyAccountant, noise_multiplier_for

RUNS = st.lists(st.tuples(st.floats(0.01, 1e6), st.integers(1, 1000)), max_size=5)


def released(*runs: tuple[float, int]) -> PrivacyAccountant:
    filled = PrivacyAccountant()
    for multiplier, count in runs:
        for _ in range(count):
            filled.release(multiplier)
    return filled


def test_fifty_rounds_at_four() -> None:
    spent = released((4.0, 50))
    assert spent.epsilon(1e-5, "rdp") == pytest.approx(9.235, abs=5e-4)
    assert spent.epsilon(1e-5, "pld") == pytest.approx(8.596, abs=5e-4)


def test_calibrates_fifty_rounds_at_epsilon_eight() -> None:
    assert noise_multiplier_for(8, 1e-5, 50, "rdp") == pytest.approx(4.509, abs=5e-4)
    assert noise_multiplier_for(8, 1e-5, 50) == pytest.approx(4.244, abs=5e-4)


@pytest.mark.parametrize(
    "runs", [[(4.0, 50)], [(1.5, 3)], [(2.0, 1), (8.0, 30)], [(30.0, 1)], [(5.0, 2), (3.0, 2), (5.0, 1)]]
)
def test_equals_dp_accounting_release_by_release(runs: list[tuple[float, int]]) -> None:
    pld, rdp = PLDAccountant(), RdpAccountant()
    for multiplier, count in runs:
        event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(multiplier), count)
        pld.compose(event)
        rdp.compose(event)
    spent = released(*runs)
    # The accountant rounds the losses up to a grid of 1e-4, ours are in closed form: just below.
    exact = spent.epsilon(1e-5, "pld")
    assert exact == pytest.approx(pld.get_epsilon(1e-5), rel=1e-5)
    assert exact <= pld.get_epsilon(1e-5) + 1e-9
    assert spent.epsilon(1e-5, "rdp") == pytest.approx(rdp.get_epsilon(1e-5), rel=1e-9)


@settings(deadline=None)
@given(multiplier=st.floats(0.3, 50), rounds=st.integers(1, 500), log_delta=st.floats(-20, -2))
def test_closed_form(multiplier: float, rounds: int, log_delta: float) -> None:
    # delta(epsilon) of a Gaussian, mu = sqrt(T) / z (Balle and Wang 2018, theorem 8), in logarithms.
    delta, mu = 10**log_delta, math.sqrt(rounds) / multiplier
    epsilon = released((multiplier, rounds)).epsilon(delta)
    if epsilon > 0:
        from scipy.special import log_ndtr

        first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        assert math.exp(first) - math.exp(second) == pytest.approx(delta, rel=1e-3, abs=1e-13)


@settings(deadline=None)
@given(epsilon=st.floats(0.05, 50), rounds=st.integers(1, 1000), accountant=st.sampled_from(["pld", "rdp"]))
def test_calibration_spends_the_budget_and_no_more(epsilon: float, rounds: int, accountant: Any) -> None:
    multiplier = noise_multiplier_for(epsilon, 1e-5, rounds, accountant)
    spent = released((multiplier, rounds)).epsilon(1e-5, accountant)
    assert spent <= epsilon * (1 + 1e-9)
    assert spent == pytest.approx(epsilon, rel=1e-6)


def test_nothing_released_costs_nothing() -> None:
    assert PrivacyAccountant().epsilon(1e-5) == 0
    assert PrivacyAccountant().releases == 0


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_one_release_without_noise_costs_everything(accountant: Any) -> None:
    assert released((4.0, 3), (0.0, 1), (4.0, 1)).epsilon(1e-5, accountant) == math.inf
    assert released((1e-9, 1)).epsilon(1e-5, accountant) == math.inf


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_what_the_next_release_would_cost(accountant: Any) -> None:
    spent = released((4.0, 3))
    assert spent.epsilon_after(2.0, 1e-5, accountant) == released((4.0, 3), (2.0, 1)).epsilon(
        1e-5, accountant
    )
    assert spent == released((4.0, 3))


@settings(deadline=None)
@given(RUNS)
def test_round_trip(runs: list[tuple[float, int]]) -> None:
    spent, loaded = PrivacyAccountant(), released((1.0, 1))
    spent.load_state_dict({"releases": [list(run) for run in runs]})
    loaded.load_state_dict(json.loads(json.dumps(spent.state_dict())))
    assert loaded == spent
    assert loaded.releases == sum(count for _, count in runs)
    assert loaded.epsilon(1e-5) == spent.epsilon(1e-5)


def test_equal_releases_in_a_row_are_one_entry() -> None:
    assert released((4.0, 3), (2.0, 1), (4.0, 2)).state_dict() == {"releases": [[4.0, 3], [2.0, 1], [4.0, 2]]}
    merged = PrivacyAccountant()
    merged.load_state_dict({"releases": [[4, 3], [4.0, 2]]})
    assert merged == released((4.0, 5))


def test_a_loaded_ledger_goes_on() -> None:
    resumed = PrivacyAccountant()
    resumed.load_state_dict(released((4.0, 3)).state_dict())
    resumed.release(4.0)
    assert resumed == released((4.0, 4))


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        "releases",
        {},
        {"releases": None},
        {"releases": "4"},
        {"releases": {"4.0": 1}},
        {"releases": [4.0]},
        {"releases": ["ab"]},
        {"releases": [[4.0]]},
        {"releases": [[4.0, 1, 1]]},
        {"releases": [["4", 1]]},
        {"releases": [[True, 1]]},
        {"releases": [[math.nan, 1]]},
        {"releases": [[math.inf, 1]]},
        {"releases": [[-1.0, 1]]},
        {"releases": [[10**400, 1]]},
        {"releases": [[4.0, 0]]},
        {"releases": [[4.0, -1]]},
        {"releases": [[4.0, 1.0]]},
        {"releases": [[4.0, True]]},
        {"releases": [[4.0, 10**400]]},
        {"releases": [[4.0, 1], None]},
    ],
)
def test_refuses_a_peers_nonsense_and_keeps_its_own(state: Any) -> None:
    spent = released((4.0, 2))
    with pytest.raises(ValueError, match=r"An accountant's|A noise multiplier"):
        spent.load_state_dict(state)
    assert spent == released((4.0, 2))


@pytest.mark.parametrize("multiplier", [-0.1, math.nan, math.inf, "4", None])
def test_refuses_no_multiplier(multiplier: Any) -> None:
    with pytest.raises(ValueError, match="A noise multiplier must be"):
        PrivacyAccountant().release(multiplier)


@pytest.mark.parametrize("delta", [0, 1, -1, math.nan, "1e-5"])
def test_refuses_no_delta(delta: Any) -> None:
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        released((4.0, 1)).epsilon(delta)


def test_refuses_an_unknown_accountant() -> None:
    with pytest.raises(ValueError, match="accountant='gdp' must be one of"):
        released((4.0, 1)).epsilon(1e-5, "gdp")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("epsilon", "rounds", "words"),
    [(0, 1, "epsilon=0"), (math.nan, 1, "epsilon=nan"), (8, 0, "rounds=0"), (8, 1.5, r"rounds=1\.5")],
)
def test_calibration_refuses(epsilon: float, rounds: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        noise_multiplier_for(epsilon, 1e-5, rounds)


def test_calibration_says_what_cannot_be_bought() -> None:
    with pytest.raises(ValueError, match="more noise than any model could be trained with"):
        noise_multiplier_for(1e-9, 1e-12, 1)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install \"pellm-lightning\[privacy\]\""):
        released((4.0, 1)).epsilon(1e-5)
