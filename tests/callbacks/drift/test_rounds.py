"""Drift corrections in whole federations: exchanges, resumes, LoRA, parties that are lost, and refusals."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drift_federations import ALL, Saved, each, summing, tuned
from job_threads import Act, Life, World, die
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lora_module import A, B, assert_same, differ
from party_threads import Classifier, Rounds, data, fit_parties, quiet_trainer, run_parties
from quadratic_parties import minimiser, sgd, train
from round_history import SIZE
from secure_exchange import masked
from torch import Tensor, nn

from pellm_lightning import Aggregator, Federation, FederationError
from pellm_lightning.aggregation import Alternating, FrozenA, HeterogeneousRank, LowRankMean, Mean, ShareA
from pellm_lightning.callbacks.dp_sgd import DPSGD
from pellm_lightning.callbacks.drift import SCAFFOLD, FedDyn, FedNova, FedProx
from pellm_lightning.comm import MismatchError
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues
from pellm_lightning.privacy import GaussianMechanism

# ---- exchanges


@each
def test_masked_sums_hide_what_crosses_beside(tmp_path: Path, name: str) -> None:
    plain = train(tmp_path, ALL[name], 4)
    np.testing.assert_allclose(train(tmp_path, ALL[name], 4, exchange=masked()), plain, rtol=1e-4, atol=1e-4)


def test_what_crosses_is_a_vector_or_a_number(tmp_path: Path, over_gloo: None) -> None:
    """The head has 51 parameters, 4 bytes each; N parties send 2 (N - 1) / N of what they sum."""

    def fit(correction: Callable[[], Callback] | None, party: int, federated: Any) -> list[float]:
        logger = Rounds()
        callbacks = [federated(), *([correction()] if correction else [])]
        trainer = quiet_trainer(tmp_path, callbacks, logger=logger, max_epochs=1)
        trainer.fit(Classifier(seed=party), data(8, seed=party))
        return [done["bytes_sent"] for done in logger.rounds]

    sent = {
        name: fit_parties(2, partial(fit, correction))[0][0] for name, correction in {"": None, **ALL}.items()
    }
    more = {name: sent[name] - sent[""] for name in ALL}
    assert more == {"FedProx": 0, "SCAFFOLD": 4 * 51, "FedNova": 4, "FedDyn": 4 * 51}


# ---- resume


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@each
def test_resume_is_exact(tmp_path: Path, name: str) -> None:
    saved = Saved(tmp_path, name)
    whole = saved.fit()
    for step in (2, 3, 7):  # before the first round, after it, in the middle of the third
        assert all(torch.equal(one, other) for one, other in zip(whole, saved.fit(step), strict=True))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "words"),
    [
        ("none", "FedProx", "saved without FedProx"),
        ("none", "SCAFFOLD", "saved without auxiliary vector than SCAFFOLD"),
        ("SCAFFOLD", "none", "saved with another auxiliary vector than plain averaging"),
    ],
)
def test_resuming_another_method_is_refused(
    tmp_path: Path, saved_by: str, resumed_by: str, words: str
) -> None:
    saved = Saved(tmp_path, saved_by)
    saved.fit()
    with pytest.raises((MisconfigurationException, ValueError, FederationError), match=words):
        saved.fit(4, name=resumed_by)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", ["FedProx", "FedNova"])
def test_resuming_without_what_a_party_has_for_itself_warns(tmp_path: Path, name: str) -> None:
    saved = Saved(tmp_path, name)
    saved.fit()
    with pytest.raises(UserWarning, match=f"add the following callbacks: .*{name}"):
        saved.fit(4, name="none")


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    corrections = [SCAFFOLD(), SCAFFOLD()]

    def fit(party: int, federated: Any) -> Tensor:
        module = Classifier(seed=party)
        trainer = quiet_trainer(tmp_path, [federated(), corrections[party]])
        trainer.fit(module, data(8 + 8 * party, seed=party))
        assert corrections[party].state_dict()["control"], "a checkpoint may be saved after the fit"
        return module.vector()

    first, again = fit_parties(2, fit), fit_parties(2, fit)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


# ---- LoRA


@each
@pytest.mark.parametrize("rule", [None, Mean(), FrozenA(), Alternating()])
def test_rules_that_average_factors(tmp_path: Path, name: str, rule: Any) -> None:
    results = fit_parties(2, lambda p, federated: tuned(tmp_path, rule, ALL[name](), p, federated))
    assert_same(results[0]["after"], results[1]["after"])
    before, after = results[0]["before"], results[0]["after"]
    assert all(torch.isfinite(value).all() for value in after.values())
    factors = {word: {n: after[n] for n in after if word in n} for word in (A, B)}
    assert differ({n: before[n] for n in factors[B]}, factors[B])
    if isinstance(rule, FrozenA):
        assert_same({n: before[n] for n in factors[A]}, factors[A])  # what rests is not corrected either


def test_a_resting_factor_stays_and_keeps_what_is_known_of_it(tmp_path: Path) -> None:
    """Alternating's rounds: B, A, B. In the second, no B may move, nor its control variates be forgotten."""
    held: dict[int, list[Any]] = {0: [], 1: []}

    class Watching(SCAFFOLD):
        def end_round(self, mean: Mapping[str, Tensor], *, counted: bool) -> None:
            super().end_round(mean, counted=counted)
            party = 0 if "0" in self.of else 1
            values = {n: p.detach().clone() for n, p in self._parameters.items()}
            held[party].append((values, {n: m.clone() for n, m in mean.items()}, dict(self._control)))

    def fit(party: int, federated: Any) -> None:
        correction = Watching()
        correction.of = str(party)
        tuned(tmp_path, Alternating(), correction, party, federated)

    fit_parties(2, fit)
    (_, c0, own0), (_, c1, own1), (_, c2, _) = held[0]
    (x0, _, _), (x1, _, _), _ = held[0]
    b = [name for name in c0 if B in name]
    a = [name for name in c0 if A in name]
    for name in b:
        assert c0[name].any()
        assert torch.equal(c0[name], c1[name])
        assert torch.equal(own0[name], own1[name])
        assert torch.equal(x0[name], x1[name])
        assert not torch.equal(c1[name], c2[name])
    for name in a:
        assert not c0[name].any()
        assert c1[name].any()
    for one, other in zip(held[0], held[1], strict=True):
        assert_same(one[1], other[1])


