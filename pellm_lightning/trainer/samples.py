"""Sample counts of batches."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from pellm_lightning.tensors.nested import leaves


class SampleCounter:
    """Counter of the samples in batches.

    Args:
        warns: Whether to warn once of a batch whose number of samples is unknown.
    """

    def __init__(self, *, warns: bool) -> None:
        self._warns = warns

    def count(self, batch: Any, loaders: Any, batch_idx: int) -> int:
        """Return the number of samples in a batch, by its tensors or its DataLoader's batch size, else 1.

        Args:
            batch: A batch of the DataLoader.
            loaders: The DataLoader, or a collection of those that the batch may come from.
            batch_idx: Index of the batch in its epoch.
        """
        samples = samples_in(batch)
        if samples is None:
            samples = samples_from(loaders, batch_idx)
        if samples is not None:
            return samples
        if self._warns:
            self._warns = False
            rank_zero_warn(
                f"weighting='samples' cannot determine the samples in a batch of type {type(batch).__name__}:"
                " it contains no tensor, and its DataLoader has no batch size. Each such batch"
                " counts as one sample. Give the DataLoader a batch_size, or set weighting='uniform' or to a"
                " number of your own, such as weighting=1000 for 1000 samples."
            )
        return 1


def batch_copies(trainer: Trainer) -> int:
    """Return how many processes of a party get the same batch: those of a tensor-parallel group."""
    replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
    return int(trainer.world_size // replicas)


def samples_in(batch: Any) -> int | None:
    """Return the first dimension of the batch's first tensor that has one; None without any tensor.

    Scalar tensors count as one sample, if the batch has no others.

    Args:
        batch: A tensor, or mappings, sequences and dataclasses of tensors.
    """
    found = False
    # Lightning's extract_batch_size would warn of tensors that differ in their first dimension.
    for tensor in (leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)):
        if tensor.ndim:
            return tensor.shape[0]
        found = True
    return 1 if found else None


def samples_from(loaders: Any, batch_idx: int) -> int | None:
    """Return the number of samples in a batch by its DataLoader's batch size; None if it has none.

    None also for several DataLoaders of different batch sizes.

    Args:
        loaders: A DataLoader, or a collection of them, such as a CombinedLoader.
        batch_idx: Index of the batch: the last one of an epoch may be smaller.
    """
    sizes: set[int | None] = set()
    loaders = getattr(loaders, "iterables", loaders)  # those of a CombinedLoader
    apply_to_collection(loaders, DataLoader, lambda loader: sizes.add(_size_by(loader, batch_idx)))
    return sizes.pop() if len(sizes) == 1 else None


def _size_by(loader: DataLoader[Any], batch_idx: int) -> int | None:
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        return None
    try:
        left = len(loader.sampler) - batch_idx * size  # type: ignore[arg-type]
    except TypeError:  # iterable datasets have no length
        return size
    return min(size, left) if left > 0 else size
