"""Rounds with differential privacy: what leaves a party, what it costs, and who remembers that."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from job_threads import Life, World, die
from lightning import seed_everything
from message_transcript import tapped
from party_threads import Classifier, Rounds, data, fit_parties, quiet_trainer, run_parties
from secure_exchange import masked
from torch import Tensor

from pellm_lightning import Aggregator, FederatedAveraging, Federation, FederationError, RoundReport
from pellm_lightning.aggregation import LowRankMean, Mean
from pellm_lightning.exchange import Exchange, Plain
from pellm_lightning.privacy import AdaptiveClipping, GaussianMechanism, PrivacyAccountant

N, SIZE = 4, 20_000
EXCHANGES: dict[str, tuple[Callable[[], Exchange], bool]] = {
    "masked": (masked, True),
    "plain": (Plain, False),
}


def updates(size: int = SIZE, scale: float = 1.0) -> list[Tensor]:
    return [torch.randn(size, generator=torch.Generator().manual_seed(i)) * scale for i in range(N)]


def clipped(update: Tensor, norm: float) -> Tensor:
    return update.double() * min(1.0, norm / float(update.double().norm()))


def rounds(
    moves: Callable[[int, int], Tensor],
    mechanism: Callable[[], GaussianMechanism],
    exchange: Callable[[], Exchange] = masked,
    count: int = 1,
    size: int = SIZE,
    **arguments: Any,
) -> list[tuple[Tensor, list[RoundReport], dict[str, Any]]]:
    """Run rounds in which party i moves by ``moves(i, round)``; return parameters, reports and state."""

    def act(federation: Federation) -> tuple[Tensor, list[RoundReport], dict[str, Any]]:
        w = torch.zeros(size)
        aggregator = Aggregator(federation, {"w": w}, privacy=mechanism(), exchange=exchange(), **arguments)
        aggregator.start()
        reports = []
        for round in range(count):
            w.add_(moves(federation.party, round))
            reports.append(aggregator.step(1.0, loss=1.0))
        return w.clone(), reports, aggregator.state_dict()

    return run_parties(N, act)


def is_normal(noise: Tensor, std: float) -> bool:
    """Tell whether the mean and the variance are those of so many draws, to five standard errors."""
    n = noise.numel()
    return abs(float(noise.mean())) < 5 * std / math.sqrt(n) and abs(
        float(noise.var()) / std**2 - 1
    ) < 5 * math.sqrt(2 / n)


# ---- what leaves a party


@pytest.mark.parametrize("colluders", [0, 1, 2])
def test_distributed_noise_adds_up_to_that_of_the_guarantee(colluders: int) -> None:
    moves = updates(scale=3.0)
    made = rounds(lambda party, _: moves[party], lambda: GaussianMechanism(0.5, 2.0, colluders=colluders))
    noise = made[0][0].double() - sum(clipped(u, 0.5) for u in moves) / N
    std = 2.0 * 0.5 * math.sqrt(N / (N - colluders)) / N
    assert is_normal(noise, std)
    assert all(torch.equal(w, made[0][0]) for w, _, _ in made)


def test_local_noise_is_in_each_update_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = tapped(monkeypatch)
    moves = updates(scale=3.0)
    seed_everything(7, verbose=False)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name)
    rounds(lambda party, _: moves[party], lambda: GaussianMechanism(0.5, 2.0, distributed=False), Plain)
    sent: dict[int, Tensor] = {}
    for message in messages:
        if message.sent and message.collective != "broadcast" and message.values.numel() > SIZE // 2:
            sent[message.party] = torch.cat([sent.get(message.party, torch.zeros(0)), message.values])
    noise = [-N * sent[party][:SIZE].double() - clipped(moves[party], 0.5) for party in range(N)]
    assert all(is_normal(of_party, 1.0) for of_party in noise)
    for i in range(N):
        for j in range(i):
            correlation = float((noise[i] * noise[j]).mean())
            assert abs(correlation) < 5 / math.sqrt(SIZE), "two parties drew the same under one seed"


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_without_noise_the_result_is_the_mean_of_the_clipped(exchange: str) -> None:
    make, distributed = EXCHANGES[exchange]
    moves = updates(scale=0.01)
    made = rounds(
        lambda party, _: moves[party] * (10.0**party),
        lambda: GaussianMechanism(1.5, 0.0, distributed=distributed),
        make,
    )
    expected = sum(clipped(u * 10.0**party, 1.5) for party, u in enumerate(moves)) / N
    torch.testing.assert_close(made[0][0].double(), expected, rtol=1e-5, atol=1e-7)
    assert made[0][1][0].epsilon == math.inf


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_what_is_not_finite_is_left_out(exchange: str) -> None:
    make, distributed = EXCHANGES[exchange]
    moves = updates()
    moves[2] = torch.full((SIZE,), math.inf)
    made = rounds(
        lambda party, _: moves[party], lambda: GaussianMechanism(1.0, 1.0, distributed=distributed), make
    )
    reports = [reports[0] for _, reports, _ in made]
    assert all(report.excluded == (2,) and report.active_parties == 3 for report in reports)
    assert all(torch.isfinite(w).all() for w, _, _ in made)
    # In the open, what the others sent before it was known was a release, too.
    accountant = PrivacyAccountant()
    for _ in range(2 if exchange == "plain" else 1):
        accountant.release(1.0)
    assert reports[0].epsilon == accountant.epsilon(1e-5)


def test_training_losses_stay_at_home() -> None:
    made = rounds(lambda party, _: torch.ones(8), lambda: GaussianMechanism(1.0, 1.0), size=8)
    assert all(reports[0].loss is None for _, reports, _ in made)


# ---- what it costs


def test_the_budget_ends_all_at_the_same_round_and_is_never_exceeded() -> None:
    accountant = PrivacyAccountant()
    for _ in range(3):
        accountant.release(2.0)
    budget = accountant.epsilon(1e-5) + 0.01

    def mechanism() -> GaussianMechanism:
        return GaussianMechanism(1.0, 2.0, max_epsilon=budget)

    made = rounds(lambda party, _: torch.ones(8), mechanism, count=5, size=8)
    for _, reports, _ in made:
        assert [report.last for report in reports] == [False, False, True, True, True]
        assert [report.active_parties for report in reports] == [N, N, N, 0, 0]
        assert reports[-1].epsilon == accountant.epsilon(1e-5)
    # Who goes on all the same is set back: nothing of its steps is told.
    assert torch.equal(made[0][0], made[1][0])


def test_a_resumed_run_goes_on_with_ledger_and_clipping_norm() -> None:
    def mechanism() -> GaussianMechanism:
        return GaussianMechanism(1.0, 0.3, adaptive=AdaptiveClipping())

    first = rounds(lambda party, _: torch.ones(8), mechanism, count=3, size=8)

    def act(federation: Federation) -> RoundReport:
        w, _, state = first[federation.party]
        aggregator = Aggregator(federation, {"w": w.clone()}, privacy=mechanism(), exchange=masked())
        aggregator.load_state_dict(state)
        aggregator.start()
        assert aggregator.state_dict()["privacy"] == state["privacy"]
        return aggregator.step(1.0)

    accountant = PrivacyAccountant()
    for _ in range(4):
        accountant.release(0.3)
    resumed = run_parties(N, act)
    assert first[0][1][-1].clipping_norm != 1.0
    assert all(report.epsilon == accountant.epsilon(1e-5) for report in resumed)
    assert len({report.clipping_norm for report in resumed}) == 1


@pytest.mark.parametrize("was_private", [True, False])
def test_a_checkpoint_goes_on_as_private_as_it_was(was_private: bool) -> None:
    def mechanism(private: bool) -> GaussianMechanism | None:
        return GaussianMechanism(1.0, 1.0) if private else None

    def act(federation: Federation) -> None:
        saved = Aggregator(
            federation, {"w": torch.zeros(3)}, privacy=mechanism(was_private), exchange=masked()
        )
        other = Aggregator(
            federation, {"w": torch.zeros(3)}, privacy=mechanism(not was_private), exchange=masked()
        )
        with pytest.raises(ValueError, match="differential privacy, and is to continue with"):
            other.load_state_dict(saved.state_dict())

    run_parties(3, act)


def test_the_clipping_norm_follows_the_updates() -> None:
    moves = updates(scale=0.01)  # norms of about 1.4

    def mechanism() -> GaussianMechanism:
        return GaussianMechanism(0.1, 0.1, adaptive=AdaptiveClipping(learning_rate=0.5), colluders=0)

    made = rounds(lambda party, round: moves[party], mechanism, count=12)
    norms = [report.clipping_norm or 0 for report in made[0][1]]
    assert norms[0] < norms[4] < norms[8]
    assert 0.7 < norms[-1] < 2.8


# ---- separate jobs


@pytest.fixture
def world() -> Iterator[World]:
    made = World(4, rounds=3, quorum=3)
    yield made
    made.close()


def private(**arguments: Any) -> dict[str, Any]:
    arguments = {"max_norm": 1.0, "noise_multiplier": 2.0} | arguments
    return {"privacy": GaussianMechanism(**arguments), "exchange": masked(), "weight": 1.0}


def test_an_attempt_that_failed_after_its_release_is_entered(world: World) -> None:
    """The party dies when the sum is known to all and the vote has not begun."""
    world.start("p3", faults={"voting@2": die}, **private())
    others = world.start("p0", "p1", "p2", **private())
    for life in others:
        life.join()
        assert life.error is None
    releases = _releases(others)
    assert len(set(releases)) == 1
    # Three rounds: of the second a sum was revealed by the attempt that failed, then its updates counted 0.
    assert releases[0] == 3
    assert [report.active_parties for report in others[0].reports[:3]] == [4, 0, 3]


def test_more_failed_releases_than_attempts_are_not_believed(world: World) -> None:
    def claims(life: Life) -> None:
        assert life.aggregator is not None
        assert life.aggregator._context.privacy is not None
        life.aggregator._context.privacy.releases = 2**40

    world.start("p3", faults={"training@1": claims}, **private())
    others = world.start("p0", "p1", "p2", **private())
    world.join()
    assert _releases(others) == [3, 3, 3]


def _releases(lives: list[Life]) -> list[int]:
    ledgers = []
    for life in lives:
        assert life.aggregator is not None
        private = life.aggregator._context.privacy
        assert private is not None
        ledgers.append(private.accountant.releases)
    return ledgers


def test_who_comes_late_takes_over_ledger_and_clipping_norm(world: World) -> None:
    world.rounds, world.membership["wait_s"] = 1000, 1.0
    settings = {"adaptive": AdaptiveClipping()}
    world.start("p0", "p1", "p2", **private(**settings))
    world.wait_for(3)
    world.start("p3", **private(**settings))
    world.until(lambda: world.counts("p3"))
    world.finish()
    states = [life.aggregator._context.privacy.state_dict() for life in world.lives]  # type: ignore[union-attr]
    assert all(state == states[0] for state in states)
    assert _releases(world.lives)[0] >= 4


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"aggregation": LowRankMean(solver="power")}, "FrozenA"),
        ({"exchange": Plain()}, "distributed=False"),
        ({"aggregation": Mean(measure_deviation=True)}, "differential privacy"),
        ({"privacy": GaussianMechanism(1.0, 0.1, max_epsilon=1.0)}, "The first round alone"),
    ],
)
def test_refused(arguments: dict[str, Any], says: str) -> None:
    def act(federation: Federation) -> None:
        parameters = {
            "m.lora_A.default.weight": torch.zeros(2, 4),
            "m.lora_B.default.weight": torch.zeros(4, 2),
        }
        given = {"exchange": masked(), "privacy": GaussianMechanism(1.0, 1.0)} | arguments
        with pytest.raises(ValueError, match=says):
            Aggregator(federation, parameters, **given)

    run_parties(3, act)


def test_a_weight_other_than_one_is_refused() -> None:
    def act(federation: Federation) -> None:
        aggregator = Aggregator(
            federation, {"w": torch.zeros(3)}, privacy=GaussianMechanism(1.0, 1.0), exchange=masked()
        )
        aggregator.start()
        with pytest.raises(ValueError, match="weighting='uniform'"):
            aggregator.step(2.0)

    run_parties(3, act)


def test_parties_must_have_the_same_mechanism() -> None:
    def act(federation: Federation) -> None:
        mechanism = GaussianMechanism(1.0 + federation.party, 1.0)
        aggregator = Aggregator(federation, {"w": torch.zeros(3)}, privacy=mechanism, exchange=masked())
        with pytest.raises(FederationError, match=r"has privacy=.GaussianMechanism"):
            aggregator.start()

    run_parties(3, act)


# ---- with a Trainer


def test_a_fit_stops_within_its_budget_logs_epsilon_and_resumes(tmp_path: Path) -> None:
    accountant = PrivacyAccountant()
    for _ in range(3):
        accountant.release(2.0)
    budget = accountant.epsilon(1e-5) + 0.01

    def fit(party: int, federated: Any, max_steps: int = -1, resumed: bool = False) -> Any:
        callback = federated(
            every_n_steps=2,
            weighting="uniform",
            exchange=masked(),
            privacy=GaussianMechanism(0.5, 2.0, max_epsilon=budget),
        )
        logger, module = Rounds(), Classifier(seed=party)
        path = tmp_path / f"{party}.ckpt"
        trainer = quiet_trainer(tmp_path, [callback], logger=logger, max_epochs=10, max_steps=max_steps)
        trainer.fit(module, data(16 + 4 * party, party), ckpt_path=path if resumed else None)
        if max_steps > 0:
            trainer.save_checkpoint(path)
        return logger.rounds, module.vector(), trainer.global_step

    first = fit_parties(3, fit)
    for logged, vector, steps in first:
        assert steps == 6
        assert [done["active_parties"] for done in logged] == [3, 3, 3]
        assert logged[-1]["epsilon"] == pytest.approx(accountant.epsilon(1e-5))
        assert torch.equal(vector, first[0][1])
    fit_parties(3, lambda party, federated: fit(party, federated, max_steps=4))
    again = fit_parties(3, lambda party, federated: fit(party, federated, resumed=True))
    for logged, _, _ in again:  # two rounds are in the checkpoint, so one is left
        assert [done["round"] for done in logged] == [2]
        assert logged[-1]["epsilon"] == pytest.approx(accountant.epsilon(1e-5))


def test_a_callback_needs_uniform_weights() -> None:
    with pytest.raises(ValueError, match="weighting='uniform'"):
        FederatedAveraging(privacy=GaussianMechanism(1.0, 1.0))
