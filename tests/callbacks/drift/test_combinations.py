"""Drift corrections together with privacy, masked sums, LoRA's rules, and outer learning rates by round."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drift_federations import ALL, Saved, each, summing, tuned
from job_threads import Life, World, die
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lora_module import A, B, assert_same, differ
from lora_oracles import adapter
from message_transcript import Message, metadata_of, tapped
from party_threads import Classifier, data, fit_parties, quiet_trainer, run_parties
from quadratic_parties import CURVATURES, LR, MINIMISERS, SHARES, STEPS, train
from round_history import SIZE
from secure_exchange import masked
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from pellm_lightning import Aggregator, Federation, FederationError, RoundReport
from pellm_lightning.aggregation import Alternating, ShareA
from pellm_lightning.callbacks.dp_sgd import DPSGD
from pellm_lightning.callbacks.drift import FedDyn
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues
from pellm_lightning.privacy import GaussianMechanism

PARAMETERS = 200
scheduled = pytest.mark.parametrize("name", ["FedProx", "SCAFFOLD", "FedNova"])
"""FedDyn says itself where the global parameters go."""
FADING = partial(ExponentialLR, gamma=0.8)


# ---- differential privacy of a record


class Keeps(Callback):
    """Keeps the gradients as DPSGD has left them, step by step."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.steps.append([p.grad.clone() for p in module.head.parameters()])


class Replays(Callback):
    """Puts gradients that were kept into the place of the module's own."""

    def __init__(self, steps: list[list[Tensor]]) -> None:
        self.steps = iter(steps)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        for parameter, grad in zip(module.head.parameters(), next(self.steps), strict=True):
            parameter.grad = grad.clone()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@each
def test_after_record_level_all_that_leaves_follows_from_noisy_gradients(tmp_path: Path, name: str) -> None:
    """Other records with the same noisy gradients give the same bits: no more of the data gets through."""

    def fit(before: list[list[Callback]], seed: int, party: int, federated: Any) -> Any:
        module, correction, given = Classifier(seed=party), ALL[name](), []
        contribution = correction.contribution

        def noted() -> AuxiliaryValues:
            given.append(contribution())
            return given[-1]

        correction.contribution = noted  # type: ignore[method-assign]
        callbacks = [federated(every_n_steps=4, weighting="uniform"), *before[party], correction]
        quiet_trainer(tmp_path, callbacks).fit(module, data(24, seed=seed + party))
        return module.vector(), given

    kept = [Keeps(), Keeps()]
    private = fit_parties(2, partial(fit, [[DPSGD(1.0, 0.5), keeps] for keeps in kept], 0))
    replayed = fit_parties(2, partial(fit, [[Replays(keeps.steps)] for keeps in kept], 100))
    assert torch.equal(private[0][0], private[1][0])
    for (vector, given), (other, again) in zip(private, replayed, strict=True):
        assert torch.equal(vector, other)
        assert len(given) == 3, "12 steps"
        for one, two in zip(given, again, strict=True):
            assert one.effective_steps == two.effective_steps
            assert_same(dict(one.vector), dict(two.vector))


# ---- differential privacy of a party


@summing
def test_a_round_without_a_trainer_refuses_sums_without_noise(name: str) -> None:
    def act(federation: Federation) -> None:
        Aggregator(
            federation,
            {"w": torch.zeros(4)},
            privacy=GaussianMechanism(1.0, 1.0, distributed=False),
            auxiliary=ALL[name]().auxiliary,
        )

    with pytest.raises(ValueError, match="differential privacy of a party does not cover"):
        run_parties(1, act)


def test_fedprox_adds_nothing_to_a_private_round() -> None:
    """Without noise, so that rounds can be compared; what is given beside the update stays at home."""

    def act(auxiliary: AuxiliaryTerms | None, federation: Federation) -> tuple[Tensor, int]:
        w = torch.zeros(PARAMETERS)
        privacy = GaussianMechanism(1.0, 0.0, distributed=False)
        aggregator = Aggregator(federation, {"w": w}, privacy=privacy, auxiliary=auxiliary)
        aggregator.start()
        w += 1.0 + federation.party
        given = AuxiliaryValues(effective_steps=7.0, vector={"w": torch.ones(PARAMETERS)})
        return w, aggregator.step(1.0, None, given).bytes_sent

    for (x, sent), (same, as_much) in zip(
        run_parties(2, partial(act, ALL["FedProx"]().auxiliary)),
        run_parties(2, partial(act, None)),
        strict=True,
    ):
        assert torch.equal(x, same)
        assert sent == as_much


