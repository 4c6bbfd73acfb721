"""What the parties of a round must agree on before any tensor moves."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from manual_rounds import SOON_S, all_bits, random, sgd, started, write_
from message_transcript import tapped
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Aggregator, Federation, FederationError
from pellm_lightning.comm import MismatchError
from pellm_lightning.engine import compatibility


def plain() -> dict[str, Any]:
    return {
        "parameters": {"a": torch.zeros(2, 3), "b": torch.zeros(4)},
        "frozen": {"embed": random(0, 5), "layer.0": random(1, 5), "layer.1": random(2, 5)},
        "config": {"every_n_epochs": 1, "weighting": "samples"},
    }


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "fewer": (lambda it: it["parameters"].pop("b"), ["Party 0 trains parameter 'b', party 1 does not"]),
    "more": (
        lambda it: it["parameters"].update(c=torch.zeros(1)),
        ["Party 1 trains parameter 'c', party 0 does not"],
    ),
    "renamed": (
        lambda it: it["parameters"].update(z=it["parameters"].pop("b")),
        ["Party 0 trains parameter 'b', party 1 does not"],
    ),
    "shape": (
        lambda it: it["parameters"].update(b=torch.zeros(5)),
        ["'b' is float32 of shape [4] at party 0", "shape [5] at party 1"],
    ),
    "transposed": (
        lambda it: it["parameters"].update(a=torch.zeros(3, 2)),
        ["'a' is float32 of shape [2, 3] at party 0", "shape [3, 2] at party 1"],
    ),
    "dtype": (
        lambda it: it["parameters"].update(b=torch.zeros(4, dtype=torch.bfloat16)),
        ["'b' is float32 of shape [4] at party 0", "bfloat16 of shape [4] at party 1"],
    ),
    "schedule": (
        lambda it: it["config"].update(every_n_epochs=2),
        ["Party 0 has every_n_epochs=1, party 1 has every_n_epochs=2"],
    ),
    "setting": (
        lambda it: it["config"].pop("weighting"),
        ["weighting='samples', party 1 has weighting=None"],
    ),
    "outer optimizer": (
        lambda it: it.update(outer_optimizer=sgd(lr=0.5)),
        ["outer_optimizer", "lr=1.0", "lr=0.5"],
    ),
    "nonfinite": (
        lambda it: it.update(on_nonfinite="raise"),
        ["on_nonfinite='exclude'", "party 1 has on_nonfinite='raise'"],
    ),
    "base": (
        lambda it: (it["frozen"]["layer.0"].add_(1), it["frozen"]["layer.1"].add_(1)),
        ["base model of party 1", "'layer.0'", "check_frozen=False"],
    ),
    "base dtype": (
        lambda it: it["frozen"].update(embed=it["frozen"]["embed"].double()),
        ["base model of party 1", "'embed'"],
    ),
    "base tensor": (lambda it: it["frozen"].pop("layer.1"), ["base model of party 1", "'layer.1'"]),
    "files": (
        lambda it: it.update(files=["host:/party-0", "host:/logs"]),
        ["Parties 0 and 1", "'host:/party-0'"],
    ),
    "protocol": (
        lambda it: it.update(protocol=99),
        ["Party 1 speaks protocol version 99", "party 0 version"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_party_that_differs_stops_all_before_a_tensor_moves(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = tapped(monkeypatch)
    alter, words = CHANGES[change]
    issue = Aggregator.party_spec

    def act(federation: Federation) -> str:
        party = federation.party
        made = plain() | {"files": [f"host:/party-{party}"]}
        if party == 1:
            alter(made)
        protocol = made.pop("protocol", compatibility.PROTOCOL)
        aggregator = Aggregator(federation, **made)
        aggregator.party_spec = lambda: issue(aggregator) | {"protocol": protocol}  # type: ignore[method-assign]
        for p in made["parameters"].values():
            p.fill_(7.0 + party)
        before = all_bits(made["parameters"])
        with pytest.raises(MismatchError) as caught:
            aggregator.start()
        assert all_bits(made["parameters"]) == before, "a parameter was touched"
        return str(caught.value)

    began = time.monotonic()
    said = run_parties(3, act)
    assert time.monotonic() - began < SOON_S
    assert len(set(said)) == 1, "every party must tell the same"
    for word in words:
        assert word in said[0]
    assert not messages, "a tensor has moved before the parties agreed"


def test_the_order_of_the_mapping_is_no_difference() -> None:
    # a: (1*1 + 3*2) / 4 = 7/4; b: ten times that.
    def act(federation: Federation) -> dict[str, Tensor]:
        names = ["a", "b"] if federation.party == 0 else ["b", "a"]
        parameters = {name: torch.zeros(3) for name in names}
        aggregator = started(federation, parameters)
        write_(parameters, {"a": torch.full((3,), 1.0 + federation.party)})
        write_(parameters, {"b": torch.full((3,), 10.0 + 10 * federation.party)})
        aggregator.step([1, 3][federation.party])
        return parameters

    for parameters in run_parties(2, act):
        assert torch.equal(parameters["a"], torch.full((3,), 1.75))
        assert torch.equal(parameters["b"], torch.full((3,), 17.5))


def test_the_base_is_not_compared_if_a_party_does_not_show_it() -> None:
    def act(federation: Federation) -> None:
        frozen = None if federation.party == 1 else {"embed": torch.ones(3) * federation.party}
        if federation.party != 2:
            started(federation, {"w": torch.zeros(1)}, frozen=frozen)
        else:
            started(federation, {"w": torch.zeros(1)})

    run_parties(3, act)


def test_a_second_aggregator_is_checked_as_the_first() -> None:
    def act(federation: Federation) -> None:
        started(federation, {"a": torch.zeros(2)})
        if federation.party == 1:
            time.sleep(0.3)  # so that its first passport must not be taken for its second
        second = {"b": torch.zeros(2 + federation.party)}
        with pytest.raises(MismatchError, match="'b' is float32 of shape"):
            started(federation, second)

    run_parties(2, act)


def test_two_aggregators_take_turns() -> None:
    # Two adapters in one federation: (1*1 + 3*2) / 4 = 7/4 in the first, ten times that in the second.
    def act(federation: Federation) -> list[Tensor]:
        vectors = [torch.zeros(5), torch.zeros(7)]
        aggregators = [started(federation, {"w": vector}) for vector in vectors]
        for _ in range(2):
            for scale, vector, aggregator in zip([1, 10], vectors, aggregators, strict=True):
                vector += scale * (1 + federation.party)
                aggregator.step([1, 3][federation.party])
        return vectors

    for first, second in run_parties(2, act):
        assert torch.equal(first, torch.full((5,), 3.5))
        assert torch.equal(second, torch.full((7,), 35.0))


def test_a_step_before_the_start_is_refused() -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    aggregator = Aggregator(federation, {"w": torch.zeros(3)})
    with pytest.raises(FederationError, match="start"):
        aggregator.step(1)
    federation.close()


def test_nothing_to_federate_is_refused() -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    with pytest.raises(ValueError, match="no parameter"):
        Aggregator(federation, {})
    federation.close()
