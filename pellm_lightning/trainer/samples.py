"""How many samples a batch holds."""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader


class SampleCounter:
    """Counts the samples of batches, and says once if there is no way to tell.

    Args:
        says: Whether anything depends on the number, so that a batch of which it is unknown is warned about.
    """

    def __init__(self, *, says: bool) -> None:
        self._says = says

    def count(self, batch: Any, loaders: Any, batch_idx: int) -> int:
        """Return the samples of a batch: those of its tensors, or else what its DataLoader says, or else one.

        Args:
            batch: What the DataLoader handed out.
            loaders: The DataLoader, or a collection of those of which the batch may be.
            batch_idx: Index of the batch in its epoch.
        """
        samples = samples_in(batch)
        if samples is None:
            samples = samples_from(loaders, batch_idx)
        if samples is not None:
            return samples
        if self._says:
            self._says = False
            rank_zero_warn(
                f"weighting='samples' cannot tell how many samples a batch of type {type(batch).__name__}"
                " holds: there is no tensor in it, and its DataLoader has no batch size. Each such batch"
                " counts as one sample. Give the DataLoader a batch_size, or set weighting='uniform' or to a"
                " number of your own, such as weighting=1000 for 1000 samples."
            )
        return 1


def samples_in(batch: Any) -> int | None:
    """Return the first dimension of the batch's first tensor that has one; None without any tensor.

    A tensor without dimensions is a sample by itself, if the batch has no others.

    Args:
        batch: What the DataLoader handed out: a tensor, or mappings, sequences and dataclasses of tensors.
    """
    found = False
    for tensor in _tensors(batch):
        if tensor.ndim:
            return tensor.shape[0]
        found = True
    return 1 if found else None


def samples_from(loaders: Any, batch_idx: int) -> int | None:
    """Return the samples of a batch by what its DataLoader says; None if it has no batch size.

    Of several DataLoaders with unlike batch sizes it is not known which one the batch came from.

    Args:
        loaders: A DataLoader, or a collection of them (a CombinedLoader, too).
        batch_idx: Index of the batch: the last one of an epoch may be smaller.
    """
    sizes: set[int | None] = set()
    loaders = getattr(loaders, "iterables", loaders)  # of a CombinedLoader
    apply_to_collection(loaders, DataLoader, lambda loader: sizes.add(_size_by(loader, batch_idx)))
    return sizes.pop() if len(sizes) == 1 else None


def _size_by(loader: DataLoader[Any], batch_idx: int) -> int | None:
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        return None
    try:
        left = len(loader.sampler) - batch_idx * size  # type: ignore[arg-type]
    except TypeError:  # of an iterable dataset, which has no length
        return size
    return min(size, left) if left > 0 else size


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
