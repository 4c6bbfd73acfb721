"""Fine-tune an encoder with LoRA and a new head on a table of texts: a script like many, federated.

No seed is needed: PEFT trains a copy of the new head, and all parties begin with that of the first.
"""

import argparse
import csv
import os

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pellm_lightning import FederatedAveraging

LABELS = ["1790-1860", "1861-1945", "1946-2026"]


class Classifier(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(LABELS))
        lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
        self.model = get_peft_model(base, lora).train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-3)


def rows(path: str, party: int, parties: int) -> list[dict[str, str]]:
    """Read a party's rows. Here each takes every n-th of one table; yours reads its own."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[party::parties]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/examples/minilm", help="hub id or folder of the encoder")
    parser.add_argument("--table", default="runs/examples/data/eras-train.csv", help="texts and their labels")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output", default="runs/examples/classifier", help="folder for logs and adapter")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def collate(batch: list[dict[str, str]]) -> dict[str, Tensor]:
        texts = [row["text"] for row in batch]
        encoded = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor([LABELS.index(row["era"]) for row in batch])}

    party, parties = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    data = rows(options.table, party, parties)
    loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate)
    module = Classifier(options.model)
    trainer = Trainer(
        max_epochs=options.epochs,
        devices=1,
        logger=CSVLogger(options.output),
        log_every_n_steps=5,
        enable_checkpointing=False,  # the adapter is what counts
        callbacks=[FederatedAveraging()],
    )
    trainer.fit(module, loader)
    module.model.save_pretrained(os.path.join(trainer.log_dir, "adapter"))


if __name__ == "__main__":
    main()
