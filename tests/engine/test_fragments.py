"""Fragments: who is in which, when each has its round, and that together they are the whole."""

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from job_threads import Life, World, die
from party_threads import Classifier, Rounds, data, fit_parties, linear, quiet_trainer, run_parties
from secure_exchange import masked
from torch import Tensor, nn

from pellm_lightning import Aggregator, Federation, Overlap
from pellm_lightning.aggregation import Alternating
from pellm_lightning.comm.torchrun.federation import SLOT_BYTES
from pellm_lightning.engine.fragments import FragmentCursor, fragments_of
from pellm_lightning.privacy import GaussianMechanism

SIZES = {"net.0.weight": 30, "net.1.weight": 7, "net.1.bias": 5, "net.2.weight": 11, "net.10.weight": 13}


def diloco(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


def noise(size: int, *seeds: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(seed * 1009**i for i, seed in enumerate(seeds)))
    return torch.randn(size, generator=generator)


def parameters(party: int) -> dict[str, Tensor]:
    return {name: noise(size, party, number) for number, (name, size) in enumerate(SIZES.items())}


def train(tensors: Mapping[str, Tensor], party: int, step: int) -> None:
    """One local step: towards a party's own target, with noise."""
    for number, x in enumerate(tensors.values()):
        target, push = noise(x.numel(), party, 50 + number), noise(x.numel(), party, step, number)
        x.add_((target - x).mul_(0.05).add_(push, alpha=0.01))


def in_two(federation: Federation, delay: int = 0, mix: float = 0.5, **options: Any) -> tuple[Any, Any]:
    tensors = parameters(federation.party)
    return tensors, Aggregator(federation, tensors, overlap=Overlap(delay, mix, fragments=2), **options)


# ---- which parameters belong together


def test_layers_are_dealt_in_turn() -> None:
    layer = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.default.weight"
    names = [layer.format(number, factor) for number in range(12) for factor in "AB"]
    dealt = fragments_of([*names, "base_model.model.lm_head.weight", "score.bias"], 3)
    of = [sorted({int(name.split(".")[4]) for name in names if "layers" in name}) for names in dealt]
    assert of == [[2, 5, 8, 11], [0, 3, 6, 9], [1, 4, 7, 10]], "the head comes first, as its name does"
    assert all(name.replace("lora_A", "lora_B") in names for names in dealt for name in names)


def test_layers_are_counted_as_people_count() -> None:
    assert fragments_of(SIZES, 2) == [
        ["net.0.weight", "net.2.weight"],
        ["net.1.bias", "net.1.weight", "net.10.weight"],
    ]


def test_what_has_no_number_is_a_layer_by_its_module() -> None:
    names = [f"model.{module}.{kind}" for module in ("embed", "norm") for kind in ("weight", "bias")]
    head = [f"model.head.lora_{factor}.default.weight" for factor in "AB"]
    listed = ["model.factors.0", "model.factors.1"]
    assert fragments_of([*names, *head, *listed], 5) == [
        ["model.embed.bias", "model.embed.weight"],
        ["model.factors.0"],
        ["model.factors.1"],
        head,
        ["model.norm.bias", "model.norm.weight"],
    ]
    assert fragments_of(["a", "b"], 2) == [["a"], ["b"]]


@given(
    st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.sampled_from(["w", "b"])), min_size=1),
    st.integers(1, 5),
)
def test_each_name_is_in_one_fragment_and_each_layer_whole(
    chosen: set[tuple[str, int, str]], fragments: int
) -> None:
    names = [f"{module}.{number}.{kind}" for module, number, kind in chosen]
    layers = {name.rpartition(".")[0] for name in names}
    if len(layers) < fragments:
        with pytest.raises(ValueError, match=f"fragments={fragments} is more than the {len(layers)} layers"):
            fragments_of(names, fragments)
        return
    dealt = fragments_of(names, fragments)
    assert sorted(name for names in dealt for name in names) == sorted(names)
    assert dealt == fragments_of(sorted(names), fragments), "whatever the order, as parties may differ in it"
    owners = [{name.rpartition(".")[0] for name in names} for names in dealt]
    assert sum(map(len, owners)) == len(layers)
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


