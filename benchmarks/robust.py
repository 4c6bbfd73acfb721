"""What one attacker, or two of seven, can do under each aggregation rule, and what the rules cost.

    python benchmarks/robust.py                    # ten classes of points, about ten minutes
    python benchmarks/robust.py --task newsgroups  # MiniLM with LoRA on 20 Newsgroups, about half an hour
    python benchmarks/robust.py --rules Median     # some of the columns
    python benchmarks/robust.py --seeds --write    # the table of what there is, into the page
    python benchmarks/robust.py --cost             # rounds without an attacker, in units of `Mean`

The parties are threads over real Gloo. Shown is the accuracy of the honest on what nobody trained on, the
mean of the seeds. Each run appends a line of JSON to the results; those that are there are not repeated.
"""

import argparse
import itertools
import json
import logging
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import aggregation as costs
import torch
import torch.distributed as dist
from processes import rows_of
from robust_points import Parameters, Points
from torch.distributed import HashStore

from pellm_lightning import Aggregator, Federation, FederationError
from pellm_lightning.aggregation import (
    Aggregation,
    GeometricMedian,
    Krum,
    LoraModule,
    LowRankMean,
    Mean,
    Median,
    MultiKrum,
    NormBound,
    TrimmedMean,
)
from pellm_lightning.aggregation.lora import find_pairs
from pellm_lightning.comm import ElasticFederation, Membership, Version

PAGE = Path(__file__).resolve().parent.parent / "docs/depth/robust.md"

RULES: dict[str, Callable[[int], Aggregation]] = {
    "`Mean`": lambda f: Mean(),
    "`LowRankMean`": lambda f: LowRankMean(),
    "`LowRankMean`, cap": lambda f: LowRankMean(),
    "`NormBound`, cap": lambda f: NormBound(),
    "`GeometricMedian`, cap": lambda f: GeometricMedian(),
    "`Krum`": Krum,
    "`MultiKrum`, cap": MultiKrum,
    "`Median`, cap": lambda f: Median(),
    "`TrimmedMean`, cap": TrimmedMean,
    "`Median`, mixing, cap": lambda f: Median(mixing=f),
}
"""Rules for f attackers; "cap" stands for a `max_share`."""


class Task(Protocol):
    """What the parties learn, and how it is divided over them."""

    rounds: int
    cap: float
    lora: Mapping[str, LoraModule] | None

    def start(self) -> Parameters: ...

    def weight(self, party: int) -> float: ...

    def accuracy(self, p: Parameters) -> float: ...

    def train_(self, p: Parameters, party: int, generator: torch.Generator, *, flipped: bool) -> None: ...


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
    for pair in find_pairs(p):
        a, b = p[pair.a], p[pair.b]
        rank = len(a)
        turn = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(3))).Q
        gauge = turn @ torch.diag(torch.logspace(-1.5, 1.5, rank))
        b.copy_(b @ gauge)
        a.copy_(torch.linalg.inv(gauge) @ a)


def unchanged(p: Parameters, before: Parameters) -> None:
    pass


@dataclass(frozen=True)
class Attack:
    """An attack: what attackers train on, what they send, and what they say.

    Args:
        send: Changes the attacker's parameters after its local steps; the second are those before.
        flipped: Whether it trains on wrong labels.
        weight: How much it says that it weighs; None is the truth.
        newer: Whether it says that its global state is newer; the parties are separate jobs then.
        attackers: How many there are, the last of the parties.
        parties: How many parties there are.
        skew: Whether the parties' labels differ.
    """

    send: Callable[[Parameters, Parameters], None] = unchanged
    flipped: bool = False
    weight: float | None = None
    newer: bool = False
    attackers: int = 1
    parties: int = 5
    skew: bool = False


