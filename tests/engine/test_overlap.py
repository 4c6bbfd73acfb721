"""Rounds in the background: what lands, when, and what happens if it cannot."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import (
    Classifier,
    Rounds,
    ValidatedClassifier,
    data,
    fit_parties,
    quiet_trainer,
    run_parties,
)
from secure_exchange import masked
from torch import Tensor

from pellm_lightning import Aggregator, Federation, FederationError, Overlap
from pellm_lightning.aggregation import Alternating, LowRankMean, Mean, ResidualMean, Stacking
from pellm_lightning.callbacks.drift import FedProx
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"delay_steps": -1}, r"delay_steps=-1\) must be a whole number"),
        ({"delay_steps": 1.5}, r"delay_steps=1\.5\) must be a whole number"),
        ({"delay_steps": 1, "mix": 1.0}, r"mix=1\.0\) must be at least 0 and below 1"),
        ({"delay_steps": 1, "mix": -0.1}, r"mix=-0\.1\) must be at least 0"),
        ({"fragments": 0}, r"fragments=0\) must be a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(arguments: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Overlap(**arguments)


@pytest.mark.parametrize(
    ("rule", "mix", "words"),
    [
        (ResidualMean(), 0.0, "writes into the frozen weights"),
        (Stacking(), 0.0, "writes into the frozen weights"),
        (Alternating(), 0.0, "trains other factors after each round"),
        (LowRankMean(factorization="balanced"), 0.5, r"other coordinates each round, so mix=0\.5"),
    ],
)
def test_rules_that_cannot_land_later_are_refused(rule: Any, mix: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Overlap(2, mix).check(rule)


def test_rules_that_can_are_not() -> None:
    Overlap(2, 0).check(LowRankMean(factorization="balanced"))
    Overlap(2, 0.5).check(LowRankMean())


# ---- in a fit


class Slow(Callback):
    """Lets each step take so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


def fitted(tmp_path: Path, options: Mapping[str, Any], **trainer: Any) -> tuple[list[Tensor], list[Rounds]]:
    """Two parties, five steps an epoch: their last parameters, and what each round told."""
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> Tensor:
        module = ValidatedClassifier(seed=party)
        callback = federated(outer_optimizer=diloco, **options)
        quiet_trainer(tmp_path, [callback], logger=loggers[party], **trainer).fit(
            module, data(10, seed=party, batch_size=2), data(4, seed=9)
        )
        return module.vector()

    return fit_parties(2, fit), loggers


@pytest.mark.parametrize(
    ("options", "trainer", "landed"),
    [
        # Begun after steps 4 and 8, landed two later; the last round at the end.
        ({"every_n_steps": 4, "overlap": Overlap(2)}, {}, [6, 10, 10]),
        ({"every_n_steps": 5, "overlap": Overlap(0, mix=0)}, {}, [5, 10]),
        # The second begins at the very end, and lands there.
        ({"every_n_steps": 5, "overlap": Overlap(4)}, {}, [9, 10]),
        # An epoch of five is shorter than the delay: what is under way lands when the next begins.
        ({"every_n_epochs": 1, "overlap": Overlap(7)}, {"max_epochs": 3}, [10, 15, 15]),
        ({"every_n_epochs": 1, "overlap": Overlap(2)}, {"max_epochs": 3}, [7, 12, 15]),
        ({"every_n_steps": 4, "overlap": Overlap(3)}, {"max_epochs": -1, "max_steps": 6}, [6, 6]),
    ],
)
def test_rounds_land_after_their_delay(
    tmp_path: Path, options: Mapping[str, Any], trainer: dict[str, Any], landed: list[int]
) -> None:
    (first, second), loggers = fitted(tmp_path, options, **trainer)
    assert torch.equal(first, second), "parties end with the same bits"
    assert [logger.steps for logger in loggers] == [landed, landed]


