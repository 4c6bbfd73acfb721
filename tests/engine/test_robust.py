"""Rounds under robust rules: dense float64 answers, equal bits, attackers, and what is refused."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from job_threads import Life, die
from lora_oracles import Parameters, Round, adapter, bits, copied, drift, name_a, name_b, random, run_rounds
from party_threads import refusals, run_parties
from round_history import SIZE
from secure_exchange import masked
from torch import Tensor

from pellm_lightning import Aggregator, Federation, Overlap
from pellm_lightning.aggregation import (
    Aggregation,
    GeometricMedian,
    Krum,
    LoraModule,
    Median,
    MultiKrum,
    NormBound,
    TrimmedMean,
)
from pellm_lightning.engine.auxiliary import AuxiliaryTerms
from pellm_lightning.exchange import Cast, Plain, Quantized, TopK
from pellm_lightning.privacy import GaussianMechanism

SIZES = {"k": (6, 5), "q": (4, 7), "v": (5, 5)}
RANK, SCALING, HEAD = 2, 2.0, "head.weight"
LORA = {f"{name}.default": LoraModule(scaling=SCALING) for name in SIZES}
WEIGHTS = [1, 3, 0, 2, 1, 0.5, 4, 1]
WEIGHING = [
    NormBound(),
    NormBound(0.5),
    GeometricMedian(),
    Krum(),
    MultiKrum(1, 2),
    GeometricMedian(mixing=1),
]
BY_COORDINATE = [Median(), TrimmedMean(), Median(mixing=1), Median(frozen_a=True)]
RULES: list[Aggregation] = [*WEIGHING, *BY_COORDINATE]
rules = pytest.mark.parametrize("rule", RULES, ids=repr)


def start(party: int) -> Parameters:
    return adapter(party, SIZES, RANK) | {HEAD: random(77 + party, 3, 4)}


def rounds_of(
    rule: Aggregation | None,
    weights: Sequence[float],
    train: Callable[[int, int, Parameters], None] | None = None,
    **arguments: Any,
) -> list[list[Round]]:
    train = train or drift(0.2)
    return run_rounds(rule, start, train, weights=weights, lora=lambda party: LORA, **arguments)


def products(parameters: Parameters) -> list[Tensor]:
    return [SCALING * parameters[name_b(k)].double() @ parameters[name_a(k)].double() for k in SIZES]


def update(held: Parameters, anchor: Parameters) -> Tensor:
    """The head's change, and that of each product, as one vector."""
    changes = [held[HEAD].double() - anchor[HEAD].double()]
    changes += [a - b for a, b in zip(products(held), products(anchor), strict=True)]
    return torch.cat([change.flatten() for change in changes])


# ---- dense references: each from the updates themselves, with no Gram matrix


def norm_bound(factor: float, x: Tensor, w: Tensor) -> Tensor:
    norms = x.norm(dim=1)
    return w * (factor * float(np.median(norms)) / norms).clamp_max(1)


def weiszfeld(x: Tensor, w: Tensor) -> Tensor:
    v = w @ x
    for _ in range(2000):
        beta = w / (v - x).norm(dim=1).clamp_min(1e-9)
        v = (beta / beta.sum()) @ x
    return beta / beta.sum()


def krum(num_malicious: int, selected: int, x: Tensor, w: Tensor) -> Tensor:
    scores = [(x - row).square().sum(dim=1).sort().values[1 : len(x) - num_malicious - 1].sum() for row in x]
    best = torch.stack(scores).argsort()[:selected]
    u = torch.zeros_like(w)
    u[best] = 1.0 if selected == 1 else w[best] / w[best].sum()
    return u


