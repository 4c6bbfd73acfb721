"""Metadata with which other parties join a quorum may be anything: it is read, or refused."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.comm import FaultyPartyError, FederationError
from pellm_lightning.engine.coordination import Header, Purpose
from pellm_lightning.engine.metrics import read_metrics

NUMBERS = st.integers() | st.floats() | st.just(10**400)  # JSON knows whole numbers of any length
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
SAID = st.sampled_from(
    ["purpose", "round", "weight", "fine", "tag", "exposed", "releases", "loss", "distance"]
)


@given(st.dictionaries(SAID, JSON))
def test_a_header_is_read_or_refused(words: dict[str, Any]) -> None:
    right: dict[str, Any] = {"purpose": 1, "round": 3, "weight": 2.5}
    try:
        header = Header.from_metadata("b", right | words)
    except FederationError:
        return
    assert math.isfinite(header.weight)
    assert header.weight >= 0
    assert isinstance(header.purpose, Purpose)
    assert all(isinstance(number, float) for number in (header.weight, header.loss, header.distance))


def test_a_header_says_what_was_said() -> None:
    words = {
        "purpose": 3,
        "round": 4,
        "weight": 2,
        "fine": False,
        "tag": "t",
        "exposed": ["a/1"],
        "releases": 5,
    }
    expected = Header(Purpose.DONE, 4, 2.0, False, "t", ("a/1",), 5, 0.5, 7.0, 9.0)
    assert Header.from_metadata("b", words | {"loss": 0.5, "distance": 7, "steps_left": 9}) == expected
    unsaid = Header.from_metadata("b", words)
    assert math.isnan(unsaid.loss)
    assert math.isnan(unsaid.distance)


def test_a_round_is_that_of_the_global_parameters() -> None:
    said = Header(Purpose.ROUND, 3, 2.5).to_metadata()
    assert Header.from_metadata("b", said, newest=3).round == 3
    assert Header.from_metadata("b", said, newest=7, behind=True).round == 3
    with pytest.raises(FaultyPartyError, match=r"Party b joined for round 3 with the .* round 7") as caught:
        Header.from_metadata("b", said, newest=7)
    assert caught.value.parties == ("b",)


@pytest.mark.parametrize("name", ["weight", "loss", "distance"])
def test_a_number_too_large_for_a_float_is_refused(name: str) -> None:
    with pytest.raises(FederationError, match="Party b joined with"):
        Header.from_metadata("b", {"purpose": 1, "round": 3, "weight": 2.5} | {name: 10**400})


@given(JSON)
def test_metrics_are_read_or_refused(told: Any) -> None:
    try:
        metrics = read_metrics("b", told)
    except FederationError:
        return
    assert all(isinstance(number, float) for both in metrics.values() for number in both)


def test_a_metric_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(FederationError, match="for its metrics"):
        read_metrics("b", {"val_loss": [10**400, 1]})
