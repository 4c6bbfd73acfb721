"""Whole rounds over a masked exchange: what they compute, what they tell, and what they refuse."""

import ast
import importlib
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lora_oracles import Parameters, Sizes, adapter, drift, random
from message_transcript import Message, NotedStore, metadata_of, tapped
from party_threads import Rounds, ValidatedClassifier, data, fit_parties, quiet_trainer, refusals, run_parties
from secure_exchange import keys, masked
from torch import Tensor

import pellm_lightning
from pellm_lightning import Aggregator, Federation, FederationError, RoundReport
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
from pellm_lightning.comm import MismatchError, PartyLostError
from pellm_lightning.engine.coordination import Header, Purpose
from pellm_lightning.exchange import Exchange, Plain
from pellm_lightning.exchange.secure.fixed_point import KeyStream

SOON_S = 8.0
SIZES: Sizes = {"k": (8, 7), "q": (6, 9)}


def aggregator_of(federation: Federation, parameters: Mapping[str, Tensor], **arguments: Any) -> Aggregator:
    aggregator = Aggregator(federation, parameters, **({"exchange": masked()} | arguments))
    aggregator.start()
    return aggregator


# ---- what rounds compute


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1.0, 3.0, 0.1, 250.0]), min_size=3, max_size=6).filter(
        lambda drawn: sum(weight > 0 for weight in drawn) >= 3
    ),
    setting=st.sampled_from([(64, 24), (32, 12), (64, 36)]),
    seed=st.integers(0, 1000),
)
def test_the_mean_equals_float64(weights: Sequence[float], setting: tuple[int, int], seed: int) -> None:
    bits, fractional_bits = setting
    held = [random(seed + party, 200) for party in range(len(weights))]
    exchange = masked(bits=bits, fractional_bits=fractional_bits)

    def act(federation: Federation) -> tuple[Tensor, RoundReport]:
        parameters = {"w": torch.zeros(200)}
        aggregator = aggregator_of(federation, parameters, exchange=exchange)
        parameters["w"].copy_(held[federation.party])
        report = aggregator.step(weights[federation.party], loss=2.0 + federation.party)
        return parameters["w"], report

    results = run_parties(len(weights), act)
    total = math.fsum(weights)
    pairs = list(zip(weights, held, strict=True))
    exact = torch.stack([weight * x.double() for weight, x in pairs]).sum(0) / total
    loss = math.fsum(weight * (2 + party) for party, weight in enumerate(weights)) / total
    # Of the sum, half a unit of each; that w x, the sum, one over the total and their product are float32;
    # that the total is a fixed point, too.
    units = len(weights) / 2 * 2.0**-fractional_bits
    units_told = len(weights) / 2 * 2.0 ** -min(fractional_bits, 32)
    largest = max(float(x.abs().max()) for x in held)
    bound = (units + largest * units_told) / total + 8 * 2.0**-24 * largest
    for party, (x, report) in enumerate(results):
        assert torch.equal(x, results[0][0])
        assert (x.double() - exact).abs().max() <= bound
        assert report.active_parties == sum(weight > 0 for weight in weights)
        assert report.weight == weights[party]
        assert report.total_weight == pytest.approx(total, abs=units_told)
        assert report.loss == pytest.approx(loss, abs=(1 + loss) * 2 * units_told / total)
        assert report.total_weight == results[0][1].total_weight


RULES: dict[str, Callable[[], Aggregation]] = {
    "Mean": Mean,
    "FrozenA": FrozenA,
    "Alternating": Alternating,
    "ShareA": ShareA,
    "LowRankMean": lambda: LowRankMean(solver="power"),
}


def rounds_of(exchange: Exchange, rule: Aggregation | None, *, head: bool = True) -> list[Parameters]:
    """Return the parties' parameters after four rounds of weights 1, 3, 0, 2."""

    def act(federation: Federation) -> Parameters:
        parameters = adapter(7, SIZES, 3)
        if head:
            parameters["head"] = random(5, 10)
        aggregator = aggregator_of(federation, parameters, aggregation=rule, exchange=exchange)
        moves = "lora_B" if isinstance(rule, FrozenA) else ""
        for number in range(4):
            if isinstance(rule, Alternating):
                moves = ("lora_B", "lora_A")[number % 2]
            drift(0.05, moves)(federation.party, number, parameters)
            aggregator.step([1.0, 3.0, 0.0, 2.0][federation.party])
        assert list(aggregator.drain()) == []
        return parameters

    return run_parties(4, act)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("rule", RULES)
