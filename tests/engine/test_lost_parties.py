"""Parties that are lost around a round: the others hear of it soon, and nothing has changed."""

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from manual_rounds import SOON_S, bits, started
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Aggregator, Federation, RoundReport
from pellm_lightning.comm import MismatchError, PartyLostError
from pellm_lightning.engine.shared_updates import SharedUpdates


def test_a_party_that_dies_between_two_rounds() -> None:
    took: list[float] = []

    def act(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        aggregator.step(1)
        w += 1 + federation.party
        before = bits(w)
        if federation.party == 1:
            raise OSError("power cut")
        began = time.monotonic()
        try:
            aggregator.step(1)
        finally:
            took.append(time.monotonic() - began)
            assert bits(w) == before, "a failed round must leave the parameters as they were"
            assert aggregator.round == 1

    results = run_parties(3, act, may_fail=True)
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "Party 1 left" in str(results[party])
        assert "OSError: power cut" in str(results[party])
    assert max(took) < SOON_S


@pytest.mark.parametrize("handed_over", [0, 2])
def test_a_party_that_dies_in_the_middle_of_a_round(
    handed_over: int, monkeypatch: pytest.MonkeyPatch, small_pieces: None, over_gloo: None
) -> None:
    # It has met the others, and dies when so many buckets of its parameters are on their way.
    armed = threading.local()
    add_up = Federation.all_reduce_each_

    def failing(self: Federation, tensors: Iterable[Tensor]) -> None:
        def cut_short() -> Iterator[Tensor]:
            for index, tensor in enumerate(tensors):
                if index == handed_over and armed.yes and tensor.dtype is torch.float32:
                    raise OSError("power cut")
                yield tensor

        add_up(self, cut_short())

    monkeypatch.setattr(Federation, "all_reduce_each_", failing)
    assert_that_a_round_fails_whole(armed)


def test_a_party_that_dies_before_it_has_written_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    # It has met the others, and dies with its part of the next global vector half done.
    armed = threading.local()
    step = SharedUpdates._step

    def failing(self: SharedUpdates, *arguments: Any, **keywords: Any) -> Any:
        squares = step(self, *arguments, **keywords)
        if armed.yes:
            raise OSError("power cut")
        return squares

    monkeypatch.setattr(SharedUpdates, "_step", failing)
    assert_that_a_round_fails_whole(armed)


def assert_that_a_round_fails_whole(armed: threading.local) -> None:
    def act(federation: Federation) -> None:
        armed.yes = False
        w = torch.zeros(100)
        aggregator = started(federation, {"w": w})
        for _ in range(2):
            aggregator.step(1)
        w += 1 + federation.party
        before = bits(w)
        armed.yes = federation.party == 1
        try:
            aggregator.step(1)
        finally:
            assert bits(w) == before

    began = time.monotonic()
    results = run_parties(3, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    assert isinstance(results[1], OSError)
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "Party 1 left the federation while in round 2: OSError: power cut" in str(results[party])


class Breaking(torch.optim.SGD):
    """Fails in its second step."""

    def step(self, closure: Any = None) -> Any:
        if self.state:
            raise OSError("power cut")
        return super().step(closure)


def test_a_party_that_dies_while_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    # The others have the sum already and finish the round; they learn of it in the next one.
    def act(federation: Federation) -> list[RoundReport]:
        outer = Breaking if federation.party == 1 else torch.optim.SGD
        aggregator = Aggregator(
            federation,
            {"w": torch.zeros(4)},
            outer_optimizer=lambda p: outer(p, lr=0.5, momentum=0.9),
            config={"outer_optimizer": "SGD"},
        )
        aggregator.start()
        return [aggregator.step(1) for _ in range(3)]

    results = run_parties(3, act, may_fail=True)
    assert isinstance(results[1], OSError)
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "Party 1 left the federation while in round 1: OSError: power cut" in str(results[party])


@pytest.mark.parametrize("elsewhere", ["drained", "metrics"])
def test_a_party_that_dies_while_others_are_elsewhere(elsewhere: str) -> None:
    def act(federation: Federation) -> None:
        aggregator = started(federation, {"w": torch.zeros(4)})
        if federation.party == 1:
            time.sleep(0.2)
            raise OSError("power cut")
        if elsewhere == "drained":
            list(aggregator.drain())
        else:
            aggregator.mean({"loss": (1.0, 1)})

    began = time.monotonic()
    results = run_parties(3, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "OSError: power cut" in str(results[party])


def test_a_party_that_does_not_come_to_a_round() -> None:
    done = threading.Event()

    def act(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        aggregator.step(1)
        w += 1
        if federation.party == 1:
            done.wait(SOON_S)
        try:
            aggregator.step(1)
        finally:
            done.set()
            assert torch.equal(w, torch.ones(4))

    began = time.monotonic()
    results = run_parties(2, act, timeout_s=1, may_fail=True)
    assert time.monotonic() - began < SOON_S
    assert isinstance(results[0], PartyLostError)
    for words in ("round 1", "party 1", "1 s", "raise timeout_s"):
        assert words in str(results[0])
    assert isinstance(results[1], PartyLostError), "a party that comes too late must not go on alone"


def test_parties_in_different_rounds_stop_all() -> None:
    def act(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        state = aggregator._global_state  # as of a party whose schedule counts other steps
        state._counters = replace(state._counters, round=federation.party)
        w += 1
        with pytest.raises(MismatchError, match=r"party 0: 0, party 1: 1, party 2: 2"):
            aggregator.step(1)
        assert torch.equal(w, torch.ones(4))

    run_parties(3, act)
