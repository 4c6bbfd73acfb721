"""Bounds that a party applies to itself: what they are of what it knows of the last round."""

import pytest

from pellm_lightning.engine.sender_bounds import SenderBounds


def after(own: float, total: float) -> SenderBounds:
    """Bounds after a round in which this party had a weight of all."""
    bounds = SenderBounds(norm_factor=None, max_share=0.4)
    bounds.weight(own, num_participants=3)
    bounds.end_round(total, mean_norm=0.0)
    return bounds


def test_a_share_is_capped_by_the_others_weights() -> None:
    assert after(own=97.0, total=100.0).weight(97.0, 3) == pytest.approx(2.0)  # 2 of 2 + 3 are 0.4


def test_a_party_that_takes_over_a_round_without_it_is_capped() -> None:
    bounds = after(own=97.0, total=100.0)
    bounds.restore({"total_weight": 3.0, "mean_norm": 0.0})
    assert bounds.weight(97.0, 3) == pytest.approx(2.0)


def test_the_state_before_a_failed_attempt_caps_again() -> None:
    bounds = after(own=1.0, total=4.0)
    state = bounds.state()
    bounds.weight(97.0, 3)
    bounds.end_round(100.0, 0.0)
    bounds.restore(state)
    # Its own weight of that round is unknown now: all of the sum counts as the others'.
    assert bounds.weight(97.0, 3) == pytest.approx(4.0 * 0.4 / 0.6)


def test_what_did_not_count_is_no_own_weight() -> None:
    bounds = after(own=1.0, total=4.0)
    bounds.weight(97.0, 3)
    bounds.weight(0.0, 2)  # the attempt is made again, without this party
    bounds.end_round(3.0, 0.0)
    assert bounds.weight(97.0, 3) == pytest.approx(2.0)