# ---- masked sums


def sums_of(messages: list[Message]) -> list[Message]:
    return [m for m in messages if not m.values.is_floating_point() and m.values.numel() >= PARAMETERS]


@summing
def test_all_that_crosses_a_masked_exchange_is_masked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Vectors of one repeated number would show themselves, as extents would among who comes to meet."""
    messages = tapped(monkeypatch)
    auxiliary = ALL[name]().auxiliary

    def act(federation: Federation) -> tuple[int, dict[str, Tensor]]:
        w = torch.zeros(PARAMETERS)
        aggregator = Aggregator(federation, {"w": w}, exchange=masked(), auxiliary=auxiliary)
        aggregator.start()
        begun = len(messages)
        w += 2.0
        value = 3.0 + federation.party
        given = AuxiliaryValues(effective_steps=value, vector={"w": torch.full((PARAMETERS,), value)})
        aggregator.step(value, None, given)
        return begun, {name: part.clone() for name, part in aggregator.carried.items()}

    results = run_parties(3, act)
    crossed = messages[max(begun for begun, _ in results) :]
    for message in crossed:
        if message.sent and message.values.dtype == torch.uint8:  # a header
            _, metadata = metadata_of(message)
            assert metadata["weight"] == 1, "that it counts, not how much"
            assert all(metadata[name] is None for name in ("loss", "distance", "steps_left"))
    sums = [message for message in sums_of(crossed) if message.sent and message.values.dtype != torch.uint8]
    # The update, and the vector if there is one, of three parties.
    assert len(sums) >= 3 * (1 + auxiliary.vector)
    for message in sums:
        assert len(message.values.unique()) > PARAMETERS / 2
    for _, carried in results:
        # (3 * 3 + 4 * 4 + 5 * 5) / 12
        for mean in carried.values():
            torch.testing.assert_close(mean, torch.full_like(mean, 50 / 12), rtol=0, atol=1e-5)


def test_a_vector_beyond_the_limit_of_masked_sums_stops_all_and_touches_nothing() -> None:
    def act(federation: Federation) -> tuple[str, Tensor, Tensor]:
        w = torch.zeros(4)
        aggregator = Aggregator(
            federation, {"w": w}, exchange=masked(), auxiliary=AuxiliaryTerms("Test()", vector=True)
        )
        aggregator.start()
        w += 1.0
        value = 1e30 if federation.party == 1 else 1.0
        with pytest.raises(FederationError) as caught:
            aggregator.step(1.0, None, AuxiliaryValues(vector={"w": torch.full((4,), value)}))
        federation.abort(str(caught.value))
        return str(caught.value), w, aggregator.carried["w"]

    for words, w, carried in run_parties(3, act):
        assert "party 1" in words.lower()
        assert torch.equal(w, torch.ones(4))
        assert not carried.any()


@summing
@pytest.mark.parametrize("rule", [Alternating(), ShareA()])
def test_what_rests_or_stays_at_home_is_left_out_of_masked_sums_too(
    tmp_path: Path, name: str, rule: Any
) -> None:
    def fit(exchange: Any, party: int, federated: Any) -> Any:
        return tuned(tmp_path, rule, ALL[name](), party, federated, exchange=exchange)

    plain, hidden = fit_parties(3, partial(fit, None)), fit_parties(3, partial(fit, masked()))
    for one, other in zip(plain, hidden, strict=True):
        for parameter, value in one["after"].items():
            torch.testing.assert_close(other["after"][parameter], value, rtol=1e-4, atol=1e-4)


# ---- what stays with its party


@summing
def test_what_share_a_leaves_at_home_is_not_corrected(tmp_path: Path, name: str) -> None:
    """There is no mean of it, so a correction would drive each party's B by its own gradients alone."""
    corrected: list[set[str]] = []

    def fit(party: int, federated: Any) -> Any:
        correction = ALL[name]()
        begin = correction.begin

        def noted(parameters: Any, *arguments: Any, **keywords: Any) -> None:
            corrected.append(set(parameters))
            begin(parameters, *arguments, **keywords)

        correction.begin = noted  # type: ignore[method-assign]
        return tuned(tmp_path, ShareA(), correction, party, federated)

    results = fit_parties(2, fit)
    factors = {word: [{n: v for n, v in r["after"].items() if word in n} for r in results] for word in (A, B)}
    assert_same(*factors[A])
    assert differ(*factors[B])
    assert corrected == [set(factors[A][0])] * 2


