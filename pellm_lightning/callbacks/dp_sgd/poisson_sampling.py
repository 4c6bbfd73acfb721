"""Poisson sampling of a party's records, and the accountant of steps on such samples."""

import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from pellm_lightning.privacy.accountant import (
    Accountant,
    check_accountant,
    check_delta,
    dp_accounting,
    root_logger_kept,
)


class PoissonBatches(Sampler[list[int]]):
    """Batch sampler that draws each record independently with the same probability.

    It uses the operating system's generator: amplification by sampling needs secret samples, which
    ``seed_everything`` with the federation's seed would reveal. An empty batch contains record 0 as a
    placeholder, whose gradient ``DPSGD`` drops.

    Args:
        records: Number n of records.
        rate: Sampling probability q of a record.
        batches: Number of batches per epoch.
    """

    def __init__(self, records: int, rate: float, batches: int) -> None:
        self.records, self.rate, self.batches = records, rate, batches
        self.sizes: deque[int] = deque()
        """True sizes of the batches that were sampled and not trained on yet, oldest first."""

    def __iter__(self) -> Iterator[list[int]]:
        self.sizes.clear()  # drop batches that were prefetched and never used
        for _ in range(self.batches):
            integers = torch.frombuffer(bytearray(os.urandom(8 * self.records)), dtype=torch.int64)
            uniform = ((integers >> 11) + 2**52).double().mul_(2.0**-53)  # [0, 1)
            drawn = (uniform < self.rate).nonzero().flatten().tolist()
            self.sizes.append(len(drawn))
            yield drawn or [0]

    def __len__(self) -> int:
        return self.batches


def poisson(loader: Any) -> DataLoader[Any]:
    """Return a DataLoader of Poisson batches, with equal expected size and number.

    Raises:
        ValueError: If the loader does not return every record of a map-style dataset once per epoch.
    """
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"Records are sampled from one torch DataLoader, not from {type(loader).__name__}. Let"
            " train_dataloader return a single one."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError("Records of an IterableDataset cannot be sampled. Use a map-style dataset.")
    sampler = loader.sampler
    every_record = (
        isinstance(sampler, SequentialSampler)
        or (isinstance(sampler, RandomSampler) and not sampler.replacement)
        or (isinstance(sampler, DistributedSampler) and sampler.num_replicas == 1)
    )
    records = len(loader.dataset)  # type: ignore[arg-type]  # a map-style dataset has a length
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None or not every_record:
        raise ValueError(
            f"The DataLoader's {type(sampler).__name__} and {type(loader.batch_sampler).__name__} select"
            " records themselves, which Poisson sampling would override. Give it shuffle=True or False and"
            " a batch_size, over a dataset of just the records to train on."
        )
    if records == 0:
        raise ValueError("The training dataset is empty.")
    rate = min(loader.batch_size / records, 1.0)
    return DataLoader(
        loader.dataset,
        batch_sampler=PoissonBatches(records, rate, len(loader)),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class PoissonAccountant:
    """Privacy accountant of DP-SGD steps on Poisson samples.

    Neighbouring relation: add or remove one record. A step is a Gaussian mechanism of multiplier z on a
    sample that contains each record with probability q.

    Example:
        >>> accountant = PoissonAccountant()
        >>> accountant.step(noise_multiplier=1.0, rate=0.01, count=100)
        >>> 0 < accountant.epsilon(delta=1e-5) < 2
        True
    """

    def __init__(self) -> None:
        self._runs: list[tuple[float, float, int]] = []

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return sum(count for *_, count in self._runs)

    def step(self, noise_multiplier: float, rate: float, count: int = 1) -> None:
        """Record steps."""
        if self._runs and self._runs[-1][:2] == (noise_multiplier, rate):
            count += self._runs.pop()[2]
        self._runs.append((noise_multiplier, rate, count))

    def epsilon(self, delta: float, accountant: Accountant = "rdp") -> float:
        """Return the epsilon of all steps together.

        Args:
            delta: Probability that the bound may fail; well below one over the number of records.
            accountant: "rdp" takes a twentieth of a second, "pld" up to seconds, and is about a tenth lower.
        """
        check_delta(delta)
        check_accountant(accountant)
        if not self._runs:
            return 0.0
        if any(multiplier == 0 for multiplier, *_ in self._runs):
            return math.inf
        dp = dp_accounting()
        logging.getLogger("absl").addFilter(_is_relevant_warning)
        spent = dp.rdp.RdpAccountant(_ORDERS) if accountant == "rdp" else dp.pld.PLDAccountant()
        with root_logger_kept():
            for multiplier, rate, count in self._runs:
                event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(multiplier))
                spent.compose(dp.SelfComposedDpEvent(event, count))
            return float(spent.get_epsilon(delta))

    def steps_within_budget(
        self, noise_multiplier: float, rate: float, at_most: int, max_epsilon: float, delta: float,
        accountant: Accountant = "rdp",
    ) -> int:  # fmt: skip
        """Return how many more steps stay within ``max_epsilon``, at most ``at_most``."""

        def within(count: int) -> bool:
            after = PoissonAccountant()
            after._runs = list(self._runs)
            after.step(noise_multiplier, rate, count)
            return after.epsilon(delta, accountant) <= max_epsilon

        if at_most == 0 or within(at_most):
            return at_most
        low, high = 0, at_most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        return low

    def state_dict(self) -> dict[str, Any]:
        """Return the steps as plain JSON: ``{"steps": [[noise_multiplier, rate, count], ...]}``."""
        return {"steps": [list(run) for run in self._runs]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the steps of ``state_dict``."""
        self._runs = [(float(z), float(rate), int(count)) for z, rate, count in state_dict["steps"]]


def _is_relevant_warning(record: logging.LogRecord) -> bool:
    """Filter warnings of orders that the accountant skips, which only increases epsilon."""
    return "failed to converge" not in record.getMessage()


# Orders nearer to 1 are never optimal, and their series does not converge.
_ORDERS = [1 + x / 10 for x in range(6, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
