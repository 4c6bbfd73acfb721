"""Loaders of a party's samples, which a resumed fit continues where the checkpoint was written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from pellm_lightning.tasks.samples import Samples


def hold_out(num_samples: int, fraction: float, seed: int, source: str = "the data") -> set[int]:
    """Sample the indices of a validation fraction by ``seed``: at least one, never all.

    Raises:
        ValueError: If there are fewer than two; names ``source``.
    """
    if num_samples < 2:
        what = "a single record" if num_samples else "no record"
        raise ValueError(
            f"There is {what} in {source}: val_fraction={fraction} would leave nothing to train on. Give more"
            " records, files of their own for validation (val_files), or val_fraction=0."
        )
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)).tolist()
    return set(order[: min(max(1, round(num_samples * fraction)), num_samples - 1)])


@dataclass
class Position:
    """Place in an epoch: the number of samples of this process that were trained on."""

    epoch: int = -1
    samples: int = 0


class EpochSampler(DistributedSampler[Any]):
    """Sampler whose order depends on seed and epoch only, so that a resumed fit repeats it.

    Lightning calls ``set_epoch``. It divides the samples among the processes of this party, never among
    parties; in a party of one process it divides nothing.
    """

    def __init__(self, samples: Samples, trainer: Trainer | None, seed: int) -> None:
        size, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        super().__init__(samples, num_replicas=size, rank=rank, shuffle=True, seed=seed)
        self.resumed = Position()

    def __iter__(self) -> Iterator[int]:
        skipped = self.resumed.samples if self.epoch == self.resumed.epoch else 0
        return islice(super().__iter__(), skipped, None)

    def resume(self, position: Position) -> None:
        """Begin the epoch of a checkpoint behind what was trained on."""
        self.resumed = position
        self.set_epoch(position.epoch)  # workers of a loader begin to read before Lightning sets it


class Stream(IterableDataset[Any]):
    """Samples of a source that is read as they are used.

    Args:
        read: Yields the samples of an epoch.
        trainer: Tells the epoch, and which process of the party this is.
    """

    def __init__(self, read: Callable[[int], Iterator[Any]], trainer: Trainer | None) -> None:
        self.read, self.trainer, self.epoch = read, trainer, 0
        self.resumed = Position()

    def __iter__(self) -> Iterator[Any]:
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            self.epoch = max(progress.processed, self.resumed.epoch)
        skipped = self.resumed.samples if self.epoch == self.resumed.epoch else 0
        return islice(self._own(self.read(self.epoch)), skipped, None)

    def _own(self, samples: Iterator[Any]) -> Iterator[Any]:
        """Give each process of the party its share, as many to each."""
        size, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        while len(group := list(islice(samples, size))) == size:
            yield group[rank]

    def resume(self, position: Position) -> None:
        """Begin the epoch of a checkpoint behind what was trained on."""
        self.resumed = position


class ResumableLoader(DataLoader[Any]):
    """DataLoader that Lightning resumes within an epoch, by the state that it saves in checkpoints."""

    trainer: Trainer | None = None

    @property
    def _order(self) -> Any:
        return self.dataset if isinstance(self.dataset, Stream) else self.sampler

    def state_dict(self) -> dict[str, int]:
        """Return the position behind the last batch that was trained on."""
        if self.trainer is None or self.batch_size is None:
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return {"epoch": self._order.epoch + 1, "samples": 0}
        return {"epoch": self._order.epoch, "samples": progress.current.processed * self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from such a position."""
        if state:
            self._order.resume(Position(**state))
