"""Rounds in shared memory give what rounds over Gloo give, to the bit."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manual_rounds import all_bits, bits, random, started
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Aggregator, Federation, Overlap, RoundReport
from pellm_lightning.aggregation import Mean
from pellm_lightning.aggregation.base import OTHERS, Parts
from pellm_lightning.comm.torchrun.shared_memory import SWITCH
from pellm_lightning.engine.shared_updates import SharedUpdates
from pellm_lightning.tensors import flat_buffer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def is_shared(aggregator: Aggregator) -> bool:
    """Whether rounds work on buffers that all parties have mapped."""
    return aggregator._global_state.updates._shared is not None


def on_both(num_parties: int, act: Callable[[Federation], Any]) -> tuple[list[Any], list[Any]]:
    results = []
    for switch in "10":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SWITCH, switch)
            results.append(run_parties(num_parties, act))
    return results[0], results[1]


def assert_alike(shared: RoundReport, gloo: RoundReport) -> None:
    """What is no sum of parameters may differ by rounding."""
    for name in ("active_parties", "trained_parties", "excluded", "weights", "weight", "last"):
        assert getattr(shared, name) == getattr(gloo, name), name
    for name in ("loss", "update_norm", "distance", "total_weight"):
        a, b = getattr(shared, name), getattr(gloo, name)
        assert (a is None) == (b is None), name
        assert a is None or a == pytest.approx(b, rel=1e-5, abs=1e-5, nan_ok=True), name


shapes = st.lists(st.integers(0, 30), min_size=0, max_size=2)
parameters = st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=5)
weight = st.sampled_from([0.0, 1.0, 3.0, 0.7, 1e-3])


@settings(max_examples=25)
@given(data=st.data(), num_parties=st.integers(2, 5), kinds=parameters)
def test_rounds_have_the_bits_of_rounds_over_gloo(
    data: st.DataObject, num_parties: int, kinds: Sequence[tuple[list[int], torch.dtype, bool]]
) -> None:
    weights = data.draw(st.lists(st.lists(weight, min_size=num_parties, max_size=num_parties), max_size=3))
    weights = [row if any(row) else [1.0] * num_parties for row in weights]
    if not sum(math.prod(shape) for shape, _, _ in kinds):
        return

    def act(federation: Federation) -> tuple[bytes, bytes, list[RoundReport]]:
        made = {f"p{i}": random(i, *shape).to(dtype) for i, (shape, dtype, _) in enumerate(kinds)}
        made = {
            name: tensor.t().contiguous().t() if across and tensor.dim() == 2 else tensor
            for (name, tensor), (_, _, across) in zip(made.items(), kinds, strict=True)
        }
        aggregator = started(federation, made)
        reports = []
        for number, row in enumerate(weights):
            for index, tensor in enumerate(made.values()):
                if (index + number) % 3:  # the others keep their bits
                    change = random(97 * federation.party + 10 * number + index, *tensor.shape)
                    tensor.mul_(0.9).add_(change.to(tensor.dtype))
            reports.append(aggregator.step(row[federation.party], loss=float(federation.party)))
        return all_bits(made), bits(aggregator.global_vector), reports

    with pytest.MonkeyPatch.context() as patch:  # many chunks and buckets
        patch.setattr(flat_buffer, "_CHUNK", 8)
        patch.setattr(flat_buffer, "_BUCKET", 24)
        shared, gloo = on_both(num_parties, act)
    assert {result[:2] for result in shared} == {result[:2] for result in gloo}
    assert len({result[:2] for result in shared}) == 1
    for (_, _, ours), (_, _, theirs) in zip(shared, gloo, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b)


def test_large_vectors_have_the_same_bits() -> None:
    size = 2 * flat_buffer._BUCKET + 12_345

    def act(federation: Federation) -> bytes:
        w = random(0, size)
        aggregator = started(federation, {"v": w[:1000], "w": w[1000:]})
        w += random(1 + federation.party, size)
        aggregator.step([1, 3, 0.3][federation.party])
        return bits(w)

    shared, gloo = on_both(3, act)
    assert {*shared} == {*gloo}
    assert len({*shared}) == 1


def nan_at(party: int) -> Callable[[Federation], Any]:
    def act(federation: Federation) -> tuple[bytes, list[RoundReport]]:
        w = torch.zeros(100)
        aggregator = started(federation, {"w": w}, quorum=1)
        reports = []
        for number in range(3):
            w += 1 + federation.party
            if number == 1 and federation.party == party:
                w[37] = math.inf
            reports.append(aggregator.step(1 + federation.party))
        return bits(w), reports

    return act


def test_what_is_not_finite_is_left_out_as_over_gloo() -> None:
    shared, gloo = on_both(3, nan_at(2))
    for (ours, reports), (theirs, others) in zip(shared, gloo, strict=True):
        assert ours == theirs
        assert [report.excluded for report in reports] == [(), (2,), ()]
        for a, b in zip(reports, others, strict=True):
            if a.round != 1 or a.weight:  # the distance of what is not finite is no number
                assert_alike(a, b)


def test_a_round_below_quorum_puts_all_back() -> None:
    def act(federation: Federation) -> tuple[bytes, list[RoundReport]]:
        w = torch.zeros(30)
        aggregator = started(federation, {"w": w}, quorum=2)
        reports = []
        for number in range(2):
            w += 1 + federation.party
            if number == 0 and federation.party:
                w.fill_(math.nan)
            reports.append(aggregator.step(1))
        return bits(w), reports

    shared, gloo = on_both(2, act)
    assert [result[0] for result in shared] == [result[0] for result in gloo]
    # Round 0 moves nothing; in round 1 the parties add 1 and 2.
    assert shared[0][0] == bits(torch.full((30,), 1.5))
    assert shared[0][1][0].distance == gloo[0][1][0].distance == math.sqrt(30)


def test_a_round_that_an_absurd_update_leaves_below_quorum_puts_all_back() -> None:
    """Known only after the sums: what has been computed must not be written."""

    def act(federation: Federation) -> tuple[bytes, RoundReport]:
        w = torch.zeros(30)
        aggregator = started(federation, {"w": w}, quorum=3)
        w += [1.0, 2.0, 1e20][federation.party]
        report = aggregator.step(1)
        assert bits(w) == bytes(4 * 30), "as before the round"
        return bits(w), report

    shared, gloo = on_both(3, act)
    assert [result[0] for result in shared] == [result[0] for result in gloo]
    for (_, report), (_, other) in zip(shared, gloo, strict=True):
        assert (report.excluded, report.active_parties) == ((2,), 0)
        assert_alike(report, other)


@pytest.mark.parametrize("learns", [0, 1, 2])
def test_who_learns_beside_parties_that_do_not_is_not_absurd(learns: int) -> None:
    def act(federation: Federation) -> tuple[bytes, RoundReport]:
        w = torch.zeros(30)
        aggregator = started(federation, {"w": w})
        w += float(federation.party == learns)
        report = aggregator.step(1)
        return bits(w), report

    shared, gloo = on_both(3, act)
    assert {bits_ for bits_, _ in (*shared, *gloo)} == {bits(torch.full((30,), 1 / 3))}
    assert all(report.excluded == () for _, report in (*shared, *gloo))


class Nothing(Mean):
    """A rule that averages no part in its odd rounds."""

    def averaged(self, round: int, num_participants: int) -> Parts:
        return frozenset() if round % 2 else OTHERS


def test_parts_that_are_not_averaged_go_back() -> None:
    def act(federation: Federation) -> list[bytes]:
        w, results = torch.zeros(50), []
        aggregator = started(federation, {"w": w}, aggregation=Nothing())
        for _ in range(3):
            w += 1 + federation.party
            aggregator.step(1)
            results.append(bits(w))
        return results

    shared, gloo = on_both(2, act)
    assert shared == gloo
    assert shared[0][1] == shared[0][0] == bits(torch.full((50,), 1.5))


def test_rounds_in_the_background_and_resumed_ones_are_the_same() -> None:
    def act(federation: Federation) -> tuple[bytes, bytes]:
        w = random(0, 500)
        aggregator = started(federation, {"w": w}, overlap=Overlap(delay_steps=2, mix=0.5))
        for number in range(3):
            w += random(10 * number + federation.party, 500)
            aggregator.begin(1 + federation.party)
            w += 0.1
            aggregator.apply()
        state = aggregator.state_dict()
        again = Aggregator(federation, {"w": w}, overlap=Overlap(delay_steps=2, mix=0.5))
        again.load_state_dict(state)
        again.start()
        w += federation.party
        again.begin(1.0)
        again.apply(last=True)
        return bits(w), bits(again.global_vector)

    shared, gloo = on_both(2, act)
    assert shared == gloo


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, True),
        ({"outer_optimizer": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9)}, False),
        ({"overlap": Overlap(fragments=2)}, False),
    ],
)
def test_rounds_that_are_more_than_a_sum_take_the_usual_way(
    arguments: dict[str, Any], expected: bool
) -> None:
    def act(federation: Federation) -> tuple[bool, bytes]:
        made = {"layers.0.w": random(0, 40), "layers.1.w": random(1, 40)}
        aggregator = started(federation, made, **arguments)
        for number in range(2):
            for index, tensor in enumerate(made.values()):
                tensor += random(7 * federation.party + 3 * index + number, 40)
            aggregator.step(1 + federation.party)
        return is_shared(aggregator), all_bits(made)

    shared, gloo = on_both(2, act)
    assert {kind for kind, _ in shared} == {expected}
    assert {kind for kind, _ in gloo} == {False}
    assert {made for _, made in shared} == {made for _, made in gloo}


def test_without_memory_for_the_vectors_rounds_are_slower_and_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SharedUpdates, "size_bytes", staticmethod(lambda layout, parties: 1 << 60))

    def act(federation: Federation) -> Tensor:
        w = torch.zeros(10)
        aggregator = started(federation, {"w": w})
        assert not is_shared(aggregator)
        w += 1 + federation.party
        aggregator.step(1)
        return w

    for w in run_parties(2, act):
        assert torch.equal(w, torch.full((10,), 1.5))
    assert caplog.text.count("cannot share 1152921504606 MB of its memory") == 1
