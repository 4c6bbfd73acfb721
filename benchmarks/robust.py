"""What one attacker, or two of seven, can do under each aggregation rule, and what the rules cost.

    python benchmarks/robust.py                  # the table of attacks, about ten minutes
    python benchmarks/robust.py --rules Median   # some of its columns
    python benchmarks/robust.py --cost           # rounds without an attacker, in units of `Mean`

Ten classes of points, fifteen rounds of ten local steps; a network with a frozen base, LoRA pairs on two
layers and a trained head. The parties are threads over real Gloo, one of five is an attacker. Shown is
the accuracy of the honest on points that nobody trained on, the mean of the seeds. `--write` puts the table
into `docs/depth/robust.md`.
"""

import argparse
import json
import math
import os
import re
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import aggregation as costs
import torch
import torch.distributed as dist
from processes import rows_of
from torch import Tensor, nn
from torch.distributed import HashStore

from pellm_lightning import Aggregator, Federation, FederationError
from pellm_lightning.aggregation import (
    Aggregation,
    GeometricMedian,
    Krum,
    LowRankMean,
    Mean,
    Median,
    MultiKrum,
    NormBound,
    TrimmedMean,
)

PAGE = Path(__file__).resolve().parent.parent / "docs/depth/robust.md"
CLASSES, INPUTS, HIDDEN, RANK = 10, 20, 48, 6
ROUNDS, STEPS, SAMPLES, BATCH = 15, 10, 300, 32
CAP = 0.3
Parameters = dict[str, Tensor]

RULES: dict[str, Callable[[int], tuple[Aggregation, float | None]]] = {
    "`Mean`": lambda f: (Mean(), None),
    "`LowRankMean`": lambda f: (LowRankMean(), None),
    "`LowRankMean`, cap": lambda f: (LowRankMean(), CAP),
    "`NormBound`, cap": lambda f: (NormBound(), CAP),
    "`GeometricMedian`, cap": lambda f: (GeometricMedian(), CAP),
    "`Krum`": lambda f: (Krum(f), None),
    "`MultiKrum`, cap": lambda f: (MultiKrum(f), CAP),
    "`Median`, cap": lambda f: (Median(), CAP),
    "`TrimmedMean`, cap": lambda f: (TrimmedMean(f), CAP),
    "`Median`, mixing, cap": lambda f: (Median(mixing=f), CAP),
}


# ---- the task


class Task:
    """Points around ten centres, and how they are divided; `skew` gives each party few of the labels."""

    def __init__(self, seed: int, parties: int, *, skew: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centers = torch.randn(CLASSES, INPUTS, generator=self.generator) * 1.1
        self.base1 = torch.randn(HIDDEN, INPUTS, generator=self.generator) / INPUTS**0.5
        self.base2 = torch.randn(HIDDEN, HIDDEN, generator=self.generator) / HIDDEN**0.5
        even = torch.full((CLASSES,), 1 / CLASSES)
        self.test = self.points(2000, even)
        drawn = torch._sample_dirichlet(torch.full((parties, CLASSES), 0.5), generator=self.generator)
        self.shards = [self.points(SAMPLES, drawn[party] if skew else even) for party in range(parties)]

    def points(self, count: int, of_classes: Tensor) -> tuple[Tensor, Tensor]:
        y = of_classes.multinomial(count, replacement=True, generator=self.generator)
        return self.centers[y] + torch.randn(count, INPUTS, generator=self.generator), y

    def start(self) -> Parameters:
        parameters = {"head.weight": torch.zeros(CLASSES, HIDDEN), "head.bias": torch.zeros(CLASSES)}
        for name, inputs in (("l1", INPUTS), ("l2", HIDDEN)):
            parameters[f"{name}.lora_A.default.weight"] = (
                torch.randn(RANK, inputs, generator=torch.Generator().manual_seed(7)) / inputs**0.5
            )
            parameters[f"{name}.lora_B.default.weight"] = torch.zeros(HIDDEN, RANK)
        return parameters

    def logits(self, p: Parameters, x: Tensor) -> Tensor:
        for name, base in (("l1", self.base1), ("l2", self.base2)):
            a, b = p[f"{name}.lora_A.default.weight"], p[f"{name}.lora_B.default.weight"]
            x = torch.relu(x @ base.T + 2 * (x @ a.T) @ b.T)
        return x @ p["head.weight"].T + p["head.bias"]

    def accuracy(self, p: Parameters) -> float:
        x, y = self.test
        return float((self.logits(p, x).argmax(dim=1) == y).float().mean())

    def train(self, p: Parameters, party: int, generator: torch.Generator, *, flipped: bool) -> None:
        x, y = self.shards[party]
        y = (y + 1) % CLASSES if flipped else y
        leaves = [q.requires_grad_() for q in p.values()]
        optimizer = torch.optim.SGD(leaves, lr=0.1)
        with torch.enable_grad():
            for _ in range(STEPS):
                at = torch.randint(0, len(x), (BATCH,), generator=generator)
                loss = nn.functional.cross_entropy(self.logits(p, x[at]), y[at])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for q in leaves:
            q.requires_grad_(False).grad = None


# ---- the attacks: what an attacker's parameters become after its local steps


def scaled(times: float, p: Parameters, before: Parameters) -> None:
    """Send a multiple of the update."""
    for name, q in p.items():
        q.copy_(before[name] + times * (q - before[name]))


def filled(value: float, p: Parameters, before: Parameters) -> None:
    for q in p.values():
        q.fill_(value)


def regauged(p: Parameters, before: Parameters) -> None:
    """Send other factors of the same products: B G and G^-1 A, with a G that turns and stretches."""
    for name in ("l1", "l2"):
        turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(3))).Q
        gauge = turn @ torch.diag(torch.logspace(-1.5, 1.5, RANK))
        a, b = p[f"{name}.lora_A.default.weight"], p[f"{name}.lora_B.default.weight"]
        b.copy_(b @ gauge)
        a.copy_(torch.linalg.inv(gauge) @ a)