def test_rules_compute_what_they_compute_openly(rule: str, bits: int) -> None:
    plain = rounds_of(Plain(), RULES[rule]())
    hidden = rounds_of(masked(bits=bits), RULES[rule]())
    for openly, one in zip(plain, hidden, strict=True):
        for name in openly:
            local = rule == "ShareA" and "lora_A" not in name
            assert local or torch.equal(one[name], hidden[0][name])
            # Four rounds of 4 / (2 * 6) * 2^-24 and a few roundings of float32, which a power iteration of
            # well separated factors does not blow up beyond a hundred times.
            torch.testing.assert_close(
                one[name], openly[name], rtol=0, atol=1e-4 if rule == "LowRankMean" else 2e-6
            )


def test_none_chooses_a_rule_that_needs_sums_only() -> None:
    chosen, named = (rounds_of(masked(), rule) for rule in (None, LowRankMean(solver="power")))
    assert all(torch.equal(chosen[0][name], named[0][name]) for name in named[0])


def test_a_round_in_which_the_last_part_rests() -> None:
    """Without a head the last bucket is of B, which does not cross in each second round."""
    plain, hidden = (rounds_of(exchange, Alternating(), head=False) for exchange in (Plain(), masked()))
    for name in plain[0]:
        torch.testing.assert_close(hidden[0][name], plain[0][name], rtol=0, atol=2e-6)


def test_parties_of_unlike_ranks() -> None:
    def act(exchange: Exchange, federation: Federation) -> Parameters:
        parameters = adapter(3, SIZES, 2 + federation.party)
        rule = HeterogeneousRank(solver="power")
        aggregator = aggregator_of(federation, parameters, aggregation=rule, exchange=exchange)
        for number in range(3):
            drift(0.05)(federation.party, number, parameters)
            aggregator.step(1.0 + federation.party)
        return parameters

    plain, hidden = (run_parties(3, partial(act, exchange)) for exchange in (Plain(), masked()))
    for openly, one in zip(plain, hidden, strict=True):
        for name in openly:
            torch.testing.assert_close(one[name], openly[name], rtol=0, atol=1e-4)


def test_an_outer_optimizer_has_the_same_state_everywhere() -> None:
    def act(federation: Federation) -> Any:
        parameters = {"w": torch.zeros(50)}
        adam = partial(torch.optim.Adam, lr=0.05)
        aggregator = aggregator_of(federation, parameters, outer_optimizer=adam)
        for number in range(3):
            parameters["w"] += random(10 * federation.party + number, 50)
            aggregator.step(1.0 + federation.party)
        return aggregator.state_dict()

    first, *others = run_parties(3, act)
    for other in others:
        assert torch.equal(first["global"], other["global"])
        moments = [
            state["fragments"][0]["outer_optimizer"]["state"][0]["exp_avg_sq"] for state in (first, other)
        ]
        assert torch.equal(*moments)


# ---- what rounds tell


