"""Rounds over compressed exchanges: what they compute, what crosses, what is owed, and what they refuse."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from job_threads import Life, World, die
from lightning.pytorch.callbacks import ModelCheckpoint
from lora_oracles import Parameters, Sizes, adapter, drift, frozen, modules, name_a, name_b, random
from message_transcript import tapped
from party_threads import Rounds, ValidatedClassifier, data, fit_parties, quiet_trainer, run_parties
from secure_exchange import masked
from torch import Tensor

from pellm_lightning import Aggregator, FederatedAveraging, Federation, RoundReport
from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    FrozenA,
    HeterogeneousRank,
    LowRankMean,
    Mean,
    ResidualMean,
    ShareA,
    Stacking,
)
from pellm_lightning.comm import MismatchError
from pellm_lightning.comm.torchrun.federation import SLOT_BYTES
from pellm_lightning.exchange import Cast, Exchange, Plain, Quantized, TopK
from pellm_lightning.privacy import GaussianMechanism

SIZES: Sizes = {"k": (40, 33), "q": (32, 48)}

EXCHANGES: dict[str, Callable[[], Exchange]] = {
    "cast": lambda: Cast("bfloat16"),
    "cast, feedback": lambda: Cast("bfloat16", error_feedback=True),
    "8 bits": lambda: Quantized(bits=8, block_size=16),
    "8 bits, feedback": lambda: Quantized(bits=8, block_size=24, error_feedback=True),
    "4 bits": lambda: Quantized(bits=4, block_size=16),
    "4 bits, feedback": lambda: Quantized(bits=4, block_size=128, error_feedback=True),
    "top-k": lambda: TopK(chunk_size=64, k=8),
    "top-k, 4 bits": lambda: TopK(chunk_size=33, k=5, bits=4),
    "top-k, no feedback": lambda: TopK(chunk_size=64, k=8, error_feedback=False),
}
FEEDBACK = [name for name, make in EXCHANGES.items() if make().error_feedback]


def aggregator_of(federation: Federation, parameters: Mapping[str, Tensor], **arguments: Any) -> Aggregator:
    aggregator = Aggregator(federation, parameters, **arguments)
    aggregator.start()
    return aggregator


def owed(aggregator: Aggregator) -> Tensor:
    return aggregator.state_dict()["error_feedback"][0]["residuals"]


# ---- what rounds compute


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1.0, 3.0, 0.1]), min_size=1, max_size=5).filter(any),
    size=st.sampled_from([1, 2, 3, 17, 200, 1001]),
    bits=st.sampled_from([8, 4]),
    seed=st.integers(0, 1000),
)
def test_quantized_means_miss_float64_by_two_steps(
    weights: Sequence[float], size: int, bits: int, seed: int
) -> None:
    """Each party's code loses a step of its values times its share, and the code of the sum one more."""
    held = [random(seed + party, size) for party in range(len(weights))]

    def act(federation: Federation) -> Tensor:
        parameters = {"w": torch.zeros(size)}
        exchange = Quantized(bits=bits, block_size=16)
        aggregator = aggregator_of(federation, parameters, exchange=exchange)
        parameters["w"].copy_(held[federation.party])
        aggregator.step(weights[federation.party])
        return parameters["w"]

    results = run_parties(len(weights), act)
    shares = [weight / math.fsum(weights) for weight in weights]
    exact = torch.stack([share * x.double() for share, x in zip(shares, held, strict=True)]).sum(0)
    step = max(float(x.abs().max()) for x in held) / (2 ** (bits - 1) - 1)
    for x in results:
        assert torch.equal(x, results[0])
        assert (x.double() - exact).abs().max() <= 2.2 * step


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_all_parties_hold_the_same_bits(exchange: str) -> None:
    """Over several buckets and uneven weights; a party of weight 0 and parameters of two dtypes."""

    def act(federation: Federation) -> tuple[Parameters, RoundReport]:
        parameters = {"a": torch.zeros(70_001), "b": torch.zeros(513, dtype=torch.bfloat16)}
        aggregator = aggregator_of(federation, parameters, exchange=EXCHANGES[exchange]())
        for number in range(3):
            drift(0.1)(federation.party, number, parameters)
            report = aggregator.step([1.0, 3.0, 0.0, 2.0][federation.party])
        return parameters, report

    results = run_parties(4, act)
    for parameters, report in results:
        assert all(torch.equal(parameters[name], results[0][0][name]) for name in parameters)
        assert report.total_weight == 6.0
        assert report.active_parties == 3
        silent = report.weight == 0 and exchange.startswith("top-k")
        assert silent == (report.compression_error is None)
        assert silent or 0 < report.compression_error < 1


