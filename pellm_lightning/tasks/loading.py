"""Loaders of a party's samples, which a resumed fit continues where the checkpoint was written."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

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


class Place:
    """Place in a party's data: the epoch, and where in it a resumed fit begins."""

    def __init__(self) -> None:
        self.epoch = 0
        self._resumed, self._samples = -1, 0
        self._shift: int | None = 0

    def resume(self, epoch: int, samples: int) -> None:
        """Begin an epoch behind the samples of this process that were trained on."""
        self.epoch, self._resumed, self._samples, self._shift = epoch, epoch, samples, None

    def enter(self, epoch: int) -> None:
        """Enter an epoch by Lightning's count, which is one ahead where a fit has ended within an epoch."""
        if self._shift is None:
            self._shift = max(0, epoch - self._resumed)
        self.epoch = max(epoch - self._shift, self._resumed)

    @property
    def skipped(self) -> int:
        """Number of samples at the beginning of this epoch that were trained on."""
        return self._samples if self.epoch == self._resumed else 0


class EpochSampler(DistributedSampler[Any]):
    """Sampler whose order depends on seed and epoch only, so that a resumed fit repeats it.

    Lightning calls ``set_epoch``. It divides the samples among the processes of this party, never among
    parties; in a party of one process it divides nothing.
    """

    def __init__(self, samples: Sequence[Any] | Samples, trainer: Trainer | None, seed: int) -> None:
        size, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        dataset = cast(Dataset[Any], samples)  # a sequence is all that a map-style dataset has to be
        super().__init__(dataset, num_replicas=size, rank=rank, shuffle=True, seed=seed)
        self.place = Place()

    def set_epoch(self, epoch: int) -> None:
        """Enter an epoch."""
        self.place.enter(epoch)

    def __iter__(self) -> Iterator[int]:
        super().set_epoch(self.place.epoch)
        return islice(super().__iter__(), self.place.skipped, None)


class Stream(IterableDataset[Any]):
    """Samples of a source that is read as they are used.

    Args:
        read: Yields the samples of an epoch.
        trainer: Source of the epoch, and of which process of the party this is.
    """

    def __init__(self, read: Callable[[int], Iterator[Any]], trainer: Trainer | None) -> None:
        self.read, self.trainer = read, trainer
        self.place = Place()

    def __iter__(self) -> Iterator[Any]:
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            self.place.enter(progress.processed)
        samples = self._own(self.read(self.place.epoch))
        first = next(samples, None)
        if first is None:  # with max_steps Lightning would begin one empty epoch after the other
            raise ValueError(
                "The stream of files has no sample for this process: its rows are blank or too long, or fewer"
                " than the processes of the party. Give more text, or a larger block_size."
            )
        return islice(chain([first], samples), self.place.skipped, None)

    def _own(self, samples: Iterator[Any]) -> Iterator[Any]:
        """Give each process of the party its share, as many to each."""
        size, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        while len(group := list(islice(samples, size))) == size:
            yield group[rank]


class ResumableLoader(DataLoader[Any]):
    """DataLoader that Lightning resumes within an epoch, by the state that it saves in checkpoints."""

    trainer: Trainer | None = None

    @property
    def _place(self) -> Place:
        holder: Any = self.dataset if isinstance(self.dataset, Stream) else self.sampler
        place: Place = holder.place
        return place

    def state_dict(self) -> dict[str, int]:
        """Return the position behind the last batch that was trained on."""
        if self.trainer is None or self.batch_size is None:
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return {"epoch": self._place.epoch + 1, "samples": 0}
        return {"epoch": self._place.epoch, "samples": progress.current.processed * self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from such a position."""
        if state:
            self._place.resume(**state)
