"""One of several parties, each with other processor settings, for test_unlike_processors.py.

Runs every case for a few rounds and writes, by case and round, a digest of what the party holds afterwards.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import (
    Alternating,
    FrozenA,
    HeterogeneousRank,
    LoraModule,
    LowRankMean,
    Mean,
    ResidualMean,
    ShareA,
    Stacking,
)
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues
from pellm_lightning.engine.optim import Yogi
from pellm_lightning.exchange import Cast, Quantized, SecureAggregation, TopK
from pellm_lightning.privacy import AdaptiveClipping, GaussianMechanism
from pellm_lightning.tensors.digest import bits_digest

OUT, PARTY, PARTIES = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ROUNDS, RANK, M, N = 3, 8, 48, 40
NAME_A, NAME_B = "layer.lora_A.default.weight", "layer.lora_B.default.weight"


def drawn(seed: int, *shape: int) -> Tensor:
    """Whole numbers over 2^20: these are the same on every processor, which normal ones of torch are not."""
    numbers = np.random.Generator(np.random.PCG64(seed)).integers(-(2**20), 2**20, shape)
    return torch.from_numpy(numbers).to(torch.float32) / 2**20


def start() -> dict[str, Tensor]:
    return {NAME_A: drawn(1, RANK, N), NAME_B: torch.zeros(M, RANK), "head.weight": drawn(2, 5, 333)}


def full(number: int, parameters: Mapping[str, Tensor]) -> None:
    """Each party moves by its own steps."""
    for index, p in enumerate(parameters.values()):
        p.add_(drawn(100 * number + 10 * PARTY + index, *p.shape), alpha=0.1)


def thin(number: int, parameters: Mapping[str, Tensor]) -> None:
    """The products have two directions that count, of equal weight; linear algebra chooses the others."""
    for name, p in parameters.items():
        p.zero_()
        if name == NAME_A:
            p[:2, 2 * number + PARTY % 2 :: 7] = 1.0
            p[2:] = drawn(number + 3 * PARTY, RANK - 2, N)
        elif name == NAME_B:
            p[number, 0] = p[number + 1, 1] = 1.0


Case = tuple[dict[str, Any], Callable[[int, Mapping[str, Tensor]], None]]


def outer(kind: Callable[..., torch.optim.Optimizer], **settings: Any) -> dict[str, Any]:
    return {"outer_optimizer": lambda parameters: kind(parameters, **settings)}


def masked(**settings: Any) -> SecureAggregation:
    return SecureAggregation(f"{OUT}/{PARTY}.key", OUT, **settings)


def cosine(optimizer: torch.optim.Optimizer) -> object:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


def cases() -> dict[str, Case]:
    power = LowRankMean(solver="power", steps=2)
    mean = {"aggregation": Mean()}
    adam = mean | outer(torch.optim.Adam, lr=0.1)
    nesterov = outer(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    rules: list[Any] = [Mean(), FrozenA(), Alternating(), ShareA(), ResidualMean(), Stacking(), power]
    rules += [LowRankMean(factorization=factorization) for factorization in ("procrustes", "balanced", "svd")]
    rules += [HeterogeneousRank(), HeterogeneousRank("zero_pad"), HeterogeneousRank(solver="power")]
    found: dict[str, Case] = {f"rule {rule!r}": ({"aggregation": rule}, full) for rule in rules}
    found |= {
        f"thin {solver} {factorization}": (
            {"aggregation": LowRankMean(solver, factorization=factorization)},
            thin,
        )
        for solver in ("exact", "power")
        for factorization in ("procrustes", "balanced")
    }
    optimizers: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
        "SGD": (torch.optim.SGD, {"lr": 0.7}),
        "momentum": (torch.optim.SGD, {"lr": 0.7, "momentum": 0.9, "weight_decay": 0.01}),
        "nesterov": (torch.optim.SGD, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
        "Adam": (torch.optim.Adam, {"lr": 0.1}),
        "AdamW fused": (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
        "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
        "RMSprop": (torch.optim.RMSprop, {"lr": 0.1, "centered": True, "momentum": 0.9}),
        "NAdam": (torch.optim.NAdam, {"lr": 0.1}),
        "Yogi": (Yogi, {"lr": 0.1}),
    }
    for name, (kind, settings) in optimizers.items():
        found[f"outer {name}"] = (mean | outer(kind, **settings), full)
    found["outer scheduled"] = (adam | {"outer_scheduler": cosine}, full)
    found["outer and low rank"] = (outer(torch.optim.Adam, lr=0.1), full)
    exchanges: list[Any] = [Cast(error_feedback=True), Quantized(8), Quantized(4, error_feedback=True)]
    exchanges += [TopK(chunk_size=64, k=8), masked(), masked(bits=32, fractional_bits=16)]
    for exchange in exchanges:
        name = repr(exchange).partition("identity")[0] + str(getattr(exchange, "bits", ""))
        found[f"exchange {name}"] = (mean | nesterov | {"exchange": exchange}, full)
    found["masked power"] = ({"exchange": masked(), "aggregation": power}, full)
    found["masked thin power"] = ({"exchange": masked(), "aggregation": power}, thin)
    found["quantized low rank"] = ({"exchange": Quantized(8)}, full)
    carried = AuxiliaryTerms("test", vector=True, rescales=True, vector_coefficient=0.3)
    found["auxiliary"] = (mean | {"auxiliary": carried}, full)
    private = GaussianMechanism(1.0, 4.0, delta=1e-3, distributed=False, adaptive=AdaptiveClipping())
    found["private"] = (mean | nesterov | {"privacy": private}, full)
    return found


def run(federation: Federation, options: dict[str, Any], train: Callable[..., None]) -> list[list[str]]:
    parameters, base = start(), drawn(3, M, N)
    lora = {"layer.default": LoraModule(scaling=2.0, base=base)}
    aggregator = Aggregator(federation, parameters, lora=lora, **options)
    aggregator.start()
    held = []
    for number in range(ROUNDS):
        train(number, parameters)
        contribution = None
        if "auxiliary" in options:
            vector = {name: p * 0.3 for name, p in parameters.items()}
            contribution = AuxiliaryValues(effective_steps=1.5 + PARTY, vector=vector)
        private = "privacy" in options
        aggregator.step(1.0 if private else 1.0 + PARTY / 3, contribution=contribution)
        state = aggregator.state_dict()
        shared = [*parameters.values()] if aggregator.global_parameters.keys() == parameters.keys() else []
        tensors = [*shared, base, aggregator.global_vector, *aggregator.carried.values()]
        for of_parameter in state["outer_optimizer"]["state"].values():
            tensors += [value for value in of_parameter.values() if isinstance(value, Tensor)]
        held.append([*map(bits_digest, tensors), repr(state["privacy"])])
    return held


def main() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    store = dist.FileStore(str(OUT / "store"), PARTIES)
    found = {}
    for name, (options, train) in cases().items():
        federation = Federation(dist.PrefixStore(name, store), PARTY, PARTIES, timeout_s=60)
        found[name] = run(federation, options, train)
        federation.close()
    x, y = drawn(4, 99_999), drawn(5, 99_999)
    settings = {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "fused": bits_digest(x.add(y, alpha=0.7)),
        "linear algebra": bits_digest(torch.linalg.qr(x[:9990].view(333, 30).double()).Q),
    }
    (OUT / f"{PARTY}.json").write_text(json.dumps({"settings": settings, "held": found}))


if __name__ == "__main__":
    main()