def unchanged(p: Parameters, before: Parameters) -> None:
    pass


class Attack:
    """An attack: what attackers train on, what they send, how much they say they weigh, and when."""

    def __init__(
        self,
        send: Callable[[Parameters, Parameters], None] = unchanged,
        *,
        flipped: bool = False,
        weight: float = SAMPLES,
        attackers: int = 1,
        parties: int = 5,
        skew: bool = False,
    ) -> None:
        self.send, self.flipped, self.weight = send, flipped, weight
        self.attackers, self.parties, self.skew = attackers, parties, skew


ATTACKS = {
    "no attack": Attack(attackers=0),
    "no attack, labels by Dirichlet(0.5)": Attack(attackers=0, skew=True),
    "no attack, seven parties": Attack(attackers=0, parties=7),
    "flipped labels": Attack(flipped=True),
    "flipped labels, weight 1e9": Attack(flipped=True, weight=1e9),
    "sign flip x10": Attack(partial(scaled, -10.0)),
    "flipped labels x5": Attack(partial(scaled, 5.0), flipped=True),
    "NaN": Attack(partial(filled, float("nan"))),
    "infinity": Attack(partial(filled, float("inf"))),
    "1e30": Attack(partial(filled, 1e30)),
    "3e38": Attack(partial(filled, 3e38)),
    "LoRA gauge": Attack(regauged),
    "LoRA gauge, flipped labels": Attack(regauged, flipped=True),
    "2 of 7 collude: flipped labels x5": Attack(partial(scaled, 5.0), flipped=True, attackers=2, parties=7),
}


def accuracy(rule: str, attack: Attack, seed: int) -> float:
    """Return the accuracy of the honest after all rounds; all of them hold the same parameters."""
    task = Task(seed, attack.parties, skew=attack.skew)
    store, results = HashStore(), [0.0] * attack.parties
    turns = threading.Lock()  # the trainings of threads would only slow each other down

    def live(party: int) -> None:
        federation = Federation(store, party, attack.parties)
        made, max_share = RULES[rule](max(attack.attackers, 1))
        p, evil = task.start(), party >= attack.parties - attack.attackers
        aggregator = Aggregator(federation, p, aggregation=made, max_share=max_share)
        aggregator.start()
        # Those that collude draw the same samples.
        generator = torch.Generator().manual_seed(99 if evil else party)
        with torch.no_grad():
            for _ in range(ROUNDS):
                before = {name: q.clone() for name, q in p.items()}
                with turns:
                    task.train(
                        p, attack.parties - 1 if evil else party, generator, flipped=evil and attack.flipped
                    )
                if evil:
                    attack.send(p, before)
                aggregator.step(attack.weight if evil else SAMPLES)
            with turns:
                results[party] = task.accuracy(p)
        federation.close()

    with ThreadPoolExecutor(attack.parties) as pool:
        done = [pool.submit(live, party) for party in range(attack.parties)]
    errors = [error for future in done if (error := future.exception()) is not None]
    if any(not isinstance(error, FederationError) for error in errors):
        raise errors[0]
    return math.nan if errors else results[0]  # all hold NaN, and stop


def table(rules: list[str], seeds: int) -> str:
    lines = ["| | " + " | ".join(rules) + " |", "|---" * (len(rules) + 1) + "|"]
    for name, attack in ATTACKS.items():
        found = [statistics.fmean(accuracy(rule, attack, seed) for seed in range(seeds)) for rule in rules]
        lines.append(f"| {name} | " + " | ".join(map(_percent, found)) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "diverges" if math.isnan(value) else f"{100 * value:.1f}"


# ---- what the rules cost without an attacker


def measure_cost(repeats: int) -> None:
    """Time rounds of one party of five, each a process, interleaved, and print the medians as JSON."""
    dist.init_process_group("gloo")
    federation = Federation.from_env()
    unit = "Mean, deviation not measured"
    robust = {name: make(1)[0] for name, make in RULES.items() if name != "`LowRankMean`, cap"}
    costs.RULES.update(robust)
    rules = [unit, *list(robust)[1:]]
    for case, modules in costs.CASES.items():
        sites = [costs.Site(federation, name, modules) for name in rules]
        for site in sites:
            site.run()
            site.seconds.clear()
        for site in sites * repeats:
            site.run()
        for site in sites if federation.party == 0 else []:
            row = {"case": case, "parties": federation.num_parties, "rule": site.name.replace(", cap", "")}
            row |= {"ms": 1e3 * statistics.median(site.seconds), "bytes": site.bytes_sent}
            print(json.dumps(row), flush=True)
    federation.close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rules", nargs="+", default=[], help="parts of names of rules")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.cost and "RANK" in os.environ:
        measure_cost(arguments.repeats)
    elif arguments.cost:
        costs.show(rows_of(__file__, 5, ["--cost", "--repeats", str(arguments.repeats)]))
    else:
        show_attacks(arguments)


def show_attacks(arguments: argparse.Namespace) -> None:
    rules = [rule for rule in RULES if not arguments.rules or any(part in rule for part in arguments.rules)]
    made = table(rules, arguments.seeds)
    if arguments.write:
        text = re.sub(
            r"(<!-- attacks -->\n\n).*?(\n\n<!-- end of attacks -->)",
            lambda match: match[1] + made + match[2],
            PAGE.read_text(),
            flags=re.DOTALL,
        )
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
