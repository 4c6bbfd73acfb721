"""Rounds by hand: parameters, optimizers and values for parties as threads."""

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pellm_lightning import Aggregator, Federation

SOON_S = 8.0
"""Far below the parties' timeout of 20 s, far above what a loaded machine needs."""
Factory = Callable[[Iterable[Any]], torch.optim.Optimizer]


def sgd(**arguments: Any) -> Factory:
    return lambda parameters: torch.optim.SGD(parameters, **arguments)


class OtherBits(torch.optim.SGD):
    """An optimizer whose last bit and whose memory are others ``here``, as on another processor."""

    def __init__(self, parameters: Any, here: bool) -> None:
        super().__init__(parameters, lr=0.7, momentum=0.9)
        self.here = here

    def step(self, closure: Any = None) -> None:
        super().step()
        for p, state in self.state.items():
            if self.here and len(p) >= 10:  # it is tried on a few values first
                with torch.no_grad():
                    p[3] = torch.nextafter(p[3], torch.tensor(9.0))
                    state["momentum_buffer"][5] *= 1.01


def started(federation: Federation, parameters: Mapping[str, Tensor], **arguments: Any) -> Aggregator:
    aggregator = Aggregator(federation, parameters, **arguments)
    aggregator.start()
    return aggregator


def write_(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """What local training does: it changes the parameters in place."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(parameters: Mapping[str, Tensor]) -> bytes:
    return b"".join(bits(parameters[name]) for name in sorted(parameters))


def trained(
    federation: Federation,
    dtype: torch.dtype,
    outer: Factory,
    store: dict[int, bytes],
    save_in: int | None,
    resume_in: int = 0,
) -> bytes:
    """Train for five rounds of two half steps each; save or begin in the middle of a round."""
    party = federation.party
    parameters = {"a": random(0, 9, 4).to(dtype), "b": random(1, 6)}
    aggregator = Aggregator(federation, parameters, outer_optimizer=outer)
    if resume_in:
        state = torch.load(io.BytesIO(store[party]), weights_only=True)
        write_(parameters, state["parameters"])
        aggregator.load_state_dict(state["aggregator"])
    aggregator.start()
    for number in range(resume_in, 5):
        for half in range(2):
            if half == 1 and number == save_in:
                file = io.BytesIO()
                torch.save({"parameters": parameters, "aggregator": aggregator.state_dict()}, file)
                store[party] = file.getvalue()
            if half == 1 or number != resume_in or not resume_in:
                for index, p in enumerate(parameters.values()):
                    p.mul_(0.9).add_(
                        random(97 * party + 10 * number + 2 * half + index, *p.shape).to(p.dtype)
                    )
        assert aggregator.step([1, 3, 0.7][party]).round == number
    return all_bits(parameters) + bits(aggregator.global_vector) + repr(aggregator.state_dict()).encode()