def test_one_party_alone_loses_nothing() -> None:
    for make in EXCHANGES.values():

        def act(federation: Federation, make: Callable[[], Exchange] = make) -> Tensor:
            parameters = {"w": torch.zeros(300)}
            aggregator = aggregator_of(federation, parameters, exchange=make())
            parameters["w"].copy_(random(1, 300))
            report = aggregator.step(1.0)
            assert report.compression_error is None
            return parameters["w"]

        torch.testing.assert_close(run_parties(1, act)[0], random(1, 300), rtol=1e-6, atol=1e-7)


def test_loss_weights_and_metrics_cross_exactly() -> None:
    def act(federation: Federation) -> None:
        aggregator = aggregator_of(federation, {"w": torch.zeros(50)}, exchange=Quantized(bits=4))
        report = aggregator.step(1.0 + federation.party, loss=1 / 3 + federation.party)
        assert report.loss == pytest.approx((1 / 3 + 2 * (4 / 3) + 3 * (7 / 3)) / 6, rel=1e-14)
        mean = aggregator.mean({"m": (1 / 7 + federation.party, 1.0)})
        assert mean["m"] == pytest.approx(1 / 7 + 1, rel=1e-15)

    run_parties(3, act)


def test_parties_round_independently_and_a_run_repeats() -> None:
    """All hold the same values; were all rounded alike, their mean would miss as much as one code does."""
    same = random(3, 4096)

    def mean(parties: int, seed: int) -> Tensor:
        def act(federation: Federation) -> Tensor:
            # The code of the sum is that of many more bits.
            parameters = {"w": torch.zeros(4096)}
            exchange = TopK(chunk_size=64, k=64, bits=4, error_feedback=False, seed=seed)
            aggregator = aggregator_of(federation, parameters, exchange=exchange)
            parameters["w"].copy_(same)
            aggregator.step(1.0)
            return parameters["w"]

        return run_parties(parties, act)[0]

    assert torch.equal(mean(2, 0), mean(2, 0))
    assert not torch.equal(mean(2, 0), mean(2, 1))
    two, eight = ((mean(parties, 0) - same).norm() for parties in (2, 8))
    assert float(eight / two) == pytest.approx(0.5, rel=0.1)  # the square root of 2 over 8


# ---- error feedback


@pytest.mark.parametrize("exchange", FEEDBACK)
def test_error_feedback_telescopes(exchange: str) -> None:
    """What was transmitted in all rounds is the sum of the true means, less what is owed at the end.

    Weights change from round to round, and with them the shares; a party counts 0 at times, and once one
    holds NaN and is left out.
    """
    weights = [[1.0, 3.0, 2.0], [0.0, 1.0, 5.0], [2.0, 2.0, 0.0], [1.0, 1.0, 1.0], [4.0, 0.0, 0.0]]

    def act(federation: Federation) -> tuple[Tensor, Tensor, Tensor]:
        party = federation.party
        parameters = {"a": torch.zeros(300), "b": torch.zeros(77)}
        aggregator = aggregator_of(federation, parameters, exchange=EXCHANGES[exchange]())
        true = torch.zeros(377, dtype=torch.float64)
        for number, of_round in enumerate(weights):
            drift(0.1)(party, number, parameters)
            mine = aggregator.global_vector.clone()
            update = torch.cat([parameters["a"], parameters["b"]]).double() - mine
            left_out = number == 3 and party == 1
            if left_out:
                parameters["a"][5] = math.nan
            report = aggregator.step(of_round[party])
            assert report.excluded == ((1,) if number == 3 else ())
            total = math.fsum(of_round) - (1.0 if number == 3 else 0.0)
            if total and not left_out:
                true += of_round[party] / total * update
        return aggregator.global_vector.clone(), true, owed(aggregator)

    results = run_parties(3, act)
    vector = results[0][0].double()
    true = torch.stack([of_party[1] for of_party in results]).sum(0)
    rest = -torch.stack([of_party[2] for of_party in results]).sum(0).double()  # of anchor minus parameters
    assert rest.norm() > 1e-3 * true.norm(), "else nothing is owed"
    torch.testing.assert_close(vector + rest, true, rtol=0, atol=1e-6)