def test_turns_count_what_each_has_missed() -> None:
    turns = FragmentCursor.from_step(2, 10)
    assert not turns.is_behind(10)
    turns = turns.advanced(8, 12)
    assert turns == FragmentCursor([0, 8], [12, 10], 1)
    turns = turns.advanced(5, 14)
    assert turns == FragmentCursor([5, 0], [12, 14], 0)
    assert turns.is_behind(14)
    turns = turns.advanced(0, 14)
    assert not turns.is_behind(14)


# ---- rounds


def test_each_fragment_has_its_own_rounds() -> None:
    """What K aggregators over K federations would do, each with a K-th of the parameters."""

    def in_turn(federation: Federation) -> dict[str, Tensor]:
        tensors, aggregator = in_two(federation, outer_optimizer=diloco)
        aggregator.start()
        for step in range(1, 25):
            train(tensors, federation.party, step)
            if step % 3 == 0:
                assert aggregator.step(1.0 + federation.party).round == step // 3 - 1
        return tensors

    def alone(number: int, federation: Federation) -> dict[str, Tensor]:
        tensors = parameters(federation.party)
        names = fragments_of(tensors, 2)[number]
        aggregator = Aggregator(federation, {name: tensors[name] for name in names}, outer_optimizer=diloco)
        aggregator.start()
        for step in range(1, 25):
            train(tensors, federation.party, step)
            if step % 6 == 3 * (number + 1) % 6:
                aggregator.step(1.0 + federation.party)
        return {name: tensors[name] for name in names}

    together = run_parties(3, in_turn)
    parts = [run_parties(3, partial(alone, number)) for number in range(2)]
    for party in range(3):
        expected = parts[0][party] | parts[1][party]
        assert all(torch.equal(together[party][name], expected[name]) for name in SIZES)


# Streaming DiLoCo (arXiv:2501.18512, algorithm 2) in float64: fragment p is sent p H / K steps after the
# first, and mixed in tau steps later.
def test_equals_streaming_diloco() -> None:
    parties, steps, delay, mix, between = 3, 26, 2, 0.5, 4

    def act(federation: Federation) -> dict[str, Tensor]:
        tensors, aggregator = in_two(federation, delay, mix, outer_optimizer=diloco)
        aggregator.start()
        for step in range(1, steps + 1):
            train(tensors, federation.party, step)
            if step % between == 0:
                aggregator.begin(1.0 + federation.party)
            if step > delay and step % between == delay:
                aggregator.apply()
        return tensors

    x = [{name: value.double() for name, value in parameters(0).items()} for _ in range(parties)]
    outer = {name: value.clone() for name, value in x[0].items()}
    momentum = {name: torch.zeros_like(value) for name, value in outer.items()}
    dealt = fragments_of(SIZES, 2)
    for step in range(1, steps + 1):
        for party in range(parties):
            train(x[party], party, step)
        turn = step // between - 1
        if step % between == 0:
            for name in dealt[turn % 2]:
                gradient = sum((1 + p) / 6 * (outer[name] - x[p][name]) for p in range(parties))
                momentum[name] = 0.9 * momentum[name] + gradient
                outer[name] = outer[name] - 0.7 * (gradient + 0.9 * momentum[name])
        if step > delay and step % between == delay:
            for name in dealt[turn % 2]:
                for party in range(parties):
                    x[party][name] = mix * x[party][name] + (1 - mix) * outer[name]
    for got, expected in zip(run_parties(parties, act), x, strict=True):
        for name, value in got.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_what_crosses_at_once_is_a_fragment() -> None:
    def act(federation: Federation) -> list[int]:
        tensors, aggregator = in_two(federation)
        aggregator.start()
        told = []
        for step in range(4):
            train(tensors, federation.party, step)
            told.append(aggregator.step(1.0).bytes_sent)
        return told

    of = [4 * sum(SIZES[name] for name in names) for names in fragments_of(SIZES, 2)]
    for told in run_parties(2, act):
        auxiliary = told[0] - of[0]  # a header and flags
        assert told == [of[0] + auxiliary, of[1] + auxiliary] * 2
        assert auxiliary < SLOT_BYTES + 100


