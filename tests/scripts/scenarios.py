"""What each process of a launch does for system/test_launched.py: the scenarios of its arguments, in order.

What a scenario returns is saved as ``<scenario>-<rank>.pt``.
"""

import logging
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from party_threads import Classifier, Rounds, ValidatedClassifier, batches, data, dataset, quiet_trainer
from small_module import LittleData, LittleModule
from torch.utils.data import DataLoader, DistributedSampler

from pellm_lightning import FederatedAveraging, FederatedCLI, Overlap, PartyEnvironment
from pellm_lightning.aggregation import Alternating, LowRankMean, ResidualMean
from pellm_lightning.callbacks.drift import SCAFFOLD, FedDyn, FedNova, FedProx

OUT = Path(sys.argv[1])
RANK = int(os.environ["RANK"])


def error_of(act: Any) -> str:
    """Run what must fail; return the error's type and text."""
    try:
        act()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---- single-process parties


def fit_uneven(root: Path, party: int, callback: FederatedAveraging) -> dict[str, Any]:
    """Uneven parties with validation: run here by torchrun and in system/test_launched.py by threads."""
    module = ValidatedClassifier(seed=party, optimizer="Adam", lr=0.01)
    logger = Rounds()
    trainer = quiet_trainer(root, [callback], max_epochs=3 - 2 * party, logger=logger)
    loader = batches((4, 2, 3, 1) if party == 0 else (5, 5, 2, 2, 7), seed=party)
    trainer.fit(module, loader, data(4 + 2 * party, seed=50 + party))
    timeless = (
        "round",
        "active_parties",
        "weight",
        "total_weight",
        "loss",
        "update_norm",
        "distance",
        "step",
    )
    return {
        "vector": module.vector(),
        "rounds": [{name: done[name] for name in timeless} for done in logger.rounds],
        "val_loss": logger.metrics["federated/val_loss"],
    }


DILOCO = {
    "every_n_steps": 3,
    "quorum": 1,  # one of two makes more steps than the other
    "outer_optimizer": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
}


def bits() -> Any:
    return fit_uneven(OUT, RANK, FederatedAveraging(**DILOCO))


def twice() -> Any:
    """A second and a third fit in the same processes, one of them with the same callback."""
    callback = FederatedAveraging(**DILOCO)
    return [fit_uneven(OUT, RANK, callback), fit_uneven(OUT, RANK, callback)]


def alone() -> Any:
    """Only party 1 validates; nobody else is there."""
    if RANK != 1:
        return 0.0
    started = time.monotonic()
    trainer = quiet_trainer(OUT, [FederatedAveraging(timeout_s=60)])
    trainer.validate(ValidatedClassifier(), data(4, seed=0), verbose=False)
    return time.monotonic() - started


class Elsewhere(Logger):
    """A logger that nobody can move."""

    name, version = "elsewhere", 0
    log_dir = str(OUT / "elsewhere")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass


def files() -> Any:
    """Fit with each mix of loggers and checkpoints; tell which files this process opened for writing."""
    opened: set[str] = set()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            flags = arguments[2] or 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                opened.add(os.path.abspath(os.fsdecode(arguments[0])))
        if event == "os.rename":  # checkpoints are written elsewhere and moved
            opened.add(os.path.abspath(os.fsdecode(arguments[1])))

    sys.addaudithook(watch)
    found = {}
    for mix, (make_logger, keeps_dirpath) in {
        "default": (lambda root: True, False),
        "csv": (CSVLogger, False),
        "tensorboard": (TensorBoardLogger, True),
        "both": (lambda root: [TensorBoardLogger(root), CSVLogger(root)], False),
        "none": (lambda root: False, False),
        "none and dirpath": (lambda root: False, True),
    }.items():
        root = OUT / mix
        checkpoint = ModelCheckpoint(root / "kept" if keeps_dirpath else None, monitor="federated/val_loss")
        trainer = quiet_trainer(
            root,
            [checkpoint, FederatedAveraging()],
            logger=make_logger(root),
            enable_checkpointing=True,
            max_epochs=1,
            log_every_n_steps=1,
        )
        opened.clear()
        trainer.fit(ValidatedClassifier(seed=RANK), data(8, seed=RANK), data(4, seed=9))
        found[mix] = {
            "opened": sorted(path for path in opened if path.startswith(str(root))),
            "checkpoint": str(checkpoint.best_model_path),
            "logs": [str(logger.log_dir) for logger in trainer.loggers],
        }
    return found


def unknown_logger() -> Any:
    trainer = quiet_trainer(OUT, [FederatedAveraging()], logger=[Elsewhere()])
    return error_of(lambda: trainer.fit(Classifier(seed=RANK), data(8, seed=RANK)))


