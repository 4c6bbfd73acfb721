"""Trainers that are jobs of their own: each a thread over one store, joined by an elastic federation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from party_threads import Connecting, Rounds, ValidatedClassifier, data, in_threads, quiet_trainer

from pellm_lightning import FederatedAveraging, SeparateJobs
from pellm_lightning.comm import TLS, ElasticFederation, Membership

ROSTER = ["a", "b", "c"]


class Jobs:
    """Parties as threads; each starts when it is told to, and its result or its error is kept."""

    def __init__(self, tmp_path: Path, **membership: Any) -> None:
        self.tmp_path = tmp_path
        self.membership = {"heartbeat_ttl_s": 0.6, "wait_s": 20} | membership
        self.store = dist.HashStore()
        self.tls: Callable[[str], TLS | None] = lambda name: None
        self.results: dict[str, Any] = {}
        self.logs = {name: Rounds() for name in ROSTER}

    def written(self) -> list[str]:
        return self.store.list_keys()

    def callback(self, name: str, **arguments: Any) -> FederatedAveraging:
        return Connecting(
            lambda: ElasticFederation(
                lambda: self.store,
                name,
                ROSTER,
                quorum=arguments.get("quorum", "majority"),
                membership=Membership(**self.membership),
                tls=self.tls(name),
            ),
            jobs=SeparateJobs("tcp://127.0.0.1:1", name, ROSTER, state_dir=str(self.tmp_path / name)),
            **({"every_n_steps": 2} | arguments),
        )

    def fit(
        self,
        name: str,
        *callbacks: Callback,
        module: LightningModule | None = None,
        samples: int = 32,
        validates: bool = True,
        ckpt_path: Any = None,
        arguments: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> None:
        index = ROSTER.index(name)
        module = ValidatedClassifier(seed=index) if module is None else module
        self.logs[name] = Rounds()
        federated = self.callback(name, **(arguments or {}))
        options = {"max_epochs": 1, "logger": self.logs[name]} | trainer
        try:
            quiet_trainer(self.tmp_path, [federated, *callbacks], **options).fit(
                module, data(samples, seed=index), data(8, seed=9) if validates else None, ckpt_path=ckpt_path
            )
            self.results[name] = module
        except BaseException as error:
            self.results[name] = error

    def run(self, *names: str, **each: dict[str, Any]) -> None:
        in_threads([lambda n=name: self.fit(n, **each.get(n, {})) for name in names or ROSTER])

    def same(self, *names: str) -> bool:
        vectors = [self.results[name].vector() for name in names]
        return all(torch.equal(vectors[0], vector) for vector in vectors)


class At(Callback):
    """Does something before a batch."""

    def __init__(self, batch: int, act: Callable[[], object]) -> None:
        self.batch = batch
        self.act = act

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            self.act()


def crash() -> None:
    raise RuntimeError("the disk is full")