def test_a_round_that_fails_after_the_sum_leaves_what_was_carried() -> None:
    """So does a checkpoint that is saved because of the failure."""

    def fails(*_: Any) -> Any:
        raise FederationError("while the products were measured")

    def act(federation: Federation) -> dict[str, Any]:
        parameters = adapter(3, {"q": (6, 9)}, 2)
        aggregator = Aggregator(federation, parameters, auxiliary=AuxiliaryTerms("Test()", vector=True))
        aggregator.start()
        given = AuxiliaryValues(vector={name: torch.ones_like(p) for name, p in parameters.items()})
        aggregator.step(1.0, None, given)
        before = aggregator.state_dict()
        for parameter in parameters.values():
            parameter += 1.0
        twice = AuxiliaryValues(vector={name: 2 * part for name, part in given.vector.items()})
        aggregator._global_state.lora.combine = fails  # type: ignore[method-assign, union-attr]
        with pytest.raises(FederationError, match="products"):
            aggregator.step(1.0, None, twice)
        after = aggregator.state_dict()
        carried = [state["fragments"][0]["carried"] for state in (before, after)]
        return {"global": (before["global"], after["global"]), "carried": tuple(carried)}

    for state in run_parties(2, act):
        assert state["carried"][0].eq(1.0).all()
        for before, after in state.values():
            assert torch.equal(before, after)


# ---- outer learning rates by round


