"""How many samples a batch holds."""

from typing import Any

from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def samples_in(batch: Any, *, otherwise: int | None) -> int:
    """Return the first dimension of the batch's first tensor.

    Args:
        batch: What the DataLoader handed out.
        otherwise: The answer for a batch without a tensor; None raises instead.

    Raises:
        ValueError: If the number cannot be told and there is no other answer.
    """
    try:
        return extract_batch_size(batch)
    except (MisconfigurationException, RecursionError) as error:
        if otherwise is not None:
            return otherwise
        raise ValueError(
            f"weighting='samples' cannot tell how many samples a batch of type {type(batch).__name__} holds."
            " Let it contain a tensor whose first dimension is the batch, or use weighting='uniform' or a"
            " number."
        ) from error