@pytest.mark.parametrize("rule", [LowRankMean(), HeterogeneousRank(), ShareA()])
def test_fedprox_goes_with_every_rule(tmp_path: Path, rule: Any) -> None:
    results = fit_parties(2, lambda p, federated: tuned(tmp_path, rule, FedProx(0.5), p, federated))
    factors = [{n: v for n, v in result["after"].items() if A in n} for result in results]
    assert_same(*factors)


@summing
@pytest.mark.parametrize("rule", [LowRankMean(), HeterogeneousRank()])
def test_rules_that_change_coordinates_are_refused(tmp_path: Path, name: str, rule: Any) -> None:
    def fit(party: int, federated: Any) -> Any:
        return tuned(tmp_path, rule, ALL[name](), party, federated)

    with pytest.raises(MisconfigurationException, match=r"SCAFFOLD, FedNova or FedDyn.*use FrozenA"):
        fit_parties(1, fit)


# ---- parties that are lost, fail, or come late


CARRIES = AuxiliaryTerms("Test()", vector=True, vector_coefficient=0.25)


def carrying(life: Life) -> None:
    """Let a party carry (index + 1) * (round + 1) everywhere, beside an update of zeros."""
    aggregator: Any = life.aggregator
    step = aggregator.step

    def steps(weight: float, loss: float | None = None) -> Any:
        value = (life.index + 1.0) * (aggregator.round + 1)
        done = step(weight, loss, AuxiliaryValues(vector={"w": torch.full_like(life.w, value)}))
        life.means.append((done.round, done.parties, aggregator.carried["w"].clone()))
        return done

    life.means = []
    aggregator.step = steps


def stays(life: Life) -> None:
    life.w.copy_(life.aggregator.global_vector)


@pytest.mark.parametrize("point", ["exchanging", "voting"])
def test_failed_attempts_leave_no_trace(world: Callable[..., World], point: str) -> None:
    w = world(3, rounds=4, quorum=2)
    faults: dict[str, dict[str, Act]] = {name: {"started": carrying} for name in w.roster}
    faults["p2"][f"{point}@2"] = die
    for name in w.roster:
        w.start(name, faults=faults[name], weight=1.0, auxiliary=CARRIES, train=stays)
    w.join()
    start = torch.randn(SIZE, generator=torch.Generator().manual_seed(77))  # of p0, which all took over
    for life in w.lives[:2]:
        # Means of 1, 2, 3 while three parties are there; of 1, 2 when p2 is gone.
        assert [number for number, _, _ in life.means] == [0, 1, 2, 3]
        assert [len(life.means[index][1]) for index in (0, -1)] == [3, 2]
        moved = torch.zeros(SIZE)
        for number, parties, mean in life.means:
            expected = (number + 1) * sum(party + 1 for party in parties) / len(parties)
            torch.testing.assert_close(mean, torch.full_like(mean, expected))
            moved += 0.25 * expected
        torch.testing.assert_close(life.w, start - moved, rtol=1e-5, atol=1e-5)
    assert torch.equal(w.lives[0].w, w.lives[1].w)


