"""Rounds in the background, without a Trainer: what is applied, when, and what happens if it cannot."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from party_threads import (
    run_parties,
)
from secure_exchange import masked
from torch import Tensor

from pellm_lightning import Aggregator, Federation, FederationError, Overlap
from pellm_lightning.privacy import GaussianMechanism

SIZE = 50


def diloco(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


def noise(*seeds: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(seed * 1009**i for i, seed in enumerate(seeds)))
    return torch.randn(SIZE, generator=generator)


def train(x: Tensor, party: int, step: int) -> None:
    """One local step: towards a party's own target, with noise."""
    x.add_((noise(party) - x).mul_(0.05).add_(noise(party, step), alpha=0.01))


def overlapped(
    federation: Federation, overlap: Overlap, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Aggregator]:
    x = noise(federation.party, 99).to(dtype)
    options = {"outer_optimizer": diloco} | options
    return x, Aggregator(federation, {"x": x}, overlap=overlap, **options)


def trained(federation: Federation, delay: int, mix: float, rounds: int, steps: int) -> list[Tensor]:
    """Return a party's parameters after each of its steps; each round is applied ``delay`` steps later."""
    x, aggregator = overlapped(federation, Overlap(max(delay, 1), mix))
    aggregator.start()
    seen = []
    for step in range(1, rounds * steps + delay + 1):
        train(x, federation.party, step)
        if step % steps == 0 and step <= rounds * steps:
            aggregator.begin(1.0 + federation.party)
        if step > delay and step % steps == delay:
            aggregator.apply()
        seen.append(x.clone())
    return seen


