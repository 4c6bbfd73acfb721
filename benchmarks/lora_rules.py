"""What the aggregation of LoRA factors does to a model: accuracy and deviation by round, rule by rule.

    python benchmarks/lora_rules.py --quick     # BBC News, one setting
    python benchmarks/lora_rules.py             # 20 Newsgroups, the whole grid; goes on where it stopped
    python benchmarks/lora_rules.py --report    # a Markdown table, and docs/images/lora_rules.png

Parties (threads of one process) fine-tune one MiniLM encoder on texts whose labels are divided over them by a
Dirichlet distribution. LoRA sits on query and value of the upper three of its six layers: the lower three are
frozen and see each text once. Beside the rules there are each party alone, and one party that holds all data
and makes as many steps as all parties together. Each run appends a line of JSON to the results.
"""

import argparse
import copy
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import lora_rules_data as data
import torch
import torch.distributed as dist
import transformers
from lora_rules_report import report
from peft import LoraConfig, get_peft_model
from torch import nn

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    FrozenA,
    HeterogeneousRank,
    LowRankMean,
    Mean,
    ResidualMean,
    ShareA,
    Stacking,
    lora_modules,
)
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.tasks import partition
from pellm_lightning.tensors.selection import select

RULES: dict[str, Callable[[], Aggregation] | None] = {
    "mean": Mean,
    "low_rank_exact": lambda: LowRankMean(solver="exact"),
    "low_rank_power": lambda: LowRankMean(solver="power"),
    "residual": ResidualMean,
    "stacking": Stacking,
    "alternating": Alternating,
    "frozen_a": FrozenA,
    "share_a": ShareA,
    "alone": None,
    "central": None,
    "low_rank_power_balanced": lambda: LowRankMean(solver="power", factorization="balanced"),
    "low_rank_power_svd": lambda: LowRankMean(solver="power", factorization="svd"),
    # Every other party has a quarter of the rank.
    "ranks_low_rank": lambda: HeterogeneousRank(solver="power"),
    "ranks_zero_pad": lambda: HeterogeneousRank(method="zero_pad"),
}
LEARNING_RATES = {"frozen_a": 5e-2, "central": 5e-3}
"""Where it is not 0.01: B alone wants more, and many steps without a mean want less."""
BATCH = 8
GRID = {"alphas": [0.1, 0.5], "parties": [8, 4], "ranks": [4, 1, 8], "seeds": [0, 1, 2], "rounds": 5}
QUICK = {"dataset": "bbc", "alphas": [0.1], "parties": [4], "ranks": [4], "seeds": [0], "rounds": 3}


@dataclass(frozen=True)
class Run:
    """A point of the grid; ``alpha`` is None where nothing is divided."""

    dataset: str
    head: str
    rule: str
    alpha: float | None
    parties: int
    rank: int
    seed: int
    rounds: int
    steps: int
    lr: float
    optimizer_state: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one setting of BBC News, unless told otherwise")
    parser.add_argument("--report", action="store_true", help="show the results of this grid, run nothing")
    parser.add_argument("--results", type=Path, default=Path("runs/lora_rules.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/pellm_lightning")
    parser.add_argument("--dataset", choices=data.WHEELS, default="20newsgroups")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--alphas", type=float, nargs="+", help="of the Dirichlet distribution")
    parser.add_argument("--parties", type=int, nargs="+")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, default=10, help="local steps in a round, of 8 texts each")
    parser.add_argument("--lr", type=float, help="one for all rules, instead of what suits each")
    parser.add_argument("--heads", nargs="+", choices=["frozen", "trained"], default=["frozen"])
    parser.add_argument("--optimizer-states", nargs="+", choices=["keep", "reset"], default=["keep"])
    parser.set_defaults(**GRID)
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    arguments = parser.parse_args()
    if arguments.report:
        wanted = set(grid(arguments))
        rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        rows = [row for row in rows if _run_of(row) in wanted]
        report(
            sorted(rows, key=lambda row: list(RULES).index(row["rule"])), Path("docs/images/lora_rules.png")
        )
        return
    arguments.cache.mkdir(parents=True, exist_ok=True)
    data.load(arguments.dataset, arguments.cache)
    sweep(list(grid(arguments)), arguments.results, arguments.cache)


