"""Measure the perplexity of the base model and of every adapter on each era's held-out messages."""

import argparse
import json
import logging
import math
from pathlib import Path

from lightning.pytorch import Trainer
from prepare import ERAS, MODEL, adapters

from pellm_lightning.tasks import CausalLM, TextDataModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="run directory")
    parser.add_argument("--only-base", action="store_true", help="evaluate the base model alone")
    parser.add_argument("--batches", type=int, default=None, help="evaluate so many batches per era only")
    options = parser.parse_args()
    quiet()
    chosen = {"base": None} if options.only_base else adapters(options.folder)
    losses = evaluate(options.folder, chosen, options.batches)
    path = options.folder / "losses.json"
    known = {} if options.only_base else json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**known, **losses}, indent=2), encoding="utf-8")


def evaluate(folder: Path, chosen: dict[str, Path | None], batches: int | None) -> dict[str, list[float]]:
    """Return, by model, the mean loss per token on each era."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_test_batches=batches,
    )
    losses: dict[str, list[float]] = {name: [] for name in chosen}
    for name, adapter in chosen.items():
        module = CausalLM(str(folder / MODEL), adapter=adapter and str(adapter))
        print(f"  {name}:", end="", flush=True)
        for party, era in enumerate(ERAS):
            loss = trainer.test(module, texts(folder, party), verbose=False)[0]["test_loss"]
            losses[name].append(loss)
            print(f"  {math.exp(loss):.1f} on {era}", end="", flush=True)
        print()
    return losses


def texts(folder: Path, party: int) -> TextDataModule:
    """Read one era's held-out messages."""
    pattern = str(folder / "data" / "party-{party}")
    return TextDataModule(
        files=f"{pattern}/train/*.txt",
        test_files=f"{pattern}/held-out/*.txt",
        tokenizer=str(folder / MODEL),
        batch_size=8,
        block_size=128,
        party=party,
    )


def quiet() -> None:
    """Keep Lightning from telling the devices at each of the tests."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