def test_who_does_not_count_keeps_what_it_owes() -> None:
    def act(federation: Federation) -> None:
        parameters = {"w": torch.zeros(128)}
        aggregator = aggregator_of(federation, parameters, exchange=TopK(chunk_size=64, k=4))
        drift(0.1)(federation.party, 0, parameters)
        aggregator.step(1.0)
        before = owed(aggregator)
        drift(0.1)(federation.party, 1, parameters)
        aggregator.step(float(federation.party != 1))
        assert torch.equal(before, owed(aggregator)) == (federation.party == 1)

    run_parties(3, act)


def quadratics(exchange: Exchange, rounds: int) -> float:
    """Return by how much N quadratics of unlike curvature end above the least of their mean."""
    size = 256
    curvatures = [1 + random(10 + party, size).abs() for party in range(3)]
    centres = [random(20 + party, size) for party in range(3)]

    def act(federation: Federation) -> Tensor:
        parameters = {"w": torch.zeros(size)}
        aggregator = aggregator_of(federation, parameters, exchange=exchange)
        h, c = curvatures[federation.party], centres[federation.party]
        for number in range(rounds):
            # One step, so that parties do not drift apart; ever smaller ones, so that what is owed ends at 0.
            parameters["w"].sub_(0.3 / (1 + number / 20) * h * (parameters["w"] - c))
            aggregator.step(1.0)
        return parameters["w"]

    w = run_parties(3, act)[0].double()
    pairs = [(h.double(), c.double()) for h, c in zip(curvatures, centres, strict=True)]
    best = sum(h * c for h, c in pairs) / sum(h for h, _ in pairs)
    return float((w - best).norm() / best.norm())


def test_four_bits_and_top_k_reach_what_plain_reaches() -> None:
    assert quadratics(Plain(), 60) < 1e-5
    assert quadratics(Quantized(bits=4, error_feedback=True), 150) < 0.02
    soon, late = (quadratics(TopK(chunk_size=64, k=8), rounds) for rounds in (40, 200))
    assert late < 0.09
    assert late < soon / 2, "it goes on"


def test_without_feedback_top_k_does_not() -> None:
    """Parties that pull in opposite directions send the same few coordinates for ever."""
    soon, late = (quadratics(TopK(chunk_size=64, k=8, error_feedback=False), rounds) for rounds in (40, 120))
    assert late > 0.5
    assert late > 0.9 * soon


# ---- going on


@pytest.mark.parametrize("exchange", ["4 bits", "4 bits, feedback", "top-k"])
def test_a_resumed_run_is_exact(exchange: str) -> None:
    def act(federation: Federation) -> None:
        def train(aggregator: Aggregator, parameters: Parameters, rounds: Sequence[int]) -> None:
            for number in rounds:
                drift(0.1)(federation.party, number, parameters)
                aggregator.step(1.0 + federation.party)

        parameters = {"w": torch.zeros(500)}
        whole = aggregator_of(federation, parameters, exchange=EXCHANGES[exchange]())
        train(whole, parameters, range(2))
        state, held = whole.state_dict(), parameters["w"].clone()
        train(whole, parameters, range(2, 4))
        again = {"w": held}
        resumed = Aggregator(federation, again, exchange=EXCHANGES[exchange]())
        resumed.load_state_dict(state)
        resumed.start()
        train(resumed, again, range(2, 4))
        assert torch.equal(again["w"], parameters["w"])
        assert torch.equal(owed(resumed), owed(whole))

    run_parties(3, act)