def mixed(rule: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    m = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i, row in enumerate(x):
        nearest = (x - row).norm(dim=1).argsort()[: len(x) - 1]
        m[i, nearest] = w[nearest] / w[nearest].sum()
    return rule(m @ x, w) @ m


REFERENCES = [
    partial(norm_bound, 1.0),
    partial(norm_bound, 0.5),
    weiszfeld,
    partial(krum, 1, 1),
    partial(krum, 1, 2),
    partial(mixed, weiszfeld),
]


@pytest.mark.parametrize("parties", [5, 8])
@pytest.mark.parametrize(
    ("rule", "reference"), [*zip(WEIGHING, REFERENCES, strict=True)], ids=[*map(repr, WEIGHING)]
)
def test_whole_updates_are_weighed_as_dense_ones_are(
    rule: Aggregation, reference: Callable[[Tensor, Tensor], Tensor], parties: int
) -> None:
    weights = WEIGHTS[:parties]
    counting = [party for party, weight in enumerate(weights) if weight]
    anchor = start(0)
    for number, done in enumerate(zip(*rounds_of(rule, weights, rounds=2), strict=True)):
        x = torch.stack([update(done[party].held, anchor) for party in counting])
        w = torch.tensor([weights[party] for party in counting], dtype=torch.float64)
        u = reference(x, w / w.sum())
        for party in range(parties):
            report, result = done[party].report, done[party].result
            assert report.active_parties == len(counting)
            expected = torch.zeros(parties, dtype=torch.float64)
            expected[counting] = u
            assert report.influence == pytest.approx(expected.tolist(), abs=1e-4), (number, rule)
            head = anchor[HEAD].double() + (u @ x[:, :12]).view(3, 4)
            torch.testing.assert_close(result[HEAD].double(), head, rtol=1e-4, atol=1e-4)
            at = 12
            for before, after in zip(products(anchor), products(result), strict=True):
                dense = before + (u @ x[:, at : at + before.numel()]).view_as(before)
                at += before.numel()
                left, s, right = torch.linalg.svd(dense)
                best = left[:, :RANK] @ torch.diag(s[:RANK]) @ right[:RANK]
                torch.testing.assert_close(after, best, rtol=1e-3, atol=2e-3)
        anchor = done[0].result


@pytest.mark.parametrize("parties", [3, 4, 7])
def test_numbers_are_combined_one_by_one(parties: int) -> None:
    weights = [1.0] * parties
    for rule, combine in (
        (Median(), lambda x: np.median(x, axis=0)),
        (TrimmedMean(1), lambda x: np.sort(x, axis=0)[1:-1].mean(axis=0)),
    ):
        anchor = start(0)
        for done in zip(*rounds_of(rule, weights, rounds=2), strict=True):
            for name in anchor:
                changes = np.stack([(party.held[name] - anchor[name]).numpy() for party in done])
                expected = anchor[name].numpy() + combine(changes)
                np.testing.assert_allclose(done[0].result[name].numpy(), expected, rtol=1e-4, atol=1e-5)
            anchor = done[0].result


def test_a_weighted_median_is_that_of_the_weights() -> None:
    # Of 1 with weight 1, 2 with weight 3 and 9 with weight 1 it is 2; of 1, 2 and 9 with 1, 1 and 3 it is 9.
    def act(federation: Federation) -> list[float]:
        w = torch.zeros(3)
        aggregator = Aggregator(federation, {"w": w}, aggregation=Median())
        aggregator.start()
        seen = []
        for weights in ([1, 3, 1], [1, 1, 3], [1, 1, 1], [2, 1, 1]):
            w.fill_([1.0, 2.0, 9.0][federation.party])
            aggregator.step(weights[federation.party])
            seen.append(float(w[0]))
        return seen

    # The updates are from 2, 9 and 2 on; the medians of the values are the same. Of 1 (2), 2, 9 it is 1 to 2.
    for seen in run_parties(3, act):
        assert seen == pytest.approx([2, 9, 2, 1.5], abs=1e-5)


@rules
@pytest.mark.parametrize("weights", [[1, 3, 0, 2, 1], [0.7, 1, 1, 1, 1, 5, 0]])
def test_all_parties_hold_the_same_bits(rule: Aggregation, weights: list[float]) -> None:
    for done in zip(*rounds_of(rule, weights, rounds=3), strict=True):
        assert len({bits(party.result) for party in done}) == 1
        assert len({party.report.influence for party in done}) == 1


@pytest.mark.parametrize("rule", [NormBound(), *RULES[2:]], ids=repr)
def test_a_party_alone_keeps_its_own_update(rule: Aggregation) -> None:
    ((done,),) = rounds_of(rule, [2.0])
    torch.testing.assert_close(done.result[HEAD], done.held[HEAD])
    for after, before in zip(products(done.result), products(done.held), strict=True):
        if isinstance(rule, Median | TrimmedMean) and rule.frozen_a:
            continue  # local training has moved A here, against the rule
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


# ---- attackers


def regauged(parameters: Parameters, seed: int, stretch: float) -> None:
    """Other factors of the same products: B G and G^-1 A."""
    for index, name in enumerate(SIZES):
        turn = torch.linalg.qr(random(seed + index, RANK, RANK).double()).Q
        gauge = turn @ torch.diag(torch.tensor([stretch, 1 / stretch], dtype=torch.float64)[:RANK])
        b, a = parameters[name_b(name)], parameters[name_a(name)]
        parameters[name_b(name)].copy_(b.double() @ gauge)
        parameters[name_a(name)].copy_(torch.linalg.inv(gauge) @ a.double())


@pytest.mark.parametrize("stretch", [1.0, 30.0])
@pytest.mark.parametrize("rule", WEIGHING, ids=repr)
def test_other_factors_of_the_same_products_change_nothing(rule: Aggregation, stretch: float) -> None:
    def turned(party: int, number: int, parameters: Parameters) -> None:
        drift(0.2)(party, number, parameters)
        if party in (1, 4):
            regauged(parameters, 10 * party, stretch)

    plain, attacked = (rounds_of(rule, [1, 3, 1, 2, 1], train)[0][0].result for train in (None, turned))
    for name in plain:  # the factors also, since they stay near to the anchor's
        torch.testing.assert_close(attacked[name], plain[name], rtol=1e-2, atol=1e-2)


def honest_and(
    attack: Callable[[Parameters, Parameters], None], attackers: Sequence[int], factor: float = 1.0
) -> Callable[[int, int, Parameters], None]:
    """Parties that all learn the same, with a little noise; attackers change what they would send."""

    def train(party: int, number: int, parameters: Parameters) -> None:
        before = copied(parameters)
        for index, p in enumerate(parameters.values()):
            p += 0.1 * random(31 + index, *p.shape) + 0.01 * random(100 * party + index, *p.shape)
        if party in attackers:
            attack(parameters, before)

    return train


def sign_flip(times: float, parameters: Parameters, before: Parameters) -> None:
    for name, p in parameters.items():
        p.copy_(before[name] - times * (p - before[name]))


def set_to(value: float, parameters: Parameters, before: Parameters) -> None:
    for p in parameters.values():
        p.fill_(value)


def gauge_attack(parameters: Parameters, before: Parameters) -> None:
    regauged(parameters, 5, 300.0)


ATTACKS: dict[str, Callable[[Parameters, Parameters], None]] = {
    "sign flip x10": partial(sign_flip, 10),
    "x5": partial(sign_flip, -5),
    "1e30": partial(set_to, 1e30),
    "3e38": partial(set_to, 3e38),
    "NaN": partial(set_to, math.nan),
    "infinity": partial(set_to, math.inf),
    "gauge": gauge_attack,
}


AGAINST_TWO = [
    GeometricMedian(),
    Krum(2),
    MultiKrum(2),
    GeometricMedian(mixing=2),
    Median(),
    TrimmedMean(2),
    Median(mixing=2),
    Median(frozen_a=True),
]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("rule", AGAINST_TWO, ids=repr)
def test_two_of_seven_barely_move_the_result(rule: Aggregation, attack: Any) -> None:
    done = rounds_of(rule, [1.0] * 7, honest_and(attack, [2, 5]))
    honest = rounds_of(rule, [1.0] * 7, honest_and(lambda *_: None, []))
    result, expected = done[0][0].result, honest[0][0].result
    assert len({bits(party[0].result) for party in done}) == 1
    distance = (update(result, expected)).norm()
    moved = update(expected, start(0)).norm()
    assert float(distance) < 0.3 * float(moved)


def test_a_norm_bound_lets_an_attacker_pull_as_far_as_others_do() -> None:
    # Of five parties with norms 1, four along the axis and one back with norm 10, cut to 1: (4 - 1) / 5.
    def act(federation: Federation) -> Any:
        w = torch.zeros(4)
        aggregator = Aggregator(federation, {"w": w}, aggregation=NormBound())
        aggregator.start()
        w[0] = -10.0 if federation.party == 3 else 1.0
        return aggregator.step(1.0), w

    for report, w in run_parties(5, act):
        assert w.tolist() == pytest.approx([0.6, 0, 0, 0])
        assert report.influence == pytest.approx([0.2, 0.2, 0.2, 0.02, 0.2])


# ---- with the other options


@pytest.mark.parametrize("exchange", [Cast("bfloat16"), Quantized(8)], ids=repr)
@pytest.mark.parametrize("rule", [GeometricMedian(), Median()], ids=repr)
def test_compressed_values_give_nearly_the_same(rule: Aggregation, exchange: Any) -> None:
    exact = rounds_of(rule, [1, 3, 0, 2, 1], exchange=Plain())
    rounded = rounds_of(rule, [1, 3, 0, 2, 1], exchange=exchange)
    assert len({bits(party[0].result) for party in rounded}) == 1
    distance = update(rounded[0][0].result, exact[0][0].result).norm()
    assert 0 < float(distance) < 0.05 * float(update(exact[0][0].result, start(0)).norm())


@pytest.mark.parametrize("rule", [GeometricMedian(), Median(), Krum(mixing=1)], ids=repr)
def test_fragments_are_judged_one_by_one(rule: Aggregation) -> None:
    done = rounds_of(rule, [1, 3, 0, 2, 1], rounds=4, overlap=Overlap(fragments=2))
    last = [party[-1] for party in done]
    assert last[0].report.round == 3
    # After the last round of each fragment all hold the same there; the other fragment has moved on since.
    changed = [name for name in last[0].result if not torch.equal(last[0].result[name], last[0].held[name])]
    assert 0 < len(changed) < len(last[0].result)
    for name in changed:
        assert len({bits(party.result[name]) for party in last}) == 1


@pytest.mark.parametrize("rule", [GeometricMedian(), Median()], ids=repr)
def test_rounds_may_run_in_the_background(rule: Aggregation) -> None:
    def act(federation: Federation, overlap: Overlap | None) -> bytes:
        parameters = start(federation.party)
        aggregator = Aggregator(federation, parameters, aggregation=rule, lora=LORA, overlap=overlap)
        aggregator.start()
        drift(0.2)(federation.party, 0, parameters)
        if overlap is None:
            aggregator.step(1.0 + federation.party)
        else:
            aggregator.begin(1.0 + federation.party)
            aggregator.apply(last=True)
        return bits(parameters)

    waiting, behind = (run_parties(5, partial(act, overlap=o)) for o in (None, Overlap(delay_steps=1)))
    assert waiting == behind


def test_an_outer_optimizer_steps_by_the_robust_update() -> None:
    done = rounds_of(Median(), [1.0] * 3, outer_optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    whole = rounds_of(Median(), [1.0] * 3)
    anchor = start(0)
    for name, p in anchor.items():
        half = p + 0.5 * (whole[0][0].result[name] - p)
        torch.testing.assert_close(done[0][0].result[name], half, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [GeometricMedian(), Median(), Krum()], ids=repr)
def test_separate_jobs_survive_a_loss_and_an_attacker(world: Any, rule: Aggregation) -> None:
    made = world(5, rounds=4, quorum=3)

    def attacks(life: Life) -> None:
        assert life.aggregator is not None
        life.w.copy_(life.aggregator.global_vector + (-50.0 if life.index == 1 else 0.1))

    for name in made.roster:
        faults = {"receiving@2": die} if name == "p4" else {}
        made.start(name, aggregation=rule, weight=1.0, train=attacks, faults=faults)
    made.join()
    lives = [life for life in made.lives if life.name != "p4"]
    assert [life.error for life in lives] == [None] * 4
    assert [len(life.reports) for life in lives] == [4] * 4
    for life in lives:
        assert torch.equal(life.w, lives[0].w)
    # Whoever is honest moves by 0.1 in each of four rounds, from where the first began.
    begin = torch.randn(SIZE, generator=torch.Generator().manual_seed(77))
    torch.testing.assert_close(lives[0].w - begin, torch.full((SIZE,), 0.4), rtol=0, atol=1e-3)


@rules
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"exchange": masked}, "secure aggregation reveals sums only. Use NormBound"),
        ({"exchange": lambda: TopK(8, 1)}, "sends a small part of each"),
        ({"privacy": lambda: GaussianMechanism(1.0, 1.0)}, "differential privacy bounds and hides these"),
        ({"auxiliary": lambda: AuxiliaryTerms("Test()", rescales=True)}, "drift corrections"),
    ],
)
def test_who_hides_single_updates_is_refused(rule: Aggregation, arguments: Any, reason: str) -> None:
    made = {name: make() for name, make in arguments.items()}

    def act(federation: Federation) -> None:
        Aggregator(federation, start(0), aggregation=rule, lora=LORA, **made)

    if isinstance(rule, NormBound) and arguments.get("exchange") is masked:
        run_parties(5, act)  # each party bounds its own
        return
    for message in refusals(run_parties(5, act, may_fail=True), ValueError):
        assert reason in message
        assert repr(rule) in message


