"""The mechanism's noise adds up to that of the guarantee, and what it cannot keep it refuses."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from scipy import stats

from pellm_lightning.privacy import AdaptiveClipping, GaussianMechanism, Noise, PrivacyAccountant


@settings(deadline=None)
@given(
    counting=st.integers(1, 50),
    colluders=st.integers(0, 49),
    multiplier=st.floats(0.01, 100),
    max_norm=st.floats(1e-6, 1e6),
)
def test_distributed_noise_outlasts_the_colluders(
    counting: int, colluders: int, multiplier: float, max_norm: float
) -> None:
    mechanism = GaussianMechanism(max_norm, multiplier, colluders=colluders)
    if colluders >= counting:
        with pytest.raises(ValueError, match="know all the noise"):
            mechanism.noise_std(counting, max_norm)
        return
    std = mechanism.noise_std(counting, max_norm)
    # Variances add up: those of the honest parties alone give (z C)^2.
    assert math.sqrt((counting - colluders) * std**2) == pytest.approx(multiplier * max_norm)


def test_local_noise_is_all_of_it_at_each_party() -> None:
    mechanism = GaussianMechanism(0.5, 3.0, distributed=False)
    assert mechanism.noise_std(1, 0.5) == mechanism.noise_std(8, 0.5) == 1.5


def test_noise_follows_the_norm_of_the_round() -> None:
    mechanism = GaussianMechanism(0.5, 3.0, colluders=0)
    assert mechanism.noise_std(9, 0.25) == pytest.approx(3.0 * 0.25 / 3)


def test_the_sum_of_real_draws_has_the_noise_of_the_guarantee() -> None:
    parties, size, max_norm = 5, 1 << 16, 0.25
    mechanism = GaussianMechanism(max_norm, 2.0, colluders=2)
    shares = [Noise().add_(torch.zeros(size), mechanism.noise_std(parties, max_norm)) for _ in range(parties)]
    honest = torch.stack(shares[2:]).double().sum(0)
    variance = float(honest.square().mean()) / (2.0 * max_norm) ** 2
    low, high = (stats.chi2.ppf(p, size) / size for p in (5e-10, 1 - 5e-10))
    assert low < variance < high


def test_without_noise_it_only_clips() -> None:
    mechanism = GaussianMechanism(1.0, 0.0, adaptive=AdaptiveClipping())
    assert mechanism.noise_std(1, 1.0) == 0
    assert mechanism.bit_noise_std(1) == 0
    accountant = PrivacyAccountant()
    accountant.release(mechanism.noise_multiplier)
    assert mechanism.epsilon(accountant) == math.inf


def test_noise_on_bits_is_distributed_like_that_on_updates() -> None:
    adaptive = AdaptiveClipping(bit_std=3.0)
    assert GaussianMechanism(1.0, 2.0, adaptive=adaptive, colluders=1).bit_noise_std(10) == 1.0
    assert GaussianMechanism(1.0, 2.0, adaptive=adaptive, distributed=False).bit_noise_std(10) == 3.0
    assert GaussianMechanism(1.0, 2.0).bit_noise_std(10) == 0


def test_stops_before_the_budget_is_exceeded() -> None:
    # z = 4: 50 rounds cost 8.596, so 49 cost less and 51 more.
    mechanism, accountant = GaussianMechanism(1.0, 4.0, max_epsilon=8.6), PrivacyAccountant()
    while mechanism.within_budget(accountant):
        accountant.release(4.0)
    assert accountant.releases == 50
    assert mechanism.epsilon(accountant) == pytest.approx(8.596, abs=5e-4)


def test_without_a_budget_there_is_no_end() -> None:
    accountant = PrivacyAccountant()
    accountant.release(0.0)
    assert GaussianMechanism(1.0, 4.0).within_budget(accountant)


def test_the_accountant_is_the_one_asked_for() -> None:
    accountant = PrivacyAccountant()
    for _ in range(50):
        accountant.release(4.0)
    assert GaussianMechanism(1.0, 4.0, accountant="rdp").epsilon(accountant) == pytest.approx(9.235, abs=5e-4)


def test_representation_has_every_setting() -> None:
    # Compared between parties: each of these must differ from the first.
    settings: list[dict[str, Any]] = [
        {},
        {"max_norm": 2.0},
        {"noise_multiplier": 2.0},
        {"distributed": False},
        {"colluders": 2},
        {"adaptive": AdaptiveClipping()},
        {"adaptive": AdaptiveClipping(target_quantile=0.4)},
        {"adaptive": AdaptiveClipping(learning_rate=0.1)},
        {"adaptive": AdaptiveClipping(bit_std=2.0)},
        {"delta": 1e-6},
        {"max_epsilon": 3.0},
        {"accountant": "rdp"},
    ]
    words = {repr(GaussianMechanism(**{"max_norm": 1.0, "noise_multiplier": 1.0} | s)) for s in settings}
    assert len(words) == len(settings)


def test_comes_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--privacy", type=GaussianMechanism)
    config = parser.parse_string(
        """
        privacy:
          class_path: pellm_lightning.privacy.GaussianMechanism
          init_args:
            max_norm: 0.1
            noise_multiplier: 4
            colluders: 2
            adaptive:
              class_path: pellm_lightning.privacy.AdaptiveClipping
              init_args: {target_quantile: 0.3}
            max_epsilon: 8
            accountant: rdp
        """
    )
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its older name
    built = instantiate(config).privacy
    assert built.noise_std(6, 0.1) > 0.4 / math.sqrt(4)
    assert built.adaptive.target_quantile == 0.3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_norm": 0.0}, "max_norm=0.0 must be between"),
        ({"max_norm": -1.0}, "max_norm=-1.0 must be between"),
        ({"max_norm": math.nan}, "max_norm=nan must be between"),
        ({"max_norm": math.inf}, "max_norm=inf must be between"),
        ({"max_norm": "1"}, "max_norm='1' must be a number"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0 must be from 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan must be from 0"),
        ({"noise_multiplier": True}, "noise_multiplier=True must be a number"),
        ({"colluders": -1}, "colluders=-1 must be an integer"),
        ({"colluders": 1.5}, r"colluders=1\.5 must be an integer"),
        ({"delta": 0.0}, r"delta=0\.0 must be above 0"),
        ({"delta": 1.0}, r"delta=1\.0 must be above 0 and below 1"),
        ({"max_epsilon": 0.0}, r"max_epsilon=0\.0 must be a finite number"),
        ({"max_epsilon": math.inf}, "max_epsilon=inf must be a finite number"),
        ({"max_epsilon": 1.0, "noise_multiplier": 0.0}, "cannot be kept with noise_multiplier=0"),
        ({"accountant": "gdp"}, "accountant='gdp' must be one of 'pld', 'rdp'"),
        ({"adaptive": AdaptiveClipping(bit_std=0.5)}, r"bit_std=0\.5 .* must be above half"),
    ],
)
def test_refuses(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GaussianMechanism(**{"max_norm": 1.0, "noise_multiplier": 1.0} | settings)


def test_noise_needs_a_party() -> None:
    with pytest.raises(ValueError, match="num_participants=0"):
        GaussianMechanism(1.0, 1.0).noise_std(0, 1.0)