def test_residuals_are_a_partys_own() -> None:
    def act(federation: Federation) -> tuple[Tensor, dict[str, Any]]:
        parameters = {"w": torch.zeros(500)}
        aggregator = aggregator_of(federation, parameters, exchange=TopK(chunk_size=64, k=4))
        drift(0.1)(federation.party, 0, parameters)
        aggregator.step(1.0)
        return owed(aggregator), aggregator._global_state.state()

    results = run_parties(2, act)
    assert not torch.equal(results[0][0], results[1][0])
    for _, state in results:
        assert "error_feedback" not in state, (
            "it would be compared, made durable, and handed to who comes late"
        )


def test_residuals_of_other_parameters_are_refused() -> None:
    error_feedback = TopK().new_error_feedback(torch.zeros(10))
    with pytest.raises(ValueError, match="are 11 numbers, but the parameters are 10"):
        error_feedback.load_state_dict({"residuals": torch.ones(11)})


def test_residuals_of_a_checkpoint_that_the_others_have_gone_beyond_are_forgotten() -> None:
    state = {"residuals": torch.ones(10)}
    behind, present = TopK().new_error_feedback(torch.zeros(10)), TopK().new_error_feedback(torch.zeros(10))
    for error_feedback in (behind, present):
        error_feedback.load_state_dict(state)
    present.begin(7, [True, True])
    present.commit()  # a round stands that it took part in: what it owes is known to be owed
    for error_feedback in (behind, present):
        error_feedback.discard_restored()
    assert torch.equal(behind.state_dict()["residuals"], torch.zeros(10))
    assert torch.equal(present.state_dict()["residuals"], torch.ones(10))


def test_what_is_no_part_of_the_vector_crosses_exactly() -> None:
    """Other vectors of float32 have no residuals here, and must not take those of the parameters."""

    def act(federation: Federation) -> None:
        exchange, vector, other = TopK(chunk_size=8, k=1), random(federation.party, 40), random(9, 40)
        error_feedback = exchange.new_error_feedback(vector)
        assert error_feedback is not None
        error_feedback.begin(0, [True, True])
        exchange.open(federation, lambda: None, error_feedback=error_feedback).all_reduce_each_(
            [vector[8:32], other[8:32]]
        )
        assert torch.equal(other[8:32], 2 * random(9, 40)[8:32])
        assert torch.equal(vector[:8], random(federation.party, 40)[:8])
        error_feedback.commit()
        owes = error_feedback.state_dict()["residuals"]
        assert owes[8:32].count_nonzero() >= 21
        assert not torch.cat([owes[:8], owes[32:]]).any()
        kept = random(federation.party, 40)[8:32] - owes[8:32]  # this party's part of the sum
        assert kept.abs().gt(1e-6).sum() == 3

    run_parties(2, act)