def test_a_round_tells_nothing_but_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, losses and metrics included: beside integers only who counts crosses."""
    messages, store = tapped(monkeypatch), NotedStore()
    weights, secret = [13.0, 11.5, 7.25], 4321.0

    def act(federation: Federation) -> tuple[int, dict[str, float]]:
        parameters = {"w": torch.zeros(100)}
        aggregator = aggregator_of(federation, parameters)
        begun = len(messages)
        parameters["w"] += random(federation.party, 100)
        aggregator.step(weights[federation.party], loss=secret)
        mean = aggregator.mean({"val_loss": (secret + federation.party, weights[federation.party])})
        return begun, mean

    results = run_parties(3, act, store=store)
    begun = max(begun for begun, _ in results)
    headers = 0
    for message in messages[begun:]:
        assert not message.values.is_floating_point()
        if said := metadata_of(message):
            assert said[1]["weight"] in (0, 1), "whether it counts, not how much"
            told = {said[1].get(name) for name in ("loss", "distance", "steps_left", "metrics")}
            assert told == {None}, "neither its loss nor its distance"
            headers += 1
    assert headers <= 3 * 2
    assert headers >= 3
    for _, value in store.written:
        assert b"4321" not in value
        assert b"4322" not in value
    # (4321 * 13 + 4322 * 11.5 + 4323 * 7.25) / 31.75
    exact = sum((secret + party) * weight for party, weight in enumerate(weights)) / sum(weights)
    means = [mean["val_loss"] for _, mean in results]
    assert means[0] == pytest.approx(exact, abs=1e-4)
    assert len(set(means)) == 1


def test_a_metric_that_two_have_is_no_mean(caplog: pytest.LogCaptureFixture) -> None:
    def act(federation: Federation) -> dict[str, float]:
        aggregator = aggregator_of(federation, {"w": torch.zeros(4)})
        mine = {"loss": (float(federation.party), 1.0), "accuracy": (0.5, 2.0)}
        if federation.party > 1:
            del mine["accuracy"]
        if federation.party == 3:
            mine["loss"] = (99.0, 0.0)
        return aggregator.mean(mine)

    assert run_parties(4, act) == [{"loss": 1.0}] * 4
    assert "No mean of accuracy: fewer than 3 parties have them at this moment" in caplog.text


def test_masks_are_never_used_twice_in_rounds_fits_and_after_a_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[tuple[bytes, int]] = []
    begin = KeyStream.__init__

    def noted(self: KeyStream, key: bytes, nonce: int = 0) -> None:
        begun.append((key, nonce))
        begin(self, key, nonce)

    monkeypatch.setattr(KeyStream, "__init__", noted)

    def act(states: Sequence[Any] | None, federation: Federation) -> Any:
        parameters = {"w": torch.zeros(30)}
        aggregator = Aggregator(federation, parameters, exchange=masked())
        if states is not None:
            aggregator.load_state_dict(states[federation.party])
        aggregator.start()
        for _ in range(2):
            parameters["w"] += 1
            aggregator.step(1.0)
            aggregator.mean({"loss": (1.0, 1.0)})
        return aggregator.state_dict()

    states = run_parties(3, partial(act, None))
    run_parties(3, partial(act, states))
    run_parties(3, partial(act, states))
    # Three federations of two rounds and two means each: a sum each, of 3 pairs, twice begun, and of 3
    # parties' own streams, begun by themselves and by all.
    counts = [begun.count(stream) for stream in set(begun)]
    assert sorted(counts) == [2] * (12 * 3) + [4] * (12 * 3)


# ---- who does not count


def test_a_party_with_nan_is_left_out_and_healed() -> None:
    def act(federation: Federation) -> tuple[Tensor, RoundReport]:
        parameters = {"w": torch.zeros(20)}
        aggregator = aggregator_of(federation, parameters)
        parameters["w"].fill_(math.nan if federation.party == 1 else federation.party)
        return parameters["w"], aggregator.step(1.0)

    for x, report in run_parties(4, act):
        # (0 + 2 + 3) / 3
        torch.testing.assert_close(x, torch.full((20,), 5 / 3), rtol=0, atol=1e-6)
        assert report.excluded == (1,)
        assert report.active_parties == 3


def test_nan_in_factors_of_a_rank_of_ones_own_is_seen_before_the_sum() -> None:
    def act(federation: Federation) -> tuple[Parameters, RoundReport]:
        parameters = adapter(3, SIZES, 2 + federation.party)
        aggregator = aggregator_of(federation, parameters, aggregation=HeterogeneousRank(solver="power"))
        drift(0.05)(federation.party, 0, parameters)
        if federation.party == 1:
            next(iter(parameters.values()))[0, 0] = math.nan
        return parameters, aggregator.step(1.0)

    for parameters, report in run_parties(4, act):
        assert report.excluded == (1,)
        assert all(x.isfinite().all() for x in parameters.values())


def test_an_outer_momentum_does_not_move_what_nobody_counts_for() -> None:
    """Three parties count in the first round, two in the second: nothing is sent, and all go back."""

    def act(federation: Federation) -> tuple[Tensor, Tensor]:
        parameters = {"w": torch.zeros(20)}
        momentum = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
        aggregator = aggregator_of(federation, parameters, outer_optimizer=momentum)
        parameters["w"].add_(1.0)
        aggregator.step(1.0)
        before = parameters["w"].clone()
        parameters["w"].add_(1.0)
        assert aggregator.step(float(federation.party > 0)).active_parties == 0
        return before, parameters["w"]

    for before, after in run_parties(3, act):
        assert torch.equal(before, torch.full((20,), 0.5))
        assert torch.equal(after, before)


def sums_sent(messages: Sequence[Message], size: int) -> list[Message]:
    return [message for message in messages if message.values.numel() == size]


def test_with_nan_at_one_of_three_nothing_is_sent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would see each other's: all go back, and the next round is as if nothing had been."""

    def act(federation: Federation) -> list[Tensor]:
        parameters = {"w": torch.full((20,), 5.0)}
        aggregator = aggregator_of(federation, parameters)
        parameters["w"].fill_(math.inf if federation.party == 1 else federation.party)
        report = aggregator.step(1.0)
        back = parameters["w"].clone()
        assert (report.active_parties, report.weight, report.total_weight) == (0, 0, 0)
        parameters["w"].fill_(federation.party)
        aggregator.step(1.0)
        return [back, parameters["w"]]

    for back, after in run_parties(3, act):
        assert torch.equal(back, torch.full((20,), 5.0))
        torch.testing.assert_close(after, torch.ones(20), rtol=0, atol=1e-6)
    assert "only 2 parties count, and each would see what the others sent" in caplog.text


