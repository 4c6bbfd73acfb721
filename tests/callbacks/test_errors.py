"""Bad input at one party: every party stops in seconds with an error that names party, thing and cure."""

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import (
    Classifier,
    Rounds,
    ValidatedClassifier,
    batches,
    data,
    fit_parties,
    linear,
    quiet_trainer,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pellm_lightning import FederationError, Parameters


def errors_of(
    tmp_path: Path,
    options: Sequence[dict[str, Any]],
    modules: Sequence[Any] | None = None,
    loaders: Sequence[Any] | None = None,
    *,
    changed: bool = False,
    **trainer: Any,
) -> list[BaseException]:
    """Fit with each party's callback options, module and data; all must fail, soon, with nothing changed."""
    num_parties = len(options)

    def fit(party: int, federated: Any) -> None:
        module = Classifier(seed=party) if modules is None else modules[party]
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        loader = data(8, seed=party) if loaders is None else loaders[party]
        try:
            quiet_trainer(tmp_path, [federated(**options[party])], **trainer).fit(module, loader)
        finally:
            after = dict(module.named_parameters())
            if not changed:
                assert all(torch.equal(p, after[name]) for name, p in before.items()), "a parameter changed"

    started = time.monotonic()
    errors = fit_parties(num_parties, fit, may_fail=True)
    assert time.monotonic() - started < 10, "the others waited for a timeout"
    assert all(isinstance(error, Exception) for error in errors), errors
    return errors


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"every_n_steps": 2},
            {"every_n_steps": 3},
            "Party 0 has every_n_steps=2, party 1 has every_n_steps=3. Give all parties the same",
        ),
        (
            {"every_n_epochs": 2},
            {"every_n_steps": 2},
            "Party 0 has every_n_epochs=2, party 1 has every_n_epochs=None. Give all parties the same",
        ),
        (
            {"weighting": "samples"},
            {"weighting": 2.0},
            "Party 0 has weighting='samples', party 1 has weighting='a number'",
        ),
        (
            {"inner_optimizer_state": "keep"},
            {"inner_optimizer_state": "reset"},
            "Party 0 has inner_optimizer_state='keep', party 1 has inner_optimizer_state='reset'",
        ),
        (
            {},
            {"on_nonfinite": "raise"},
            "Party 0 has on_nonfinite='exclude', party 1 has on_nonfinite='raise'",
        ),
        (
            {"outer_optimizer": partial(torch.optim.SGD, lr=0.7)},
            {"outer_optimizer": partial(torch.optim.Adam, lr=0.7)},
            "party 1 has outer_optimizer='Adam(",
        ),
        (
            {"parameters": Parameters(include=["*.weight"])},
            {"parameters": Parameters(include=["*.bias"])},
            "Party 1 trains parameter 'head.bias', party 0 does not (1 parameters at party 0, 1 at party 1)."
            " Give both the same model, the same PEFT configuration and the same include and exclude",
        ),
        (
            {},
            {"parameters": Parameters(exclude=["*.bias"])},
            "Party 0 trains parameter 'head.bias', party 1 does not",
        ),
    ],
)
def test_different_settings(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    for error in errors_of(tmp_path, [first, second]):
        assert isinstance(error, FederationError)
        assert message in str(error)


def test_settings_of_a_third_party(tmp_path: Path) -> None:
    for error in errors_of(tmp_path, [{}, {}, {"every_n_epochs": 2}]):
        assert "Party 0 has every_n_epochs=None, party 2 has every_n_epochs=2" in str(error)


def test_different_shapes_dtypes_and_bases(tmp_path: Path) -> None:
    wide, half, other = Classifier(), Classifier(), Classifier()
    wide.head = linear(16, 4, seed=0)
    half.head.to(torch.bfloat16)
    with torch.no_grad():
        other.base.weight[3, 2] += 1
    cases = {
        "Parameter 'head.bias' is float32 of shape [3] at party 0 but float32 of shape [4] at party 1": wide,
        "Parameter 'head.bias' is float32 of shape [3] at party 0 but bfloat16 of shape [3] at party 1": half,
        "The frozen base model of party 1 is not that of party 0: the first tensor that differs is"
        " 'base.weight'": other,
    }
    for message, module in cases.items():
        for error in errors_of(tmp_path, [{}, {}], [Classifier(), module]):
            assert message in str(error)


def test_a_different_base_may_be_allowed(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        if party:
            module.base.weight.mul_(2)
        quiet_trainer(tmp_path, [federated(parameters=Parameters(check_frozen=False))]).fit(
            module, data(8, seed=party)
        )
        return module.vector()

    first, second = fit_parties(2, fit)
    assert torch.equal(first, second)


class AllOptimized(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_nothing_trainable(tmp_path: Path) -> None:
    frozen = AllOptimized().requires_grad_(False)
    other, own = errors_of(tmp_path, [{}, {}], [Classifier(), frozen])
    assert isinstance(own, MisconfigurationException | ValueError)
    assert "Party 1: " in str(own)
    assert "No parameter of the module requires a gradient" in str(own)
    assert "Add a PEFT adapter" in str(own)
    assert isinstance(other, FederationError)
    assert "Party 1 left the federation" in str(other)
    assert "No parameter of the module requires a gradient" in str(other)


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    other, own = errors_of(tmp_path, [{}, {"parameters": Parameters(include=["lora"])}])
    assert "Party 1: The include pattern 'lora' matches none of the 2 trainable parameters" in str(own)
    assert "Party 1 left the federation" in str(other)
    assert "pattern 'lora'" in str(other)


def test_no_samples_anywhere(tmp_path: Path) -> None:
    class Still(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.head.parameters(), lr=0.0)

    modules = [Still(seed=0), Still(seed=0)]
    for error in errors_of(tmp_path, [{"weighting": 0.0}] * 2, modules):
        assert isinstance(error, FederationError)
        assert "No party has weight above 0 in round 0" in str(error)
        assert "check the data of each party" in str(error)


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
@pytest.mark.parametrize("empty", ["dataset", "limit"])
def test_a_party_with_nothing_to_train(tmp_path: Path, empty: str, caplog: pytest.LogCaptureFixture) -> None:
    none = DataLoader(TensorDataset(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)))

    def fit(party: int, federated: Any) -> None:
        module = Classifier(seed=party)
        before = module.vector()
        trainer = quiet_trainer(
            tmp_path, [federated()], limit_train_batches=0 if party and empty == "limit" else 1.0
        )
        try:
            trainer.fit(module, none if party and empty == "dataset" else data(8, seed=party))
        finally:
            assert torch.equal(module.vector(), before)

    started = time.monotonic()
    other, own = fit_parties(2, fit, may_fail=True)
    assert time.monotonic() - started < 10
    assert isinstance(other, FederationError)
    assert "Party 1 left the federation" in str(other)
    assert "it has no training batches" in str(other)
    # Lightning takes a fit without batches for done, so this party is told by a warning.
    assert own is None
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("[party 1] ")
    assert "it has no training batches" in warning


class Failing(ValidatedClassifier):
    def __init__(self, seed: int, hook: str | None) -> None:
        super().__init__(seed)
        self.fails_in = hook

    def maybe_fail(self, hook: str) -> None:
        if hook == self.fails_in:
            raise ArithmeticError(f"broken {hook}")

    def setup(self, stage: str) -> None:
        self.maybe_fail("setup")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.maybe_fail("configure_optimizers")
        return super().configure_optimizers()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 1:
            self.maybe_fail("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.maybe_fail("validation_step")
        super().validation_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self.maybe_fail("on_train_end")


@pytest.mark.parametrize("hook", ["setup", "configure_optimizers", "training_step", "validation_step"])
def test_an_exception_at_one_party_is_told_to_all(tmp_path: Path, hook: str) -> None:
    def fit(party: int, federated: Any) -> None:
        module = Failing(party, hook if party == 1 else None)
        quiet_trainer(tmp_path, [federated()]).fit(module, data(8, seed=party), data(4, seed=9))

    started = time.monotonic()
    first, failed, last = fit_parties(3, fit, may_fail=True)
    assert time.monotonic() - started < 10
    assert isinstance(failed, ArithmeticError)
    for other in (first, last):
        assert isinstance(other, FederationError)
        assert "Party 1 left the federation" in str(other)
        assert f"ArithmeticError: broken {hook}" in str(other)
        assert "resume all parties from their last checkpoints" in str(other)


def test_an_exception_after_the_last_round_harms_nobody(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Failing(party, "on_train_end" if party == 1 else None)
        quiet_trainer(tmp_path, [federated()]).fit(module, data(8, seed=party), data(4, seed=9))
        return module.vector()

    first, failed = fit_parties(2, fit, may_fail=True)
    assert isinstance(first, torch.Tensor)
    assert isinstance(failed, ArithmeticError)


def test_after_a_failed_fit_the_same_callbacks_fit_again(tmp_path: Path) -> None:
    callbacks: list[Any] = [None, None]

    def fit(fails: bool, party: int, federated: Any) -> torch.Tensor:
        callbacks[party] = callbacks[party] or federated()
        module = Failing(party, "training_step" if fails and party else None)
        quiet_trainer(tmp_path, [callbacks[party]]).fit(module, data(8, seed=party), data(4, seed=9))
        return module.vector()

    store = dist.HashStore()
    assert all(
        isinstance(e, Exception) for e in fit_parties(2, partial(fit, True), store=store, may_fail=True)
    )
    first, second = fit_parties(2, partial(fit, False), store=store)
    assert torch.equal(first, second)


def test_after_a_failed_fit_one_that_is_over_at_once_lets_nobody_wait(tmp_path: Path) -> None:
    callbacks: list[Any] = [None, None]

    def fit(fails: bool, party: int, federated: Any) -> None:
        callbacks[party] = callbacks[party] or federated()
        module = Failing(party, "training_step" if fails and party else None)
        trainer = quiet_trainer(
            tmp_path, [callbacks[party]], limit_train_batches=1.0 if fails or party == 0 else 0
        )
        trainer.fit(module, data(8, seed=party), data(4, seed=9))

    store = dist.HashStore()
    fit_parties(2, partial(fit, True), store=store, may_fail=True)
    started = time.monotonic()
    other, _ = fit_parties(2, partial(fit, False), store=store, may_fail=True)
    assert time.monotonic() - started < 10
    assert "it has no training batches" in str(other)


# ---- NaN and infinity


class Poisoned(Classifier):
    """Its parameters hold a bad value after the local step with the given number, counted from 0."""

    def __init__(self, seed: int, step: int, value: float = math.nan) -> None:
        super().__init__(seed, optimizer="SGD")
        self.step, self.value = step, value

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.global_step == self.step:
            with torch.no_grad():
                self.head.weight[1, 2] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_party_with_bad_values_is_left_out_and_healed(
    tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = [Rounds() for _ in range(3)]

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Poisoned(party, 0 if party == 1 else -1, value)
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=1)], max_epochs=2, logger=loggers[party])
        trainer.fit(module, batches([party + 2], seed=party))
        return module.vector()

    first, *others = fit_parties(3, fit)
    assert torch.isfinite(first).all()
    assert all(torch.equal(first, other) for other in others)
    # 2 + 4 samples without party 1's 3, then all 9 again.
    assert [done["active_parties"] for done in loggers[0].rounds] == [2, 3]
    assert [done["total_weight"] for done in loggers[0].rounds] == [6, 9]
    assert [done["weight"] for done in loggers[1].rounds] == [0, 3]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert all("Round 0: the parameters of party 1 hold NaN or infinity" in text for text in warnings)
    (own,) = [text for text in warnings if text.startswith("[party 1]")]
    assert "'head.weight'" in own
    assert "Lower that party's learning rate" in own


def test_a_party_poisoned_through_its_gradients_counts_again(tmp_path: Path) -> None:
    """NaN gradients poison Adam's moments, too: healed parameters alone would be NaN after the next step."""

    class BadBatch(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.global_step == 0 and self.bad else loss

    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = BadBatch(seed=party, optimizer="Adam")
        module.bad = party == 1
        trainer = quiet_trainer(
            tmp_path, [federated(every_n_steps=1, quorum=1)], max_epochs=1, logger=loggers[party]
        )
        trainer.fit(module, data(12, seed=party))
        return module.vector()

    first, second = fit_parties(2, fit)
    assert torch.equal(first, second)
    assert [done["active_parties"] for done in loggers[0].rounds] == [1, 2, 2]


@pytest.mark.parametrize(
    ("bad", "options", "who"),
    [
        ({0, 1}, {}, "party 0, 1"),
        ({1}, {"on_nonfinite": "raise"}, "party 1"),
        ({0}, {"on_nonfinite": "raise"}, "party 0"),
    ],
)
def test_bad_values_everywhere_or_not_allowed_stop_all(
    tmp_path: Path, bad: set[int], options: dict[str, Any], who: str
) -> None:
    at_the_round: list[torch.Tensor | None] = [None, None]

    class Remembering(Poisoned):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            at_the_round[self.party] = self.vector()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Remembering(party, 0 if party in bad else -1)
        module.party = party
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=1, **options)])
        try:
            trainer.fit(module, data(8, seed=party))
        finally:
            torch.testing.assert_close(module.vector(), at_the_round[party], rtol=0, atol=0, equal_nan=True)
        return module.vector()

    for error in fit_parties(2, fit, may_fail=True):
        assert isinstance(error, FederationError)
        assert f"Round 0: the parameters of {who} hold NaN or infinity" in str(error)
        assert "No parameter was changed. Lower that party's learning rate" in str(error)


def test_gradients_that_overflow_are_no_reason_to_hang(tmp_path: Path) -> None:
    """A loss of infinity is reported for nobody but does not stop the round."""

    class Infinite(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            return loss + math.inf if self.bad else loss

    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Infinite(seed=party)
        module.bad = party == 1
        quiet_trainer(tmp_path, [federated()], max_epochs=1, logger=loggers[party]).fit(
            module, data(8, seed=party)
        )
        return module.vector()

    first, second = fit_parties(2, fit)
    assert torch.equal(first, second)
    # Only party 0's loss is a number.
    assert all(math.isfinite(logger.rounds[0]["loss"]) for logger in loggers)
