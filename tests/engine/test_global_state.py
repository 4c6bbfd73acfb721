"""The state of rounds: saved, loaded and resumed, exactly or not at all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from manual_rounds import Factory, bits, sgd, started, trained
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation.base import RoundContext
from pellm_lightning.comm import MismatchError, Version
from pellm_lightning.engine.global_state import GlobalState
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.tensors import snapshot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "outer",
    [sgd(lr=1.0), sgd(lr=0.7, momentum=0.9, nesterov=True), lambda p: torch.optim.Adam(p, lr=0.1)],
    ids=["FedAvg", "DiLoCo", "FedAdam"],
)
def test_resuming_in_the_middle_of_a_round_is_exact(dtype: torch.dtype, outer: Factory) -> None:
    store: dict[int, bytes] = {}
    whole = run_parties(3, lambda federation: trained(federation, dtype, outer, store, save_in=2))
    again = run_parties(
        3, lambda federation: trained(federation, dtype, outer, store, save_in=None, resume_in=2)
    )
    assert again == whole


def test_a_state_is_a_copy() -> None:
    def act(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, outer_optimizer=sgd(lr=0.7, momentum=0.9))
        w += 1 + federation.party
        aggregator.step(1)
        state = aggregator.state_dict()
        before = repr(state)
        w += 1
        aggregator.step(1)
        assert repr(state) == before, "a later round has changed a state that was saved"

    run_parties(2, act)


def test_a_state_can_be_loaded_twice() -> None:
    saved: dict[int, Any] = {}

    def save(federation: Federation) -> None:
        w = torch.zeros(4)
        aggregator = started(federation, {"w": w}, outer_optimizer=sgd(lr=0.7, momentum=0.9))
        w += 1 + federation.party
        aggregator.step(1)
        saved[federation.party] = aggregator.state_dict()

    def resume(federation: Federation) -> bytes:
        state = saved[federation.party]
        before = repr(state)
        w = state["global"].clone()
        aggregator = Aggregator(federation, {"w": w}, outer_optimizer=sgd(lr=0.7, momentum=0.9))
        aggregator.load_state_dict(state)
        aggregator.start()
        w += 1
        aggregator.step(1)
        assert repr(state) == before, "going on has changed the state that was loaded"
        return bits(w)

    run_parties(2, save)
    assert len({*run_parties(2, resume), *run_parties(2, resume)}) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(4)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(5)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)},
        {"a": torch.zeros(3, 2), "b": torch.zeros(4)},
        {"a": torch.zeros(4), "b": torch.zeros(2, 3)},
    ],
    ids=["fewer", "renamed", "longer", "more", "transposed", "swapped"],
)
def test_a_state_of_other_parameters_is_refused(other: dict[str, Tensor]) -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    state = Aggregator(federation, {"a": torch.zeros(2, 3), "b": torch.zeros(4)}).state_dict()
    aggregator = Aggregator(federation, other)
    with pytest.raises(ValueError, match="checkpoint"):
        aggregator.load_state_dict(state)
    federation.close()


def resumed(federation: Federation, rounds: int, value: float) -> Aggregator:
    state = Aggregator(Federation(dist.HashStore(), 0, 1), {"w": torch.full((4,), value)}).state_dict()
    aggregator = Aggregator(federation, {"w": torch.full((4,), value)})
    aggregator.load_state_dict(state | {"round": rounds})
    return aggregator


@pytest.mark.parametrize(
    ("rounds", "values", "words"),
    [
        ([3, 3, 4], [1.0, 1.0, 1.0], ["Party 0 starts at round 3, party 2 at round 4"]),
        ([3, 3, 3], [1.0, 1.0, 2.0], ["Parties 0 and 2", "round 3", "different global vectors"]),
    ],
)
def test_parties_that_do_not_resume_together_are_refused(
    rounds: list[int], values: list[float], words: list[str]
) -> None:
    def act(federation: Federation) -> None:
        aggregator = resumed(federation, rounds[federation.party], values[federation.party])
        with pytest.raises(MismatchError) as caught:
            aggregator.start()
        for word in words:
            assert word in str(caught.value)

    run_parties(3, act)


def test_a_party_that_forgot_its_checkpoint_is_refused() -> None:
    def act(federation: Federation) -> None:
        fresh = Aggregator(federation, {"w": torch.full((4,), 1.0)})
        with pytest.raises(MismatchError, match="checkpoints"):
            (fresh if federation.party == 1 else resumed(federation, 0, 1.0)).start()

    run_parties(2, act)


def test_resumed_parties_keep_their_own_parameters() -> None:
    def act(federation: Federation) -> None:
        w = torch.full((4,), 5.0 + federation.party)
        aggregator = Aggregator(federation, {"w": w})
        aggregator.load_state_dict(
            Aggregator(Federation(dist.HashStore(), 0, 1), {"w": torch.ones(4)}).state_dict()
        )
        aggregator.start()
        assert torch.equal(w, torch.full((4,), 5.0 + federation.party))

    run_parties(2, act)


# ---- attempts that fail

Act = Callable[[Aggregator, GlobalState], None]


def steps(aggregator: Aggregator, state: GlobalState) -> None:
    state.updates.average(RoundContext(aggregator.federation, [1.0], state.round), None)
    state.updates.advance(writes=False, moves=True)
    state.end_round(Version("run", 9, 9), 0.5, short_rounds=0, written=False)


def loads(aggregator: Aggregator, state: GlobalState) -> None:
    newer = aggregator.state_dict() | {"round": 7, "version": ["run", 7, 1]}
    newer["global"] = newer["global"] + 3
    state.load_state(newer)
    assert float(state.vector[0]) == float(newer["global"][0])


def begins(aggregator: Aggregator, state: GlobalState) -> None:
    state.begin(Version("run", 0, 1))


def loads_and_steps(aggregator: Aggregator, state: GlobalState) -> None:
    loads(aggregator, state)
    steps(aggregator, state)


def steps_half(aggregator: Aggregator, state: GlobalState) -> None:
    """Stop in the middle of a step, with some chunks written."""
    chunks = state.updates.layout.chunks()
    kept, chunks[2:] = chunks[2:], [None]  # type: ignore[list-item]
    try:
        steps(aggregator, state)
    finally:
        chunks[2:] = kept


@torch.no_grad()
def fail(aggregator: Aggregator, state: GlobalState, act: Act, before: str) -> None:
    with state.reversible():
        act(aggregator, state)
        assert snapshot.digest(state.state()) != before
        raise ZeroDivisionError


@pytest.mark.parametrize("version", [None, Version("run", 1, 1)], ids=["new", "running"])
@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "outer", [sgd(lr=1.0), sgd(lr=0.7, momentum=0.9, nesterov=True)], ids=["FedAvg", "DiLoCo"]
)
def test_what_a_failed_attempt_did_is_undone_to_the_bit(
    outer: Factory, dtype: torch.dtype, fragments: int, version: Version | None, small_pieces: None
) -> None:
    acts: list[Act] = [
        steps,
        loads,
        begins,
        loads_and_steps,
        steps_half,
    ]
    federation = Federation(dist.HashStore(), 0, 1)
    parameters = {name: torch.linspace(0.1, 7.0, 40).to(dtype) for name in ("layers.0.w", "layers.1.w")}
    aggregator = started(federation, parameters, outer_optimizer=outer, overlap=Overlap(fragments=fragments))
    state = aggregator._global_state
    if version is not None:  # before, the vector is what the parameters are
        for p in parameters.values():
            p += 0.3
        aggregator.step(1)
        state._counters = replace(state._counters, version=version)
        for p in parameters.values():
            p += 0.1
    before, counters = snapshot.digest(state.state()), state._counters
    for act in acts * 2:
        with pytest.raises((ZeroDivisionError, AttributeError)):
            fail(aggregator, state, act, before)
        assert snapshot.digest(state.state()) == before, act.__name__
        assert state._counters is counters
    federation.close()


@pytest.mark.parametrize("outer", [sgd(lr=0.7, momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.1)])
def test_a_state_is_loaded_into_the_buffers_that_are_there(outer: Factory) -> None:
    """And what was loaded is not kept: of a billion parameters it would be gigabytes."""
    federation = Federation(dist.HashStore(), 0, 1)
    w = torch.zeros(4)
    aggregator = started(federation, {"w": w}, outer_optimizer=outer)
    states = []
    for _ in range(2):
        w += 1
        aggregator.step(1)
        states.append(aggregator.state_dict())
    state = aggregator._global_state
    (buffers,) = state.updates.optimizer.state_dict()["state"].values()
    places = {key: value.data_ptr() for key, value in buffers.items()}
    state.load_state(states[0])
    (buffers,) = state.updates.optimizer.state_dict()["state"].values()
    assert {key: value.data_ptr() for key, value in buffers.items()} == places
    again, (saved,) = aggregator.state_dict(), states[0]["fragments"]
    assert torch.equal(again["global"], states[0]["global"])
    for key, value in saved["outer_optimizer"]["state"][0].items():
        assert torch.equal(buffers[key], value)
        assert buffers[key].data_ptr() != value.data_ptr()
    assert state.loaded == {"lora": None}
    federation.close()
