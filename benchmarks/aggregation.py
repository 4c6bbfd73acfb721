"""What the aggregation rules cost: a whole round of each, and their arithmetic for one large module.

Run `make bench`. Rounds are timed by torchrun for N = 2 and 4, interleaved in one run, in units of a round of
`Mean()` that does not measure its deviation; compare ratios, not milliseconds. The arithmetic is that of a
module with m = n = 4096 and r = 16 for four parties, beside a dense SVD of the m x n matrix, which nobody
needs.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from processes import rows_of, timed

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import Aggregation, Alternating, FrozenA, LowRankMean, Mean
from pellm_lightning.aggregation.factors import (
    MeanFactors,
    Stack,
    factorize,
    from_range,
    orthonormal,
    truncated_svd,
)

# (m, n, r) of the adapted modules: query and value of SmolLM2-135M, and all linear layers of a 7B Llama, of
# which four blocks are enough to see the ratio.
SMALL = [(m, 576, 8) for _ in range(30) for m in (576, 192)]
LARGE = [(m, n, 16) for _ in range(4) for m, n in [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]]
CASES = {"60 modules, r=8, 1.5 MB": SMALL, "28 modules, r=16, 20 MB": LARGE}
RULES: dict[str, Aggregation] = {
    "Mean, deviation not measured": Mean(measure_deviation=False),
    "Mean": Mean(measure_deviation=True),
    "FrozenA": FrozenA(measure_deviation=True),
    "Alternating": Alternating(measure_deviation=True),
    "LowRankMean power, not measured": LowRankMean("power", measure_deviation=False),
    "LowRankMean power": LowRankMean("power", measure_deviation=True),
    "LowRankMean exact": LowRankMean("exact", measure_deviation=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure_rounds(arguments.repeats)
        return
    print("\na round, median of one interleaved run, in units of Mean without its deviation\n")
    for parties in arguments.parties:
        show(rows_of(__file__, parties, ["--repeats", str(arguments.repeats)]))
    show_arithmetic()


def measure_rounds(repeats: int) -> None:
    dist.init_process_group("gloo")
    federation = Federation.from_env()
    for case, modules in CASES.items():
        sites = [Site(federation, name, modules) for name in RULES]
        for site in sites * repeats:
            site.run()
        if federation.party == 0:
            for site in sites:
                row = {"case": case, "parties": federation.num_parties, "rule": site.name}
                row |= {"ms": 1e3 * statistics.median(site.seconds), "bytes": site.bytes_sent}
                print(json.dumps(row), flush=True)
    federation.close()
    dist.destroy_process_group()


class Site:
    """One party's adapter under one rule."""

    def __init__(self, federation: Federation, name: str, modules: list[tuple[int, int, int]]) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.bytes_sent = 0
        self.generator = torch.Generator().manual_seed(federation.party)
        self.parameters = {}
        for k, (m, n, r) in enumerate(modules):
            self.parameters[f"layer{k:03}.lora_A.default.weight"] = torch.randn(r, n) / n**0.5
            self.parameters[f"layer{k:03}.lora_B.default.weight"] = torch.randn(m, r) / m**0.5
        self.aggregator = Aggregator(federation, self.parameters, aggregation=RULES[name])
        self.aggregator.start()

    def run(self) -> None:
        """Drift, as local steps do: parties that agree would have nothing to factorise."""
        for parameter in self.parameters.values():
            parameter.add_(
                torch.randn(parameter.shape, generator=self.generator), alpha=0.3 / len(parameter) ** 0.5
            )
        self.seconds.append(timed(self.round))

    def round(self) -> None:
        self.bytes_sent = self.aggregator.step(1.0).bytes_sent


def show(rows: list[dict]) -> None:
    print("| adapter | parties | rule | ms | time | bytes sent |\n|---|---|---|---|---|---|")
    for case in CASES:
        of_case = [row for row in rows if row["case"] == case]
        unit = of_case[0]
        for row in of_case:
            ratios = f"{row['ms'] / unit['ms']:.2f}x | {row['bytes'] / unit['bytes']:.2f}x"
            print(f"| {case} | {row['parties']} | {row['rule']} | {row['ms']:.1f} | {ratios} |")
    print()


def show_arithmetic(m: int = 4096, n: int = 4096, r: int = 16, parties: int = 4) -> None:
    threads = torch.get_num_threads()
    print(f"arithmetic of a module, m = {m}, n = {n}, r = {r}, {parties} parties, {threads} threads\n")
    start_b, start_a = torch.randn(m, r) / m**0.5, torch.randn(r, n) / n**0.5
    each = [
        (1 / parties, start_b + 0.01 * torch.randn(m, r), start_a + 0.01 * torch.randn(r, n))
        for _ in range(parties)
    ]
    own_b, own_a = (factor.double() for factor in each[0][1:])

    def exact() -> tuple[torch.Tensor, torch.Tensor]:
        low = truncated_svd(Stack.of(each), r)
        a = sum(w * a.double() @ low.v for w, _, a in each)
        b = sum(w * low.u.T @ b.double() for w, b, _ in each)
        squares = sum(w * float(b.double().square().sum() + a.double().square().sum()) for w, b, a in each)
        return factorize(low, MeanFactors(a, b, squares), 1.0, r, "procrustes")

    def power() -> None:
        """One party's terms of each sum, and what all compute of the sums; here of its own."""
        p = orthonormal(own_b @ (own_a @ orthonormal(start_a.double().T)))
        low = from_range(p, own_a.T @ (own_b.T @ p))
        factorize(low, MeanFactors(own_a @ low.v, low.u.T @ own_b, 1e3), 1.0, r, "procrustes")

    result = exact()
    acts: dict[str, Callable[[], object]] = {
        "LowRankMean exact, at the module's owner": exact,
        "LowRankMean power, at each party": power,
        "deviation, at the module's owner": lambda: Stack.of(each).squared_norms(1.0, *result),
        "dense mean and SVD": lambda: torch.linalg.svd(sum(w * b @ a for w, b, a in each)),
    }
    print("| what | ms |\n|---|---|")
    for name, act in acts.items():
        print(f"| {name} | {1e3 * median_seconds(act, 1 if 'dense' in name else 15):.1f} |")


def median_seconds(act: Callable[[], object], repeats: int) -> float:
    act()
    return statistics.median(timed_alone(act) for _ in range(repeats))


def timed_alone(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