def test_who_comes_late_is_given_the_mean(world: Callable[..., World]) -> None:
    w = world(3, rounds=10**6, quorum=2, wait_s=1.0)
    late: list[Tensor] = []

    def begins(life: Life) -> None:
        assert life.aggregator is not None
        late.append(life.aggregator.carried["w"].clone())
        carrying(life)

    common: dict[str, Any] = {"weight": 1.0, "auxiliary": CARRIES, "train": stays}
    for name in ("p0", "p1"):
        w.start(name, faults={"started": carrying}, pace_s=0.05, **common)
    w.wait_for(2)
    w.start("p2", faults={"started": begins}, **common)
    w.until(lambda: w.counts("p2", since=2))
    w.finish()
    assert len({life.w.numpy().tobytes() for life in w.lives}) == 1
    (given,) = late
    # The mean of k and 2 k, in round k - 1.
    multiple = given[0].item() / 1.5
    assert multiple == round(multiple) >= 1
    assert torch.equal(given, torch.full_like(given, given[0].item()))
    means = {number: mean for life in w.lives for number, _, mean in life.means}
    assert torch.equal(means[round(multiple) - 1], given)


def test_who_does_not_count_keeps_its_memory(tmp_path: Path) -> None:
    """Party 1 overflows in round 1: it takes over the result, its control variate stays that of round 0."""
    seen: dict[int, list[Any]] = {0: [], 1: []}

    class Overflowing(Classifier):
        def __init__(self, party: int) -> None:
            super().__init__(seed=party)
            self.party = party

        def on_after_backward(self) -> None:
            if self.party == 1 and self.trainer.global_step == 3:
                self.head.weight.grad.fill_(math.nan)

    def fit(party: int, federated: Any) -> Tensor:
        correction = SCAFFOLD()
        end = correction.end_round

        def noted(mean: Mapping[str, Tensor], *, counted: bool) -> None:
            end(mean, counted=counted)
            seen[party].append((counted, correction._control["head.weight"].clone()))

        correction.end_round = noted  # type: ignore[method-assign]
        module = Overflowing(party)
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=2), correction], max_steps=6)
        trainer.fit(module, data(24, seed=party))
        return module.vector()

    vectors = fit_parties(2, fit)
    assert torch.equal(*vectors)
    assert torch.isfinite(vectors[0]).all()
    assert [counted for counted, _ in seen[1]] == [True, False, True]
    assert torch.equal(seen[1][0][1], seen[1][1][1])
    assert not torch.equal(seen[1][1][1], seen[1][2][1])
    assert all(torch.isfinite(error_feedback).all() for _, error_feedback in seen[0] + seen[1])


def test_a_vector_that_is_not_finite_does_not_count() -> None:
    def act(federation: Federation) -> tuple[Any, Tensor]:
        w = torch.zeros(4)
        aggregator = Aggregator(federation, {"w": w}, auxiliary=CARRIES)
        aggregator.start()
        value = math.inf if federation.party == 1 else 3.0
        report = aggregator.step(1.0, None, AuxiliaryValues(vector={"w": torch.full((4,), value)}))
        return report, aggregator.carried["w"].clone()

    for report, carried in run_parties(3, act):
        assert report.excluded == (1,)
        assert torch.equal(carried, torch.full((4,), 3.0))


# ---- refusals


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_coefficients_are_checked(value: float) -> None:
    for make in (FedProx, FedDyn):
        with pytest.raises(ValueError, match="must be a finite number"):
            make(value)
    with pytest.raises(ValueError, match="alpha=0 must be a finite number above 0"):
        FedDyn(0)


def test_parties_must_agree(tmp_path: Path) -> None:
    def fit(corrections: list[Callback | None], party: int, federated: Any) -> None:
        callbacks = [federated(), *filter(None, [corrections[party]])]
        quiet_trainer(tmp_path, callbacks).fit(Classifier(seed=party), data(8, seed=party))

    cases: list[tuple[list[Callback | None], str]] = [
        ([FedProx(0.1), FedProx(0.2)], r"drift correction='FedProx\(mu=0.1\)', party 1 has .*mu=0.2"),
        ([None, SCAFFOLD()], r"drift correction=None, party 1 has drift correction='SCAFFOLD\(\)'"),
    ]
    for pair, words in cases:
        with pytest.raises(MismatchError, match=words):
            fit_parties(2, partial(fit, pair))


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Custom(Classifier):
    """A Classifier with an optimizer of the test's choice."""

    def __init__(self, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.head)