def commands() -> Any:
    """The command line: fit by a YAML, then validate, test and predict this party's checkpoint."""
    os.chdir(OUT)
    (OUT / f"run-{RANK}.yaml").write_text(
        """
        seed_everything: 3
        trainer:
          accelerator: cpu
          devices: 1
          max_epochs: 2
          enable_progress_bar: false
          default_root_dir: command
        data: {samples: 8}
        federated: {every_n_epochs: 1}
        """
    )

    def run(*words: str) -> FederatedCLI:
        sys.argv = ["federate", words[0], f"--config=run-{RANK}.yaml", *words[1:]]
        return FederatedCLI(LittleModule, LittleData)

    fitted = run("fit", f"--model.seed={RANK}")
    path = fitted.trainer.checkpoint_callback.best_model_path
    answers = {"vector": fitted.model.vector(), "checkpoint": path, "log_dir": fitted.trainer.log_dir}
    answers["parties"] = float(fitted.trainer.callback_metrics["federated/active_parties"])
    for verb in ("validate", "test", "predict"):
        done = run(verb, f"--ckpt_path={path}")
        answers[verb] = {name: float(value) for name, value in done.trainer.callback_metrics.items()}
        assert torch.equal(done.model.vector(), fitted.model.vector())
    return answers


# ---- parties of several processes


def ddp_trainer(root: Path, callbacks: Any, **kwargs: Any) -> Any:
    return quiet_trainer(
        root, callbacks, plugins=[PartyEnvironment(num_parties=2)], strategy="ddp", devices=2, **kwargs
    )


