"""The aggregation rules under real Trainers, parties as threads: what trains, rests, is kept and resumed."""

import copy
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lora_module import HEAD, A, B, Tuned, assert_same, building, differ
from party_threads import Classifier, Rounds, batches, data, fit_parties, quiet_trainer, refusals
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tolerances import assert_says_the_same
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from pellm_lightning import FederatedAveraging, FederatedCLI, Parameters, aggregation
from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    FrozenA,
    GeometricMedian,
    HeterogeneousRank,
    LowRankMean,
    Mean,
    Median,
    NormBound,
    ResidualMean,
    ShareA,
    Stacking,
    TrimmedMean,
)
from pellm_lightning.tasks import SaveAdapter

pytestmark = [
    # A resumed fit saves where the whole one did.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Lightning calls jsonargparse in a way that has gone out of use.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

RULES: dict[str, Aggregation | None] = {
    "default": None,
    "Mean": Mean(),
    "LowRankMean, two steps": LowRankMean("power", steps=2),
    "LowRankMean, exact": LowRankMean("exact"),
    "LowRankMean, balanced": LowRankMean("power", factorization="balanced"),
    "LowRankMean, svd": LowRankMean("exact", factorization="svd"),
    "FrozenA": FrozenA(),
    "Alternating": Alternating(),
    "ShareA": ShareA(),
    "ResidualMean": ResidualMean(),
    "Stacking": Stacking(),
    "HeterogeneousRank": HeterogeneousRank(solver="power"),
    "HeterogeneousRank, padded": HeterogeneousRank("zero_pad"),
}
ROBUST: dict[str, Aggregation] = {
    "NormBound": NormBound(),
    "GeometricMedian": GeometricMedian(),
    "Median, frozen A": Median(frozen_a=True),
    "TrimmedMean, mixing": TrimmedMean(mixing=1),
}
BASE_WRITING = ("ResidualMean", "Stacking")

# ---- every rule


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[Tuned, Rounds]]]:
    """Three uneven parties that train for six rounds under a rule, once for all tests."""

    @cache
    def train(name: str) -> list[tuple[Tuned, Rounds]]:
        def fit(party: int, federated: Any) -> tuple[Tuned, Rounds]:
            module, logger = Tuned(party), Rounds()
            trainer = quiet_trainer(
                root, [federated(aggregation=(RULES | ROBUST)[name])], max_epochs=6, logger=logger
            )
            trainer.fit(module, data((12, 4, 20)[party], seed=party))
            return module, logger

        root = tmp_path_factory.mktemp("trained")
        return fit_parties(3, fit)

    return train


@pytest.mark.parametrize("name", [*RULES, *ROBUST])
def test_every_rule_trains(trained: Any, name: str) -> None:
    for _, logger in trained(name):
        losses = [done["loss"] for done in logger.rounds]
        assert len(losses) == 6
        assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", [*RULES, *ROBUST])
def test_parties_end_with_what_they_share(trained: Any, name: str) -> None:
    (first, _), *others = trained(name)
    start = Tuned(0)
    for other, _ in others:
        if name == "ShareA":
            assert_same(first.of(A), other.of(A))
            assert differ(first.of(B, HEAD), other.of(B, HEAD))
        else:
            assert_same(first.of(""), other.of(""))
        assert_same(first.bases(), other.bases())
    weights = {key for key in start.bases() if key.endswith("weight")}
    moved = {key for key, value in start.bases().items() if not torch.equal(value, first.bases()[key])}
    assert moved == (weights if name in BASE_WRITING else set())


@pytest.mark.parametrize("name", RULES)
def test_the_deviation_is_logged_alike_at_all_parties(trained: Any, name: str) -> None:
    reports = [logger.rounds for _, logger in trained(name)]
    if name == "ShareA":  # no common product to deviate from
        assert not any("deviation" in done or "worst_deviation" in done for own in reports for done in own)
        return
    for key in ("deviation", "worst_deviation"):
        values = [[done[key] for done in own] for own in reports]
        assert values[0] == values[1] == values[2]
        assert len(values[0]) == 6
    for done in reports[0]:
        assert 0 <= done["deviation"] <= done["worst_deviation"]
        if name in ("FrozenA", "Alternating", *BASE_WRITING):
            # Exact up to the rounding of float32 factors and weights, 2^-24 of products of mixed signs.
            assert done["worst_deviation"] < 1e-5
    if name not in ("FrozenA", "Alternating", *BASE_WRITING):
        assert max(done["deviation"] for done in reports[0]) > 1e-3


def test_the_low_rank_mean_deviates_less_than_the_mean_of_factors(trained: Any) -> None:
    """In the first round all start alike, so what is to be approximated is the same for all."""
    first = {name: trained(name)[0][1].rounds[0]["deviation"] for name in RULES if name != "ShareA"}
    best = first["LowRankMean, exact"]
    assert first["LowRankMean, svd"] == pytest.approx(best, rel=1e-4)
    assert first["default"] == pytest.approx(best, rel=1e-6), "the default"
    assert best <= first["LowRankMean, two steps"] <= first["LowRankMean, balanced"] < first["Mean"]
    assert first["HeterogeneousRank, padded"] == pytest.approx(first["Mean"], rel=1e-4)