def groups(head: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [head.weight]}, {"params": [head.bias], "lr": 0.5}], lr=0.1)


def momentum(head: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("corrections", "module", "options", "words"),
    [
        ([SCAFFOLD(), FedProx(0.1)], Classifier, {}, "2 drift corrections"),
        ([SCAFFOLD()], Manual, {}, "SCAFFOLD.* manual optimization"),
        ([SCAFFOLD(), DPSGD(1.0, 1.0)], Classifier, {}, "before DPSGD"),
        ([FedNova()], lambda: Classifier(optimizer="Adam"), {}, "not of Adam, which rescales"),
        ([FedNova()], lambda: Custom(groups), {}, "have different lr"),
        ([FedNova()], lambda: Custom(momentum), {}, "inner_optimizer_state='reset'"),
        ([FedProx(0.1)], lambda: Classifier(optimizer="LBFGS"), {}, "LBFGS computes several"),
        (
            [FedDyn(0.1)],
            Classifier,
            {"outer_optimizer": partial(torch.optim.SGD, lr=0.7)},
            "says itself where the global parameters go",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(
    tmp_path: Path,
    corrections: list[Callback],
    module: Callable[[], LightningModule],
    options: dict[str, Any],
    words: str,
) -> None:
    def fit(party: int, federated: Any) -> None:
        callbacks = [federated(weighting="uniform", **options), *corrections]
        quiet_trainer(tmp_path, callbacks).fit(module(), data(8, seed=party))

    with pytest.raises(MisconfigurationException, match=words):
        fit_parties(1, fit)


@summing
def test_sums_without_noise_are_refused(tmp_path: Path, name: str) -> None:
    private = GaussianMechanism(1.0, 1.0, distributed=False)

    def fit(correction: Callback, party: int, federated: Any) -> Tensor:
        module = Classifier(seed=party)
        callbacks = [federated(weighting="uniform", privacy=private), correction]
        quiet_trainer(tmp_path, callbacks).fit(module, data(8, seed=party))
        return module.vector()

    with pytest.raises(MisconfigurationException, match="differential privacy of a party does not cover"):
        fit_parties(1, partial(fit, ALL[name]()))
    fit_parties(2, lambda party, federated: fit(FedProx(0.1), party, federated))


def test_a_fused_optimizer_with_a_scaler_is_refused(tmp_path: Path) -> None:
    def fused(head: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(head.parameters(), lr=0.1, fused=True)

    def fit(party: int, federated: Any) -> None:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        trainer = quiet_trainer(tmp_path, [federated(), SCAFFOLD()], plugins=[plugin])
        trainer.fit(Custom(fused), data(8, seed=party))

    with pytest.raises(MisconfigurationException, match="fused SGD unscales gradients in its step"):
        fit_parties(1, fit)


def test_rounds_are_needed(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Add FederatedAveraging\(\)"):
        quiet_trainer(tmp_path, [FedProx(0.1)]).fit(Classifier(), data(8, seed=0))


def test_sparse_gradients_are_refused(tmp_path: Path) -> None:
    class Sparse(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.table(torch.tensor([1, 2])).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(party: int, federated: Any) -> None:
        quiet_trainer(tmp_path, [federated(), FedProx(0.1)]).fit(Sparse(), data(8, seed=party))

    with pytest.raises(MisconfigurationException, match=r"'table.weight' is sparse.*sparse=False"):
        fit_parties(1, fit)


def test_a_contribution_is_checked() -> None:
    def act(federation: Federation) -> None:
        aggregator = Aggregator(federation, {"w": torch.zeros(4)}, auxiliary=CARRIES)
        aggregator.start()
        with pytest.raises(ValueError, match=r"round 0 of Test\(\) without a contribution"):
            aggregator.step(1.0)
        with pytest.raises(ValueError, match=r"'w' has shape \[3\] there and \[4\] here"):
            aggregator.step(1.0, None, AuxiliaryValues(vector={"w": torch.zeros(3)}))
        with pytest.raises(ValueError, match="effective_steps=-1"):
            aggregator.step(1.0, None, AuxiliaryValues(effective_steps=-1, vector={"w": torch.zeros(4)}))

    run_parties(1, act)


def test_scaffold_with_an_outer_optimizer_rests_at_the_minimiser_too(tmp_path: Path) -> None:
    outer = partial(torch.optim.SGD, lr=0.7, momentum=0.3)
    end = train(tmp_path, SCAFFOLD, 60, outer_optimizer=outer, optimizer=sgd())[-1]
    np.testing.assert_allclose(end, minimiser(np.array([1, 3, 2]) / 6), atol=1e-4)