def test_nan_may_stop_all_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> None:
        parameters = {"w": torch.zeros(20)}
        aggregator = aggregator_of(federation, parameters, on_nonfinite="raise")
        parameters["w"].fill_(math.nan if federation.party == 1 else 1.0)
        del messages[:]
        with pytest.raises(FederationError, match="parameters of party 1 hold NaN or infinity"):
            aggregator.step(1.0)

    run_parties(3, act)
    assert all(metadata_of(message) for message in messages if message.sent)


def test_where_all_weights_are_zero_there_is_no_mean() -> None:
    def act(federation: Federation) -> None:
        aggregator = aggregator_of(federation, {"w": torch.zeros(4)})
        with pytest.raises(FederationError, match="No party has weight above 0 in round 0"):
            aggregator.step(0.0)

    run_parties(3, act)


def test_weights_that_are_too_small_for_their_digits_are_told() -> None:
    def act(federation: Federation) -> None:
        aggregator = aggregator_of(federation, {"w": torch.zeros(4)}, exchange=masked(fractional_bits=8))
        with pytest.raises(FederationError, match="weights of round 0 are too small for the fractional bits"):
            aggregator.step(1e-4)

    run_parties(3, act)


def test_what_exceeds_the_limit_stops_all_and_touches_nothing() -> None:
    def act(federation: Federation) -> str:
        parameters = {"w": torch.zeros(4)}
        aggregator = aggregator_of(federation, parameters, exchange=masked(bits=32))
        parameters["w"].fill_(1000.0 if federation.party == 2 else 1.0)
        before = parameters["w"].clone()
        try:
            aggregator.step(1.0)
        except FederationError as error:
            assert torch.equal(parameters["w"], before)
            raise error
        raise AssertionError("a sum that wraps around")

    began = time.monotonic()
    errors = run_parties(3, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    assert "Party 2 would add 1000 (an update or a metric times its weight" in str(errors[2])
    assert all(isinstance(error, PartyLostError) for error in errors[:2])


def test_the_last_round_is_told_when_too_few_go_on(caplog: pytest.LogCaptureFixture) -> None:
    steps = [1, 2, 4, 4]

    def act(federation: Federation) -> list[tuple[int, int, bool, float]]:
        parameters = {"w": torch.zeros(4)}
        aggregator = aggregator_of(federation, parameters, quorum=2)
        done = []
        for _ in range(steps[federation.party]):
            parameters["w"] += 1.0
            report = aggregator.step(1.0)
            done.append(report)
            if report.last:
                break
        done += aggregator.drain()
        return [(r.round, r.active_parties, r.last, float(parameters["w"][0])) for r in done]

    results = run_parties(4, act)
    # Party 0 is done after round 0, so three count in round 1; then party 1 is done, too, and the two that
    # are left cannot hide: round 2 moves nothing and is the last.
    final = results[0][-1][-1]
    assert results == [[(0, 4, False, final), (1, 3, False, final), (2, 0, True, final)]] * 4
    assert final == pytest.approx(2.0, abs=1e-6)
    assert "Round 2 is the last: 2 parties have made all their steps, and the 2 that have not" in caplog.text


def test_who_revealed_a_sum_counts_only_in_the_same_sum() -> None:
    """Parties 0 to 4 revealed a sum together; since then party 2 alone did so in one with others."""

    def act(federation: Federation) -> list[float]:
        aggregator = aggregator_of(federation, {"w": torch.zeros(4)})
        together = tuple(f"{party}/now" for party in range(5))
        exposed = [together, together, ("2/now", "5/now", "6/now"), together, together]
        headers = [Header(Purpose.ROUND, 0, 1.0, True, "now", names) for names in exposed]
        return aggregator._rounds._filter.select(headers, 0, 0, lambda: None).weights

    # With party 2 left out, the sum of the four others would tell what party 2 had in the first.
    assert run_parties(5, act) == [[0.0] * 5] * 5


def test_who_comes_back_with_new_values_does_not_complete_an_old_sum() -> None:
    """All three revealed a sum; then one was replaced by a process with other values."""

    def act(federation: Federation) -> list[float]:
        aggregator = aggregator_of(federation, {"w": torch.zeros(4)})
        together = ("0/a", "1/b", "2/c")
        headers = [
            Header(Purpose.ROUND, 0, 1.0, True, tag, exposed)
            for tag, exposed in (("a", together), ("b", together), ("d", ()))
        ]
        same = [Header(Purpose.ROUND, 0, 1.0, True, tag, together) for tag in "abc"]
        filter = aggregator._rounds._filter
        assert filter.select(same, 0, 0, lambda: None).weights == [1.0] * 3
        return filter.select(headers, 0, 0, lambda: None).weights  # one alone cannot hide

    assert run_parties(3, act) == [[0.0] * 3] * 3


def test_a_metric_that_is_nan_stops_nobody() -> None:
    def act(federation: Federation) -> dict[str, float]:
        aggregator = aggregator_of(federation, {"w": torch.zeros(4)})
        return aggregator.mean({"loss": (math.nan if federation.party == 1 else 1.0, 1.0)})

    results = run_parties(4, act, may_fail=True)
    assert not [error for error in results if isinstance(error, Exception)]


# ---- refused


@pytest.mark.parametrize(
    "rule", [LowRankMean(), ResidualMean(), Stacking(), HeterogeneousRank()], ids=lambda rule: repr(rule)
)
def test_rules_that_need_the_parties_refuse_before_anything_is_sent(
    rule: Aggregation, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> None:
        with pytest.raises(ValueError, match="needs single parties' factors") as caught:
            Aggregator(federation, adapter(1, SIZES, 2), aggregation=rule, exchange=masked())
        assert repr(rule) in str(caught.value)
        assert "LowRankMean(solver='power')" in str(caught.value)

    run_parties(3, act)
    assert not messages


def test_measuring_the_deviation_is_refused() -> None:
    def act(federation: Federation) -> None:
        with pytest.raises(ValueError, match="measure_deviation=True needs the parties' own factors"):
            Aggregator(federation, adapter(1, SIZES, 2), aggregation=Mean(True), exchange=masked())

    run_parties(3, act)


@pytest.mark.parametrize(
    "other",
    [
        Plain(),
        masked(bits=32),
        masked(fractional_bits=20),
        masked(signing_key=f"{keys('strangers')}/{{party}}.key", trusted_keys=str(keys("strangers"))),
    ],
    ids=["plain", "bits", "digits", "peers"],
)
def test_parties_with_other_exchanges_are_told_before_anything_is_sent(
    other: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> None:
        mine = other if federation.party == 1 else masked()
        with pytest.raises(MismatchError, match="exchange"):
            Aggregator(federation, {"w": torch.zeros(3)}, aggregation=Mean(), exchange=mine).start()

    run_parties(3, act)
    assert not messages


# ---- in a fit


def fitted(
    root: Path, exchange: Exchange, ckpt: str | None = None, steps: Sequence[int] = (9, 9, 9)
) -> list[tuple[Tensor, Rounds]]:
    """Fit three parties that save after each step, or go on from a step's checkpoint."""

    def fit(party: int, federated: Any) -> tuple[Tensor, Rounds]:
        folder = root / f"party-{party}"
        saved = ModelCheckpoint(
            folder,
            filename="{step}",
            every_n_train_steps=1,
            save_top_k=-1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        module, rounds = ValidatedClassifier(seed=party if ckpt is None else 77), Rounds()
        trainer = quiet_trainer(
            root,
            [saved, federated(every_n_steps=2, exchange=exchange)],
            logger=rounds,
            enable_checkpointing=True,
            max_epochs=-1,
            max_steps=steps[party],
            check_val_every_n_epoch=None,
            val_check_interval=4,
        )
        path = None if ckpt is None else folder / f"step={ckpt}.ckpt"
        loaders = data(4 + party, seed=party, batch_size=8), data(6, seed=10 + party)
        trainer.fit(module, *loaders, ckpt_path=path)
        return module.vector(), rounds

    return fit_parties(3, fit)


def test_a_fit_ends_as_one_over_a_plain_exchange(tmp_path: Path) -> None:
    plain, hidden = fitted(tmp_path / "plain", Plain()), fitted(tmp_path / "masked", masked())
    for (openly, rounds), (one, hidden_rounds) in zip(plain, hidden, strict=True):
        assert torch.equal(one, hidden[0][0])
        torch.testing.assert_close(one, openly, rtol=0, atol=1e-5)
        assert hidden_rounds.metrics["federated/val_loss"] == pytest.approx(
            rounds.metrics["federated/val_loss"], abs=1e-5
        )
        assert hidden_rounds.metrics["federated/val_loss"] == hidden[0][1].metrics["federated/val_loss"]
        for name in ("round", "weight", "total_weight", "active_parties"):
            ours, theirs = ([done[name] for done in seen.rounds] for seen in (hidden_rounds, rounds))
            assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("step", ["4", "5"])
def test_a_fit_goes_on_from_its_checkpoint(tmp_path: Path, step: str) -> None:
    whole = fitted(tmp_path, masked())
    resumed = fitted(tmp_path, masked(), ckpt=step)
    assert all(torch.equal(one, resumed[0][0]) for one, _ in resumed)
    for (expected, _), (got, _) in zip(whole, resumed, strict=True):
        assert torch.equal(got, expected)


def test_a_fit_ends_when_too_few_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        results = fitted(tmp_path, masked(), steps=(4, 20, 20))
    assert all(torch.equal(one, results[0][0]) for one, _ in results)
    assert [len(rounds.rounds) for _, rounds in results] == [3, 3, 3]
    assert "Round 2 is the last" in caplog.text


def test_a_fit_with_a_rule_that_needs_the_parties_is_refused_in_words(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> None:
        module = ValidatedClassifier(seed=party)
        callback = federated(exchange=masked(), aggregation=LowRankMean())
        quiet_trainer(tmp_path, [callback]).fit(module, data(8, seed=party), data(4, seed=party))

    for told in refusals(fit_parties(3, fit, may_fail=True), MisconfigurationException):
        assert "needs single parties' factors" in told


# ---- without cryptography


def test_without_cryptography_all_but_masked_works(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("pellm_lightning.exchange", "pellm_lightning.comm.signing_keys")
    for name in list(sys.modules):
        if name.split(".")[0] == "cryptography" or name.startswith(ours):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setattr(pellm_lightning, "exchange", pellm_lightning.exchange)  # set by the next line
    exchange = importlib.import_module("pellm_lightning.exchange")
    assert repr(exchange.Plain()) == "Plain()"
    with pytest.raises(ImportError, match=r"pip install 'pellm-lightning\[keys\]'"):
        exchange.SecureAggregation("a.key", {"a": "ed25519:"})


def test_nothing_imports_cryptography_until_it_is_used() -> None:
    needed = {
        *(f"exchange.secure.{name}" for name in ("key_agreement", "fixed_point", "collectives")),
        *("comm.keys", "comm.signing_keys", "comm.revocation"),
    }
    for path in Path(pellm_lightning.__file__).parent.rglob("*.py"):
        if path.stem in ("keys", "signing_keys", "revocation") or path.parent.name == "secure":
            continue
        for statement in ast.parse(path.read_text()).body:
            words = (
                ast.unparse(statement) if isinstance(statement, ast.Import | ast.ImportFrom | ast.Try) else ""
            )
            assert "cryptography" not in words
            assert not any(f"pellm_lightning.{module} " in f"{words} " for module in needed)
