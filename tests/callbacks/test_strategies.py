"""Which strategies may train inside a party, and what is refused before it joins."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pellm_lightning import Parameters
from pellm_lightning.aggregation import Alternating, LowRankMean
from pellm_lightning.callbacks.dp_sgd import DPSGD
from pellm_lightning.callbacks.drift import FedProx
from pellm_lightning.callbacks.strategies import check_strategy, is_sharding
from pellm_lightning.comm.topology import Topology
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.trainer.party_parameters import choice

ALONE, PAIR = Topology(0, 2, 0, 1), Topology(1, 2, 0, 2)


def check(
    strategy: Any, topology: Topology, callbacks: Any = (), settings: Any = None, **parameters: Any
) -> None:
    trainer: Any = SimpleNamespace(strategy=strategy, callbacks=list(callbacks))
    factory = AggregatorFactory.of(parameters=Parameters(**parameters), **(settings or {}))
    check_strategy(trainer, topology, factory)


class Ddp(DDPStrategy):
    """As if it spanned so many processes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    @property
    def world_size(self) -> int:
        return self.size


class Sharded(ModelParallelStrategy):
    """As if it spanned two processes."""

    world_size = 2


def of_two(kind: type[Strategy]) -> Any:
    """A strategy of two processes that cannot be built without its library or a GPU."""
    derived = type(kind.__name__, (kind,), {"world_size": 2})
    return derived.__new__(derived)


@pytest.fixture(autouse=True)
def any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are the same with every torch."""
    monkeypatch.setattr(choice, "OLDEST_TORCH", "2.0")


def test_parties_in_shards_need_a_torch_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "OLDEST_TORCH", "99.0")
    with pytest.raises(MisconfigurationException, match=r"tried with torch 99\.0 and newer, and this is"):
        check(Sharded(1, 2), PAIR)
    check(Sharded(1, 2), PAIR, experimental=True)
    check(SingleDeviceStrategy("cpu"), ALONE)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_what_has_not_been_run_needs_consent(kind: type[Strategy]) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        check(of_two(kind), PAIR)
    assert f"Trainer(strategy={kind.__name__}): Parties in shards by " in str(caught.value)
    assert "have not been run in a federation on accelerators yet" in str(caught.value)
    assert "parameters=Parameters(experimental=True)" in str(caught.value)
    check(of_two(kind), PAIR, settings={"on_nonfinite": "raise"}, experimental=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"on_nonfinite": "raise", "inner_optimizer_state": "reset"},
        {"on_nonfinite": "raise", "aggregation": LowRankMean(factorization="balanced")},
        {"on_nonfinite": "raise", "aggregation": Alternating()},
    ],
)
def test_what_clears_moments_or_drops_gradients_is_refused_with_deepspeed(settings: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="which DeepSpeed keeps to itself"):
        check(of_two(DeepSpeedStrategy), PAIR, settings=settings, experimental=True)
    check(of_two(FSDPStrategy), PAIR, settings=settings, experimental=True)


def test_an_unknown_strategy_is_refused_with_consent_too() -> None:
    class Own:
        world_size = 2

    with pytest.raises(MisconfigurationException, match=r"Trainer\(strategy=Own\) may shard or shadow"):
        check(Own(), PAIR, experimental=True)


def test_ddp_that_spans_parties_is_refused() -> None:
    with pytest.raises(MisconfigurationException) as caught:
        check(Ddp(4), PAIR)
    assert "Ddp spans 4 processes, but a party has 2 (2 parties)" in str(caught.value)
    assert "plugins=[PartyEnvironment(num_parties=...)]" in str(caught.value)


def test_one_device_for_a_party_of_several_processes_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="spans 1 processes, but a party has 2"):
        check(SingleDeviceStrategy(torch.device("cpu")), PAIR)


def test_ddp_within_a_party_a_single_device_and_shards_are_welcome() -> None:
    check(Ddp(2), PAIR)
    check(SingleDeviceStrategy(torch.device("cpu")), ALONE, [FedProx(0.1)], save_frozen=False)
    check(Sharded(), PAIR)
    check(Sharded(save_distributed_checkpoint=False), PAIR, save_frozen=False)


@pytest.mark.parametrize("callback", [FedProx(0.1), DPSGD.__new__(DPSGD), WeightAveraging()])
def test_what_needs_whole_parameters_is_refused_on_shards(callback: Any) -> None:
    check(Ddp(2), PAIR, [callback])
    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__} needs whole parameters"):
        check(Sharded(), PAIR, [callback])


def test_distributed_checkpoints_hold_everything() -> None:
    with pytest.raises(MisconfigurationException, match="save_frozen=False leaves parameters out"):
        check(Sharded(), PAIR, save_frozen=False)


def test_which_strategies_shard() -> None:
    assert is_sharding(Sharded())
    assert is_sharding(of_two(FSDPStrategy))
    assert is_sharding(of_two(DeepSpeedStrategy))
    assert not is_sharding(Ddp(2))
    assert not is_sharding(SingleDeviceStrategy(torch.device("cpu")))
