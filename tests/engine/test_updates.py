"""Rounds over parameters of every kind, and the memory that they take."""

import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from manual_rounds import Factory, all_bits, random, sgd, started, write_
from party_threads import run_parties
from torch import Tensor, nn

from pellm_lightning import Aggregator, Federation
from pellm_lightning.tensors import flat_buffer

# ---- parameters of every kind


def test_parameters_of_every_kind(small_pieces: None) -> None:
    # Party 0 (weight 1) and party 1 (weight 3) move everything by 1 and 2: by 7/4 together.
    kinds = {
        "across": random(0, 6, 7).t(),
        "empty": torch.zeros(0, 3),
        "expanded view": random(1, 4, 6)[:, ::2],
        "half": random(2, 9).half(),
        "large": random(3, 100),
        "number": torch.tensor(2.0),
        "slice": random(4, 40)[3:21],
    }
    base = {name: tensor.clone() for name, tensor in kinds.items()}

    def act(federation: Federation) -> dict[str, Tensor]:
        parameters = {}
        for name, tensor in kinds.items():
            parameters[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            parameters[name].copy_(tensor)
        assert not parameters["across"].is_contiguous()
        aggregator = started(federation, parameters)
        for _ in range(2):
            for tensor in parameters.values():
                tensor += 1 + federation.party
            aggregator.step([1, 3][federation.party])
        return parameters

    first, second = run_parties(2, act)
    assert all_bits(first) == all_bits(second)
    for name, tensor in first.items():
        tolerance = 1e-6 if tensor.dtype is torch.float32 else 8e-3
        torch.testing.assert_close(tensor.float(), base[name].float() + 3.5, rtol=0, atol=tolerance)


def test_parties_may_lay_out_memory_differently(small_pieces: None) -> None:
    # The same names, shapes and dtypes, but party 1 keeps "b" by columns: (1*x + 3*y) / 4 in any order.
    def act(federation: Federation) -> Tensor:
        by_rows = random(5 + federation.party, 9, 10)
        b = by_rows.t().contiguous().t() if federation.party == 1 else by_rows.clone()
        parameters = {"a": torch.zeros(3), "b": b, "c": torch.zeros(5)}
        aggregator = started(federation, parameters)
        write_(parameters, {"b": random(7 + federation.party, 9, 10)})
        aggregator.step([1, 3][federation.party])
        return b

    expected = (random(7, 9, 10).double() + 3 * random(8, 9, 10).double()) / 4
    for result in run_parties(2, act):
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


def test_tied_parameters_are_averaged_once() -> None:
    # Two names, one storage: it moves by 7/4, not by twice that.
    def act(federation: Federation) -> Tensor:
        w = torch.zeros(6)
        aggregator = started(federation, {"embedding": w, "head": w.view(2, 3)})
        for _ in range(2):
            w += 1 + federation.party
            aggregator.step([1, 3][federation.party])
        return w

    for result in run_parties(2, act):
        assert torch.equal(result, torch.full((6,), 3.5))


@pytest.mark.parametrize("moved", ["the same", "across"])
def test_storage_that_moves_between_rounds(moved: str, small_pieces: None) -> None:
    # ``module.to(...)`` and others rebind ``p.data``: reading and writing must be where the values now are.
    def act(federation: Federation) -> Tensor:
        w = nn.Parameter(torch.zeros(5, 6))
        aggregator = started(federation, {"w": w})
        for _ in range(3):
            w.data = w.data.clone() if moved == "the same" else w.data.t().contiguous().t()
            write_({"w": w}, {"w": w + 1 + federation.party})
            aggregator.step([1, 3][federation.party])
        return w.detach()

    for result in run_parties(2, act):
        torch.testing.assert_close(result, torch.full((5, 6), 5.25))  # 3 * 7/4


def test_a_parameter_whose_size_changed_is_told() -> None:
    def act(federation: Federation) -> None:
        w = nn.Parameter(torch.zeros(5, 6))
        aggregator = started(federation, {"weight": w})
        w.data = torch.zeros(8, 6)
        with pytest.raises(ValueError, match="'weight'"):
            aggregator.step(1)

    run_parties(1, act)


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("outer", "buckets"),
    [
        (sgd(lr=1.0), 0.5),
        (sgd(lr=0.5, momentum=0.9), 0.5),
        (sgd(lr=0.7, momentum=0.9, nesterov=True), 1),
        (sgd(lr=0.7, momentum=0.9, nesterov=True, weight_decay=0.1), 1),
        (lambda p: torch.optim.Adam(p, lr=0.1), 1),
    ],
    ids=["FedAvg", "momentum", "DiLoCo", "decay", "Adam"],
)
def test_no_memory_in_proportion_after_the_first_round(
    dtype: torch.dtype, outer: Factory, buckets: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_buffer, "_CHUNK", 1024)
    monkeypatch.setattr(flat_buffer, "_BUCKET", 4096)
    size = 64 * 1024

    def act(federation: Federation) -> tuple[int, int]:
        with Allocations() as first:
            parameters = {f"{i:02}": torch.zeros(size // 64, dtype=dtype) for i in range(64)}
            first.sizes.clear()
            aggregator = started(federation, parameters, outer_optimizer=outer)
            aggregator.step(1)
        with Allocations() as later:
            for _ in range(2):
                aggregator.step(1)
        return sum(made for made in first.sizes if made > 16 * 1024), max(later.sizes)

    for first, later in run_parties(2, act):
        assert later <= buckets * 4 * 4096, "a later round has allocated more than a chunk or a bucket"
        # The global vector and what crosses; the optimizer's state lies in buckets.
        assert first <= 2.1 * 4 * size


def test_the_size_that_is_told_is_that_of_the_vector() -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    aggregator = Aggregator(federation, {"a": torch.zeros(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)})
    assert aggregator.size_bytes == 4 * 14
    assert aggregator.global_vector.shape == (14,)
    assert aggregator.global_vector.dtype == torch.float32
    federation.close()
