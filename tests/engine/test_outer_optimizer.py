"""Outer optimizers and their schedules: right to float64, to other people's arithmetic, and refused in words.

The constants of FLOWER are what flwr 1.41.0 returns, those of TORCHFT what torchft-nightly 2026.10.26
does, on the updates of ``pull``. They were made like this, each in an environment of its own:

    class Reply:  # what flwr's strategies read of a message
        def __init__(self, content): self.content = content
        def has_error(self): return False
        def has_content(self): return True

    def run(strategy):  # FedAdam(eta=0.1), FedAvgM(server_learning_rate=0.5, server_momentum=0.9), ...
        x = np.cos(np.arange(4.0))
        strategy._construct_messages = lambda *_: []
        for number, weights in enumerate(WEIGHTS):
            strategy.configure_train(number + 1, ArrayRecord({"w": Array(x)}), ConfigRecord(), grid_of_3)
            replies = [Reply(RecordDict({
                "arrays": ArrayRecord({"w": Array(0.9 * x + 0.1 * pull(number, party))}),
                "metrics": MetricRecord({"num-examples": weight}),
            })) for party, weight in enumerate(weights)]
            arrays, _ = strategy.aggregate_train(number + 1, replies)
            x = arrays["w"].numpy()
        return x

    # Three threads; the manager's allreduce is the mean of three tensors, should_commit() is True.
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    with torchft.local_sgd.DiLoCo(manager, [model], inner, outer, sync_every=1):
        for number in range(5):
            model.w.grad = 0.1 * (model.w.detach() - pull(number, party))
            inner.step()
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from job_threads import World, die
from party_threads import run_parties
from round_history import noise
from secure_exchange import masked
from torch import Tensor, nn
from torch.optim import lr_scheduler

from pellm_lightning import Aggregator, FederatedAveraging, Federation, FederationError
from pellm_lightning.aggregation import Alternating, LowRankMean
from pellm_lightning.comm import MismatchError
from pellm_lightning.engine import outer_optimizer
from pellm_lightning.engine.optim import Yogi

SGD, Adam = torch.optim.SGD, torch.optim.Adam

RECIPES: dict[str, Any] = {
    "FedAvg": partial(SGD, lr=1.0),
    "FedAvgM": partial(SGD, lr=0.5, momentum=0.9),
    "FedAdam": partial(Adam, lr=0.1, betas=(0.9, 0.99), eps=1e-3),
    "FedAdagrad": partial(torch.optim.Adagrad, lr=0.1, eps=1e-3),
    "FedYogi": partial(Yogi, lr=0.1),
    "DiLoCo": partial(SGD, lr=0.7, momentum=0.9, nesterov=True),
}

# The SequentialLR of torch 2.7 warns of itself.
torchs_own_words = pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step:UserWarning")

SCHEDULES: dict[str, Any] = {
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=6),
    "warmup": partial(lr_scheduler.LinearLR, start_factor=0.25, total_iters=3),
    "steps": partial(lr_scheduler.MultiStepLR, milestones=[2, 4]),
    "function": partial(lr_scheduler.LambdaLR, lr_lambda=lambda round: 1 / (1 + round)),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=8, cycle_momentum=False),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
        ],
        milestones=[2],
    ),
}

WEIGHTS = [[1, 3, 2], [0, 3, 1], [5, 1, 0], [1, 1, 1], [2, 0, 3]]
"""Of three parties, round by round."""


def pull(number: int, party: int) -> np.ndarray:
    return np.sin(1.0 + np.arange(4) + 5 * number + 2 * party)


def federated(optimizer: Any, weights: Any = WEIGHTS, **arguments: Any) -> Tensor:
    """The global vector after rounds in which party i makes ``x_i = 0.9 x + 0.1 pull_i`` of it."""

    def act(federation: Federation) -> tuple[Tensor, Tensor]:
        w = torch.from_numpy(np.cos(np.arange(4.0))).float()
        aggregator = Aggregator(federation, {"w": w}, outer_optimizer=optimizer, **arguments)
        aggregator.start()
        for number, of_parties in enumerate(weights):
            w.mul_(0.9).add_(torch.from_numpy(pull(number, federation.party)).float(), alpha=0.1)
            aggregator.step(of_parties[federation.party])
        return w, aggregator.global_vector.clone()

    (w, vector), *others = run_parties(3, act)
    assert all(torch.equal(other, w) and torch.equal(own, vector) for other, own in others)
    return vector.double()


def replayed(optimizer: Any, scheduler: Any = None, weights: Any = WEIGHTS) -> Tensor:
    """The same in float64, by one process and plain torch."""
    x = nn.Parameter(torch.from_numpy(np.cos(np.arange(4.0))))
    stepping = optimizer([x])
    schedule = None if scheduler is None else scheduler(stepping)
    for number, of_parties in enumerate(weights):
        gone = x.detach()
        locals_ = [0.9 * gone + 0.1 * torch.from_numpy(pull(number, party)) for party in range(3)]
        mean = sum(w * own for w, own in zip(of_parties, locals_, strict=True)) / sum(of_parties)
        x.grad = gone - mean
        stepping.step()
        if schedule is not None:
            schedule.step()
    return x.detach()


# ---- other people's arithmetic

FLOWER = {
    "FedAvg": [0.587447308, 0.325664353, -0.235532907, -0.580182298],
    "FedAvgM": [0.402851412, 0.169638402, -0.219539373, -0.406873661],
    "FedAdam": [0.626993566, 0.184940437, -0.197368297, -0.620470966],
    "FedAdagrad": [0.733145572, 0.326871083, -0.220814631, -0.721885087],
    "FedYogi": [0.380916899, -0.019747808, -0.053471378, -0.376276718],
}
TORCHFT = [0.123517601, 0.066971894, -0.051147463, -0.122242078]


class FlowersAdam(Adam):
    """Torch's Adam, made to do what flwr's FedAdam does.

    flwr frees the moments of their start with the exponent t + 1, torch with t; flwr adds tau to the root of
    the moment as it is, torch to that of the freed one. So in round t, with c_i = 1 - beta_i^t and
    d_i = 1 - beta_i^(t + 1), flwr's step is torch's with the learning rate eta sqrt(d_2) c_1 / (d_1
    sqrt(c_2)) and eps = tau / sqrt(c_2). The ratio of learning rates is
    0.74 in the first round, and goes to 1.
    """

    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        t = 1 + int(next((state["step"] for state in self.state.values()), torch.tensor(0)))
        (c1, d1), (c2, d2) = ((1 - b**t, 1 - b ** (t + 1)) for b in group["betas"])
        eta, tau = group["lr"], group["eps"]
        group |= {"lr": eta * math.sqrt(d2) * c1 / (d1 * math.sqrt(c2)), "eps": tau / math.sqrt(c2)}
        super().step(closure)
        group |= {"lr": eta, "eps": tau}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("FedAvg", RECIPES["FedAvg"]),
        ("FedAvgM", RECIPES["FedAvgM"]),
        ("FedAdam", partial(FlowersAdam, lr=0.1, betas=(0.9, 0.99), eps=1e-3)),
        ("FedAdagrad", RECIPES["FedAdagrad"]),
        # flwr's second moment starts at 0, where the paper asks for tau^2.
        ("FedYogi", partial(Yogi, lr=0.1, initial_accumulator_value=0.0)),
    ],
)
def test_equals_flower(name: str, optimizer: Any) -> None:
    expected = torch.tensor(FLOWER[name], dtype=torch.float64)
    torch.testing.assert_close(federated(optimizer), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(replayed(optimizer), expected, rtol=0, atol=1e-8)


def test_flowers_adam_is_slower_at_the_start() -> None:
    """Named in the documentation: the same settings give smaller steps in flwr's first rounds."""
    start, first = torch.from_numpy(np.cos(np.arange(4.0))), WEIGHTS[:1]
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-12}
    ours, theirs = (
        replayed(partial(kind, **settings), weights=first) - start for kind in (Adam, FlowersAdam)
    )
    # sqrt(1 - 0.99^2) (1 - 0.9) / ((1 - 0.9^2) sqrt(1 - 0.99)) = 0.7425
    torch.testing.assert_close(theirs / ours, torch.full_like(ours, 0.74246), rtol=0, atol=1e-4)


