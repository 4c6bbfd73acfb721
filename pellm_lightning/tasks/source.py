"""Sources of a party's samples: files, validation split, shuffling."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch.utils.data import Dataset, DistributedSampler


def party_files(pattern: str, party: int) -> list[Path]:
    """List the files that ``pattern`` matches for one party, sorted.

    Args:
        pattern: Glob pattern (``**`` crosses folders); the placeholder ``{party}`` stands for the party's
            index.
        party: Zero-based index.

    Raises:
        ValueError: When no file matches.
    """
    asked = pattern.replace("{party}", str(party))
    files = sorted(Path(name) for name in glob.glob(asked, recursive=True) if Path(name).is_file())
    if not files:
        raise ValueError(
            f"No file matches {asked!r} (pattern {pattern!r}, party {party}, looked from {Path.cwd()}). "
            "Parties count from 0; a relative pattern is seen from where the command was started."
        )
    return files


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


def shuffled(samples: Sequence[Any], trainer: Trainer | None, seed: int) -> DistributedSampler[Any]:
    """Return a sampler whose order depends on ``seed`` and epoch only, so that a resumed fit repeats it.

    Lightning calls `set_epoch`. The sampler divides the samples among the processes of this party, never
    among parties; in a party of one process it divides nothing.
    """
    size, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
    dataset = cast(Dataset[Any], samples)  # a list is all that a map-style dataset has to be
    return DistributedSampler(dataset, num_replicas=size, rank=rank, shuffle=True, seed=seed)