@pytest.mark.parametrize(
    ("rule", "parties"),
    [(Median(), 2), (Krum(1), 4), (TrimmedMean(2), 4), (Median(mixing=2), 4), (MultiKrum(2), 6)],
)
def test_too_few_parties_to_protect_any_are_refused(rule: Aggregation, parties: int) -> None:
    def act(federation: Federation) -> None:
        Aggregator(federation, start(0), aggregation=rule, lora=LORA)

    for message in refusals(run_parties(parties, act, may_fail=True), ValueError):
        assert f"protects {parties + 1} parties or more, and these are {parties}" in message


@pytest.mark.parametrize(
    "make",
    [
        lambda: NormBound(0),
        lambda: NormBound(math.nan),
        lambda: Median(mixing=-1),
        lambda: Krum(True),
        lambda: Krum(-1),
        lambda: TrimmedMean(0),
        lambda: MultiKrum(1, 0),
        lambda: GeometricMedian(math.inf),
        lambda: GeometricMedian(0.0),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], Aggregation]) -> None:
    with pytest.raises(ValueError, match="must be a"):
        make()


def test_a_round_of_too_few_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    rounds_of(Krum(1), [1, 1, 1, 0, 0], rounds=2)
    assert caplog.text.count("3 parties count, and Krum(num_malicious=1, mixing=0) protects 5 or more") == 5
