"""How many samples a batch holds."""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor


def samples_in(batch: Any, *, otherwise: int | None) -> int:
    """Return the first dimension of the batch's first tensor; a number counts as one sample.

    Args:
        batch: What the DataLoader handed out: a tensor, or mappings, sequences and dataclasses of tensors.
        otherwise: The answer for a batch without a tensor; None raises instead.

    Raises:
        ValueError: If the number cannot be told and there is no other answer.
    """
    first = next(_tensors(batch), None)
    if first is not None:
        return first.shape[0] if first.ndim else 1
    if otherwise is not None:
        return otherwise
    raise ValueError(
        f"weighting='samples' cannot tell how many samples a batch of type {type(batch).__name__} holds."
        " Let it contain a tensor whose first dimension is the batch, or use weighting='uniform' or a number."
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    # Lightning's extract_batch_size would warn of tensors that differ in their first dimension.
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        yield from _tensors(vars(batch))