def test_without_lora_or_if_not_asked_for_there_is_no_deviation(tmp_path: Path) -> None:
    loggers = [Rounds() for _ in range(4)]

    def fit(party: int, federated: Any) -> None:
        plain = quiet_trainer(tmp_path, [federated()], max_epochs=1, logger=loggers[party])
        plain.fit(Classifier(seed=party), data(8, seed=party))
        options = {"aggregation": Mean(measure_deviation=False)}
        quiet = quiet_trainer(tmp_path, [federated(**options)], max_epochs=1, logger=loggers[2 + party])
        quiet.fit(Tuned(party), data(8, seed=party))

    fit_parties(2, fit)
    for logger in loggers:
        assert len(logger.rounds) == 1
        assert not any("deviation" in key for key in logger.metrics)


def test_one_party_alone_trains_to_the_bit_as_with_the_plain_mean(tmp_path: Path) -> None:
    """Where one party counts, its own factors are the result, whatever the gauge."""

    def fit(rule: Aggregation | None, party: int, federated: Any) -> dict[str, Tensor]:
        module = Tuned(0)
        callbacks = [federated(aggregation=rule, every_n_steps=2)]
        quiet_trainer(tmp_path, callbacks, max_epochs=3).fit(module, data(20, seed=5))
        return module.of("")

    ((mean,), *others) = [
        fit_parties(1, partial(fit, rule))
        for rule in (Mean(), None, LowRankMean("exact"), LowRankMean(factorization="balanced"))
    ]
    for (other,) in others:
        assert_same(mean, other)
    alone = Tuned(0)
    quiet_trainer(tmp_path, max_epochs=3).fit(alone, data(20, seed=5))
    # anchor - (anchor - x) is x again up to one rounding of each, which AdamW's steps may magnify.
    for key, value in alone.of("").items():
        torch.testing.assert_close(mean[key], value, rtol=0, atol=1e-5)


class Recording(Tuned):
    """Keeps what it would train with alone: its effective weights after its last local step."""

    local: list[Tensor]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.local = self.weights()


@pytest.mark.parametrize("name", [name for name in RULES if name != "ShareA"])
def test_a_party_that_goes_on_alone_keeps_what_it_learns(tmp_path: Path, name: str) -> None:
    """Party 1 is through after one epoch of the four, and answers party 0's rounds from then on."""

    def fit(party: int, federated: Any) -> tuple[Recording, list[float]]:
        module, logger = Recording(party), Rounds()
        callbacks = [federated(aggregation=RULES[name], quorum=1)]
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=4 - 3 * party, logger=logger)
        trainer.fit(module, data(8, seed=party))
        return module, [done["active_parties"] for done in logger.rounds]

    (first, active), (second, _) = fit_parties(2, fit)
    assert active == [2, 1, 1, 1]
    assert_same(first.of(""), second.of(""))
    assert_same(first.bases(), second.bases())
    for now, own in zip(first.weights(), first.local, strict=True):
        # Its weights are the mean of one: a few float32 roundings of numbers below 4.
        torch.testing.assert_close(now, own, rtol=0, atol=2e-6)


