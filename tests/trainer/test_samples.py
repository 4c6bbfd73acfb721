"""How many samples a batch holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from transformers import BatchEncoding

from pellm_lightning.trainer.samples import SampleCounter, samples_from, samples_in


@dataclass
class Strings:
    values: list[str]


@dataclass
class Pair:
    name: str
    values: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(5, 2), 5),
        ([torch.zeros(3, 2), torch.zeros(3)], 3),
        ({"ids": torch.zeros(4, 7), "name": "a"}, 4),
        ({"deep": [{"ids": torch.zeros(2, 7)}]}, 2),
        (torch.tensor(1.0), 1),
        ({"ids": torch.zeros(4, 7), "lengths": torch.zeros(28)}, 4),
        ({"epoch": torch.tensor(3), "ids": torch.zeros(4, 7)}, 4),
        ([None, {"ids": torch.zeros(3, 7)}], 3),
        ({"text": ["a", "b"], "ids": torch.zeros(2, 7)}, 2),
        (torch.zeros(0, 2), 0),
        (BatchEncoding({"ids": torch.zeros(6, 7)}), 6),
        (Pair("a", torch.zeros(3)), 3),
    ],
)
def test_the_first_dimension_of_the_first_tensor_that_has_one(batch: Any, samples: int) -> None:
    assert samples_in(batch) == samples


NOTHING = [
    None,
    3,
    "text",
    object(),
    {},
    [],
    ["a", "b"],
    {"text": ["a", "b"], "n": None},
    ([], ()),
    Strings(["a"]),
]


@pytest.mark.parametrize("batch", NOTHING)
def test_a_batch_without_a_tensor_has_its_loaders_size(batch: Any) -> None:
    assert samples_in(batch) is None
    loader = DataLoader(range(10), batch_size=4)
    counter = SampleCounter(warns=True)
    # 10 samples in batches of 4.
    assert [counter.count(batch, loader, index) for index in range(3)] == [4, 4, 2]


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(10)


def sampled(size: int) -> BatchSampler:
    return BatchSampler(SequentialSampler(range(10)), size, drop_last=False)


@pytest.mark.parametrize(
    ("loaders", "sizes"),
    [
        (DataLoader(range(10), batch_size=4, drop_last=True), [4, 4, 2]),
        (DataLoader(Endless(), batch_size=4), [4, 4, 4]),
        (DataLoader(range(10), batch_sampler=sampled(6)), [6, 4, 6]),
        (DataLoader(range(10), batch_sampler=[[0, 1], [2]]), [None] * 3),
        (DataLoader(range(10), batch_size=None), [None] * 3),
        ([DataLoader(range(10), batch_size=4), DataLoader(range(20), batch_size=4)], [4, 4, None]),
        ({"a": DataLoader(range(20), batch_size=4), "b": DataLoader(range(20), batch_size=2)}, [None] * 3),
        (CombinedLoader({"a": DataLoader(range(20), batch_size=3)}, "max_size"), [3, 3, 3]),
        (["batches", "of no DataLoader"], [None] * 3),
        (None, [None] * 3),
    ],
)
def test_the_sizes_of_a_loaders_batches(loaders: Any, sizes: list[int | None]) -> None:
    assert [samples_from(loaders, index) for index in range(3)] == sizes


def test_what_cannot_be_known_is_said_once() -> None:
    counter = SampleCounter(warns=True)
    with pytest.warns(UserWarning, match=r"batch of type list:.*weighting='uniform' or to a number") as said:
        assert [counter.count(["a", "b"], None, index) for index in range(3)] == [1, 1, 1]
    assert len(said) == 1
    assert SampleCounter(warns=False).count(["a", "b"], None, 0) == 1
