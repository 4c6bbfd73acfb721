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
from pellm_lightning.aggregation.base import Term
from pellm_lightning.aggregation.factors import (
    MeanFactors,
    Stack,
    factorize,
    from_range,
    orthonormal,
    truncated_svd,
)
from pellm_lightning.aggregation.gram import Module, best_means

# (m, n, r) of the adapted modules: query and value of SmolLM2-135M, and all linear layers of a 7B Llama, of
# which four blocks are enough to see the ratio.
SMALL = [(m, 576, 8) for _ in range(30) for m in (576, 192)]
LARGE = [(m, n, 16) for _ in range(4) for m, n in [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]]
CASES = {"60 modules, r=8, 1.5 MB": SMALL, "28 modules, r=16, 20 MB": LARGE}
# All 32 blocks of a 7B Llama; the memory of seven rules at once is too much, so it is only made if asked for.
WHOLE = {"224 modules, r=16, 160 MB": LARGE * 8}
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
    parser.add_argument("--default", action="store_true", help="the default rule only, also for 224 modules")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure_rounds(arguments.repeats, default=arguments.default)
        return
    options = ["--repeats", str(arguments.repeats), *(["--default"] if arguments.default else [])]
    print("\na round, median of one interleaved run, in units of Mean without its deviation\n")
    for parties in arguments.parties:
        show(rows_of(__file__, parties, options))
    show_arithmetic()


def measure_rounds(repeats: int, *, default: bool) -> None:
    dist.init_process_group("gloo")
    federation = Federation.from_env()
    rules = ["Mean, deviation not measured", "LowRankMean exact"] if default else list(RULES)
    for case, modules in (CASES | WHOLE if default else CASES).items():
        sites = [Site(federation, name, modules) for name in rules]
        for site in sites:
            site.run()
            site.seconds.clear()
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
    for case in dict.fromkeys(row["case"] for row in rows):
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

    module = Module([Term(w, 1.0, b, a) for w, b, a in each], 1.0, r)

    def exact() -> tuple[torch.Tensor, torch.Tensor]:
        return best_means({0: module}, "procrustes")[0].factors

    def power() -> None:
        """One party's terms of each sum, and what all compute of the sums; here of its own."""
        p = orthonormal(own_b @ (own_a @ orthonormal(start_a.double().T)))
        low = from_range(p, own_a.T @ (own_b.T @ p))
        factorize(low, MeanFactors(own_a @ low.v, low.u.T @ own_b, 1e3), 1.0, r, "procrustes")

    result = exact()
    acts: dict[str, Callable[[], object]] = {
        "LowRankMean exact, at the module's owner": exact,
        "its fall-back, QR and SVD, alone": lambda: truncated_svd(Stack.of(each), r),
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