def test_a_party_that_goes_on_alone_takes_the_shared_a_along(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> Tuned:
        module = Tuned(party)
        callbacks = [federated(aggregation=ShareA(), quorum=1)]
        quiet_trainer(tmp_path, callbacks, max_epochs=4 - 3 * party).fit(module, data(8, seed=party))
        return module

    first, second = fit_parties(2, fit)
    assert_same(first.of(A), second.of(A))
    assert differ(first.of(B, HEAD), second.of(B, HEAD))


@pytest.mark.parametrize("name", [name for name in RULES if name != "ShareA"])
def test_a_party_whose_factors_are_nan_is_left_out_and_healed(tmp_path: Path, name: str) -> None:
    class Broken(Recording):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            if self.breaks and self.global_step == 3:  # in round 1, in which the A of Alternating trains
                next(p for key, p in self.trained().items() if (A if "Alt" in name else B) in key).data[0] = (
                    float("nan")
                )

    def fit(party: int, federated: Any) -> tuple[Broken, list[float]]:
        module, logger = Broken(party), Rounds()
        module.breaks = party == 1
        callbacks = [federated(aggregation=RULES[name], quorum=1)]
        quiet_trainer(tmp_path, callbacks, max_epochs=2, logger=logger).fit(module, data(8, seed=party))
        return module, [done["active_parties"] for done in logger.rounds]

    (first, active), (second, _) = fit_parties(2, fit)
    assert active == [2, 1]
    assert_same(first.of(""), second.of(""))
    assert_same(first.bases(), second.bases())
    for now, own in zip(first.weights(), first.local, strict=True):
        assert torch.isfinite(now).all()
        torch.testing.assert_close(now, own, rtol=0, atol=2e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "name", ["default", "LowRankMean, exact", "Alternating", "HeterogeneousRank", *BASE_WRITING]
)
def test_precisions(tmp_path: Path, name: str, precision: Any) -> None:
    def fit(party: int, federated: Any) -> tuple[Tuned, list[dict[str, float]]]:
        module, logger = Tuned(party), Rounds()
        callbacks = [federated(aggregation=RULES[name])]
        options: dict[str, Any] = {"max_epochs": 6, "logger": logger, "precision": precision}
        quiet_trainer(tmp_path, callbacks, **options).fit(module, data((12, 4)[party], seed=party))
        return module, logger.rounds

    (first, rounds), (second, _) = fit_parties(2, fit)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {value.dtype for value in {**first.of(""), **first.bases()}.values()} == {dtype}
    assert_same(first.of(""), second.of(""))
    assert_same(first.bases(), second.bases())
    assert rounds[-1]["loss"] < 0.8 * rounds[0]["loss"]
    if name in BASE_WRITING and dtype == torch.bfloat16:  # it holds 8 bits of a weight
        assert 1e-5 < rounds[0]["deviation"] < 0.1


def test_two_fits_with_one_callback_start_anew(tmp_path: Path) -> None:
    """The second fit's rounds begin with B again, and write into its own model's weights."""

    def fit(rule: Aggregation, party: int, federated: Any) -> list[tuple[dict[str, Tensor], list[Tensor]]]:
        callback, ends = federated(aggregation=rule), []
        for _ in range(2):
            module = Tuned(party)
            quiet_trainer(tmp_path, [callback], max_epochs=3).fit(module, data(8, seed=party))
            ends.append((module.of(""), module.weights()))
        return ends

    for rule in (Alternating(), ResidualMean(), Stacking()):
        for (first, weights), (again, weights_again) in fit_parties(2, partial(fit, rule)):
            assert_same(first, again)
            assert all(torch.equal(*both) for both in zip(weights, weights_again, strict=True))


# ---- what rests


class Steps(Callback):
    """Keeps copies of the factors, and of their optimizer state, after each optimizer step and round."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Tensor], dict[str, dict[str, Tensor]]]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._note(trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step > self.seen[-1][0]:
            self._note(trainer, module)

    def _note(self, trainer: Any, module: Tuned) -> None:
        (optimizer,) = trainer.optimizers
        state = {name: optimizer.state.get(p, {}) for name, p in module.trained().items()}
        self.seen.append((trainer.global_step, module.of(""), copy.deepcopy(state)))


class Manual(Tuned):
    def __init__(self, party: int, **config: Any) -> None:
        super().__init__(party, **config)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.on_before_zero_grad(optimizer)  # which Lightning calls in automatic optimization only
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        (Tuned, {}, 8),
        (Tuned, {"accumulate_grad_batches": 2}, 4),
        (Tuned, {"gradient_clip_val": 0.01}, 8),
        (Manual, {}, 8),
    ],
    ids=["plain", "accumulated", "clipped", "manual"],
)
def test_the_resting_factor_and_its_moments_do_not_move(
    tmp_path: Path, kind: type[Tuned], options: dict[str, Any], steps: int
) -> None:
    """AdamW would decay a parameter without a gradient of its own, and let its moments fade."""

    def fit(party: int, federated: Any) -> Steps:
        watch = Steps()
        callbacks = [federated(aggregation=Alternating(), every_n_steps=2), watch]
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=1, **options)
        trainer.fit(kind(party), data(32, seed=party))
        return watch

    for watch in fit_parties(2, fit):
        assert [step for step, _, _ in watch.seen] == list(range(steps + 1))
        for (step, before, state), (_, after, state_after) in zip(watch.seen, watch.seen[1:], strict=False):
            # Steps 0 and 1 belong to round 0, in which A rests; 2 and 3 to round 1, in which B does.
            rests, trains = (B, A) if step // 2 % 2 else (A, B)
            for key in before:
                assert torch.equal(before[key], after[key]) == (rests in key), (step, key)
                if rests in key:
                    assert state[key].keys() == state_after[key].keys()
                    assert all(torch.equal(state[key][own], state_after[key][own]) for own in state[key])
                if trains in key:
                    assert int(state_after[key]["step"]) == int(state[key].get("step", 0)) + 1
        _, _, last = watch.seen[-1]
        # Half of the steps each; the head trains in all of them.
        assert {int(own["step"]) for key, own in last.items() if HEAD not in key} == {steps // 2}
        assert {int(own["step"]) for key, own in last.items() if HEAD in key} == {steps}


class ManuallyClipped(Manual):
    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().manual_backward(loss, *args, **kwargs)
        self.clip_gradients(self.optimizers(), gradient_clip_val=1e-3)


@pytest.mark.parametrize(
    ("kind", "options"), [(Tuned, {"gradient_clip_val": 1e-3}), (ManuallyClipped, {})], ids=["", "manual"]
)
def test_what_rests_takes_no_part_of_the_clipped_norm(
    tmp_path: Path, kind: type[Tuned], options: dict[str, Any]
) -> None:
    class Watching(kind):  # type: ignore[misc,valid-type]
        def on_before_zero_grad(self, optimizer: Any) -> None:
            gradients = {key: p.grad for key, p in self.trained().items() if p.grad is not None}
            if gradients:
                self.norms.append(float(torch.stack([g.norm() for g in gradients.values()]).norm()))
                self.frozen_parts.append(
                    {word for word in (A, B) if not any(word in key for key in gradients)}
                )

    def fit(party: int, federated: Any) -> Watching:
        module = Watching(party)
        module.norms, module.frozen_parts = [], []
        callbacks = [federated(aggregation=Alternating(), every_n_steps=1)]
        quiet_trainer(tmp_path, callbacks, max_epochs=1, **options).fit(module, data(20, seed=party))
        return module

    for module in fit_parties(2, fit):
        # All gradients are longer than 1e-3, so clipping leaves just that to what trains.
        assert module.frozen_parts[:4] == [{A}, {B}, {A}, {B}]
        assert module.norms[:4] == pytest.approx([1e-3] * 4, rel=1e-3)


def test_frozen_a_stays_as_party_0_initialised_it(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> tuple[Tuned, list[str], list[dict[str, Tensor]]]:
        module, watch = Tuned(party), Steps()
        callbacks = [federated(aggregation=FrozenA(), every_n_steps=2), watch]
        quiet_trainer(tmp_path, callbacks, max_epochs=2).fit(module, data(12, seed=party))
        (_, _, state) = watch.seen[-1]
        return module, [key for key, own in state.items() if own], [values for _, values, _ in watch.seen]

    initial = Tuned(0).of(A)
    for module, with_state, seen in fit_parties(2, fit):
        assert len(seen) == 7
        for values in seen:
            assert_same({key: value for key, value in values.items() if A in key}, initial)
        assert {*with_state} == module.of(B, HEAD).keys()


# ---- the local optimizers' state


KEPT = {
    "default": (A, B, HEAD),
    "Mean": (A, B, HEAD),
    "LowRankMean, exact": (A, B, HEAD),
    "LowRankMean, balanced": (HEAD,),
    "LowRankMean, svd": (HEAD,),
    "ResidualMean": (A, B, HEAD),
    "Stacking": (HEAD,),
    "HeterogeneousRank": (HEAD,),
    "HeterogeneousRank, padded": (A, B, HEAD),
    "ShareA": (A, B, HEAD),
}


@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("name", KEPT)
def test_moments_go_where_their_coordinates_go(tmp_path: Path, name: str, state: Any) -> None:
    def fit(party: int, federated: Any) -> tuple[Tuned, Steps]:
        module, watch = Tuned(party), Steps()
        callback = federated(aggregation=RULES[name], inner_optimizer_state=state, every_n_steps=2)
        quiet_trainer(tmp_path, [callback, watch], max_epochs=1).fit(module, data(12, seed=party))
        return module, watch

    for module, watch in fit_parties(2, fit):
        _, (_, _, within), (_, _, after), (_, _, last) = watch.seen
        everything = module.of("").keys()
        kept = module.of(*KEPT[name]).keys() if state == "keep" else set()
        assert {key for key, own in within.items() if own} == everything
        assert {key for key, own in after.items() if own} == kept
        # A third step, and the last round after it.
        assert {int(own["step"]) for key, own in last.items() if own and key in kept} <= {3}


def test_the_moments_of_a_party_that_trains_on_alone_are_kept(tmp_path: Path) -> None:
    """Nothing was factorised anew where one party counts."""

    def fit(party: int, federated: Any) -> Steps:
        watch = Steps()
        callbacks = [federated(aggregation=LowRankMean(factorization="balanced"), quorum=1), watch]
        quiet_trainer(tmp_path, callbacks, max_epochs=3 - 2 * party).fit(Tuned(party), data(4, seed=party))
        return watch

    watch, _ = fit_parties(2, fit)
    steps = [
        {int(own.get("step", 0)) for key, own in state.items() if B in key} for _, _, state in watch.seen
    ]
    # Dropped after the round of two; after that party 0 counts alone.
    assert steps == [{0}, {0}, {1}, {2}]


# ---- what is refused


MOMENTUM = partial(torch.optim.SGD, lr=0.5, momentum=0.5)
HALF = partial(torch.optim.SGD, lr=0.5)


@pytest.mark.parametrize(
    ("name", "outer", "words"),
    [
        ("LowRankMean, balanced", MOMENTUM, "gives the factors other coordinates each round"),
        ("LowRankMean, svd", HALF, "must be SGD with lr=1 and no momentum"),
        ("Stacking", MOMENTUM, "gives the factors other coordinates each round"),
        ("ResidualMean", HALF, "must be SGD with lr=1 and no momentum"),
        ("HeterogeneousRank", MOMENTUM, "or the aggregation LowRankMean(factorization='procrustes')"),
        ("FrozenA", MOMENTUM, "freezes a factor, which the momentum of outer_optimizer=SGD("),
        ("Alternating", partial(torch.optim.Adam, lr=0.1), "would still move. Use SGD without momentum"),
    ],
)
def test_an_outer_optimizer_that_makes_no_sense_is_refused(
    tmp_path: Path, name: str, outer: Any, words: str
) -> None:
    def fit(party: int, federated: Any) -> None:
        callback = federated(aggregation=RULES[name], outer_optimizer=outer)
        quiet_trainer(tmp_path, [callback], max_epochs=1).fit(Tuned(party), data(8, seed=party))

    for told in refusals(fit_parties(2, fit, may_fail=True), ValueError):
        assert repr(RULES[name]) in told
        assert words in told


@pytest.mark.parametrize(
    ("name", "outer"), [("default", MOMENTUM), ("Alternating", HALF), ("Mean", MOMENTUM)]
)
def test_an_outer_optimizer_that_makes_sense_trains(tmp_path: Path, name: str, outer: Any) -> None:
    def fit(party: int, federated: Any) -> tuple[Tuned, list[float]]:
        module, logger = Tuned(party), Rounds()
        callback = federated(aggregation=RULES[name], outer_optimizer=outer)
        quiet_trainer(tmp_path, [callback], max_epochs=6, logger=logger).fit(module, data(8, seed=party))
        return module, [done["loss"] for done in logger.rounds]

    (first, losses), (second, _) = fit_parties(2, fit)
    assert_same(first.of(""), second.of(""))
    assert losses[-1] < 0.9 * losses[0]


def test_what_rests_for_good_needs_no_optimizer(tmp_path: Path) -> None:
    """With FrozenA people give their optimizer what trains; that A is in none is no reason for a warning."""

    class WithoutA(Tuned):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for name, p in self.trained().items() if A not in name], lr=0.1)

    def fit(party: int, federated: Any) -> Tuned:
        module = WithoutA(party)
        quiet_trainer(tmp_path, [federated(aggregation=FrozenA())], max_epochs=1).fit(
            module, data(8, seed=party)
        )
        return module

    first, second = fit_parties(2, fit)
    assert_same(first.of(""), second.of(""))


def test_parties_with_other_rules_are_told(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> None:
        callback = federated(aggregation=LowRankMean("power", steps=1 + party))
        quiet_trainer(tmp_path, [callback], max_epochs=1).fit(Tuned(party), data(8, seed=party))

    for error in fit_parties(2, fit, may_fail=True):
        assert (
            "Party 0 has aggregation=\"LowRankMean(solver='power', steps=1, factorization='procrustes')\""
            in str(error)
        )


def test_parties_with_other_scalings_are_told(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> None:
        module = Tuned(party, lora_alpha=4 + 4 * party)
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(module, data(8, seed=party))

    for error in fit_parties(2, fit, may_fail=True):
        # 4 / 2 and 8 / 2.
        assert (
            "'model.base_model.model.first.default' has scaling 2 (lora_alpha over rank) at party 0"
            in str(error)
        )
        assert "but 4 at party 1" in str(error)


# ---- what stays local


def said(caplog: pytest.LogCaptureFixture, party: int, words: str) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("pellm")]
    return [line for line in lines if line.startswith(f"[party {party}]") and words in line]


def test_share_a_announces_what_stays_and_exports_an_adapter_per_party(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")

    class OfParty(SaveAdapter):
        """Knows its party, which threads cannot learn from their environment."""

        def __init__(self, party: int) -> None:
            super().__init__("adapter-{party}")
            self.given = party

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.party = self.given

    def fit(party: int, federated: Any) -> Tuned:
        module = Tuned(party)
        callbacks = [federated(aggregation=ShareA()), OfParty(party)]
        quiet_trainer(tmp_path, callbacks, max_epochs=2).fit(module, data(8, seed=party))
        return module

    modules = fit_parties(2, fit)
    for party, module in enumerate(modules):
        # The two B, and weight and bias of the head.
        (local,) = said(caplog, party, "stay local")
        assert local == (
            f"[party {party}] 4 trainable parameters of its own stay local:"
            " model.base_model.model.first.lora_B.default.weight,"
            " model.base_model.model.head.modules_to_save.default.bias,"
            " model.base_model.model.head.modules_to_save.default.weight and 1 more"
        )
        assert said(caplog, party, "LoRA modules, aggregated by") == [
            f"[party {party}] 2 LoRA modules, aggregated by ShareA()"
        ]
        # A of 2 x 8 and 2 x 16: 48 scalars of 4 bytes.
        assert "48 of " in said(caplog, party, "leave a party")[0]
        fresh = Tuned(50)
        loaded = PeftModel.from_pretrained(
            fresh.model.unload(), str(tmp_path / f"adapter-{party}"), is_trainable=True
        )
        saved = {f"model.{name}": p.detach() for name, p in loaded.named_parameters() if p.requires_grad}
        assert_same(saved, module.of(""))


@pytest.mark.parametrize(
    ("patterns", "local"),
    [
        ({"parameters": Parameters(exclude=["*modules_to_save*"])}, (HEAD,)),
        ({"parameters": Parameters(include=["*first.lora_*"])}, ("second", HEAD)),
    ],
)
def test_what_patterns_leave_out_stays_local_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, patterns: dict[str, list[str]], local: tuple[str, ...]
) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")

    def fit(party: int, federated: Any) -> Tuned:
        module = Tuned(party)
        quiet_trainer(tmp_path, [federated(**patterns)], max_epochs=2).fit(module, data(8, seed=party))
        return module

    first, second = fit_parties(2, fit)
    assert differ(first.of(*local), second.of(*local))
    shared = first.of("").keys() - first.of(*local).keys()
    assert_same({key: first.of("")[key] for key in shared}, {key: second.of("")[key] for key in shared})
    for party in range(2):
        (line,) = said(caplog, party, "stay local")
        assert f" {len(first.of(*local))} trainable parameters of its own stay local: " in line
        assert sorted(first.of(*local))[0] in line


def test_nothing_of_a_compiled_model_is_called_local(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")

    def fit(party: int, federated: Any) -> Tuned:
        module = Tuned(party)
        module.model = torch.compile(module.model, backend="eager")
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(module, data(8, seed=party))
        return module

    first, second = fit_parties(2, fit)
    assert_same(first.of(""), second.of(""))
    for party in range(2):
        assert said(caplog, party, "2 LoRA modules")
        assert said(caplog, party, "stay local") == []


# ---- ranks of their own


RANKS: tuple[dict[str, Any], ...] = (
    {"r": 2, "lora_alpha": 4},
    {"r": 8, "lora_alpha": 4},
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
)
OF_RANKS = {
    "HeterogeneousRank": HeterogeneousRank(),
    "HeterogeneousRank, exact": HeterogeneousRank(solver="exact"),
    "HeterogeneousRank, svd": HeterogeneousRank(solver="exact", factorization="svd"),
    "HeterogeneousRank, padded": HeterogeneousRank("zero_pad"),
    "Stacking": Stacking(),
}


@pytest.mark.parametrize("name", OF_RANKS)
def test_parties_of_other_ranks_and_scalings_train_together(tmp_path: Path, name: str) -> None:
    def fit(party: int, federated: Any) -> tuple[Recording, list[dict[str, float]]]:
        module, logger = Recording(party, **RANKS[party]), Rounds()
        callbacks = [federated(aggregation=OF_RANKS[name])]
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=6, logger=logger)
        trainer.fit(module, data((12, 4, 20)[party], seed=party))
        return module, logger.rounds

    (first, reports), *others = results = fit_parties(3, fit)
    for party, (module, rounds) in enumerate(results):
        rank = RANKS[party]["r"]
        assert sorted(tuple(p.shape) for p in module.of(A).values()) == [(rank, 8), (rank, 16)]
        assert rounds[-1]["loss"] < 0.8 * rounds[0]["loss"]
        for done, as_reported in zip(rounds, reports, strict=True):
            assert done["deviation"] == as_reported["deviation"]
    for module, _ in others:
        assert_same(module.of(HEAD), first.of(HEAD))
        assert_same(module.bases(), first.bases())
    if name == "HeterogeneousRank, padded":
        return  # what it lacks is no best approximation of anything
    start = [value.double() for key, value in Tuned(0).bases().items() if key.endswith("weight")]
    for layer, base in enumerate(start):
        shares = (12 / 36, 4 / 36, 20 / 36)
        mean = sum(share * module.local[layer] for share, (module, _) in zip(shares, results, strict=True))
        singular = torch.linalg.svdvals(mean - base)
        for party, (module, _) in enumerate(results):
            away = float((module.weights()[layer] - mean).norm())
            best = float(singular[RANKS[party]["r"] :].norm())
            if name == "Stacking":
                assert away < 1e-5
            elif name == "HeterogeneousRank":  # one power iteration
                assert away < 3 * best + 1e-5
            else:
                assert away == pytest.approx(best, rel=1e-3, abs=1e-5)


# ---- checkpoints


class Saved:
    """A federation of two parties that saves after each epoch, with a round after every second."""

    def __init__(
        self, root: Path, rule: Aggregation | None, save_frozen: bool = True, ranks: Any = ({}, {})
    ) -> None:
        self.root, self.rule, self.save_frozen, self.ranks = root, rule, save_frozen, ranks

    def fit(self, epoch: int | None = None) -> list[tuple[Tuned, dict[str, Any], list[dict[str, float]]]]:
        """Fit for six epochs; ``epoch`` names the one after which to go on."""
        return fit_parties(2, partial(self._fit, epoch))

    def _fit(self, epoch: int | None, party: int, federated: Any) -> Any:
        folder = self.root / f"party-{party}"
        module, logger = Tuned(party if epoch is None else 70 + party, **self.ranks[party]), Rounds()
        callbacks = [
            federated(
                aggregation=self.rule, every_n_epochs=2, parameters=Parameters(save_frozen=self.save_frozen)
            ),
            ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1, enable_version_counter=False),
        ]
        trainer = quiet_trainer(self.root, callbacks, max_epochs=6, logger=logger, enable_checkpointing=True)
        loader = batches((4, 2, 3) if party else (2, 4, 1), seed=party)
        path = None if epoch is None else folder / f"epoch={epoch}.ckpt"
        trainer.fit(module, loader, ckpt_path=path)
        return module, trainer.optimizers[0].state_dict()["state"], logger.rounds


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], tuple[Saved, Any]]:
    """A federation that has been fitted, and what it came to; several tests resume it."""

    @cache
    def fitted(name: str, save_frozen: bool) -> tuple[Saved, Any]:
        federation = Saved(tmp_path_factory.mktemp("unbroken"), RULES[name], save_frozen)
        results = federation.fit()
        shutil.copytree(federation.root, federation.root / "copy")
        return federation, results

    return fitted


@pytest.mark.parametrize("save_frozen", [True, False], ids=["whole", "small"])
@pytest.mark.parametrize("epoch", [2, 3], ids=["within a round", "after a round"])
@pytest.mark.parametrize("name", RULES)
def test_a_resumed_federation_goes_on_to_the_bit(
    unbroken: Callable[[str, bool], tuple[Saved, Any]], name: str, epoch: int, save_frozen: bool
) -> None:
    """Rounds after epochs 1, 3 and 5 (from 0). After epoch 2 the A of Alternating is half way through."""
    federation, whole = unbroken(name, save_frozen)
    shutil.copytree(federation.root / "copy", federation.root, dirs_exist_ok=True)  # another may have resumed
    resumed = federation.fit(epoch)
    for (module, state, rounds), (again, state_again, rounds_again) in zip(whole, resumed, strict=True):
        assert_same(dict(module.state_dict()), dict(again.state_dict()))
        assert state.keys() == state_again.keys()
        for key, moments in state.items():
            assert_same(moments, state_again[key])
        left = 2 if epoch == 2 else 1
        assert len(rounds_again) == left
        for done, done_again in zip(rounds[-left:], rounds_again, strict=True):
            for key in ("round", "step", "weight", "loss", "update_norm", "distance"):
                assert done[key] == done_again[key]
            assert done.get("deviation") == done_again.get("deviation")


def test_a_resumed_federation_of_other_ranks_goes_on_to_the_bit(tmp_path: Path) -> None:
    federation = Saved(tmp_path, HeterogeneousRank(), ranks=RANKS[1:])
    for (module, _, rounds), (again, _, rounds_again) in zip(
        federation.fit(), federation.fit(2), strict=True
    ):
        assert_same(dict(module.state_dict()), dict(again.state_dict()))
        assert rounds[-1]["deviation"] == rounds_again[-1]["deviation"]


def test_small_checkpoints_hold_the_weights_that_rounds_write_into(tmp_path: Path) -> None:
    for name in ("Mean", *BASE_WRITING):
        federation = Saved(tmp_path / name, RULES[name], save_frozen=False)
        for party, (module, _, _) in enumerate(federation.fit()):
            saved = torch.load(federation.root / f"party-{party}" / "epoch=5.ckpt")["state_dict"]
            written = {key for key in module.bases() if key.endswith("weight")} if name != "Mean" else set()
            assert saved.keys() == module.of("").keys() | written


@pytest.mark.parametrize(
    ("rule", "difference"),
    [
        (ShareA(), "the first that differs is 'model.base_model.model.first.lora_B.default.weight'"),
        (Alternating(), "their order differs, as with another aggregation"),
    ],
    ids=repr,
)
def test_a_checkpoint_of_another_rule_is_refused_with_words(
    tmp_path: Path, rule: Aggregation, difference: str
) -> None:
    Saved(tmp_path, Mean()).fit()
    results = fit_parties(2, partial(Saved(tmp_path, rule)._fit, 3), may_fail=True)
    for told in refusals(results, ValueError):
        assert difference in told
        assert "Resume with the model, PEFT configuration, aggregation, include and exclude" in told


# ---- exports


class Language(LightningModule):
    """A tiny Llama with LoRA on its projections."""

    def __init__(self, base: Path, party: int) -> None:
        super().__init__()
        with building:
            model = LlamaForCausalLM.from_pretrained(base)
            torch.manual_seed(100 + party)
            config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
            self.model = get_peft_model(model.train(), config)

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, use_cache=False, bos_token_id=None, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def loading_is_over() -> Iterator[None]:
    """Wait for the threads of `from_pretrained`: they end a moment after it returns, as a leak would not."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)


@pytest.mark.usefixtures("loading_is_over")
@pytest.mark.parametrize("name", ["Mean", *BASE_WRITING])
def test_an_exported_adapter_comes_with_the_base_it_belongs_to(
    tmp_path: Path, llama: Path, name: str
) -> None:
    def fit(party: int, federated: Any) -> Language:
        module = Language(llama, party)
        callbacks = [federated(aggregation=RULES[name])] + ([] if party else [SaveAdapter()])
        ids = torch.randint(1, 24, (8, 6), generator=torch.Generator().manual_seed(party))
        loader = DataLoader(ids, batch_size=4, generator=torch.Generator())
        quiet_trainer(tmp_path, callbacks, max_epochs=3).fit(module, loader)
        return module

    module, _ = fit_parties(2, fit)
    folder = tmp_path / "adapter"
    assert (folder / "base").exists() == (name in BASE_WRITING)
    base = folder / "base" if name in BASE_WRITING else llama
    ids = torch.arange(24).view(2, 12)

    def logits(model: Any) -> Tensor:
        return model.eval()(input_ids=ids).logits.detach()

    def on(path: Path) -> PeftModel:
        return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(path), str(folder))

    expected = logits(module.model)
    # The configuration names the base, so that no one has to.
    for loaded in (on(base), AutoPeftModelForCausalLM.from_pretrained(folder)):
        assert_same(dict(loaded.named_parameters()), dict(module.model.named_parameters()))
        assert_says_the_same(logits(loaded), expected)
    if name in BASE_WRITING:
        assert (logits(on(llama)) - expected).abs().max() > 1e-3