def test_an_attempt_that_is_given_up_changes_no_residual() -> None:
    error_feedback = TopK().new_error_feedback(torch.zeros(10))
    for end in (error_feedback.discard, lambda: error_feedback.begin(3, [True])):
        error_feedback.begin(3, [True])
        error_feedback.next_residual(2, 5).fill_(1.0)
        end()
        error_feedback.commit()
        assert not error_feedback.state_dict()["residuals"].any()
    error_feedback.next_residual(2, 5).fill_(1.0)
    error_feedback.next_residual(7, 8).fill_(math.nan)  # of a round whose values overflowed
    error_feedback.commit()
    assert error_feedback.state_dict()["residuals"].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_fit_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def fitted(ckpt: str | None = None) -> list[Tensor]:
        def fit(party: int, federated: Any) -> Tensor:
            folder = tmp_path / f"party-{party}"
            saved = ModelCheckpoint(
                folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
            )
            module, rounds = ValidatedClassifier(seed=party if ckpt is None else 77), Rounds()
            exchange = Quantized(bits=4, block_size=8, error_feedback=True)
            trainer = quiet_trainer(
                tmp_path,
                [saved, federated(every_n_steps=2, exchange=exchange)],
                logger=rounds,
                enable_checkpointing=True,
                max_epochs=-1,
                max_steps=8,
            )
            loaders = data(4 + party, seed=party, batch_size=8), data(6, seed=10 + party)
            trainer.fit(module, *loaders, ckpt_path=None if ckpt is None else folder / f"step={ckpt}.ckpt")
            assert 0 < rounds.rounds[-1]["compression_error"] < 0.5
            return module.vector()

        return fit_parties(3, fit)

    whole = fitted()
    assert all(torch.equal(one, whole[0]) for one in whole)
    for got, expected in zip(fitted("5"), whole, strict=True):
        assert torch.equal(got, expected)


# ---- separate jobs


@pytest.mark.parametrize("exchange", ["4 bits, feedback", "top-k"])
def test_rounds_of_separate_jobs_agree_though_one_dies(world: Callable[..., World], exchange: str) -> None:
    """A party dies in an exchange; the others make the attempt again, and hold the same bits."""
    federation = world(4, rounds=5)
    federation.start("p0", "p1", "p2", exchange=EXCHANGES[exchange]())
    federation.start("p3", exchange=EXCHANGES[exchange](), faults={"exchanging@2": die})
    federation.join()
    by_round: dict[int, set[tuple[float, ...]]] = {}
    for entry in federation.settled:
        by_round.setdefault(entry.round, set()).add(tuple(entry.vector))
    assert federation.reached == 5
    assert all(len(vectors) == 1 for vectors in by_round.values())


def test_an_attempt_that_failed_and_members_that_change_lose_nothing(world: Callable[..., World]) -> None:
    """The owners of the slices change as p3 goes; what p0 to p2 owe is still theirs, once.

    All that they ever wanted to say is what the vector has moved, what they owe, and what p3 took with it.
    """
    federation = world(4, rounds=4)
    exchange = TopK(chunk_size=16, k=4)
    at_death: list[tuple[int, Tensor]] = []
    lock = threading.Lock()

    def dies(life: Life) -> None:
        assert life.aggregator is not None
        with lock:
            at_death.append((life.aggregator.round - 1, owed(life.aggregator)))  # of the round made
        die(life)

    starts: dict[str, Tensor] = {}
    wanted: dict[tuple[str, int], Tensor] = {}

    def notes(life: Life) -> None:
        aggregator = life.aggregator
        assert aggregator is not None
        average = aggregator._global_state.updates.average

        def averages(counting: Any, *more: Any) -> Any:
            with lock:
                starts.setdefault(life.name, aggregator.global_vector.clone())
                update = aggregator.global_vector.double() - life.parameters.double()
                wanted[life.name, aggregator.round] = counting.share * update  # the last attempt stands
            return average(counting, *more)

        aggregator._global_state.updates.average = averages

    lives = federation.start("p0", "p1", "p2", exchange=exchange, faults={"forming@0": notes})
    lives += federation.start("p3", exchange=exchange, faults={"forming@0": notes, "voting@2": dies})
    federation.join()
    died_in, lost = at_death[0]
    said = sum(update for (name, round), update in wanted.items() if name != "p3" or round < died_in)
    aggregator = lives[0].aggregator
    assert aggregator is not None
    rest = lost + sum(owed(life.aggregator) for life in lives[:3])
    moved = starts["p0"].double() - aggregator.global_vector.double()
    torch.testing.assert_close(moved + rest, said, rtol=0, atol=1e-5)
    assert rest.norm() > 0.1 * moved.norm()


# ---- rules of LoRA


