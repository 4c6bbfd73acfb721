"""FedAvg in float64 with plain torch: the independent answer that a federation of Trainers must give."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

Optimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]


def sgd(params: Iterable[Any], lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def fedavg(
    module: nn.Module,
    batches: Sequence[Sequence[Any]],
    *,
    rounds: int,
    steps: int,
    weights: Sequence[Sequence[float]],
    inner: Optimizer = sgd,
    reset: bool = False,
    outer: Optimizer = lambda params: sgd(params, 1.0),
) -> torch.Tensor:
    """Train ``module.head`` at every party, ``steps`` local steps per round; return the global vector.

    ``batches[i]`` are the batches of party i, used in turn; ``weights[r][i]`` is its weight in round r.
    """
    modules = [copy.deepcopy(module).double() for _ in batches]
    optimizers = [inner(module.head.parameters()) for module in modules]
    shared = nn.Parameter(nn.utils.parameters_to_vector(modules[0].head.parameters()).detach().clone())
    outer_optimizer = outer([shared])
    for round_ in range(rounds):
        for module, optimizer, own in zip(modules, optimizers, batches, strict=True):
            nn.utils.vector_to_parameters(shared.detach().clone(), module.head.parameters())
            for step in range(round_ * steps, (round_ + 1) * steps):
                x, y = own[step % len(own)]
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x.double()), y).backward()
                optimizer.step()
            if reset:
                optimizer.state.clear()
        locals_ = [nn.utils.parameters_to_vector(m.head.parameters()).detach() for m in modules]
        mean = sum(w * x for w, x in zip(weights[round_], locals_, strict=True)) / sum(weights[round_])
        shared.grad = shared.detach() - mean
        outer_optimizer.step()
    return shared.detach()