OF_ONE = {
    "NaN": Attack(partial(filled, float("nan"))),
    "infinity": Attack(partial(filled, float("inf"))),
    "1e30": Attack(partial(filled, 1e30)),
    "3e38": Attack(partial(filled, 3e38)),
    "flipped labels": Attack(flipped=True),
    "flipped labels, weight 1e9": Attack(flipped=True, weight=1e9),
    "sign flip x10": Attack(partial(scaled, -10.0)),
    "flipped labels x5": Attack(partial(scaled, 5.0), flipped=True),
    "LoRA gauge": Attack(regauged),
    "LoRA gauge, flipped labels": Attack(regauged, flipped=True),
}
OF_TWO = {
    "2 of 7 collude: flipped labels x5": Attack(partial(scaled, 5.0), flipped=True, attackers=2, parties=7),
}
ON_POINTS = {
    "no attack": Attack(attackers=0),
    "no attack, labels by Dirichlet(0.5)": Attack(attackers=0, skew=True),
    "no attack, seven parties": Attack(attackers=0, parties=7),
    **OF_ONE,
    **OF_TWO,
}
ON_TEXTS = {
    "no attack": Attack(attackers=0),
    "without the attacker": Attack(weight=0.0),
    "a newer version claimed, flipped labels": Attack(flipped=True, newer=True),
    **OF_ONE,
    "without the two": Attack(weight=0.0, attackers=2),
    **OF_TWO,
}
ATTACKS = {
    "points": ON_POINTS,
    "newsgroups": {name: replace(attack, parties=7, skew=True) for name, attack in ON_TEXTS.items()},
}


@lru_cache(maxsize=2)
def make_task(name: str, seed: int, parties: int, skew: bool) -> Task:
    if name == "points":
        return Points(seed, parties, skew=skew)
    from robust_texts import Newsgroups  # needs the model and the texts

    return Newsgroups(seed, parties, skew=skew)


def accuracy(task: Task, rule: str, attack: Attack) -> float:
    """Return the accuracy of the honest after all rounds; all of them hold the same parameters."""
    store, honest = HashStore(), attack.parties - attack.attackers
    turns = threading.Lock()  # the trainings of threads would only slow each other down

    def live(party: int) -> float:
        federation = connect(attack, store, party)
        try:
            p = task.start()
            aggregator = make_aggregator(task, rule, attack, federation, p)
            rounds(task, attack, aggregator, p, party, turns)
            with turns:
                result = task.accuracy(p)
            for _ in aggregator.drain():
                pass
        except BaseException as error:
            federation.abort(repr(error))
            raise
        federation.close()
        return result

    with ThreadPoolExecutor(attack.parties) as pool:
        done = [pool.submit(live, party) for party in range(attack.parties)]
    errors = [error for future in done if (error := future.exception()) is not None]
    if any(not isinstance(error, FederationError) for error in errors):
        raise errors[0]
    failed = any(future.exception() for future in done[:honest])
    return math.nan if failed else done[0].result()  # all hold NaN, and stop


def connect(attack: Attack, store: HashStore, party: int) -> Federation | ElasticFederation:
    """Join the parties: of one launch, or as separate jobs where an attack is on how these agree."""
    if not attack.newer:
        return Federation(store, party, attack.parties)
    names = [str(index) for index in range(attack.parties)]
    membership = Membership(wait_s=300, heartbeat_ttl_s=30)
    federation = ElasticFederation(lambda: store, names[party], names, membership=membership)
    if party >= attack.parties - attack.attackers:
        claim_newer_(federation)
    return federation


def claim_newer_(federation: ElasticFederation) -> None:
    """Let a party say in each round that it has a newer version of the global state than all others."""
    honest = federation.join_quorum

    def lie(intent: Any, version: Version | None, metadata: Any, state: str = "") -> Any:
        if version is not None:
            version = version._replace(attempt=version.attempt + 10**6)
        return honest(intent, version, metadata, state)

    federation.join_quorum = lie  # type: ignore[method-assign]


def make_aggregator(
    task: Task, rule: str, attack: Attack, federation: Federation | ElasticFederation, p: Parameters
) -> Aggregator:
    made = RULES[rule](max(attack.attackers, 1))
    max_share = task.cap if rule.endswith("cap") else None
    aggregator = Aggregator(federation, p, aggregation=made, lora=task.lora, max_share=max_share)
    aggregator.start()
    return aggregator