RULES: dict[str, Callable[[], Aggregation]] = {
    "Mean": Mean,
    "FrozenA": FrozenA,
    "Alternating": Alternating,
    "ShareA": ShareA,
    "LowRankMean": LowRankMean,
    "zero_pad": lambda: HeterogeneousRank(method="zero_pad"),
    "ResidualMean": ResidualMean,
    "Stacking": Stacking,
}


def products_of(
    exchange: Exchange, rule: Aggregation, **arguments: Any
) -> list[tuple[Parameters, RoundReport]]:
    def act(federation: Federation) -> tuple[Parameters, RoundReport]:
        parameters, bases = adapter(7, SIZES, 3), frozen(9, SIZES)
        parameters["head"] = random(5, 10)
        aggregator = aggregator_of(
            federation,
            parameters,
            aggregation=rule,
            exchange=exchange,
            lora=modules(bases, 1.5),
            **arguments,
        )
        for number in range(4):
            moves = {"FrozenA": "lora_B", "Alternating": ("lora_B", "lora_A")[number % 2]}
            drift(0.05, moves.get(type(rule).__name__, ""))(federation.party, number, parameters)
            report = aggregator.step([1.0, 3.0, 0.0, 2.0][federation.party])
        if isinstance(rule, ShareA):  # the other factor and the head stay local
            parameters = {
                name: p if "lora_A" in name else torch.ones_like(p) for name, p in parameters.items()
            }
        return parameters | bases, report

    return run_parties(4, act)