def test_who_is_through_answers_in_turn() -> None:
    def act(federation: Federation) -> dict[str, Tensor]:
        tensors, aggregator = in_two(federation, outer_optimizer=diloco)
        aggregator.start()
        for step in range(3 + federation.party):
            train(tensors, federation.party, step)
            aggregator.step(1.0)
        drained = [report.round for report in aggregator.drain()]
        assert drained == list(range(3 + federation.party, 5))
        return tensors

    first, *others = run_parties(3, act)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in fragments_of(SIZES, 2)[0])


def test_one_validates_while_another_is_a_turn_ahead() -> None:
    begun = threading.Event()

    def act(federation: Federation) -> tuple[dict[str, float], dict[str, Tensor]]:
        tensors, aggregator = in_two(federation, 2, 0.0, outer_optimizer=diloco)
        aggregator.start()
        train(tensors, federation.party, 1)
        aggregator.begin(1.0)
        if federation.party == 0:
            begun.wait(10)  # the other is in the next fragment's round by then
            mean = aggregator.mean({"loss": (1.0, 1.0)})
            aggregator.apply()
            train(tensors, federation.party, 2)
            aggregator.begin(1.0)
        else:
            aggregator.apply()
            train(tensors, federation.party, 2)
            aggregator.begin(1.0)
            begun.set()
            mean = {"loss": 1.0}
        assert aggregator.apply().round == 1
        return mean, tensors

    (mean, first), (_, second) = run_parties(2, act)
    assert mean == {"loss": 1.0}
    assert all(torch.equal(first[name], second[name]) for name in fragments_of(SIZES, 2)[1])


def test_masked_sums_in_fragments() -> None:
    def result(federation: Federation, **options: Any) -> dict[str, Tensor]:
        tensors, aggregator = in_two(federation, **options)
        aggregator.start()
        for step in range(4):
            train(tensors, federation.party, step)
            aggregator.step(1.0)
        return tensors

    hidden = run_parties(3, partial(result, exchange=masked()))
    for mine, other in zip(run_parties(3, result), hidden, strict=True):
        for name in SIZES:
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=1e-6)


def test_what_cannot_be_done_in_fragments_is_refused() -> None:
    def act(federation: Federation) -> None:
        private = GaussianMechanism(max_norm=1.0, noise_multiplier=1.0, distributed=False)
        with pytest.raises(ValueError, match=r"look at all parameters at once\. Set fragments=1"):
            in_two(federation, privacy=private)
        _, aggregator = in_two(federation)
        state = Aggregator(federation, parameters(0), overlap=Overlap(fragments=3)).state_dict()
        with pytest.raises(ValueError, match="is of 3 fragments, these are 2"):
            aggregator.load_state_dict(state)

    run_parties(1, act)
    with pytest.raises(ValueError, match="trains other factors after each round, but fragments"):
        Overlap(fragments=2).check(Alternating())


# ---- between separate jobs


def start_jobs(
    world: World, *names: str, tensors: Mapping[str, dict[str, Tensor]], **options: Any
) -> list[Life]:
    def steps(life: Life) -> None:
        assert life.aggregator is not None
        train(tensors[life.name], life.index, life.aggregator.round + 1)

    options = {"overlap": Overlap(fragments=2), "outer_optimizer": diloco, "train": steps} | options
    return [life for name in names for life in world.start(name, parameters=tensors[name], **options)]