class Ddp(ValidatedClassifier):
    """Logs one metric at the party's first process only."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.global_rank == 0:
            self.log("first_only", 0.25, rank_zero_only=True)


def fit_pairs(
    root: Path, party: int, make_trainer: Any, callback: Any, batch_size: int, loggers: Any = (), **fit: Any
) -> dict[str, Any]:
    """Four batches an epoch; the batch size is that of a process, or of a party that is one process."""
    module, logger = Ddp(seed=party + 10 * bool(fit)), Rounds()
    checkpoint = ModelCheckpoint(root, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = make_trainer(
        root,
        [callback, checkpoint],
        logger=[logger, *loggers],
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    samples = dataset(16 + 16 * party, seed=party)
    # Lightning's own sampler would shuffle, so that the batches would be others than those of one process.
    sampler = (
        None if make_trainer is quiet_trainer else DistributedSampler(samples, 2, RANK % 2, shuffle=False)
    )
    loader = DataLoader(samples, batch_size * (party + 1), sampler=sampler)
    trainer.fit(module, loader, data(8, seed=90 + party, batch_size=batch_size), **fit)
    return {
        "vector": module.vector(),
        "rounds": logger.rounds,
        "val_loss": float(trainer.callback_metrics["federated/val_loss"]),
        "first_only": float(trainer.callback_metrics["federated/first_only"]),
        "dirpath": checkpoint.dirpath,
        "logs": [str(own.log_dir) for own in trainer.loggers[1:]],
        "files": sorted(path.name for path in Path(checkpoint.dirpath).iterdir() if path.is_file()),
    }


def ddp() -> Any:
    """Two parties of DDP(2); the whole, and resumed from the middle of its second round."""
    callback = FederatedAveraging(**DILOCO)
    # DDP makes a party's first process write before any callback runs, so the loggers are at work already.
    files = [TensorBoardLogger(OUT / "logs"), CSVLogger(OUT / "logs")]
    whole = fit_pairs(OUT / "whole", RANK // 2, ddp_trainer, callback, 2, files)
    path = f"{whole['dirpath']}/step=4.ckpt"
    return whole, fit_pairs(OUT / "resumed", RANK // 2, ddp_trainer, callback, 2, ckpt_path=path)


def ddp_overlap() -> Any:
    """Two parties of DDP(2) whose rounds land two steps later: whole, resumed under way, by the clock."""
    callback = FederatedAveraging(**DILOCO, overlap=Overlap(2))
    whole = fit_pairs(OUT / "overlap", RANK // 2, ddp_trainer, callback, 2)
    path, again = f"{whole['dirpath']}/step=4.ckpt", OUT / "overlap-resumed"
    resumed = fit_pairs(again, RANK // 2, ddp_trainer, callback, 2, ckpt_path=path)
    callback = FederatedAveraging(every_n_seconds=0.02, overlap=Overlap(1))
    return whole, resumed, fit_pairs(OUT / "clock", RANK // 2, ddp_trainer, callback, 2)


RULES = {"low rank": LowRankMean("exact"), "residual": ResidualMean(), "alternating": Alternating()}


def fit_products(root: Path, party: int, make_trainer: Any, callback: Any, batch_size: int) -> dict[str, Any]:
    """LoRA for four batches; the batch size is that of a process, or of a party that is one process."""
    from lora_module import Tuned  # PEFT takes seconds to import, which the other launches need not wait for

    module, logger = Tuned(party, optimizer="SGD", lr=0.1), Rounds()
    samples = dataset(16 + 16 * party, seed=party)
    sampler = (
        None if make_trainer is quiet_trainer else DistributedSampler(samples, 2, RANK % 2, shuffle=False)
    )
    trainer = make_trainer(root, [callback], logger=logger, max_epochs=1)
    trainer.fit(module, DataLoader(samples, batch_size * (party + 1), sampler=sampler))
    return {
        "trained": module.of(""),
        "bases": module.bases(),
        "weights": module.weights(),
        "deviation": [done["deviation"] for done in logger.rounds],
    }


def ddp_products() -> Any:
    """Two parties of DDP(2) under rules that combine, write the base weights, and let a factor rest."""
    return {
        name: fit_products(
            OUT / name, RANK // 2, ddp_trainer, FederatedAveraging(every_n_steps=2, aggregation=rule), 2
        )
        for name, rule in RULES.items()
    }


CORRECTIONS = {"FedProx": partial(FedProx, 0.5), "SCAFFOLD": SCAFFOLD, "FedNova": FedNova}
CORRECTIONS["FedDyn"] = partial(FedDyn, 0.5)


def fit_corrected(
    root: Path, party: int, make_trainer: Any, callback: Any, name: str, batch_size: int, **fit: Any
) -> torch.Tensor:
    """Epochs of four batches at party 0, of eight at party 1; batch size as in ``fit_products``."""
    module = Classifier(seed=party + 10 * bool(fit))
    checkpoint = ModelCheckpoint(root, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    callbacks = [callback, CORRECTIONS[name](), checkpoint]
    trainer = make_trainer(root, callbacks, enable_checkpointing=True, max_epochs=3)
    samples = dataset(16 + 16 * party, seed=party)
    sampler = (
        None if make_trainer is quiet_trainer else DistributedSampler(samples, 2, RANK % 2, shuffle=False)
    )
    trainer.fit(module, DataLoader(samples, batch_size, sampler=sampler), **fit)
    return module.vector()


def ddp_drift() -> Any:
    """Two parties of DDP(2) with each drift correction; the whole, and resumed in the third round."""
    answers = {}
    for name in CORRECTIONS:
        root = OUT / "drift" / name
        whole = fit_corrected(root, RANK // 2, ddp_trainer, FederatedAveraging(every_n_steps=3), name, 2)
        path = (root / "party-1" if RANK > 1 else root) / "step=8.ckpt"
        callback = FederatedAveraging(every_n_steps=3)
        again = root / "again"
        answers[name] = whole, fit_corrected(again, RANK // 2, ddp_trainer, callback, name, 2, ckpt_path=path)
    return answers


def ddp_over_parties() -> Any:
    """Plain DDP over all processes would mix the parties' gradients."""
    trainer = quiet_trainer(
        OUT, [FederatedAveraging()], strategy="ddp", devices=int(os.environ["WORLD_SIZE"])
    )
    return error_of(lambda: trainer.fit(Classifier(seed=RANK), data(8, seed=RANK)))


def indivisible() -> Any:
    trainer = quiet_trainer(OUT, [FederatedAveraging()], plugins=[PartyEnvironment(num_parties=2)])
    return error_of(lambda: trainer.fit(Classifier(seed=RANK), data(8, seed=RANK)))


def failure() -> Any:
    """Party 1 fails in its training step; the launch must end soon, and say why."""

    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if RANK == 1 and self.global_step == 3:
                raise OSError("disk full at party 1")
            return super().training_step(batch, batch_idx)

    torch.save(time.time(), OUT / f"failing-{RANK}.pt")
    trainer = quiet_trainer(OUT, [FederatedAveraging(every_n_steps=2, timeout_s=120)])
    try:
        trainer.fit(Failing(seed=RANK), data(32, seed=RANK))
    except Exception as error:
        torch.save(f"{type(error).__name__}: {error}", OUT / f"failure-{RANK}.pt")
        raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in sys.argv[2:]:
        try:
            answer = globals()[name]()
        except BaseException:
            (OUT / f"{name}-{RANK}.txt").write_text(traceback.format_exc())
            raise
        torch.save(answer, OUT / f"{name}-{RANK}.pt")
