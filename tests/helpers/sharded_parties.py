"""The four processes of scripts/sharded.py as parties of some sizes, and a fit of one of them."""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from party_threads import Connecting, Rounds, data, dataset, quiet_trainer
from sharded_module import ShardedModule
from torch.utils.data import DataLoader, DistributedSampler

from pellm_lightning import FederatedAveraging, Federation, PartyEnvironment
from pellm_lightning.comm import topology

OUT = Path(sys.argv[1])
RANK = int(os.environ["RANK"])
DILOCO: dict[str, Any] = {
    "every_n_steps": 3,
    "outer_optimizer": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
}
FEDAVG: dict[str, Any] = {"outer_optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
_fits, _groups = itertools.count(), itertools.count()


def store() -> dist.Store:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


class Parties:
    """The four processes as parties of the given sizes, in order; ``party`` and ``rank`` are this one's."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        starts = list(itertools.accumulate(sizes, initial=0))
        self.party = max(i for i, start in enumerate(starts[:-1]) if start <= RANK)
        self.size, self.rank, self.count = sizes[self.party], RANK - starts[self.party], len(sizes)
        self.key = "-".join(map(str, sizes))

    @contextlib.contextmanager
    def entered(self) -> Iterator["Parties"]:
        """Let this process look like one of a launch of its party alone, with a group of its own."""
        before = dict(os.environ)
        topology._hidden.clear()
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.rank),
            "LOCAL_WORLD_SIZE": str(self.size),
            # No prefix of a store serves twice.
            "TORCHELASTIC_RESTART_COUNT": f"{self.key}-{self.party}-{next(_groups)}",
        }
        try:
            yield self
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            topology._hidden.clear()
            os.environ.clear()
            os.environ.update(before)

    def federated(self, name: str, **arguments: Any) -> FederatedAveraging:
        """A callback whose parties meet in the launch's store."""

        def connect() -> Federation:
            prefix = dist.PrefixStore(f"{self.key}/{name}", store())
            return Federation(prefix, self.party, self.count, timeout_s=60)

        return Connecting(connect, **arguments)

    def trainer(self, kind: str, root: Path, callbacks: Any, **kwargs: Any) -> Any:
        """A Trainer by a kind of party: "fsdp", "tp", "2d", "ddp"; a party of one process is none of them."""
        if self.size == 1:
            return quiet_trainer(root, callbacks, **kwargs)
        distributed = kwargs.pop("distributed", False)
        tp = {"fsdp": 1, "tp": self.size, "2d": 2}.get(kind)
        strategy: Any = "ddp"
        if tp is not None:
            strategy = ModelParallelStrategy(self.size // tp, tp, save_distributed_checkpoint=distributed)
        plugins = [PartyEnvironment(num_parties=1)]
        return quiet_trainer(root, callbacks, plugins=plugins, strategy=strategy, devices=self.size, **kwargs)

    def loader(self, kind: str, batch_size: int) -> DataLoader:
        """Batches of ``batch_size`` a process, so that those of all processes together are the same."""
        samples = dataset(16 + 16 * self.party, seed=self.party)
        replicas = {"tp": 1, "2d": self.size // 2}.get(kind, self.size)
        sampler = DistributedSampler(
            samples, replicas, self.rank * replicas // self.size, shuffle=False, drop_last=True
        )
        batch_size = batch_size * (self.party + 1) // replicas
        # Parties may be threads, of which one makes LoRA from the global generator as another begins.
        return DataLoader(samples, batch_size, sampler=sampler, generator=torch.Generator())


def fit(
    parties: Parties,
    kind: str,
    *,
    batch: int = 4,
    module: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    keep: bool = False,
    ckpt_path: Any = None,
    seed: int = 0,
    callbacks: Any = (),
    **arguments: Any,
) -> dict[str, Any]:
    """Fit for two epochs with a validation after each, in the middle of a round; return what came out."""
    number = next(_fits)
    root = OUT / f"{parties.key}-{number}"
    federated = parties.federated(str(number), **(DILOCO | arguments))
    logger = Rounds()
    checkpoint = ModelCheckpoint(root / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=4)
    net = ShardedModule(parties.party + seed, **(module or {}))
    made = parties.trainer(
        kind,
        root,
        [federated, *callbacks, *([checkpoint] if keep else [])],
        logger=logger,
        enable_checkpointing=keep,
        num_sanity_val_steps=int(keep),
        log_every_n_steps=1,
        **(trainer or {}),
    )
    made.fit(net, parties.loader(kind, batch), data(8, seed=9), ckpt_path=ckpt_path)
    return {
        "vector": net.vector(),
        "weights": [done["weight"] for done in logger.rounds],
        "steps": logger.steps,
        "loss": [done.get("loss", 0.0) for done in logger.rounds],
        "deviation": [done.get("deviation", 0.0) for done in logger.rounds],
        "val_loss": logger.metrics.get("federated/val_loss", []),
        "dirpath": str(checkpoint.dirpath),
    }


def error_of(act: Any) -> tuple[str, float]:
    started = time.monotonic()
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "no error", time.monotonic() - started
