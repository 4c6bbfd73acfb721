"""Adapters of N parties, and the dense float64 answers that rules on factors must give.

Nothing here knows how the rules compute: products are m x n matrices, decomposed by numpy.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Aggregator, Federation, RoundReport
from pellm_lightning.aggregation import Aggregation, LoraModule, LowRankMean

Parameters = dict[str, Tensor]
Sizes = Mapping[str, tuple[int, int]]
"""(m, n) of each adapted module, by name."""
Optimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]


# ---- adapters


def name_a(module: str) -> str:
    return f"{module}.lora_A.default.weight"


def name_b(module: str) -> str:
    return f"{module}.lora_B.default.weight"


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def adapter(seed: int, sizes: Sizes, rank: int, dtype: torch.dtype = torch.float32) -> Parameters:
    """Random factors of full rank for each module."""
    made = {}
    for index, (module, (m, n)) in enumerate(sizes.items()):
        made[name_a(module)] = random(1000 * seed + 2 * index, rank, n).to(dtype)
        made[name_b(module)] = random(1000 * seed + 2 * index + 1, m, rank).to(dtype)
    return made


def drift(scale: float, only: str = "") -> Callable[[int, int, Parameters], None]:
    """Local training: noise of its own for each party and round, where ``only`` is part of the name."""

    def train(party: int, number: int, parameters: Parameters) -> None:
        for index, (name, p) in enumerate(sorted(parameters.items())):
            if only in name:
                p += random(7919 * party + 101 * number + index + 1, *p.shape, scale=scale).to(p.dtype)

    return train


def copied(parameters: Mapping[str, Tensor]) -> Parameters:
    return {name: p.detach().clone() for name, p in parameters.items()}


def bits(parameters: Mapping[str, Tensor] | Tensor) -> bytes:
    if isinstance(parameters, Tensor):
        return parameters.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return b"".join(bits(parameters[name]) for name in sorted(parameters))


def sgd(**arguments: Any) -> Optimizer:
    return lambda parameters: torch.optim.SGD(parameters, **arguments)


def frozen(seed: int, sizes: Sizes, dtype: torch.dtype = torch.float32) -> Parameters:
    """The frozen weight of each module, (m, n)."""
    return {module: random(seed + m, m, n).to(dtype) for module, (m, n) in sizes.items()}


def modules(bases: Mapping[str, Tensor], scaling: float = 1.0) -> dict[str, LoraModule]:
    """What modules with these frozen weights say."""
    return {f"{name}.default": LoraModule(scaling=scaling, base=base) for name, base in bases.items()}


# ---- rounds of N parties


@dataclass(frozen=True)
class Round:
    """What one party saw of one round."""

    held: Parameters
    """Its parameters after its local steps."""
    result: Parameters
    report: RoundReport


def run_rounds(
    rule: Aggregation | None,
    start: Callable[[int], Parameters],
    train: Callable[[int, int, Parameters], None],
    *,
    weights: Sequence[float],
    rounds: int = 1,
    lora: Callable[[int], Mapping[str, LoraModule]] | None = None,
    **arguments: Any,
) -> list[list[Round]]:
    """Return what each party saw of each round; party i starts with ``start(i)`` and has ``weights[i]``."""

    def act(federation: Federation) -> list[Round]:
        party = federation.party
        parameters = start(party)
        modules = None if lora is None else lora(party)
        aggregator = Aggregator(federation, parameters, aggregation=rule, lora=modules, **arguments)
        aggregator.start()
        seen = []
        for number in range(rounds):
            train(party, number, parameters)
            held = copied(parameters)
            report = aggregator.step(weights[party])
            seen.append(Round(held, copied(parameters), report))
        return seen

    return run_parties(len(weights), act)


def one_round(
    rule: Aggregation | None,
    ends: Sequence[Parameters],
    weights: Sequence[float],
    *,
    start: Parameters | None = None,
    **arguments: Any,
) -> list[Parameters]:
    """Return what the parties hold after a round that they came to with ``ends``.

    They began it with ``start``, or else with what party 0 came with.
    """

    def train(party: int, number: int, parameters: Parameters) -> None:
        for name, p in parameters.items():
            p.copy_(ends[party][name])

    begin = ends[0] if start is None else start
    seen = run_rounds(rule, lambda party: copied(begin), train, weights=weights, **arguments)
    return [done.result for (done,) in seen]


# ---- dense answers, float64


def update(parameters: Mapping[str, Tensor], module: str, scaling: float = 1.0) -> np.ndarray:
    """s B A, (m, n)."""
    b, a = (parameters[name(module)].double().flatten(1).numpy() for name in (name_b, name_a))
    return scaling * b @ a


def mean_of(weights: Sequence[float], matrices: Sequence[np.ndarray]) -> np.ndarray:
    """sum(w_i X_i) / sum(w_i) over those that count: 0 * nan is nan."""
    total = sum(weight * x for weight, x in zip(weights, matrices, strict=True) if weight)
    return np.asarray(total / sum(weights))


def mean_update(
    held: Sequence[Mapping[str, Tensor]],
    module: str,
    weights: Sequence[float],
    scalings: Sequence[float] | None = None,
) -> np.ndarray:
    """M = sum(w_i s_i B_i A_i) / sum(w_i), (m, n)."""
    scalings = [1.0] * len(held) if scalings is None else scalings
    return mean_of(weights, [update(p, module, s) for p, s in zip(held, scalings, strict=True)])


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of a rank (Eckart and Young)."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


def cut(matrix: np.ndarray, rank: int) -> float:
    """By how much that misses: sqrt of the sum of the squared singular values left out."""
    return float(np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:]))


def iterated(matrix: np.ndarray, a: Tensor, steps: int) -> np.ndarray:
    """Subspace iteration on the dense matrix, started with the rows of ``a`` (r, n)."""
    q = np.linalg.qr(a.double().numpy().T)[0]
    for _ in range(steps):
        p = np.linalg.qr(matrix @ q)[0]
        q = np.linalg.qr(matrix.T @ p)[0]
    return np.asarray(p @ (p.T @ matrix))


def away(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative distance, Frobenius."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def measuring(rule: Aggregation | None, measure: bool) -> Aggregation:
    """The rule, LowRankMean for None, told whether to measure the deviation of its results."""
    told = copy.copy(LowRankMean() if rule is None else rule)
    told.measure_deviation = measure
    return told