def test_equals_torchft() -> None:
    """It averages unweighted. Its first DiLoCo had the sign the other way; this one has not."""
    even = [[1, 1, 1]] * 5
    expected = torch.tensor(TORCHFT, dtype=torch.float64)
    torch.testing.assert_close(federated(RECIPES["DiLoCo"], even), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(replayed(RECIPES["DiLoCo"], weights=even), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_equal_their_replay_in_float64(name: str) -> None:
    torch.testing.assert_close(federated(RECIPES[name]), replayed(RECIPES[name]), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(SGD, lr=0.7, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.2),
    ],
    ids=["coupled", "decoupled"],
)
def test_weight_decay_is_that_of_the_global_vector(optimizer: Any) -> None:
    """Once a round, of the float32 vector that all parties share, by torch's own formula."""
    torch.testing.assert_close(federated(optimizer), replayed(optimizer), rtol=0, atol=3e-6)


# ---- one party


def test_one_party_without_momentum_is_lookahead() -> None:
    """Zhang et al. 2019, algorithm 1: k inner steps of A from phi, then phi <- phi + alpha (theta - phi)."""
    alpha, k = 0.5, 5
    curvature = torch.linspace(0.1, 2.0, 6, dtype=torch.float64)

    federation = Federation(dist.HashStore(), 0, 1)
    w = torch.ones(6)
    aggregator = Aggregator(federation, {"w": w}, outer_optimizer=partial(SGD, lr=alpha))
    aggregator.start()
    phi = torch.ones(6, dtype=torch.float64)
    for _ in range(10):
        theta = phi.clone()
        for _ in range(k):
            theta -= 0.3 * curvature * theta
            w -= 0.3 * curvature.float() * w
        phi = phi + alpha * (theta - phi)
        aggregator.step(1)
        torch.testing.assert_close(w.double(), phi, rtol=0, atol=1e-6)
    federation.close()


def test_one_party_of_diloco_is_lookahead_with_nesterov() -> None:
    """The pseudo-gradient of one party is ``phi - theta``; the weight of the only party does not matter."""
    federation = Federation(dist.HashStore(), 0, 1)
    w = torch.ones(3)
    aggregator = Aggregator(federation, {"w": w}, outer_optimizer=RECIPES["DiLoCo"])
    aggregator.start()
    phi, m = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for number in range(8):
        theta = 0.8 * phi + 0.1 * number
        w.mul_(0.8).add_(0.1 * number)
        m = 0.9 * m + (phi - theta)
        phi = phi - 0.7 * ((phi - theta) + 0.9 * m)
        aggregator.step(0.25 + number)
        torch.testing.assert_close(w.double(), phi, rtol=0, atol=5e-6)
    federation.close()


# ---- small steps


@pytest.mark.parametrize("name", RECIPES)
def test_bf16_loses_no_small_steps(name: str) -> None:
    """All recipes, with a learning rate that makes each step vanish in bf16.

    Both parties move by -1/8, which bf16 holds exactly, so the pseudo-gradient is 1/8 in each round.
    """
    lr = 5e-4 if name != "FedAvg" else 0.01
    optimizer = partial(RECIPES[name].func, **RECIPES[name].keywords | {"lr": lr})
    x = nn.Parameter(torch.ones(5, dtype=torch.float64))
    stepping = optimizer([x])
    for _ in range(40):
        x.grad = torch.full_like(x, 0.125)
        stepping.step()

    def act(federation: Federation) -> tuple[Tensor, Tensor]:
        w = torch.ones(5, dtype=torch.bfloat16)
        aggregator = Aggregator(federation, {"w": w}, outer_optimizer=optimizer)
        aggregator.start()
        for _ in range(40):
            w -= 0.125
            aggregator.step(1 + 2 * federation.party)
        return aggregator.global_vector.clone(), w

    for vector, w in run_parties(2, act):
        torch.testing.assert_close(vector.double(), x.detach(), rtol=0, atol=2e-5)
        assert torch.equal(w, vector.to(torch.bfloat16))
        assert float(w[0]) < 1.0


# ---- schedules


@torchs_own_words
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("recipe", ["DiLoCo", "FedAdam"])
def test_schedules_equal_their_replay(recipe: str, name: str) -> None:
    got = federated(RECIPES[recipe], outer_scheduler=SCHEDULES[name])
    torch.testing.assert_close(got, replayed(RECIPES[recipe], SCHEDULES[name]), rtol=0, atol=3e-6)


class RenamedSGD(SGD):
    """An optimizer that a round cannot know to be SGD."""


def test_the_short_way_is_taken_only_while_it_is_true() -> None:
    # Learning rates 1, 0.5, 1, 0.5, 1.
    flips = partial(lr_scheduler.LambdaLR, lr_lambda=lambda round: 1 - 0.5 * (round % 2))
    short = federated(partial(SGD, lr=1.0), outer_scheduler=flips)
    assert torch.equal(short, federated(partial(RenamedSGD, lr=1.0), outer_scheduler=flips))
    torch.testing.assert_close(short, replayed(partial(SGD, lr=1.0), flips), rtol=0, atol=1e-6)


def test_a_round_in_which_nobody_counts_moves_nothing() -> None:
    """Neither by the memory of the optimizer, nor the schedule."""

    def act(federation: Federation) -> None:
        w = torch.ones(3)
        aggregator = Aggregator(
            federation,
            {"w": w},
            outer_optimizer=RECIPES["DiLoCo"],
            outer_scheduler=SCHEDULES["warmup"],
            quorum=1,
        )
        aggregator.start()
        if federation.party == 1:
            w += 1
            aggregator.step(1)
            list(aggregator.drain())
            return
        w += 1
        assert aggregator.step(1).outer_lr == pytest.approx(0.7 * 0.25)
        before, state = w.clone(), repr(aggregator.state_dict()["fragments"][0]["outer_optimizer"])
        w += 1
        report = aggregator.step(0)  # the other is through, so nobody counts
        assert (report.active_parties, report.outer_lr) == (0, None)
        assert torch.equal(w, before)
        assert repr(aggregator.state_dict()["fragments"][0]["outer_optimizer"]) == state
        w += 1
        assert aggregator.step(1).outer_lr == pytest.approx(0.7 * 0.5)
        list(aggregator.drain())

    run_parties(2, act)


def rounds(
    federation: Federation, recipe: str, schedule: str | None, state: Any = None, until: int = 6
) -> tuple[Any, list[float | None]]:
    w = torch.ones(5)
    aggregator = Aggregator(
        federation,
        {"w": w},
        outer_optimizer=RECIPES[recipe],
        outer_scheduler=None if schedule is None else SCHEDULES[schedule],
    )
    if state is not None:
        w.copy_(state["global"])
        aggregator.load_state_dict(state)
    aggregator.start()
    rates = []
    while aggregator.round < until:
        w.add_(noise(federation.party, aggregator.round, 5))
        rates.append(aggregator.step(1 + federation.party).outer_lr)
    return aggregator.state_dict(), rates


@torchs_own_words
@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("recipe", RECIPES)
def test_resuming_is_exact(recipe: str, schedule: str | None) -> None:
    def act(federation: Federation) -> Any:
        return rounds(federation, recipe, schedule, until=3)

    halves = run_parties(2, act)
    wholes = run_parties(2, lambda federation: rounds(federation, recipe, schedule))
    again = run_parties(2, lambda f: rounds(f, recipe, schedule, halves[f.party][0]))
    for (whole, rates), (resumed, later), (_, first) in zip(wholes, again, halves, strict=True):
        assert repr(resumed) == repr(whole)
        assert first + later == rates
        assert whole["fragments"][0]["outer_scheduler"] == (None if schedule is None else 6)


@given(steps=st.integers(0, 7), name=st.sampled_from(sorted(SCHEDULES)))
@settings(max_examples=40, deadline=None)
def test_a_restored_schedule_is_where_it_was(steps: int, name: str) -> None:
    one, other = (SGD([nn.Parameter(torch.zeros(1))], lr=0.7) for _ in range(2))
    schedule, restored = (
        outer_optimizer.OuterSchedule(SCHEDULES[name], optimizer) for optimizer in (one, other)
    )
    for _ in range(steps):
        schedule.step()
    for _ in range(3):
        restored.step()  # an attempt that failed
    restored.restore(schedule.state, one.state_dict())
    assert one.param_groups[0] | {"params": 0} == other.param_groups[0] | {"params": 0}
    schedule.step(), restored.step()
    assert schedule.lr == restored.lr


def test_a_schedule_that_ends_before_training_does() -> None:
    short = partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=3, cycle_momentum=False)

    def act(federation: Federation) -> tuple[Tensor, Tensor, str]:
        w = torch.ones(3)
        aggregator = Aggregator(
            federation, {"w": w}, outer_optimizer=RECIPES["DiLoCo"], outer_scheduler=short
        )
        aggregator.start()
        for _ in range(4):
            w += 1
            aggregator.step(1)
        w += 1
        before = w.clone()
        with pytest.raises(FederationError) as caught:
            aggregator.step(1)
        return before, w, str(caught.value)

    for before, after, words in run_parties(2, act):
        assert torch.equal(before, after)
        for word in ("Round 4", "OneCycleLR", "No parameter was changed", "as many rounds as are run"):
            assert word in words


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("cosine", None),
        ("cosine", "warmup"),
        ("function", partial(lr_scheduler.LambdaLR, lr_lambda=lambda round: 1 / (1 + round * round))),
        ("cosine", partial(lr_scheduler.CosineAnnealingLR, T_max=7)),
    ],
)
def test_parties_must_have_the_same_schedule(ours: str, theirs: Any) -> None:
    def act(federation: Federation) -> None:
        one, other = SCHEDULES[ours], SCHEDULES.get(theirs) if isinstance(theirs, str) else theirs
        aggregator = Aggregator(
            federation,
            {"w": torch.zeros(2)},
            outer_optimizer=RECIPES["DiLoCo"],
            outer_scheduler=one if federation.party == 0 else other,
        )
        aggregator.start()

    errors = run_parties(2, act, may_fail=True)
    assert any(isinstance(error, MismatchError) for error in errors)
    for error in errors:  # whoever is slower may hear it from the other
        assert isinstance(error, FederationError)
        assert "Party 0 has outer_scheduler='" in str(error)
        assert "party 1 has outer_scheduler=" in str(error)


