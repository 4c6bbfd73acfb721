"""Validation loss against bytes sent: gradients at every step, FedAvg, DiLoCo with compression and overlap.

Four parties, each with the presidential messages of an era of its own, train one model. All variants begin
with the same weights and make the same number of local steps on the same batches. Bytes are those that a
party hands to its group in rounds, as the federation counts them. Parties are threads of this process.

Each run goes into a JSON file when it ends; what is there already is not run again, so variants can be run
one by one.
"""

import argparse
import copy
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from low_communication_data import ERAS, Task, byte_task, lora_task
from low_communication_report import REFERENCE, report
from torch import Tensor, nn

from pellm_lightning import Aggregator, Federation, Overlap
from pellm_lightning.aggregation import Mean
from pellm_lightning.exchange import Exchange, Plain, Quantized, TopK

MEASURE_EVERY = 50
"""Local steps between two points of a learning curve."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/low_communication"), help="for what is kept"
    )
    parser.add_argument("--variants", nargs="+", help="names of those to run; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, help="local steps of each party")
    parser.add_argument("--image", type=Path, help="default: in the folder")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M with LoRA, not the small model")
    parser.add_argument("--tiny", action="store_true", help="some seconds, to see that everything works")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # each party is a thread already
    options.folder.mkdir(parents=True, exist_ok=True)
    task, steps, chosen = setting(options)
    if unknown := sorted(set(options.variants or ()) - chosen.keys()):
        parser.error(f"{', '.join(unknown)}: no such variant. There are: {', '.join(chosen)}.")
    path = options.folder / f"{task.name}.json"
    results = kept(path)
    rows = []
    for name, variant in chosen.items():
        for seed in options.seeds:
            settings = {"variant": name, "seed": seed, "steps": steps, **variant.settings()}
            row = next((row for row in results if row["settings"] == settings), None)
            if row is None and (options.variants is None or name in options.variants):
                print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
                row = {"settings": settings, **run(task, variant, steps, seed)}
                results = [*kept(path), row]  # read again: another variant may have been run beside it
                path.with_suffix(".new").write_text(json.dumps(results, indent=1))
                path.with_suffix(".new").replace(path)
            if row is not None:
                rows.append(row | {"variant": name, "seed": seed})
    report(rows, options.image or options.folder / f"{task.name}.png")


def kept(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def setting(options: argparse.Namespace) -> tuple[Task, int, dict[str, "Variant"]]:
    """Return the task, the number of local steps, and the variants."""
    if options.tiny:
        task = byte_task(options.folder, width=32, depth=1, context=16, batch_size=2, warm_up=5, name="tiny")
        return task, options.steps or 9, {name: shortened(variant) for name, variant in variants().items()}
    if options.smollm2:
        return lora_task(options.folder, context=128, batch_size=2), options.steps or 200, variants()
    task = byte_task(options.folder, width=256, depth=3, context=64, batch_size=8, warm_up=1200)
    return task, options.steps or 400, variants()


def shortened(variant: "Variant") -> "Variant":
    """Return the variant with rounds of few steps."""
    overlap = variant.overlap and replace(variant.overlap, delay_steps=1)
    return replace(variant, every_n_steps=-(-variant.every_n_steps // 25), overlap=overlap)


@dataclass(frozen=True)
class Variant:
    """How the parties communicate.

    Args:
        every_n_steps: Local steps of a round; 0 averages the gradients of each step.
        learning_rate: The highest of the local optimizer, AdamW.
        outer_lr: Of the outer optimizer, SGD.
        momentum: Of the outer optimizer, Nesterov's; 0 and outer_lr=1 are FedAvg.
        exchange: What crosses.
        overlap: Whether training goes on while it does.
    """

    every_n_steps: int
    learning_rate: float = 1e-3
    outer_lr: float = 1.0
    momentum: float = 0.0
    exchange: Exchange = field(default_factory=Plain)
    overlap: Overlap | None = None

    def outer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.outer_lr, momentum=self.momentum, nesterov=self.momentum > 0)

    def settings(self) -> dict[str, Any]:
        """Return what tells a run from another."""
        return vars(self) | {"exchange": repr(self.exchange), "overlap": repr(self.overlap)}


def diloco(every_n_steps: int, **settings: Any) -> Variant:
    return Variant(every_n_steps, outer_lr=0.7, momentum=0.9, **settings)


def variants() -> dict[str, Variant]:
    four, late = Quantized(bits=4, error_feedback=True), Overlap(delay_steps=5, mix=0.5)
    return {
        REFERENCE: Variant(0),
        "FedAvg": Variant(50),
        "DiLoCo, H=10": diloco(10),
        "DiLoCo": diloco(50),
        "DiLoCo, H=200": diloco(200),
        "DiLoCo, 8 bits": diloco(50, exchange=Quantized(bits=8)),
        "DiLoCo, 4 bits": diloco(50, exchange=four),
        "FedAvg, top-k": Variant(50, exchange=TopK()),
        "DiLoCo, overlapped": diloco(50, overlap=late),
        "DiLoCo, 4 bits, overlapped": diloco(50, exchange=four, overlap=late),
        "DiLoCo, 4 bits, overlapped, H=60": diloco(60, exchange=four, overlap=late),
        "DiLoCo, 4 bits, overlapped, H=100": diloco(100, exchange=four, overlap=late),
    }


# ---- a run


def run(task: Task, variant: Variant, steps: int, seed: int) -> dict[str, Any]:
    """Train all parties, and return what came of it."""
    models = [task.build(seed)]
    models += [twin(models[0]) for _ in ERAS[1:]]
    start = time.perf_counter()
    of_parties = in_parties(
        lambda federation: train(federation, task, models[federation.party], variant, steps, seed)
    )
    seconds = time.perf_counter() - start
    curves = [done["curve"] for done in of_parties]
    return {
        "every_n_steps": variant.every_n_steps,
        "rounds": of_parties[0]["rounds"],
        "bytes_start": of_parties[0]["bytes_start"],
        "bytes": mean([done["bytes"] for done in of_parties]),
        "loss": mean([done["loss"] for done in of_parties]),
        "losses": [done["loss"] for done in of_parties],
        # Points of (step, bytes, loss), each a mean over the parties and so over the eras.
        "curve": [
            [mean(list(values)) for values in zip(*at, strict=True)] for at in zip(*curves, strict=True)
        ],
        "parameters": of_parties[0]["parameters"],
        "seconds": seconds,
    }


def twin(model: nn.Module) -> nn.Module:
    """Return a copy that shares what is frozen."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def train(
    federation: Federation,
    task: Task,
    model: nn.Module,
    variant: Variant,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Train one party."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=variant.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    line = (Rounds if variant.every_n_steps else EveryStep)(federation, trained, variant)
    judged = twin(model)
    generator = torch.Generator().manual_seed(1000 * seed + federation.party)
    bytes_start = federation.bytes_sent
    era = federation.party
    curve = [(0, 0, task.validate(model, era, task.curve_windows))]
    for step in range(1, steps + 1):
        loss = task.loss(model, task.batch(era, generator))
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        line.before_step()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        line.after_step(step, last=step == steps)
        if step % MEASURE_EVERY == 0 and step < steps:
            line.put_into(judged)
            curve.append(
                (step, federation.bytes_sent - bytes_start, task.validate(judged, era, task.curve_windows))
            )
    sent = federation.bytes_sent - bytes_start
    return {
        "bytes_start": bytes_start,
        "bytes": sent,
        "rounds": line.rounds,
        "curve": [*curve, (steps, sent, task.validate(model, era, task.curve_windows))],
        "loss": task.validate(model, era),
        "parameters": sum(p.numel() for p in trained.values()),
    }


