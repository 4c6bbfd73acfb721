"""How long a whole round takes, in units of one raw all-reduce of the same bytes.

Run `make bench`. It starts N processes by torchrun for N = 2 and 4 and prints a table. All timings of a table
come from one interleaved run, so that a busy machine slows all of them alike; compare ratios, not
milliseconds.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from processes import rows_of, timed
from shapes import CASES
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.utils.data import DataLoader

from pellm_lightning import Aggregator, FederatedAveraging, Federation
from pellm_lightning.comm.torchrun.store import store_from_env
from pellm_lightning.tensors.flat_buffer import Layout

_OTHERS = ("gloo", "loop", "averager", "floor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--sizes", nargs="+", metavar="TENSORSxMB", help="such as 1000x16: these instead of two LoRA adapters"
    )
    parser.add_argument("--without", nargs="*", default=[], choices=_OTHERS, help="do not time these")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    cases = CASES if arguments.sizes is None else {size: shapes_of(size) for size in arguments.sizes}
    if "RANK" in os.environ:
        measure(cases, arguments.repeats, arguments.without)
        return
    words = ["--repeats", str(arguments.repeats), "--without", *arguments.without]
    words += [] if arguments.sizes is None else ["--sizes", *arguments.sizes]
    rows = [row for parties in arguments.parties for row in rows_of(__file__, parties, words)]
    show(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


def shapes_of(size: str) -> list[tuple[int, int]]:
    """Return the shapes of equal tensors of so many megabytes together, given as TENSORSxMB."""
    tensors, megabytes = size.split("x")
    return [(max(1, round(float(megabytes) * 1e6 / 4 / int(tensors) / 16)), 16)] * int(tensors)


def measure(cases: dict[str, list[tuple[int, int]]], repeats: int, without: list[str]) -> None:
    dist.init_process_group("gloo")
    store = store_from_env(timeout_s=600)
    place = dist.get_rank(), dist.get_world_size()
    federations = {
        "ours": Federation(dist.PrefixStore("memory", store), *place),
        "gloo": Federation(dist.PrefixStore("gloo", store), *place, shared_memory=False),
    }
    for name, shapes in cases.items():
        row = measure_case(federations, name, shapes, repeats, without)
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
    for federation in federations.values():
        federation.close()
    dist.destroy_process_group()


def measure_case(
    federations: dict[str, Federation],
    name: str,
    shapes: list[tuple[int, int]],
    repeats: int,
    without: list[str],
) -> dict:
    parameters = {f"layer{i:03}": torch.randn(shape) for i, shape in enumerate(shapes)}
    size = sum(p.numel() for p in parameters.values())
    flat = torch.randn(size)

    def loop() -> None:
        for parameter in parameters.values():
            dist.all_reduce(parameter)

    aggregators, memory = {}, {}
    for lane in [lane for lane in federations if lane not in without]:
        before = private_bytes()
        aggregators[lane] = aggregator = Aggregator(federations[lane], parameters)
        aggregator.start()
        for _ in range(2):
            aggregator.step(1.0)
        memory[lane] = private_bytes() - before
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "raw": lambda: lambda: dist.all_reduce(flat),
        "ours": lambda: lambda: aggregators["ours"].step(1.0),
        "gloo": lambda: lambda: aggregators["gloo"].step(1.0),
        "loop": lambda: loop,
        "averager": lambda: averager(list(parameters.values())),
        "floor": lambda: bare_passes(federations["ours"], list(parameters.values())),
    }
    contenders = {name: make() for name, make in makers.items() if name not in without}
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(repeats):
        for contender, act in contenders.items():
            flat.fill_(1.0)
            for parameter in parameters.values():
                parameter.fill_(1.0 + dist.get_rank())
            times[contender].append(timed(act))
    for aggregator in aggregators.values():
        check(aggregator, parameters)
    medians = {contender: statistics.median(values) for contender, values in times.items()}
    return {
        "case": name,
        "parties": dist.get_world_size(),
        "tensors": len(shapes),
        "megabytes": 4 * size / 1e6,
        "raw_ms": 1e3 * medians["raw"],
        "ours_ms": 1e3 * medians["ours"],
        **{name: medians[name] / medians["raw"] for name in contenders if name != "raw"},
        "best": min(times["ours"]) / min(times["raw"]),
        **{f"extra_memory_{lane}": held / (4 * size) for lane, held in memory.items()},
        "hook_us": 1e6 * hook_seconds(),
    }


def averager(parameters: list[Tensor]) -> Callable[[], None]:
    """Return a step of torch's PeriodicModelAverager, which makes the plain mean and nothing else."""
    parameters = [torch.nn.Parameter(parameter) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # it averages what has a gradient
    periodic = PeriodicModelAverager(period=1)
    return lambda: periodic.average_parameters(parameters)


def bare_passes(federation: Federation, parameters: list[Tensor]) -> Callable[[], None]:
    """Return the passes over memory that a mean in shared memory cannot do without, and nothing else.

    No header, norm, distance, weight of zero or report: what a round of this design takes at least here.
    """
    party, parties = federation.party, federation.num_parties
    layout, size = Layout({str(i): p for i, p in enumerate(parameters)}), sum(p.numel() for p in parameters)
    memory = federation.share_memory(4 * size * (parties + 2))
    if memory is None:
        raise SystemExit("The parties cannot share memory here, so there is nothing to measure.")
    present, following, *updates = memory.view(torch.float32).view(parties + 2, size)
    pieces, sizes = [p.view(-1) for p in parameters], [p.numel() for p in parameters]
    length, stop = 1 << 16, (party + 1) * size // parties
    own = [slice(at, min(at + length, stop)) for at in range(party * size // parties, stop, length)]
    mean, part = torch.empty(length), torch.empty(length)

    def act() -> None:
        for chunk in layout.chunks():
            at = slice(chunk.start, chunk.stop)
            chunk.subtracted_from(present[at], out=updates[party][at])
        federation.barrier()
        for at in own:
            total, scaled = mean[: at.stop - at.start], part[: at.stop - at.start]
            torch.mul(updates[0][at], 1 / parties, out=total)
            for update in updates[1:]:
                total.add_(torch.mul(update[at], 1 / parties, out=scaled))
            torch.sub(present[at], total, out=following[at])
        federation.barrier()
        torch._foreach_copy_(pieces, list(following.split(sizes)))

    return act


def check(aggregator: Aggregator, parameters: dict[str, torch.Tensor]) -> None:
    """A fast round that is wrong is no round."""
    for parameter in parameters.values():
        parameter.fill_(1.0 + dist.get_rank())
    aggregator.step(1.0)
    mean = 1 + (dist.get_world_size() - 1) / 2
    assert all(torch.allclose(p, torch.tensor(mean), rtol=1e-6) for p in parameters.values())


def hook_seconds(steps: int = 2000) -> float:
    """What the callback costs in a step of a fit without a round."""
    spent: list[float] = []

    class Timed(FederatedAveraging):
        def on_train_batch_end(self, *arguments: Any) -> None:
            start = time.perf_counter()
            super().on_train_batch_end(*arguments)
            spent.append(time.perf_counter() - start)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(8))

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return (batch["input_ids"] @ self.weight).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batch = {"input_ids": torch.zeros(4, 8), "attention_mask": torch.zeros(4, 8), "labels": torch.zeros(4, 8)}
    timed = Timed(every_n_steps=10**9)
    Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True, callbacks=[timed]).fit(
        Module(), DataLoader([batch] * steps, batch_size=None)
    )
    return statistics.median(spent)


def private_bytes() -> int:
    """What this process holds; of pages that N parties have mapped, an N-th."""
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


def show(rows: list[dict]) -> None:
    print("\nmedian of one interleaved run; ratios in units of one raw all_reduce of one flat buffer\n")
    print(
        "| case | parties | MB | raw ms | round ms | round | bare passes | round over Gloo |"
        " PeriodicModelAverager | loop of all_reduces | memory | memory over Gloo |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        cells = [
            f"{r['case']}, {r['tensors']} tensors",
            str(r["parties"]),
            f"{r['megabytes']:.1f}",
            f"{r['raw_ms']:.1f}",
            f"{r['ours_ms']:.1f}",
            f"{r['ours']:.2f}x",
            *(f"{r[name]:.2f}x" if name in r else "" for name in ("floor", "gloo", "averager", "loop")),
            f"{r['extra_memory_ours']:.2f} x trainable",
            f"{r['extra_memory_gloo']:.2f} x" if "extra_memory_gloo" in r else "",
        ]
        print(f"| {' | '.join(cells)} |")
    print(f"\nbetween rounds the callback costs {max(r['hook_us'] for r in rows):.0f} us a step")


if __name__ == "__main__":
    main()