def gradients(party: int, start: np.ndarray, correct: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return each step's uncorrected gradient, (steps, 2)."""
    x, seen = start.copy(), []
    for _ in range(STEPS[party]):
        seen.append(CURVATURES[party] @ (x - MINIMISERS[party]))
        x = x - LR * (seen[-1] + correct(x))
    return np.stack(seen)


@scheduled
def test_a_schedule_with_momentum_equals_float64(tmp_path: Path, name: str) -> None:
    """Each paper's pseudo-gradient g, then ``m = 0.5 m + g`` and ``x = x - 0.8^k m``."""
    outer = {"outer_optimizer": partial(torch.optim.SGD, lr=1.0, momentum=0.5), "outer_scheduler": FADING}
    path = train(tmp_path, ALL[name], 6, **outer)
    x, momentum, c, own = np.zeros(2), np.zeros(2), np.zeros(2), np.zeros((3, 2))
    reach = LR * np.array(STEPS)
    for round in range(6):
        corrects: list[Callable[[np.ndarray], np.ndarray]] = [
            {
                "FedProx": lambda at, x=x: 0.3 * (at - x),
                "SCAFFOLD": lambda at, shift=c - own[party]: shift,
                "FedNova": np.zeros_like,
            }[name]
            for party in range(3)
        ]
        seen = [gradients(party, x, corrects[party]) for party in range(3)]
        updates = np.stack([_update(x, *both) for both in zip(seen, corrects, strict=True)])
        if name == "SCAFFOLD":
            own = np.stack([of_party.mean(0) for of_party in seen])
            c = SHARES @ own
        if name == "FedNova":
            g = SHARES @ reach * (SHARES @ (updates / reach[:, None]))
        else:
            g = SHARES @ updates
        momentum = 0.5 * momentum + g
        x = x - 0.8**round * momentum
        np.testing.assert_allclose(path[round], x, rtol=2e-5, atol=1e-5)


def _update(start: np.ndarray, seen: np.ndarray, correct: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    x = start.copy()
    for gradient in seen:
        x = x - LR * (gradient + correct(x))
    return start - x


def test_feddyn_refuses_a_schedule(tmp_path: Path) -> None:
    """Also one that begins at 1."""

    def fit(party: int, federated: Any) -> None:
        callbacks = [federated(outer_scheduler=FADING), FedDyn(0.1)]
        quiet_trainer(tmp_path, callbacks).fit(Classifier(), data(8, seed=0))

    def act(federation: Federation) -> None:
        Aggregator(federation, {"w": torch.zeros(4)}, auxiliary=FedDyn(0.1).auxiliary, outer_scheduler=FADING)

    with pytest.raises(MisconfigurationException, match="outer_scheduler would undo that"):
        fit_parties(1, fit)
    with pytest.raises(ValueError, match="outer_scheduler would undo that"):
        run_parties(1, act)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@scheduled
def test_resume_with_an_outer_schedule_is_exact(tmp_path: Path, name: str) -> None:
    diloco = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    cosine = partial(CosineAnnealingLR, T_max=4)
    saved = Saved(tmp_path, name, outer_optimizer=diloco, outer_scheduler=cosine)
    whole = saved.fit()
    for step in (2, 3, 7):  # before the first round, after it, in the middle of the third
        assert all(torch.equal(one, other) for one, other in zip(whole, saved.fit(step), strict=True))


# ---- parties that are lost


@pytest.fixture
def world() -> Iterator[World]:
    made = World(3, rounds=5, quorum=2)
    yield made
    made.close()


BOTH = AuxiliaryTerms("Test()", vector=True, rescales=True)


def supports(life: Life) -> None:
    """Let a party reach (index + 1) far, and carry (index + 1) * (round + 1) everywhere."""
    aggregator: Any = life.aggregator
    step = aggregator.step

    def steps(weight: float, loss: float | None = None) -> RoundReport:
        far = life.index + 1.0
        vector = {"w": torch.full_like(life.w, far * (aggregator.round + 1))}
        return step(weight, loss, AuxiliaryValues(effective_steps=far, vector=vector))

    aggregator.step = steps


def walks(life: Life) -> None:
    assert life.aggregator is not None
    life.w.copy_(life.aggregator.global_vector - (life.index + 1.0))


@pytest.mark.parametrize("point", ["exchanging", "voting"])
def test_failed_attempts_move_neither_the_vector_nor_the_schedule(world: World, point: str) -> None:
    """Updates are as long as the parties reach, so the rescaled mean is how far the present ones reach."""
    outer = {"outer_optimizer": partial(torch.optim.SGD, lr=1.0, momentum=0.5), "outer_scheduler": FADING}
    faults: dict[str, Any] = {name: {"started": supports} for name in world.roster}
    faults["p2"][f"{point}@2"] = die
    for name in world.roster:
        world.start(name, faults=faults[name], weight=1.0, auxiliary=BOTH, train=walks, **outer)
    world.join()
    start = torch.randn(SIZE, generator=torch.Generator().manual_seed(77))  # of p0, which all took over
    for life in world.lives[:2]:
        assert [report.round for report in life.reports] == [0, 1, 2, 3, 4]
        assert [len(report.parties) for report in (life.reports[0], life.reports[-1])] == [3, 2]
        x, momentum, mean = start.double(), 0.0, 0.0
        for round, report in enumerate(life.reports):
            reach = sum(party + 1 for party in report.parties) / len(report.parties)
            momentum, mean = 0.5 * momentum + reach, reach * (round + 1)
            x = x - 0.8**round * momentum
            assert report.outer_lr == pytest.approx(0.8**round)
        assert life.aggregator is not None
        torch.testing.assert_close(life.w.double(), x, rtol=0, atol=1e-4)
        torch.testing.assert_close(life.aggregator.carried["w"], torch.full((SIZE,), mean))
    assert torch.equal(world.lives[0].w, world.lives[1].w)