def test_separate_jobs_take_turns_as_one_launch_does() -> None:
    def launched(federation: Federation) -> dict[str, Tensor]:
        tensors, aggregator = in_two(federation, outer_optimizer=diloco)
        aggregator.start()
        for step in range(1, 7):
            train(tensors, federation.party, step)
            aggregator.step(1.0 + federation.party)
        return tensors

    world = World(3, rounds=6)
    tensors = {name: parameters(party) for party, name in enumerate(world.roster)}
    try:
        start_jobs(world, *world.roster, tensors=tensors)
        world.join()
    finally:
        world.close()
    for party, expected in enumerate(run_parties(3, launched)):
        for name in SIZES:
            torch.testing.assert_close(tensors[f"p{party}"][name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("point", ["exchanging@3", "voting@3"])
def test_a_lost_job_comes_back_to_all_fragments(tmp_path: Path, point: str) -> None:
    world = World(3, rounds=1_000_000, state_dir=tmp_path)
    tensors = {name: parameters(party) for party, name in enumerate(world.roster)}
    try:
        start_jobs(world, "p0", "p1", tensors=tensors, pace_s=0.02)
        (killed,) = start_jobs(world, "p2", tensors=tensors, faults={point: die})
        killed.join()
        world.wait_for(world.reached + 3)  # more than one round of each fragment without it
        before = world.reached
        tensors["p2"] = parameters(7)
        start_jobs(world, "p2", tensors=tensors)
        world.until(lambda: world.counts("p2", since=before + 2))
        world.finish()
    finally:
        world.close()
    assert len({(entry.round, entry.digest) for entry in world.settled}) == world.reached + 1
    states = [life.aggregator.state_dict() for life in world.lives if life is not killed and life.aggregator]
    for state in states[1:]:
        for mine, other in zip(state["fragments"], states[0]["fragments"], strict=True):
            assert repr(mine) == repr(other)


# ---- in a fit


class Layered(Classifier):
    """Three trained layers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        layers = [linear(16, 16, seed=10 * seed + number) for number in (1, 2)]
        self.head = nn.Sequential(*layers, self.head)


def fitted(tmp_path: Path, options: Mapping[str, Any], **trainer: Any) -> list[Rounds]:
    """Two parties, five and seven steps an epoch: what each round told; they end with the same bits."""
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> Tensor:
        module = Layered(seed=party)
        callback = federated(outer_optimizer=diloco, **options)
        loader = data(10 + 4 * party, seed=party, batch_size=2)
        quiet_trainer(tmp_path, [callback], logger=loggers[party], **trainer).fit(module, loader)
        return module.vector()

    first, second = fit_parties(2, fit)
    assert torch.equal(first, second)
    return loggers


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # Ten steps and fourteen, a fragment every two. At the end one more of each; then the first answers.
        ({"every_n_steps": 6}, ([2, 4, 6, 8, 10, 10, 10], [2, 4, 6, 8, 10, 12, 14, 14, 14])),
        ({"every_n_steps": 6, "delay_steps": 1}, ([3, 5, 7, 9, 10, 10, 10], [3, 5, 7, 9, 11, 13, 14])),
    ],
)
def test_fragments_take_turns_in_a_fit(
    tmp_path: Path, options: Mapping[str, Any], steps: tuple[list[int], list[int]]
) -> None:
    overlap = Overlap(options.get("delay_steps", 0), fragments=3)
    first, second = fitted(tmp_path, {"every_n_steps": options["every_n_steps"], "overlap": overlap})
    assert first.steps[: len(steps[0])] == steps[0]
    assert second.steps[: len(steps[1])] == steps[1]
    assert len(first.steps) == len(second.steps), "who is through answers"
    assert [done["round"] for done in second.rounds] == list(range(len(second.rounds)))
    # Two samples a step: a fragment counts by all since its last round.
    assert [done["weight"] for done in second.rounds[:5]] == [4, 8, 12, 12, 12]


def test_the_schedule_must_divide_among_fragments() -> None:
    def make(**arguments: Any) -> None:
        fit_parties(1, lambda _, federated: federated(**arguments))

    with pytest.raises(ValueError, match="every_n_steps=10 must be a multiple of 3; or give every_n_seconds"):
        make(every_n_steps=10, overlap=Overlap(fragments=3))
    with pytest.raises(ValueError, match=r"an epoch is not divided\. Give every_n_steps, a multiple of 2"):
        make(every_n_epochs=2, overlap=Overlap(fragments=2))
    with pytest.raises(ValueError, match=r"fragments=0\) must be a whole number, 1 or more"):
        make(every_n_steps=2, overlap=Overlap(fragments=0))
    with pytest.raises(ValueError, match="applies a round after the next one has begun, 5 steps later"):
        make(every_n_steps=10, overlap=Overlap(5, fragments=2))