def test_a_fit_without_delay_and_mixing_is_one_without_overlap(tmp_path: Path) -> None:
    plain, loggers = fitted(tmp_path, {"every_n_steps": 3})
    other, others = fitted(tmp_path, {"every_n_steps": 3, "overlap": Overlap(0, mix=0)})
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    for logger, same in zip(loggers, others, strict=True):
        assert [done["update_norm"] for done in logger.rounds] == [
            done["update_norm"] for done in same.rounds
        ]


def test_settings_of_the_overlap_must_be_the_same(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> None:
        callback = federated(every_n_steps=5, overlap=Overlap(1 + party))
        quiet_trainer(tmp_path, [callback]).fit(Classifier(), data(8, seed=party))

    errors = fit_parties(2, fit, may_fail=True)
    assert all("overlap" in str(error) for error in errors)


def test_what_lands_after_the_next_begins_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Overlap\(delay_steps=10, mix=0.5, fragments=1\) applies a round after the next"
    ):
        next(iter(fit_parties(1, lambda _, federated: federated(every_n_steps=10, overlap=Overlap(10)))))


def test_drift_corrections_are_refused(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> None:
        callbacks = [FedProx(0.1), federated(every_n_steps=5, overlap=Overlap(1))]
        quiet_trainer(tmp_path, callbacks).fit(Classifier(), data(8, seed=party))

    with pytest.raises(MisconfigurationException, match="with an overlap or fragments is not there yet"):
        fit_parties(1, fit)


def test_a_rule_that_cannot_land_later_stops_the_fit_before_it_begins(tmp_path: Path) -> None:
    class Writing(Mean):
        writes_base = True

    def fit(party: int, federated: Any) -> None:
        callback = federated(overlap=Overlap(1), aggregation=Writing())
        quiet_trainer(tmp_path, [callback]).fit(Classifier(), data(8, seed=party))

    with pytest.raises(MisconfigurationException, match="writes into the frozen weights"):
        fit_parties(1, fit)


def test_a_fit_that_fails_while_a_round_is_under_way_can_be_saved(tmp_path: Path) -> None:
    class Saving(Callback):
        def on_exception(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "failed.ckpt")

    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 5:
                raise OSError("the disk is full")
            return super().training_step(batch, batch_idx)

    def fit(party: int, federated: Any) -> Any:
        folder = tmp_path / str(party)
        callback = federated(every_n_steps=4, overlap=Overlap(3))
        trainer = quiet_trainer(folder, [Saving(), callback])
        with pytest.raises((OSError, FederationError)):
            trainer.fit((Classifier if party else Failing)(seed=party), data(40, seed=party))
        return torch.load(folder / "failed.ckpt", weights_only=True)

    for saved in fit_parties(2, fit):
        state = saved["callbacks"]["FederatedAveraging"]
        assert (state["under_way_since"] == 4) == (state["aggregator"]["pending"] is not None)


@pytest.mark.parametrize("overlap", [None, Overlap(1)])
def test_a_slow_party_does_not_idle_a_fast_one(tmp_path: Path, overlap: Overlap | None) -> None:
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> None:
        callbacks = [Slow(0.1 if party else 0.005), federated(every_n_seconds=0.3, overlap=overlap, quorum=1)]
        steps = {"max_epochs": -1, "max_steps": 6 if party else 80}
        loader = data(400, seed=party, batch_size=4)
        quiet_trainer(tmp_path, callbacks, logger=loggers[party], **steps).fit(Classifier(party), loader)

    fit_parties(2, fit)
    fast, slow = (logger.rounds[0] for logger in loggers)
    assert fast["step"] > 2 * slow["step"], "both came when the time was up"
    assert fast["weight"] + slow["weight"] == fast["total_weight"]
    assert fast["weight"] > 2 * slow["weight"], "each counts by its samples"
    assert fast["waited_seconds"] < 0.5, "it waited for all six steps of the slow one, 0.6 s"
