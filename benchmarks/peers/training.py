"""The same fine-tuning here and in Flower: accuracy by round, wall time, bytes.

Run `make peers`. Four parties teach MiniLM, by LoRA and a new head, to tell the era of a paragraph; each
holds its own mixture of labels. Model, first adapter, batches, their order and dropout are the same, so the
results must agree where optimizers begin anew each round, as in Flower's clients; here they need not.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
for place in (str(_HERE), str(_HERE.parent)):
    if place not in sys.path:
        sys.path.insert(0, place)

from environments import NotInstalled, python_of, versions  # noqa: E402
from memory import Watch  # noqa: E402
from round_times import free_ports  # noqa: E402
from training_task import Training, evaluate, write_  # noqa: E402

ERAS = ["1790-1860", "1861-1945", "1946-2026"]
OURS, FLOWER = "ours", "Flower"
# Who, with which optimizer, by which rule. Flower's clients make new optimizers each round: so does "reset".
RUNS = [
    (OURS, "sgd", "reset"),
    (FLOWER, "sgd", "mean"),
    (OURS, "adamw", "reset"),
    (OURS, "adamw", "mean"),
    (OURS, "adamw", "default"),
    (FLOWER, "adamw", "mean"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/peers"), help="for environments and results"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of division, adapter, order and dropout")
    parser.add_argument("--only", nargs="+", default=["ours", "Flower"], help="beginnings of who runs")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--image", type=Path, help="draw the accuracies into this PNG file")
    arguments = parser.parse_args()
    flower = flower_python(arguments.folder) if any("Flower".startswith(o) for o in arguments.only) else None
    runs = [
        (who, optimizer, rule)
        for who, optimizer, rule in RUNS
        if any(who.startswith(only) for only in arguments.only) and optimizer in arguments.optimizers
    ]
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        folder = (arguments.folder / f"training-{seed}").absolute()
        prepare(folder, arguments.parties, seed)
        training = Training(str(folder), "", arguments.parties, arguments.rounds, "", "", seed)
        rows += trained(training, [run for run in runs if run[0] == OURS or flower], flower)
        (arguments.folder / "training.json").write_text(json.dumps(rows, indent=1))
    import training_report

    training_report.report(rows, arguments.image)


def trained(
    common: Training, runs: Sequence[tuple[str, str, str]], flower: str | None
) -> list[dict[str, Any]]:
    """Run all of one seed, and score what they kept."""
    rows: list[dict[str, Any]] = []
    for who, optimizer, rule in runs:
        out = str(Path(common.folder, f"{who}-{optimizer}-{rule}"))
        try:
            figures = run(replace(common, out=out, optimizer=optimizer, rule=rule), who, flower)
        except RuntimeError as error:
            if who == OURS:
                raise
            print(f"{who}, {optimizer} is left out: {error}", flush=True)
            continue
        rows.append({"who": who, "optimizer": optimizer, "rule": rule, "seed": common.seed, **figures})
        print(f"seed {common.seed}, {who}, {optimizer}, {rule}: {figures['wall_s']:.0f} s", flush=True)
    score_(rows, common)
    return rows


def flower_python(folder: Path) -> str | None:
    try:
        python = python_of("flower-training", folder)
    except NotInstalled as error:
        print(f"Flower is skipped, since it does not install: {error}", flush=True)
        return None
    print("Flower:", versions(python, ["flwr", "torch", "transformers", "peft", "numpy"]), flush=True)
    return python


def prepare(folder: Path, parties: int, seed: int) -> None:
    """Write each party's paragraphs and the held-out ones as token ids, from what `make_data.py` wrote."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from pellm_lightning.tasks.partition import dirichlet

    source = _HERE.parents[1] / "runs" / "examples"
    if not (source / "data" / "eras-train.csv").exists() or not (source / "minilm").exists():
        raise SystemExit("The model and the paragraphs are missing. Make them: python examples/make_data.py")
    shutil.copytree(source / "minilm", folder / "minilm", dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "minilm")

    def write(name: str, rows: list[dict[str, str]]) -> None:
        texts = tokenizer(
            [row["text"] for row in rows],
            truncation=True,
            max_length=64,
            padding="max_length",
            return_tensors="pt",
        )
        tensors = {key: texts[key].contiguous() for key in ("input_ids", "attention_mask")}
        tensors["labels"] = torch.tensor([ERAS.index(row["era"]) for row in rows])
        save_file(tensors, folder / f"{name}.safetensors")

    tables = {name: read(source / "data" / f"eras-{name}.csv") for name in ("train", "test")}
    write("test", tables["test"])
    eras = [row["era"] for row in tables["train"]]
    parts = dirichlet(eras, parties, alpha=1.0, seed=1 + seed, min_per_party=32)
    for party, part in enumerate(parts):
        write(f"party-{party}", [tables["train"][index] for index in part])
    print(
        f"the parties hold {', '.join(str(len(part)) for part in parts)} of {sum(map(len, parts))} paragraphs"
    )


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(training: Training, who: str, flower: str | None) -> dict[str, Any]:
    """Run it once; return seconds from the start of the processes to the last round, and bytes."""
    shutil.rmtree(training.out, ignore_errors=True)
    Path(training.out).mkdir()
    ports = free_ports(training.parties + 1)
    paths = [str(_HERE), str(_HERE.parent), str(_HERE.parents[1])]
    common = os.environ | training.to_env() | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    common |= {"HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    if who == OURS:
        command = [sys.executable, str(_HERE / "training_ours.py")]
        more = [{"RANK": str(p), "WORLD_SIZE": str(training.parties)} for p in range(training.parties)]
    else:
        command = [str(flower), str(_HERE / "training_flower.py"), ",".join(map(str, ports))]
        more = [{}]
    watch = Watch(json.dumps(training.out))
    start = time.monotonic()
    started = []
    for index, words in enumerate(more):
        with open(Path(training.out, f"{index}.out"), "w") as log:
            started.append(
                subprocess.Popen(command, env=common | words, stdout=log, stderr=subprocess.STDOUT)
            )
    codes = [process.wait(1200) for process in started]
    watch.end_what_is_left()
    times = [Path(training.out, f"{round}.time") for round in range(training.rounds + 1)]
    if any(codes) or not all(path.exists() for path in times):
        raise RuntimeError(f"{who} ended with {codes}: see the logs in {training.out}")
    at = [float(path.read_text()) for path in times]
    return {"wall_s": at[-1] - start, "rounds_s": [b - a for a, b in pairwise(at)]}


def score_(rows: list[dict[str, Any]], common: Training) -> None:
    """Evaluate what each run kept, all by the same program, and compare it with ours."""
    from safetensors.torch import load_file

    model, test, rounds = common.model(), common.data("test"), common.rounds
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        out = Path(common.folder, f"{row['who']}-{row['optimizer']}-{row['rule']}")
        row["accuracy"], row["loss"] = [], []
        for round in range(rounds + 1):
            last = load_file(out / f"{round}.safetensors")
            write_(model, last)
            accuracy, loss = evaluate(model, test)
            row["accuracy"].append(accuracy)
            row["loss"].append(loss)
        size = 4 * sum(tensor.numel() for tensor in last.values())
        # Flower's party sends its parameters and receives the mean; the server does as much with each.
        row["sent_bytes"] = rounds * size if row["who"] != OURS else float((out / "bytes").read_text())
        row["server_bytes"] = 2 * rounds * common.parties * size if row["who"] != OURS else 0
        if row["who"] == OURS and row["rule"] == "reset":
            kept[row["optimizer"]] = last
        ours = kept.get(row["optimizer"])
        row["apart"] = distance(last, ours, load_file(out / "0.safetensors")) if ours else None


def distance(a: dict[str, Any], b: dict[str, Any], first: dict[str, Any]) -> float:
    """Return the 2-norm of a minus b in units of how far b has moved from the first parameters."""
    apart = sum(((a[name] - b[name]).double() ** 2).sum().item() for name in b)
    moved = sum(((b[name] - first[name]).double() ** 2).sum().item() for name in b)
    return (apart / moved) ** 0.5


if __name__ == "__main__":
    main()
