"""Rounds in which one party would decide: absurd updates are left out, shares capped, masked ones bound."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_threads import Life, die
from lora_oracles import bits, name_a, name_b, random
from manual_rounds import started
from party_threads import refusals, run_parties
from round_history import SIZE
from secure_exchange import masked
from torch import Tensor

from pellm_lightning import Aggregator, Federation, FederationError, Overlap, RoundReport
from pellm_lightning.aggregation import Aggregation, LowRankMean, Mean, Median, NormBound
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues
from pellm_lightning.exchange import Plain, Quantized, TopK
from pellm_lightning.privacy import GaussianMechanism

RULES = [Mean(), LowRankMean(), LowRankMean("power"), Median(), NormBound()]
Act = Callable[[Federation], Any]


def parameters() -> dict[str, Tensor]:
    return {name_a("q"): random(1, 2, 5), name_b("q"): random(2, 4, 2), "head": random(3, 6)}


def learn(tensors: dict[str, Tensor], party: int, number: int = 0, scale: float = 0.1) -> None:
    for index, p in enumerate(tensors.values()):
        p += scale * random(100 * party + 10 * number + index, *p.shape)


# ---- absurd updates


@pytest.mark.parametrize("value", [1e6, 1e30, 3e38, -3e38, math.nan, math.inf])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_result_is_that_of_the_others(rule: Aggregation, value: float) -> None:
    def act(federation: Federation, weight: float) -> tuple[list[RoundReport], dict[str, Tensor]]:
        tensors = parameters()
        aggregator = started(federation, tensors, aggregation=rule)
        reports = []
        for number in range(2):
            learn(tensors, federation.party, number)
            if federation.party == 2 and number == 0:
                for p in tensors.values():
                    p.fill_(value)
            given = [1.0, 3.0, weight, 2.0][federation.party]
            reports.append(aggregator.step(given if number == 0 else 1.0))
        return reports, tensors

    with_it = run_parties(4, lambda federation: act(federation, 5.0))
    without = run_parties(4, lambda federation: act(federation, 0.0))
    for (reports, tensors), (_, expected) in zip(with_it, without, strict=True):
        assert [report.excluded for report in reports] == [(2,), ()], "the honest are not NaN afterwards"
        assert reports[0].active_parties == 3
        assert reports[0].total_weight == 6.0
        assert bits(tensors) == bits(expected)


def test_it_is_named_with_its_norm(caplog: pytest.LogCaptureFixture) -> None:
    def act(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        w.fill_([1.0, -1.0, 4e4][federation.party])
        aggregator.step(1)

    run_parties(3, act)
    message = "the update of party 2 has norm 8e+04, 1000 times the median of the others' or more."
    assert caplog.text.count(message) == 3
    assert "NaN" not in caplog.text


def test_it_can_be_an_error() -> None:
    def act(federation: Federation) -> Tensor:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, on_nonfinite="raise")
        w.fill_([1.0, -1.0, 4e4][federation.party])
        with pytest.raises(FederationError, match=r"party 2 has norm 8e\+04.*No parameter was changed"):
            aggregator.step(1)
        assert aggregator.round == 0
        return w

    assert [float(w[0]) for w in run_parties(3, act)] == [1.0, -1.0, 4e4]


def test_nan_and_an_absurd_update_are_both_left_out() -> None:
    def act(federation: Federation) -> tuple[RoundReport, Tensor]:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, quorum=1)
        w.fill_([1.0, math.nan, 1e30, 3.0, 2.0][federation.party])
        return aggregator.step([1, 2, 3, 1, 2][federation.party]), w

    for report, w in run_parties(5, act):
        assert report.excluded == (1, 2)
        assert w.tolist() == [2.0] * 4  # (1*1 + 1*3 + 2*2) / 4


def test_with_two_parties_nobody_is_judged() -> None:
    # Nobody could tell which of the two is right: (1*1e6 + 1*0) / 2.
    def act(federation: Federation) -> tuple[RoundReport, Tensor]:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        w.fill_([1e6, 1.0][federation.party])
        return aggregator.step(1), w

    for report, w in run_parties(2, act):
        assert report.excluded == ()
        assert w.tolist() == pytest.approx([500000.5] * 4)


def test_a_party_of_weight_0_is_neither_judged_nor_judges() -> None:
    def act(federation: Federation) -> tuple[RoundReport, Tensor]:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w})
        w.fill_([1e-9, 1e9, 2.0, 2.0, 1.0][federation.party])
        return aggregator.step([0, 0, 1, 1, 2][federation.party]), w

    for report, w in run_parties(5, act):
        assert report.excluded == ()
        assert w.tolist() == [1.5] * 4


@pytest.mark.parametrize("exchange", [Plain(), Quantized(8), TopK(8, 4)], ids=repr)
@pytest.mark.parametrize("overlap", [None, Overlap(fragments=2)], ids=["whole", "fragments"])
def test_with_other_exchanges_and_fragments(exchange: Any, overlap: Overlap | None) -> None:
    def act(federation: Federation) -> list[RoundReport]:
        tensors = {"layers.0.w": torch.zeros(24), "layers.1.w": torch.zeros(16)}
        aggregator = started(federation, tensors, exchange=exchange, overlap=overlap)
        reports = []
        for number in range(4):
            learn(tensors, federation.party, number)
            if federation.party == 1 and number == 2:
                tensors["layers.0.w"].fill_(1e20)
            reports.append(aggregator.step(1.0))
        assert all(p.abs().max() < 10 for p in tensors.values())
        return reports

    for reports in run_parties(4, act):
        assert [report.excluded for report in reports] == [(), (), (1,), ()]


def test_where_privacy_hides_norms_clipping_bounds_them() -> None:
    def act(federation: Federation) -> tuple[RoundReport, Tensor]:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, privacy=GaussianMechanism(1.0, 1e-6, distributed=False))
        w[0] = 1e6 if federation.party == 1 else 1.0
        return aggregator.step(1.0), w

    for report, w in run_parties(4, act):
        assert report.excluded == ()
        assert float(w[0]) == pytest.approx(1.0, abs=1e-3)


def test_a_control_variate_of_an_absurd_party_is_left_out_with_its_update() -> None:
    def act(federation: Federation) -> tuple[RoundReport, Tensor, Tensor]:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, auxiliary=AuxiliaryTerms("Test()", vector=True))
        value = 1e25 if federation.party == 1 else 1.0
        w.fill_(value)
        report = aggregator.step(1.0, None, AuxiliaryValues(vector={"w": torch.full((4,), value)}))
        return report, w, aggregator.carried["w"]

    for report, w, carried in run_parties(4, act):
        assert report.excluded == (1,)
        assert w.tolist() == carried.tolist() == [1.0] * 4


# ---- capped shares


def shared(weights: list[float], max_share: float, rounds: int = 1, **arguments: Any) -> list[list[Any]]:
    """The reports and results of parties whose updates are the unit vectors: their shares can be read off."""

    def act(federation: Federation) -> list[tuple[RoundReport, list[float]]]:
        w = torch.zeros(len(weights))
        aggregator = started(federation, {"w": w}, max_share=max_share, **arguments)
        seen = []
        for _ in range(rounds):
            before = w.clone()
            w[federation.party] += 1.0
            report = aggregator.step(weights[federation.party])
            seen.append((report, (w - before).tolist()))
        return seen

    return run_parties(len(weights), act)


def test_a_share_is_capped() -> None:
    # Two are above the cap: C = 0.4 (2 C + 1) = 2.
    for party, ((report, moved),) in enumerate(shared([1e9, 3, 0, 1], 0.4)):
        assert moved == pytest.approx([0.4, 0.4, 0.0, 0.2])
        assert report.weights == pytest.approx([2, 2, 0, 1])
        assert report.weight == report.weights[party]
        assert report.influence == pytest.approx(moved)


def test_too_few_parties_for_the_cap_count_alike() -> None:
    for ((_, moved),) in shared([5, 1, 100], 0.2):
        assert moved == pytest.approx([1 / 3] * 3)


def test_the_cap_must_be_a_share_and_the_same_everywhere() -> None:
    def act(federation: Federation, max_share: float) -> None:
        started(federation, {"w": torch.zeros(2)}, max_share=max_share)

    for bad in (0, -1, 1.5, math.nan):
        for message in refusals(run_parties(1, lambda f, m=bad: act(f, m), may_fail=True), ValueError):
            assert "max_share" in message
    differing = run_parties(2, lambda f: act(f, [0.5, 0.6][f.party]), may_fail=True)
    assert any("max_share=0.5, party 1 has max_share=0.6" in str(error) for error in differing)


# ---- by the sender, where sums are masked


def test_a_masked_weight_is_capped_from_the_second_round_on() -> None:
    # The first round: 97 % for party 0. Then at most 0.4 / 0.6 of the others' 3.
    for party, seen in enumerate(shared([97, 1, 1, 1], 0.4, rounds=3, exchange=masked())):
        first, *later = seen
        assert first[1] == pytest.approx([0.97, 0.01, 0.01, 0.01], abs=1e-4)
        for report, moved in later:
            assert moved == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=1e-4)
            assert report.weight == pytest.approx(2.0 if party == 0 else 1.0, abs=1e-4)
            assert report.total_weight == pytest.approx(5.0, abs=1e-4)


def test_masked_weights_come_to_the_cap_of_open_ones() -> None:
    weights, cap = [50.0, 40.0, 1.0, 2.0], 0.35
    (open_round,) = shared(weights, cap)[0]
    masked_rounds = shared(weights, cap, rounds=12, exchange=masked())[0]
    assert masked_rounds[-1][1] == pytest.approx(open_round[1], abs=0.01)


def test_equal_masked_weights_stay_equal_below_the_cap_that_few_can_keep() -> None:
    for seen in shared([2, 2, 2], 0.1, rounds=3, exchange=masked()):
        for report, moved in seen:
            assert moved == pytest.approx([1 / 3] * 3, abs=1e-4)
            assert report.weight == pytest.approx(2.0)


def test_a_masked_update_is_bound_by_the_mean_norm_of_the_round_before() -> None:
    # Round 0: norms 1, 1, 1, 2; the mean 1.25 is the bound of round 1, in which the last is 20: 1.25 count.
    # It reports 2.5, twice the mean, so the next bound is (1 + 1 + 1 + 2.5) / 4 = 1.375.
    def act(federation: Federation) -> list[float]:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, aggregation=NormBound(), exchange=masked())
        assert aggregator.settings["aggregation"] == "NormBound(factor=1.0), by each party itself"
        seen = []
        for size in (2.0, 20.0, 20.0):
            before = w.clone()
            w[federation.party] += size if federation.party == 3 else 1.0
            aggregator.step(1.0)
            seen.append(float((w - before)[3]) * 4)
        return seen

    for seen in run_parties(4, act):
        assert seen == pytest.approx([2.0, 1.25, 1.375], abs=1e-3)


def test_a_bound_and_a_cap_go_together_and_are_kept_in_checkpoints() -> None:
    def act(federation: Federation) -> list[float]:
        w = torch.zeros(4)
        arguments: Any = {"aggregation": NormBound(), "exchange": masked(), "max_share": 0.4}
        aggregator = started(federation, {"w": w}, **arguments)
        w[federation.party] += 1.0
        aggregator.step(1.0)
        state = aggregator.state_dict()
        again = started_from(federation, {"w": w}, state, **arguments)
        before = w.clone()
        w[federation.party] += 100.0 if federation.party == 1 else 1.0
        again.step(100.0 if federation.party == 1 else 1.0)
        return (w - before).tolist()

    # The norm is cut to 1; the weight to 0.4 / 0.6 of 4, since its own earlier weight is forgotten.
    share = 8 / 3 / (8 / 3 + 3)
    for moved in run_parties(4, act):
        assert moved == pytest.approx([1 / (8 / 3 + 3), share] + [1 / (8 / 3 + 3)] * 2, abs=1e-3)


def started_from(
    federation: Federation, tensors: dict[str, Tensor], state: Any, **arguments: Any
) -> Aggregator:
    aggregator = Aggregator(federation, tensors, **arguments)
    aggregator.load_state_dict(state)
    aggregator.start()
    return aggregator


def test_masked_lora_updates_are_bound_factor_by_factor() -> None:
    def act(federation: Federation) -> list[float]:
        tensors = parameters()
        aggregator = started(federation, tensors, aggregation=NormBound(), exchange=masked())
        moved = []
        for number, scale in enumerate([0.1, 50.0]):
            before = {name: p.clone() for name, p in tensors.items()}
            learn(tensors, federation.party, number, scale if federation.party == 1 else 0.1)
            report = aggregator.step(1.0)
            assert report.deviation is None
            moved.append(math.sqrt(sum(float((tensors[k] - before[k]).square().sum()) for k in tensors)))
        return moved

    first, *others = run_parties(4, act)
    assert all(other == first for other in others)
    assert first[1] < 1.5 * first[0], "fifty times as much of one party moves them no further"


def test_separate_jobs_keep_their_bounds_when_one_is_lost(tmp_path: Path, world: Any) -> None:
    made = world(4, rounds=5, quorum=3, state_dir=tmp_path)

    def learns(life: Life) -> None:
        assert life.aggregator is not None
        far = 1000.0 if life.index == 1 and life.aggregator.round >= 2 else 1.0
        life.w.copy_(life.aggregator.global_vector + far)

    arguments: Any = {"aggregation": NormBound(), "exchange": masked(), "max_share": 0.4, "train": learns}
    made.start("p0", "p1", "p2", weight=1.0, **arguments)
    made.start("p3", weight=1.0, faults={"voting@2": die}, **arguments)
    made.join()
    assert [life.error for life in made.lives] == [None] * 4
    alive = made.lives[:3]
    assert all(torch.equal(life.w, alive[0].w) for life in alive)
    begin = torch.randn(SIZE, generator=torch.Generator().manual_seed(77))
    # The round that p3 left was lost, since its sum was revealed; in the others all move by 1, and from the
    # third on party 1 by 1000, of which the bound leaves little more.
    moved = float((alive[0].w - begin).mean())
    assert 4 < moved < 6


def test_mixing_is_refused_where_sums_are_masked() -> None:
    def act(federation: Federation) -> None:
        started(federation, {"w": torch.zeros(4)}, aggregation=NormBound(mixing=1), exchange=masked())

    for message in refusals(run_parties(4, act, may_fail=True), ValueError):
        assert "secure aggregation reveals sums only" in message