@pytest.mark.parametrize(
    ("resumed", "words"),
    [
        (("DiLoCo", None), "has an outer_scheduler, this party has none"),
        (("FedAdam", "cosine"), "is of the outer optimizer SGD, this party has Adam"),
        (("DiLoCo", "warmup"), "outer_scheduler=LinearLR gives"),
        (("FedAvgM", "cosine"), "has the outer learning rate 0.653"),
    ],
)
def test_a_checkpoint_of_another_outer_optimizer_is_refused(resumed: Any, words: str) -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    state, _ = rounds(federation, "DiLoCo", "cosine", until=1)
    with pytest.raises(ValueError, match=words):
        rounds(federation, *resumed, state)
    federation.close()


# ---- what is refused


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.LBFGS, "closure"),
        pytest.param(
            getattr(torch.optim, "Muon", None),
            "Muon only supports 2D parameters",
            marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon"),
        ),
        (torch.optim.SparseAdam, "dense gradients"),
        (torch.optim.Adafactor, r"outer_optimizer=Adafactor\(.*scales a step by the root mean square of all"),
    ],
)
def test_only_elementwise_optimizers_make_sense(optimizer: Any, words: str) -> None:
    for make in (
        lambda: FederatedAveraging(outer_optimizer=optimizer),
        lambda: outer_optimizer.make_prototype(optimizer),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            make()
        assert "must be one that moves each element by its own gradients" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"],
)
def test_all_others_of_torch_are_taken(name: str) -> None:
    assert type(outer_optimizer.make_prototype(getattr(torch.optim, name))).__name__ == name


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (lr_scheduler.ReduceLROnPlateau, "must follow from the number of rounds alone"),
        (lambda optimizer: 0.5, "makes a float, but"),
        (
            partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=9),
            "changes momentum from 0.9 to 0.95 in round 0; it may change the learning rate only",
        ),
        (partial(lr_scheduler.LambdaLR, lr_lambda=lambda round: -1.0), "gives lr=-0.7 in round 0"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(scheduler: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FederatedAveraging(outer_optimizer=RECIPES["DiLoCo"], outer_scheduler=scheduler)


def test_a_schedule_through_new_coordinates_is_refused() -> None:
    tried = outer_optimizer.make_prototype(RECIPES["FedAvg"])
    with pytest.raises(ValueError, match="and no momentum, without an outer_scheduler"):
        outer_optimizer.check(LowRankMean(factorization="svd"), tried, scheduled=True)
    outer_optimizer.check(LowRankMean(factorization="svd"), tried, scheduled=False)
    outer_optimizer.check(Alternating(), tried, scheduled=True)


# ---- with masked sums, and parties that are lost


def test_masked_rounds_are_plain_ones() -> None:
    """But for the weights' and updates' rounding to integers."""
    arguments = {"optimizer": RECIPES["DiLoCo"], "outer_scheduler": SCHEDULES["cosine"]}
    even = [[1, 3, 2]] * 5
    hidden = federated(**arguments, weights=even, exchange=masked())
    torch.testing.assert_close(
        hidden, replayed(RECIPES["DiLoCo"], SCHEDULES["cosine"], even), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("point", ["exchanging@3", "voting@3", "training@3"])
def test_diloco_with_a_party_that_is_lost_and_comes_back_equals_its_replay(tmp_path: Any, point: str) -> None:
    """An attempt that fails leaves no momentum and no step of the schedule behind."""
    world = World(3, rounds=1_000_000, state_dir=tmp_path)
    fading = partial(lr_scheduler.ExponentialLR, gamma=0.8)
    arguments = {"outer_optimizer": RECIPES["DiLoCo"], "outer_scheduler": fading}
    try:
        world.start("p0", "p1", pace_s=0.02, **arguments)
        (killed,) = world.start("p2", faults={point: die}, **arguments)
        killed.join()
        world.wait_for(world.reached + 2)
        before = world.reached
        world.start("p2", **arguments)
        world.until(lambda: world.counts("p2", since=before + 1))
        world.finish()
    finally:
        world.close()
    assert len({(entry.round, entry.digest) for entry in world.settled}) == world.reached + 1
    stands = {entry.round: entry.digest for entry in world.settled}
    ran = {e.round: e for e in world.entries if e.weights and e.digest == stands.get(e.round)}
    assert sorted(ran) == list(range(1, world.reached + 1))
    assert any("p2" not in entry.members for entry in ran.values()), "nobody was ever missing"
    begin = next(entry for entry in world.settled if entry.round == 0)
    x = nn.Parameter(torch.tensor(begin.vector, dtype=torch.float64))
    optimizer = RECIPES["DiLoCo"]([x])
    schedule = fading(optimizer)
    for round, entry in sorted(ran.items()):
        x.grad = torch.zeros_like(x)
        for name, weight in zip(entry.members, entry.weights, strict=True):
            own = noise(world.roster.index(name), round - 1).double()
            x.grad -= weight / sum(entry.weights) * own
        optimizer.step()
        schedule.step()
        vector = torch.tensor(entry.vector, dtype=torch.float64)
        torch.testing.assert_close(x.detach(), vector, rtol=0, atol=2e-5)
    states = [life.aggregator.state_dict() for life in world.lives if life is not killed]  # type: ignore[union-attr]
    assert {state["fragments"][0]["outer_scheduler"] for state in states} == {world.reached}
