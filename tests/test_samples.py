"""How many samples a batch holds."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from pellm_lightning.samples import samples_in


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
        (BatchEncoding({"ids": torch.zeros(6, 7)}), 6),
        (Pair("a", torch.zeros(3)), 3),
    ],
)
def test_the_first_dimension_of_the_first_tensor(batch: Any, samples: int) -> None:
    assert samples_in(batch, otherwise=None) == samples
    assert samples_in(batch, otherwise=9) == samples


@pytest.mark.parametrize("batch", [None, 3, object(), {}, []])
def test_a_batch_without_a_tensor(batch: Any) -> None:
    assert samples_in(batch, otherwise=1) == 1
    with pytest.raises(ValueError, match=f"of type {type(batch).__name__} holds.*weighting='uniform'"):
        samples_in(batch, otherwise=None)
