"""PartyBatches: a party's pass over its data, which resumes where the party stopped."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from pellm_lightning.loop.simulation.random_state import random_state, set_random_state

_END = object()


class PartyBatches:
    """Batches of a party, pass after pass over its loader, from the place where the party stopped.

    That place is found again by the random numbers with which the pass began, and by skipping as many
    batches: what a loader draws as it begins a pass is drawn again.

    Args:
        loader: The party's batches; each ``iter`` is a pass. A ``generator`` of its own, or of its sampler,
            is part of the place.
        place: As of ``place()``; None begins.
        device: Whose generator belongs to the state of the random numbers.

    Example:
        >>> batches = PartyBatches([1, 2, 3], None, torch.device("cpu"))
        >>> [next(batches), next(batches)]
        [1, 2]
        >>> next(PartyBatches([1, 2, 3], batches.place(), torch.device("cpu")))
        3
    """

    def __init__(self, loader: Any, place: Mapping[str, Any] | None, device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._iterator: Iterator[Any] | None = None
        self._pass, self._batch = 0, 0
        self._began: dict[str, Any] = {}
        if place is not None:
            self._pass, self._batch = place["pass"], place["batch"]
            self._set_generators(place["generators"])
            if self._batch:
                self._find(place)

    def __iter__(self) -> "PartyBatches":
        return self

    def __next__(self) -> Any:
        """Return the next batch, of another pass if one is over.

        Raises:
            ValueError: If a pass has no batch.
        """
        if self._iterator is not None:
            batch = next(self._iterator, _END)
            if batch is not _END:
                self._batch += 1
                return batch
            self._pass += 1
        self._batch, self._iterator = 0, self._begin()
        for batch in self._iterator:
            self._batch = 1
            return batch
        raise ValueError("The party's loader has no batch. Give every party a sample, or fewer parties.")

    def place(self) -> dict[str, Any]:
        """Return where the next batch is."""
        generators = [generator.get_state() for generator in self._generators()]
        if self._batch >= _length(self._loader):  # else the pass would be skipped batch by batch, to its end
            return {"pass": self._pass + 1, "batch": 0, "generators": generators}
        return {"pass": self._pass, "batch": self._batch, "generators": generators} | self._began

    def _begin(self) -> Iterator[Any]:
        samplers: list[Any] = [getattr(self._loader, name, None) for name in ("sampler", "batch_sampler")]
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._pass)
        generators = [generator.get_state() for generator in self._generators()]
        self._began = {"random": random_state(self._device), "began_with": generators}
        return iter(self._loader)

    def _find(self, place: Mapping[str, Any]) -> None:
        """Repeat the pass up to the place."""
        now = random_state(self._device)
        set_random_state(place["random"], self._device)
        self._set_generators(place["began_with"])
        self._iterator = self._begin()
        for _ in islice(self._iterator, self._batch):
            pass
        self._set_generators(place["generators"])
        set_random_state(now, self._device)

    def _generators(self) -> list[torch.Generator]:
        """Return the generators of the loader's own."""
        owners = self._loader, getattr(self._loader, "sampler", None)
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)


def _length(loader: Any) -> float:
    """Return the batches of a pass; infinity if nobody knows."""
    try:
        return float(len(loader))
    except TypeError:
        return float("inf")