@pytest.mark.parametrize("exchange", ["cast", "8 bits", "4 bits, feedback"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_compute_nearly_what_they_compute_openly(rule: str, exchange: str) -> None:
    """What the weights of the modules miss, in units of by how much the rounds have moved them."""
    plain, small = (products_of(x, RULES[rule]()) for x in (Plain(), EXCHANGES[exchange]()))
    start = adapter(7, SIZES, 3) | frozen(9, SIZES)
    for (openly, _), (one, _) in zip(plain, small, strict=True):
        assert all(torch.equal(one[name], small[0][0][name]) for name in openly)
        start |= {name_b(module): openly[name_b(module)] for module in SIZES if rule == "ShareA"}
        for module in SIZES:
            before, expected, got = (weight(module, held) for held in (start, openly, one))
            part = {"cast": 0.005, "8 bits": 0.02, "4 bits, feedback": 0.4}[exchange]
            assert (got - expected).norm() <= part * (expected - before).norm()


def weight(module: str, held: Mapping[str, Tensor]) -> Tensor:
    """Return what a module computes with."""
    a, b = held[name_a(module)], held[name_b(module)]
    return held[module] + 1.5 * b @ a


@pytest.mark.parametrize("exchange", ["top-k", "top-k, 4 bits"])
@pytest.mark.parametrize("rule", ["Mean", "FrozenA", "Alternating", "ShareA", "zero_pad"])
def test_top_k_goes_with_rules_of_means(rule: str, exchange: str) -> None:
    results = products_of(EXCHANGES[exchange](), RULES[rule]())
    for one, _ in results:
        assert all(torch.equal(one[name], results[0][0][name]) for name in one)


def test_factors_cross_compressed() -> None:
    """A round of LowRankMean sends a quarter; measuring comes with it, and costs nothing more."""
    plain, small = (products_of(exchange, LowRankMean()) for exchange in (Plain(), Quantized(block_size=64)))
    for (_, openly), (_, report) in zip(plain, small, strict=True):
        if report.weight:  # of so few numbers the flags and the last blocks are a large part
            assert report.bytes_sent - SLOT_BYTES < 0.48 * (openly.bytes_sent - SLOT_BYTES)
        assert report.deviation is not None
        assert openly.deviation is not None
        assert report.deviation.total == pytest.approx(openly.deviation.total, rel=0.2)


def test_the_deviation_is_measured_if_asked_for_and_where_it_is_free() -> None:
    silent = products_of(Quantized(block_size=16), Mean())
    asked = products_of(Quantized(block_size=16), Mean(measure_deviation=True))
    openly = products_of(Plain(), Mean())
    for (_, without), (_, measured), (_, plain) in zip(silent, asked, openly, strict=True):
        assert without.deviation is None
        assert measured.deviation is not None
        assert plain.deviation is not None
        assert measured.deviation.total == pytest.approx(plain.deviation.total, rel=0.2)
        assert measured.bytes_sent >= without.bytes_sent


def test_by_default_lora_gets_a_rule_that_the_exchange_can_serve() -> None:
    def act(federation: Federation) -> tuple[str, str]:
        found = [
            repr(Aggregator(federation, adapter(7, SIZES, 3), exchange=exchange)._context.plan.rule)
            for exchange in (Quantized(), TopK())
        ]
        return found[0], found[1]

    assert run_parties(1, act)[0] == (repr(LowRankMean()), repr(Mean()))


# ---- bytes


def sent_in_round(monkeypatch: pytest.MonkeyPatch, exchange: Exchange, size: int, parties: int) -> list[int]:
    """Return what each party reports to have sent in a round, having compared it with what Gloo was given."""
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> int:
        parameters = {"w": torch.zeros(size)}
        aggregator = aggregator_of(federation, parameters, exchange=exchange)
        aggregator.step(1.0)
        first = len([m for m in messages if m.party == federation.party])
        parameters["w"].copy_(random(federation.party, size))
        report = aggregator.step(1.0)
        mine = [m for m in messages if m.party == federation.party][first:]
        counted = 0
        index = 0
        while index < len(mine):
            message = mine[index]
            if message.collective in ("allgather", "alltoall_base"):  # what comes in, then what goes out
                index += 1
                counted += mine[index].values.nbytes
            elif message.sent:
                counted += message.values.nbytes
            index += 1
        assert report.bytes_sent == counted
        return counted

    return run_parties(parties, act)


@pytest.mark.parametrize("parties", [2, 4])
@pytest.mark.parametrize("size", [1_000_000, 70_000])
def test_bytes(monkeypatch: pytest.MonkeyPatch, size: int, parties: int) -> None:
    """A reduce-scatter gives (N - 1) / N of a code to the group, an all-gather 1 / N: together a code."""
    whole = 4 * size
    for exchange, part, more in [
        (Cast("bfloat16"), 1 / 2, 0.001),
        (Quantized(bits=8), 1 / 4, 0.04),
        (Quantized(bits=4), 1 / 8, 0.08),
        (Quantized(bits=4, error_feedback=True), 1 / 8, 0.08),
        (TopK(), (3 * 64 + 4) / 4096 / 4, 0.02),
    ]:
        with monkeypatch.context() as patch:
            for sent in sent_in_round(patch, exchange, size, parties):
                # The headers' slots, the N + 4 float64 flags, and what fills up the last slices.
                few = SLOT_BYTES + (parties + 4) * 8 + 256
                assert part * whole * 0.995 <= sent <= part * (1 + more) * whole + few
    with monkeypatch.context() as patch:
        assert min(sent_in_round(patch, Plain(), size, parties)) >= whole


# ---- differential privacy


def test_clipping_and_noise_come_before_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update far above the clipping norm: what crosses is the code of the clipped one, with its noise."""

    def moved(noise: float) -> Tensor:
        def act(federation: Federation) -> Tensor:
            parameters = {"w": torch.zeros(2000)}
            privacy = GaussianMechanism(max_norm=1.0, noise_multiplier=noise, delta=1e-5, distributed=False)
            aggregator = aggregator_of(federation, parameters, exchange=Quantized(bits=8), privacy=privacy)
            parameters["w"].fill_(100.0)  # the same at all, so that their mean has the norm of one
            aggregator.step(1.0)
            return parameters["w"]

        results = run_parties(3, act)
        assert all(torch.equal(x, results[0]) for x in results)
        return results[0]

    clipped = moved(1e-6)
    assert float(clipped.norm()) == pytest.approx(1.0, rel=0.01)
    noisy = moved(1.0) - clipped
    # Each party's noise has the deviation 1, and their mean 1 / sqrt(3) of it, in each of 2000 directions.
    assert float(noisy.std()) == pytest.approx(3**-0.5, rel=0.1)


def test_noise_that_only_a_sum_hides_is_refused() -> None:
    def act(federation: Federation) -> None:
        privacy = GaussianMechanism(max_norm=1.0, noise_multiplier=1.0, delta=1e-5)
        with pytest.raises(ValueError, match="each update alone has too little"):
            Aggregator(federation, {"w": torch.zeros(9)}, exchange=Quantized(), privacy=privacy)

    run_parties(3, act)


# ---- what is refused


@pytest.mark.parametrize("several", [[masked, Quantized], [Quantized, TopK]])
def test_several_exchanges_are_refused_in_words(several: Sequence[Callable[[], Exchange]]) -> None:
    exchange: Any = [make() for make in several]
    with pytest.raises(ValueError, match="Several cannot be combined: secure aggregation sums integers"):
        FederatedAveraging(exchange=exchange)

    def act(federation: Federation) -> None:
        with pytest.raises(ValueError, match=r"SecureAggregation\(..., bits=32\)"):
            Aggregator(federation, {"w": torch.zeros(9)}, exchange=exchange)

    run_parties(1, act)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cast("float16"), r"dtype='float16' must be 'bfloat16'.*use Quantized\(bits=8\)"),
        (lambda: Quantized(bits=2), "bits=2 must be 8 or 4"),
        (lambda: Quantized(block_size=12), "block_size=12 must be a multiple of 8"),
        (lambda: Quantized(block_size=1 << 16), "block_size=65536 must be"),
        (lambda: Quantized(error_feedback="yes"), "error_feedback='yes' must be true or false"),
        (lambda: TopK(k=0), "k=0 must be a whole number from 1 to chunk_size=4096"),
        (lambda: TopK(chunk_size=64, k=65), "k=65 must be"),
        (lambda: TopK(chunk_size=40_000), "chunk_size=40000 must be a whole number from 8 to 32768"),
    ],
)
def test_arguments_are_checked(make: Callable[[], Exchange], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("rule", "exchange", "words"),
    [
        (LowRankMean(solver="power"), Quantized(), "a compressed exchange would save nothing"),
        (HeterogeneousRank(solver="power"), Cast(), "Use solver='exact'"),
        (HeterogeneousRank(), Quantized(), "changes the basis of the factors"),
        (LowRankMean(factorization="svd"), Cast(), r"Use LowRankMean\(\) with factorization='procrustes'"),
        (LowRankMean(), TopK(), "needs the parties' whole factors"),
        (Stacking(), TopK(), r"or exchange.Quantized\(...\)"),
    ],
)
def test_rules_that_need_what_is_not_sent_are_refused(
    rule: Aggregation, exchange: Exchange, words: str
) -> None:
    def act(federation: Federation) -> None:
        lora = modules(frozen(9, SIZES))
        with pytest.raises(ValueError, match=words):
            Aggregator(federation, adapter(1, SIZES, 2), aggregation=rule, lora=lora, exchange=exchange)

    run_parties(1, act)


def test_measuring_what_top_k_does_not_send_is_refused() -> None:
    def act(federation: Federation) -> None:
        with pytest.raises(ValueError, match="measure_deviation=True needs the parties' whole factors"):
            Aggregator(federation, adapter(1, SIZES, 2), aggregation=Mean(True), exchange=TopK())

    run_parties(1, act)


@pytest.mark.parametrize(
    "other", [Plain(), Quantized(bits=4), Quantized(block_size=64), Quantized(error_feedback=True), TopK()]
)
def test_parties_with_other_exchanges_are_told_before_anything_is_sent(
    other: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> None:
        mine = other if federation.party == 1 else Quantized()
        with pytest.raises(MismatchError, match="exchange"):
            Aggregator(federation, {"w": torch.zeros(3)}, exchange=mine).start()

    run_parties(2, act)
    assert not messages