def test_without_delay_and_mixing_it_is_diloco_to_the_bit() -> None:
    def blocking(federation: Federation) -> list[Tensor]:
        x = noise(federation.party, 99)
        aggregator = Aggregator(federation, {"x": x}, outer_optimizer=diloco)
        aggregator.start()
        seen = []
        for step in range(1, 41):
            train(x, federation.party, step)
            if step % 10 == 0:
                aggregator.step(1.0 + federation.party)
            seen.append(x.clone())
        return seen

    overlapping = run_parties(3, lambda federation: trained(federation, 0, 0.0, 4, 10))
    for mine, other in zip(run_parties(3, blocking), overlapping, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


# Streaming DiLoCo (arXiv:2501.18512, algorithm 2) for one fragment, in float64: the outer gradient is the
# last outer parameters minus those sent; tau steps later the outer ones are mixed into the local ones.
@pytest.mark.parametrize(("delay", "mix"), [(0, 0.0), (3, 0.0), (3, 0.5)])
def test_equals_streaming_diloco(delay: int, mix: float) -> None:
    parties, rounds, steps = 3, 4, 10
    x = [noise(0, 99).double() for _ in range(parties)]
    outer, momentum = x[0].clone(), torch.zeros(SIZE, dtype=torch.float64)
    for step in range(1, rounds * steps + delay + 1):
        for party in range(parties):
            train(x[party], party, step)
        if delay and step > delay and (step - delay) % steps == 0:
            x = [mix * local + (1 - mix) * outer for local in x]
        if step % steps == 0 and step <= rounds * steps:
            shares = [(1 + party) / 6 for party in range(parties)]
            gradient = sum(share * (outer - local) for share, local in zip(shares, x, strict=True))
            momentum = 0.9 * momentum + gradient
            outer = outer - 0.7 * (gradient + 0.9 * momentum)
            if not delay:
                x = [mix * local + (1 - mix) * outer for local in x]
    results = run_parties(parties, lambda f: trained(f, delay, mix, rounds, steps)[-1])
    for result, expected in zip(results, x, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_lands_on_the_global_vector() -> None:
    def act(federation: Federation) -> tuple[Tensor, Tensor]:
        x, aggregator = overlapped(federation, Overlap(1, mix=0), torch.bfloat16)
        aggregator.start()
        x += 0.25 * (1 + federation.party)
        aggregator.begin(1.0)
        x += 1
        aggregator.apply()
        return x.clone(), aggregator.global_vector.clone()

    for x, vector in run_parties(2, act):
        assert torch.equal(x, vector.bfloat16())


def test_training_does_not_wait_for_who_comes_late() -> None:
    late = threading.Event()

    def act(federation: Federation) -> float:
        x, aggregator = overlapped(federation, Overlap(5))
        aggregator.start()
        if federation.party:
            assert late.wait(20)
        aggregator.begin(1.0)
        x += 1
        late.set()
        time.sleep(2.0)  # of training
        assert aggregator.apply().stalled_seconds < 1.5, "it waited for the other one to have trained"
        return aggregator.step(1.0).total_weight

    assert run_parties(2, act) == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_sent_is_what_was_there_at_the_beginning(dtype: torch.dtype) -> None:
    def act(federation: Federation) -> Tensor:
        x, aggregator = overlapped(federation, Overlap(3, mix=0), dtype, outer_optimizer=torch.optim.SGD)
        aggregator.start()
        x.fill_(1 + federation.party)
        aggregator.begin(1.0)
        x.fill_(1000)
        aggregator.apply()
        return x.clone()

    start = noise(0, 99).to(dtype).double()
    for x in run_parties(3, act):  # SGD's own rate is 1e-3
        expected = (start + 1e-3 * (2 - start)).to(dtype)
        torch.testing.assert_close(x, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_a_party_with_nan_is_healed_whatever_is_mixed() -> None:
    def act(federation: Federation) -> tuple[Tensor, Tensor]:
        x, aggregator = overlapped(federation, Overlap(3, mix=0.5))
        aggregator.start()
        if federation.party == 1:
            x[3] = torch.nan
        aggregator.begin(1.0)
        report = aggregator.apply()
        assert report.excluded == (1,)
        return x.clone(), aggregator.global_vector.clone()

    x, vector = run_parties(3, act)[1]
    assert torch.equal(x, vector)


def test_masked_sums_in_the_background() -> None:
    def result(**options: Any) -> Callable[[Federation], Tensor]:
        def act(federation: Federation) -> Tensor:
            x, aggregator = overlapped(federation, Overlap(1, mix=0.5), **options)
            aggregator.start()
            for step in range(3):
                train(x, federation.party, step)
                aggregator.begin(1.0)
                train(x, federation.party, 10 + step)
                aggregator.apply()
            return x.clone()

        return act

    plain, hidden = run_parties(3, result()), run_parties(3, result(exchange=masked()))
    for a, b in zip(plain, hidden, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_differential_privacy_is_counted_in_the_background() -> None:
    private = GaussianMechanism(max_norm=1.0, noise_multiplier=1.0)

    def blocking(federation: Federation) -> list[float | None]:
        x = noise(federation.party, 99)
        aggregator = Aggregator(federation, {"x": x}, privacy=private, exchange=masked())
        aggregator.start()
        return [aggregator.step(1.0).epsilon for _ in range(4)]

    def act(federation: Federation) -> tuple[list[float | None], Tensor]:
        x, aggregator = overlapped(federation, Overlap(1), privacy=private, exchange=masked())
        aggregator.start()
        spent = []
        for step in range(3):
            train(x, federation.party, step)
            aggregator.begin(1.0)
            train(x, federation.party, 10 + step)
            spent.append(aggregator.apply().epsilon)
        return [*spent, aggregator.step(1.0).epsilon], x.clone()

    (spent, x), *others = run_parties(3, act)
    assert spent == run_parties(3, blocking)[0]
    assert all(told == spent and torch.equal(other, x) for told, other in others)


def test_resumed_under_way_it_lands_as_if_nothing_had_happened() -> None:
    def act(federation: Federation) -> None:
        x, aggregator = overlapped(federation, Overlap(2, mix=0.25))
        aggregator.start()
        train(x, federation.party, 1)
        aggregator.begin(1.0)
        train(x, federation.party, 2)
        state, saved = aggregator.state_dict(), x.clone()
        report = aggregator.apply()
        again = saved.clone()
        resumed = Aggregator(federation, {"x": again}, overlap=Overlap(2, 0.25), outer_optimizer=diloco)
        resumed.load_state_dict(state)
        assert not resumed.start()
        assert torch.equal(again, saved), "it has not landed yet"
        assert replace(resumed.apply(), stalled_seconds=report.stalled_seconds) == report
        assert torch.equal(again, x)
        train(again, federation.party, 3)
        train(x, federation.party, 3)
        assert resumed.step(1.0).update_norm == aggregator.step(1.0).update_norm
        assert torch.equal(again, x)

    run_parties(2, act)


def test_metrics_and_checkpoints_wait_for_the_round() -> None:
    def act(federation: Federation) -> tuple[dict[str, float], int]:
        _, aggregator = overlapped(federation, Overlap(2))
        aggregator.start()
        aggregator.begin(1.0)
        mean = aggregator.mean({"loss": (float(federation.party), 1.0)})
        round = aggregator.state_dict()["round"]
        aggregator.apply()
        return mean, round

    assert run_parties(2, act) == [({"loss": 0.5}, 1)] * 2


def test_who_is_through_takes_over_what_the_others_make() -> None:
    def act(federation: Federation) -> Tensor:
        x, aggregator = overlapped(federation, Overlap(1, mix=0.5))
        aggregator.start()
        for step in range(1 + federation.party):
            train(x, federation.party, step)
            aggregator.begin(1.0)
            train(x, federation.party, 10 + step)
            aggregator.apply()
        aggregator.step(1.0)
        assert len(list(aggregator.drain())) == 2 - federation.party
        return x.clone()

    first, second, third = run_parties(3, act)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_a_failure_in_the_background_is_raised_where_it_lands() -> None:
    def act(federation: Federation) -> str:
        _, aggregator = overlapped(federation, Overlap(2))
        aggregator.start()
        if federation.party == 1:
            federation.abort("out of memory")
            return ""
        aggregator.begin(1.0)
        deadline = time.monotonic() + 10
        while not aggregator.background.failed and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(FederationError) as caught:
            aggregator.apply()
        assert not aggregator.background.failed
        aggregator.state_dict()  # told once; what remains can be saved
        return str(caught.value)

    assert "out of memory" in run_parties(2, act, may_fail=True)[0]


def test_a_state_is_saved_though_the_round_under_way_has_failed() -> None:
    def act(federation: Federation) -> None:
        _, aggregator = overlapped(federation, Overlap(2))
        aggregator.start()
        before = aggregator.state_dict()
        aggregator.begin(1.0)
        if federation.party == 1:
            federation.abort("out of memory")
        state = aggregator.state_dict()
        assert (state["round"], state["pending"]) == (0, None)
        assert torch.equal(state["global"], before["global"])
        assert aggregator.background.failed
        with pytest.raises(FederationError):
            aggregator.apply()

    failed = run_parties(2, act, may_fail=True)
    assert not any(isinstance(error, AssertionError) for error in failed), failed


def test_an_interrupted_wait_does_not_forget_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(federation: Federation) -> None:
        _, aggregator = overlapped(federation, Overlap(2))
        aggregator.start()
        go_on = threading.Event()
        step = aggregator.federation.enter
        aggregator.federation.enter = lambda phase: (go_on.wait(10), step(phase))  # type: ignore
        aggregator.begin(1.0)
        with monkeypatch.context() as patch:
            patch.setattr(Future, "result", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                aggregator.apply()
        with pytest.raises(RuntimeError, match="before the last was applied"):
            aggregator.begin(1.0)
        go_on.set()
        assert aggregator.apply().round == 0

    run_parties(1, act)


def test_waiting_for_metrics_counts_as_standing_still() -> None:
    def act(federation: Federation) -> float:
        _, aggregator = overlapped(federation, Overlap(2))
        aggregator.start()
        if federation.party:
            time.sleep(0.5)
        aggregator.begin(1.0)
        aggregator.mean({})
        return aggregator.apply().stalled_seconds

    assert run_parties(2, act)[0] > 0.4


def test_who_lands_in_time_and_who_does_not_resume_from_no_other_state() -> None:
    def act(federation: Federation) -> None:
        x, aggregator = overlapped(federation, Overlap(2))
        aggregator.start()
        aggregator.begin(1.0)
        state = aggregator.state_dict()
        with pytest.raises(ValueError, match="with a round in progress"):
            Aggregator(federation, {"x": x}, outer_optimizer=diloco).load_state_dict(state)
        with pytest.raises(RuntimeError, match="before the last was applied"):
            next(aggregator.drain())
        aggregator.apply()

    run_parties(1, act)


def test_one_round_at_a_time() -> None:
    def act(federation: Federation) -> None:
        _, aggregator = overlapped(federation, Overlap(2))
        aggregator.start()
        with pytest.raises(RuntimeError, match=r"No round of party 0 is running\. Call begin"):
            aggregator.apply()
        aggregator.begin(1.0)
        with pytest.raises(RuntimeError, match="Party 0 begins a round before the last was applied"):
            aggregator.begin(1.0)
        aggregator.apply()

    run_parties(1, act)