def rate(step: int, steps: int) -> float:
    """Return the learning rate's factor: up over a tenth of the steps, then down to a tenth as a cosine."""
    return min(1.0, 10 * (step + 1) / steps) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)))


class EveryStep:
    """The gradients of each step are averaged: one model in data-parallel training."""

    def __init__(self, federation: Federation, trained: dict[str, nn.Parameter], variant: Variant) -> None:
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        gradients = {name: parameter.grad for name, parameter in trained.items()}
        self._trained = trained
        # Whatever tensors it averages, with SGD(lr=1) the result is their mean.
        self._aggregator = Aggregator(federation, gradients, aggregation=Mean(measure_deviation=False))
        self._aggregator.start()

    @property
    def rounds(self) -> int:
        return self._aggregator.round

    def before_step(self) -> None:
        self._aggregator.step(1.0)

    def after_step(self, step: int, last: bool) -> None:
        pass

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        for name, parameter in self._trained.items():
            model.get_parameter(name).copy_(parameter)


class Rounds:
    """The parameters are averaged after every so many local steps, and an outer optimizer steps."""

    def __init__(self, federation: Federation, trained: dict[str, nn.Parameter], variant: Variant) -> None:
        # No step takes another momentum: the local optimizers go on with their own.
        options: dict[str, Any] = {
            "aggregation": Mean(measure_deviation=False),
            "exchange": variant.exchange,
            "outer_optimizer": variant.outer,
        }
        self._variant, self._trained, self._plain = variant, trained, -1
        tensors: dict[str, Tensor] = dict(trained)
        self._aggregator = Aggregator(federation, tensors, overlap=variant.overlap, **options)
        self._aggregator.start()

    @property
    def rounds(self) -> int:
        return self._aggregator.round

    def before_step(self) -> None:
        pass

    def after_step(self, step: int, last: bool) -> None:
        due = last or step % self._variant.every_n_steps == 0
        overlap = self._variant.overlap
        if step == self._plain or (last and step < self._plain):
            self._aggregator.apply()
        if last or (due and overlap is None):
            self._aggregator.step(1.0)
        elif due and overlap is not None:
            self._aggregator.begin(1.0)
            self._plain = step + overlap.delay_steps

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Write what the last round has made into the model; between rounds the parties differ."""
        for name, values in self._aggregator.global_parameters.items():
            model.get_parameter(name).copy_(values)


def in_parties(act: Callable[[Federation], dict[str, Any]]) -> list[dict[str, Any]]:
    """Run each party in a thread of its own, over sockets between them."""
    store = dist.HashStore()
    done: list[Any] = [None] * len(ERAS)
    failed: list[BaseException] = []

    def party(index: int) -> None:
        federation = Federation(store, index, len(ERAS), timeout_s=300)
        try:
            done[index] = act(federation)
            federation.close()
        except BaseException as error:
            failed.append(error)
            federation.abort(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=party, args=(index,)) for index in range(len(ERAS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return done


if __name__ == "__main__":
    main()
