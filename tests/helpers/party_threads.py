"""N parties as N threads of one process: one HashStore, real shared memory or real Gloo, no launcher."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer import trainer as lightning_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pellm_lightning import FederatedAveraging, Federation
from pellm_lightning.comm import PartyLostError
from pellm_lightning.comm.session import PartySession
from pellm_lightning.comm.topology import Topology

T = TypeVar("T")


def run_parties(
    num_parties: int,
    act: Callable[[Federation], T],
    *,
    store: dist.Store | None = None,
    timeout_s: float = 20,
    may_fail: bool = False,
) -> list[Any]:
    """Return what ``act`` returned at each party; with ``may_fail`` an exception stands for its result."""
    store = dist.HashStore() if store is None else store
    results: list[Any] = [None] * num_parties

    def party(index: int) -> None:
        federation = None
        try:
            federation = Federation(store, index, num_parties, timeout_s=timeout_s)
            results[index] = act(federation)
            federation.close()
        except BaseException as error:
            results[index] = error
            if federation is not None:
                federation.abort(f"{type(error).__name__}: {error}")

    in_threads([lambda i=i: party(i) for i in range(num_parties)])
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed and not may_fail:
        raise failed[0]
    return results


def session_of(federation: Federation) -> PartySession:
    """The session of a party that has joined."""
    return PartySession(Topology(*federation.place, label=federation.name), lambda: federation)


def refusals(results: Sequence[Any], kind: type[Exception]) -> list[str]:
    """Return what each party was told of what all refuse.

    Each would find it by itself, but a party that is slow may learn of the first that has left, and why.
    """
    assert all(isinstance(result, kind | PartyLostError) for result in results), results
    assert any(isinstance(result, kind) for result in results)
    return [str(result) for result in results]


def in_threads(acts: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=act) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    """A layer of its own generator: parties are threads, and the global one would mix their draws."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return layer


class Connecting(FederatedAveraging):
    """A callback whose parties meet as ``connected`` says."""

    def __init__(self, connected: Callable[[], Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.connected = connected

    def connect(self) -> Any:
        return self.connected()


class Classifier(LightningModule):
    """A frozen layer and a trained one, the same base at every party; the head differs by ``seed``."""

    def __init__(self, seed: int = 0, lr: float = 0.1, optimizer: str = "SGD") -> None:
        super().__init__()
        self.base = linear(8, 16, seed=1234).requires_grad_(False)
        self.head = linear(16, 3, seed=seed)
        self.lr = lr
        self.optimizer = optimizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.base(x)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.head.parameters(), lr=self.lr)

    def vector(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.head.parameters()]).clone()


class ValidatedClassifier(Classifier):
    """A Classifier that also validates."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


def dataset(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    # Lightning's true half precisions change the default dtype of the whole process, so of all threads.
    x = torch.randn(samples, 8, generator=generator, dtype=torch.float32)
    y = torch.randint(0, 3, (samples,), generator=generator)
    return TensorDataset(x, y)


def data(samples: int, seed: int, batch_size: int = 4) -> DataLoader:
    """Batches that draw nothing from the global generator, from which another party may be making LoRA."""
    return DataLoader(dataset(samples, seed), batch_size=batch_size, generator=torch.Generator())


def batches(sizes: Sequence[int], seed: int) -> DataLoader:
    """Batches of the given sizes, in this order."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    cut = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    return DataLoader(dataset(sum(sizes), seed), batch_sampler=cut, generator=torch.Generator())


class Rounds(Logger):
    """A logger that keeps what each round reported, in order; ``events`` tells rounds from validations.

    A round's ``step`` is the number of optimizer steps this party had made when it ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[dict[str, float]] = []
        self.metrics: dict[str, list[float]] = {}
        self.events: list[tuple[str, int]] = []

    @property
    def name(self) -> str:
        return "rounds"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(float(value))
        if "federated/round" in metrics and step is not None:
            short = {name.removeprefix("federated/"): value for name, value in metrics.items()}
            self.rounds.append(short | {"step": step + 1})
            self.events.append(("round", step + 1))

    @property
    def steps(self) -> list[int]:
        return [int(done["step"]) for done in self.rounds]


def quiet_trainer(root: Any, callbacks: Sequence[Any] = (), **kwargs: Any) -> Trainer:
    """A Trainer on one CPU device that prints nothing; logger and checkpoints off unless asked for."""
    kwargs = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 2,
    } | kwargs
    return Trainer(default_root_dir=root, callbacks=list(callbacks), **kwargs)


def fit_parties(
    num_parties: int,
    fit: Callable[[int, Callable[..., FederatedAveraging]], T],
    *,
    store: dist.Store | None = None,
    timeout_s: float = 20,
    may_fail: bool = False,
) -> list[Any]:
    """Run ``fit(party, federated)`` in N threads; ``federated(**arguments)`` makes the party's callback."""
    store = dist.HashStore() if store is None else store
    results: list[Any] = [None] * num_parties

    def party(index: int) -> None:
        def federated(**arguments: Any) -> FederatedAveraging:
            return Connecting(lambda: Federation(store, index, num_parties, timeout_s=timeout_s), **arguments)

        try:
            results[index] = fit(index, federated)
        except BaseException as error:
            results[index] = error

    # Lightning puts the global generator back as a fit begins: in the midst of what another party draws.
    with mock.patch.object(lightning_trainer, "isolate_rng", nullcontext):
        in_threads([lambda i=i: party(i) for i in range(num_parties)])
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed and not may_fail:
        raise failed[0]
    return results