def grid(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs so that a sweep that is cut short has said most: seed by seed, strong skew first."""
    axes = (arguments.optimizer_states, arguments.heads, arguments.seeds, arguments.alphas)
    points = itertools.product(*axes, arguments.parties, arguments.ranks, arguments.rules)
    runs = (
        Run(
            arguments.dataset, head, rule, None if rule == "central" else alpha, parties, rank, seed,
            arguments.rounds, arguments.steps, arguments.lr or LEARNING_RATES.get(rule, 1e-2), state,
        )
        for state, head, seed, alpha, parties, rank, rule in points
        if not rule.startswith("ranks_") or rank >= 4  # a rank of 1 has no quarter
    )  # fmt: skip
    yield from dict.fromkeys(runs)


# ---- many runs


def sweep(runs: Sequence[Run], results: Path, cache: Path) -> None:
    """Make the runs that are not among the results, one process to a core that this one may use."""
    results.parent.mkdir(parents=True, exist_ok=True)
    results.touch()
    done = {_run_of(json.loads(line)) for line in results.read_text().splitlines()}
    runs = [run for run in runs if run not in done]
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    cores = context.SimpleQueue()
    num_workers = len(os.sched_getaffinity(0))
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    start = time.perf_counter()
    with context.Pool(num_workers, _pin, [cores]) as pool, results.open("a") as file:
        rows = pool.imap_unordered(functools.partial(_attempt, cache=cache), runs)
        for number, (run, row) in enumerate(rows, 1):
            if isinstance(row, str):
                print(f"FAILED {run}: {row}", flush=True)
                continue
            file.write(json.dumps(asdict(run) | row) + "\n")
            file.flush()
            minutes = (time.perf_counter() - start) / 60
            accuracies = " ".join(f"{100 * accuracy:.1f}" for accuracy in row["accuracy"])
            print(
                f"{number}/{len(runs)} {minutes:.1f} of {minutes * len(runs) / number:.0f} min"
                f"  alpha {run.alpha} parties {run.parties} rank {run.rank} seed {run.seed}"
                f" {run.rule}: {accuracies}  ({row['seconds']:.1f} s)",
                flush=True,
            )


def _run_of(row: dict[str, Any]) -> Run:
    return Run(**{field.name: row[field.name] for field in fields(Run)})


def _pin(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _attempt(run: Run, cache: Path) -> tuple[Run, dict[str, Any] | str]:
    """Make a run; a rule that fails costs its own results, not those of the runs to come."""
    try:
        return run, execute(run, cache)
    except Exception as error:
        return run, repr(error)


# ---- one run


def execute(run: Run, cache: Path) -> dict[str, Any]:
    """Return a run's results, lists by round."""
    start = time.perf_counter()
    train, test = data.load(run.dataset, cache)
    num_parties = 1 if run.rule == "central" else run.parties
    if run.rule == "central":
        run = replace(run, steps=run.steps * run.parties)
        parts = [list(range(len(train)))]
    else:
        parts = partition.dirichlet(train.labels.tolist(), num_parties, run.alpha, run.seed, BATCH)
    models = [make_model(run, party, len(train.labels.unique())) for party in range(num_parties)]

    def act(federation: Federation) -> list[dict[str, Any]]:
        party = federation.party
        return train_party(federation, run, models[party], train[parts[party]], test[party::num_parties])

    bytes_per_round = count_bytes(run, models) if RULES[run.rule] else 0
    parties = in_threads(num_parties, act)
    return _averaged(parties) | {
        "bytes_per_round": bytes_per_round,
        "seconds": round(time.perf_counter() - start, 2),
    }


def train_party(
    federation: Federation, run: Run, model: nn.Module, train: data.Examples, test: data.Examples
) -> list[dict[str, Any]]:
    """Train for some rounds; tell of each how it went, and how the model does on this part of the test set.

    Where the parties end a round with one model, their parts of the test set add up to a test of it on the
    whole; else to the mean over the parties' models.
    """
    parameters = select(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=run.lr)
    generator = torch.Generator().manual_seed(1000 * run.seed + federation.party)
    mixture = torch.bincount(train.labels, minlength=int(test.labels.max()) + 1) / len(train)
    rule = _rule(run)
    if rule is not None:
        aggregator = Aggregator(federation, parameters, aggregation=rule, lora=lora_modules(model))
        aggregator.start()
        plan = Plan(rule, parameters, lora_modules(model))
    rounds = []
    for number in range(run.rounds):
        frozen_parts = plan.named(rule.frozen_parts(number)) if rule else set()
        for _ in range(run.steps):
            batch = train[torch.randperm(len(train), generator=generator)[:BATCH]]
            nn.functional.cross_entropy(logits(model, batch), batch.labels).backward()
            for name in frozen_parts:
                parameters[name].grad = None
            optimizer.step()
            optimizer.zero_grad()
        deviation, forgotten = None, set(parameters) if run.optimizer_state == "reset" else set()
        if rule is not None:
            done = aggregator.step(weight=len(train))
            deviation, forgotten = (
                done.deviation,
                forgotten | plan.named(rule.basis_changed(done.active_parties)),
            )
        for name in forgotten:
            optimizer.state.pop(parameters[name], None)
        rounds.append(evaluate(model, test, mixture) | {"deviation": deviation})
    return rounds


@torch.no_grad()
def evaluate(model: nn.Module, test: data.Examples, mixture: torch.Tensor) -> dict[str, float]:
    """Return the accuracy, and that on texts whose labels are mixed as the party's own are."""
    batches = (test[start : start + 64] for start in range(0, len(test), 64))
    predicted = torch.cat([logits(model, batch).argmax(dim=1) for batch in batches])
    correct = (predicted == test.labels).float()
    recall = torch.stack([correct[test.labels == label].mean() for label in range(len(mixture))])
    return {"accuracy": float(correct.mean()), "own_accuracy": float(mixture @ recall)}


def make_model(run: Run, party: int, num_labels: int) -> nn.Module:
    """Return a party's model; all parties' frozen parts are equal.

    PEFT trains the head of a classifier beside the adapter. Then the head learns nearly all that can be
    learned in a few steps, and rules and ranks differ by less than seeds do. As in the experiments of
    LoRA-A2 (arXiv:2410.22815) the head is frozen here, so that what is learned passes through the factors.
    It is drawn with a deviation of 0.5, as logits of the usual 0.02 would be too small to learn from.
    """
    model = copy.deepcopy(_base(num_labels))
    torch.manual_seed(run.seed)
    if run.head == "frozen":
        nn.init.normal_(model.classifier.weight, std=0.5)
    few = run.rule.startswith("ranks_") and party % 2 == 1
    rank = run.rank // 4 if few else run.rank
    task = "SEQ_CLS" if run.head == "trained" else None
    config = LoraConfig(task_type=task, r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
    return get_peft_model(model, config).train()


@functools.cache
def _base(num_labels: int) -> nn.Module:
    return data.upper_layers(num_labels)


def _rule(run: Run) -> Aggregation | None:
    make = RULES[run.rule]
    return None if make is None else make()


def _unmeasured(rule: Aggregation | None) -> Aggregation:
    told = LowRankMean() if rule is None else rule
    told.measure_deviation = False
    return told


def logits(model: nn.Module, batch: data.Examples) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(inputs_embeds=batch.hidden, attention_mask=batch.mask).logits.float()


def count_bytes(run: Run, models: Sequence[nn.Module]) -> float:
    """Return the bytes that a party sends in a round, without those that measure the deviation."""
    copies = copy.deepcopy(list(models))

    def act(federation: Federation) -> float:
        model = copies[federation.party]
        aggregator = Aggregator(
            federation,
            select(model),
            aggregation=_unmeasured(_rule(run)),
            lora=lora_modules(model),
        )
        aggregator.start()
        return (aggregator.step(1.0).bytes_sent + aggregator.step(1.0).bytes_sent) / 2

    sent = in_threads(len(models), act)
    return sum(sent) / len(sent)


def in_threads(num_parties: int, act: Callable[[Federation], Any]) -> list[Any]:
    """Return what ``act`` returned at each party of a federation of threads."""
    store = dist.HashStore()

    def party(index: int) -> Any:
        federation = Federation(store, index, num_parties)
        try:
            result = act(federation)
        except BaseException as error:
            federation.abort(repr(error))
            raise
        federation.close()
        return result

    with ThreadPoolExecutor(num_parties) as pool:
        return list(pool.map(party, range(num_parties)))


def _averaged(parties: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Average over the parties, each counting alike; the deviation is the same at all."""
    rounds = list(zip(*parties, strict=True))
    means = {
        key: [sum(one[key] for one in each) / len(each) for each in rounds]
        for key in ("accuracy", "own_accuracy")
    }
    deviations = [each[0]["deviation"] for each in rounds]
    if None in deviations:
        return means
    return means | {
        "deviation": [deviation.total for deviation in deviations],
        "worst_deviation": [deviation.worst for deviation in deviations],
        "worst_module": [deviation.worst_module for deviation in deviations],
    }


if __name__ == "__main__":
    main()
