"""Parties whose losses are quadratics, so that where each method comes to rest is known in closed form."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from party_threads import data, fit_parties, quiet_trainer
from torch import Tensor, nn

CURVATURES = np.array([[[2.0, 0.6], [0.6, 1.0]], [[0.5, -0.2], [-0.2, 1.5]], [[1.2, 0.0], [0.0, 0.4]]])
MINIMISERS = np.array([[1.0, -2.0], [-3.0, 0.5], [0.5, 4.0]])
STEPS = (2, 6, 3)
WEIGHTS = (1.0, 3.0, 2.0)
SHARES = np.array(WEIGHTS) / sum(WEIGHTS)
LR = 0.1

Optimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(lr: float = LR, **settings: Any) -> Optimizer:
    return lambda params: torch.optim.SGD(params, lr=lr, **settings)


class Quadratic(LightningModule):
    """``(x - b)' H (x - b) / 2``, whatever the batch."""

    def __init__(self, h: np.ndarray, b: np.ndarray, optimizer: Optimizer, decay: float = 1.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(len(b), dtype=torch.float32))
        self.h = torch.tensor(h, dtype=torch.float32)
        self.b = torch.tensor(b, dtype=torch.float32)
        self.optimizer, self.decay = optimizer, decay
        self.path: list[np.ndarray] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        away = self.x - self.b
        return 0.5 * away @ self.h @ away

    def on_train_epoch_end(self) -> None:
        self.path.append(self.x.detach().double().numpy().copy())

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([self.x])
        decay = self.decay
        if decay == 1.0:  # a schedule would warn of a first step that a scaler skips
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    root: Path,
    correction: Callable[[], Callback] | None,
    rounds: int,
    *,
    optimizer: Optimizer | None = None,
    decay: float = 1.0,
    steps: Sequence[int] = STEPS,
    weights: Sequence[float] = WEIGHTS,
    curvatures: np.ndarray = CURVATURES,
    trainer: Callable[[], dict[str, Any]] = dict,
    **arguments: Any,
) -> np.ndarray:
    """Return the global parameters after each round, (rounds, 2); a round is an epoch of unequal length."""

    def fit(party: int, federated: Any) -> np.ndarray:
        module = Quadratic(curvatures[party], MINIMISERS[party], optimizer or sgd(), decay)
        callbacks = [federated(weighting=weights[party], **arguments)]
        callbacks += [] if correction is None else [correction()]
        fitting = quiet_trainer(root, callbacks, max_epochs=rounds, **trainer())
        fitting.fit(module, data(steps[party], seed=party, batch_size=1))
        return np.stack(module.path)

    paths = fit_parties(len(steps), fit)
    assert all(np.array_equal(paths[0], other) for other in paths)
    return paths[0]


def minimiser(shares: np.ndarray, curvatures: np.ndarray = CURVATURES) -> np.ndarray:
    """Where the weighted loss is least: ``(sum s_i H_i)^-1 sum s_i H_i b_i``."""
    return np.linalg.solve(
        np.einsum("i,ijk->jk", shares, curvatures),
        np.einsum("i,ijk,ik->j", shares, curvatures, MINIMISERS[: len(shares)]),
    )


def resting_place(factors: np.ndarray, lr: float, curvatures: np.ndarray = CURVATURES) -> np.ndarray:
    """Where ``sum s_i (x - x_i) = 0``, with ``x_i - b_i = (I - lr H_i)^tau_i (x - b_i)``."""
    moved = [
        np.eye(2) - np.linalg.matrix_power(np.eye(2) - lr * h, tau)
        for h, tau in zip(curvatures, STEPS, strict=True)
    ]
    total = sum(s * m for s, m in zip(factors, moved, strict=True))
    return np.linalg.solve(total, sum(s * m @ b for s, m, b in zip(factors, moved, MINIMISERS, strict=True)))