# ---- the command line


class Commanded(Tuned):
    """What a command line builds."""

    def __init__(self, rank: int = 2, alpha: int = 4) -> None:
        super().__init__(0, r=rank, lora_alpha=alpha)


class Samples(LightningDataModule):
    """Samples without any to validate on."""

    def train_dataloader(self) -> DataLoader:
        return data(8, seed=0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., FederatedAveraging]:
    """Run `fit` with the given words in a new folder; return the callback."""
    monkeypatch.chdir(tmp_path)
    quiet = [
        "--seed_everything=false",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.max_epochs=2",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]

    def run(*words: str) -> FederatedAveraging:
        monkeypatch.setattr(sys, "argv", ["federate", "fit", *quiet, *words])
        cli = FederatedCLI(Commanded, Samples)
        (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, FederatedAveraging)]
        return callback

    return run


PATH = "--federated.aggregation=pellm_lightning.aggregation."
SETTING = "--federated.aggregation."
COMMANDS = {
    "Mean": ([PATH + "Mean"], "Mean()"),
    "LowRankMean": (
        [PATH + "LowRankMean", SETTING + "solver=exact", SETTING + "factorization=svd"],
        "LowRankMean(solver='exact', steps=1, factorization='svd')",
    ),
    "FrozenA": ([PATH + "FrozenA"], "FrozenA()"),
    "Alternating": ([PATH + "Alternating"], "Alternating()"),
    "ShareA": ([PATH + "ShareA"], "ShareA()"),
    "ResidualMean": ([PATH + "ResidualMean"], "ResidualMean()"),
    "Stacking": ([PATH + "Stacking", SETTING + "seed=3"], "Stacking(seed=3)"),
    "HeterogeneousRank": (
        [PATH + "HeterogeneousRank", SETTING + "solver=power", SETTING + "steps=2"],
        "HeterogeneousRank(method='low_rank', solver='power', steps=2, factorization='balanced')",
    ),
    "a name alone": (["--federated.aggregation=LowRankMean", SETTING + "steps=4"],
                     "LowRankMean(solver='exact', steps=4, factorization='procrustes')"),
    "null": (["--federated.aggregation=null"], "None"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_line_names_the_rule(command: Any, name: str) -> None:
    words, expected = COMMANDS[name]
    callback = command(*words)
    assert repr(callback.aggregation) == expected
    assert callback.state_dict()["aggregator"]["round"] == 2


NEEDS_OTHERS = {"GeometricMedian", "Krum", "Median", "MultiKrum", "NormBound", "TrimmedMean"}
"""Rules that one party alone cannot train by."""


def test_every_rule_has_a_command() -> None:
    public = [getattr(aggregation, name) for name in aggregation.__all__]
    rules = {rule.__name__ for rule in public if isinstance(rule, type) and issubclass(rule, Aggregation)}
    assert rules - {"Aggregation"} - NEEDS_OTHERS <= COMMANDS.keys()


@pytest.mark.parametrize("name", sorted(NEEDS_OTHERS))
def test_a_command_line_names_a_robust_rule(
    command: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(PATH + name, SETTING + "mixing=1", "--print_config")
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["federated"]["aggregation"]
    assert printed["class_path"] == f"pellm_lightning.aggregation.{name}"
    assert printed["init_args"]["mixing"] == 1


def test_a_yaml_names_the_rule_and_prints_it_again(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rule.yaml").write_text(
        """
        federated:
          aggregation:
            class_path: pellm_lightning.aggregation.HeterogeneousRank
            init_args: {method: low_rank, solver: exact, factorization: svd}
        """
    )
    with pytest.raises(SystemExit) as stopped:
        command("--config=rule.yaml", "--print_config")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["federated"]["aggregation"] == {
        "class_path": "pellm_lightning.aggregation.HeterogeneousRank",
        "init_args": {"method": "low_rank", "solver": "exact", "steps": 1, "factorization": "svd"}
        | {"measure_deviation": None},
    }
    (tmp_path / "printed.yaml").write_text(printed)
    callback = command("--config=printed.yaml")
    assert repr(callback.aggregation) == repr(HeterogeneousRank("low_rank", "exact", 1, "svd"))


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ([PATH + "LowRankMean", SETTING + "solver=fast"], ["solver", "fast", "'power'", "'exact'"]),
        ([PATH + "LowRankMean", SETTING + "factorization=best"], ["factorization", "best", "'procrustes'"]),
        ([PATH + "LowRankMean", SETTING + "steps=two"], ["steps", "two", "int"]),
        ([PATH + "LowRankMean", SETTING + "step=2"], ["step"]),
        (
            [PATH + "HeterogeneousRank", SETTING + "factorization=procrustes"],
            ["factorization", "procrustes", "'balanced'"],
        ),
        ([PATH + "LowrankMean"], ["LowrankMean"]),
        (["--federated.aggregation=2"], ["federated.aggregation", "2"]),
    ],
)
def test_a_wrong_value_is_named(
    command: Any, capsys: pytest.CaptureFixture[str], words: list[str], messages: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(*words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    for message in messages:
        assert message in error
    assert len(error.splitlines()) < 20, "the message must not be buried"


def test_a_value_out_of_range_is_told_as_by_the_rule(command: Any) -> None:
    with pytest.raises(ValueError, match="steps=0 must be an integer >= 1"):
        command(PATH + "LowRankMean", SETTING + "steps=0")