@torch.no_grad()
def rounds(
    task: Task, attack: Attack, aggregator: Aggregator, p: Parameters, party: int, turns: threading.Lock
) -> None:
    """Make a party's rounds."""
    evil = party >= attack.parties - attack.attackers
    shard = attack.parties - 1 if evil else party  # those that collude draw the same samples
    weight = attack.weight if evil and attack.weight is not None else task.weight(shard)
    generator = torch.Generator().manual_seed(99 if evil else party)
    while aggregator.round < task.rounds:
        before = {name: q.clone() for name, q in p.items()}
        with turns:
            task.train_(p, shard, generator, flipped=evil and attack.flipped)
        if evil:
            attack.send(p, before)
        aggregator.step(weight)


# ---- the table


def run(task: str, rules: list[str], seeds: list[int], results: Path, cap: float | None = None) -> None:
    """Make the runs that are not among the results, seed by seed."""
    results.parent.mkdir(parents=True, exist_ok=True)
    results.touch()
    done = {_key(row) for row in _rows(results)}
    cells = [
        {"task": task, "attack": attack, "rule": rule, "seed": seed}
        for seed, attack, rule in itertools.product(seeds, ATTACKS[task], rules)
    ]
    for row in [cell for cell in cells if _key(cell) not in done]:
        begun, attack = time.perf_counter(), ATTACKS[task][row["attack"]]
        of_seed = make_task(task, row["seed"], attack.parties, attack.skew)
        of_seed.cap = of_seed.cap if cap is None else cap
        row["accuracy"] = accuracy(of_seed, row["rule"], attack)
        row["seconds"] = round(time.perf_counter() - begun, 1)
        print(*row.values(), flush=True)
        with results.open("a") as file:
            print(json.dumps(row), file=file)


def table(task: str, rules: list[str], results: Path) -> str:
    """Return the table of what there is of a task, in Markdown, without rows of which nothing was run."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in _rows(results):
        if row["task"] == task:
            found.setdefault((row["attack"], row["rule"]), []).append(row["accuracy"])
    lines = ["| | " + " | ".join(rules) + " |", "|---" * (len(rules) + 1) + "|"]
    for name in [name for name in ATTACKS[task] if any((name, rule) in found for rule in rules)]:
        cells = [_percent(found.get((name, rule), [])) for rule in rules]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(task: str, made: str) -> None:
    """Put the table of a task into the page."""
    between = rf"(<!-- attacks on {task} -->\n\n).*?(\n\n<!-- end of attacks -->)"
    text = re.sub(between, lambda match: match[1] + made + match[2], PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(text)


def _rows(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["attack"], row["rule"], row["seed"]


def _percent(of_seeds: list[float]) -> str:
    if not of_seeds:
        return "not run"
    mean = statistics.fmean(of_seeds)
    return "diverges" if math.isnan(mean) else f"{100 * mean:.1f}"


# ---- what the rules cost without an attacker


def measure_cost(repeats: int) -> None:
    """Time rounds of one party of five, each a process, interleaved, and print the medians as JSON."""
    dist.init_process_group("gloo")
    federation = Federation.from_env()
    unit = "Mean, deviation not measured"
    robust = {name: make(1) for name, make in RULES.items() if name != "`LowRankMean`, cap"}
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
    parser.add_argument("--task", choices=ATTACKS, default="points")
    parser.add_argument("--rules", nargs="+", default=[], help="parts of names of rules")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none to run nothing")
    parser.add_argument("--results", type=Path, default=Path("runs/robust.jsonl"))
    parser.add_argument(
        "--cap", type=float, help="another max_share than the task's; with --results of its own"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pellm_lightning").setLevel(logging.ERROR)  # else a warning a round and party
    if arguments.cost and "RANK" in os.environ:
        measure_cost(arguments.repeats)
    elif arguments.cost:
        costs.show(rows_of(__file__, 5, ["--cost", "--repeats", str(arguments.repeats)]))
    else:
        show_attacks(arguments)


def show_attacks(arguments: argparse.Namespace) -> None:
    rules = [rule for rule in RULES if not arguments.rules or any(part in rule for part in arguments.rules)]
    run(arguments.task, rules, arguments.seeds, arguments.results, arguments.cap)
    made = table(arguments.task, rules, arguments.results)
    print(made)
    if arguments.write:
        write(arguments.task, made)


if __name__ == "__main__":
    main()
