"""Fine-tune a causal language model with LoRA on a text file."""

import argparse
import os

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from pellm_lightning import FederatedAveraging


class LoraModel(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), lora).train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def blocks(text: str, model: str, size: int = 128) -> Tensor:
    """Cut a text into rows of ``size`` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return tokens[: len(tokens) // size * size].view(-1, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/examples/smollm2", help="hub id or folder of the base model")
    parser.add_argument("--text", required=True, help="text file to learn from")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--output", default="runs/examples/finetune", help="folder for logs and adapter")
    options = parser.parse_args()

    with open(options.text.format(party=os.environ.get("RANK", 0)), encoding="utf-8") as file:
        loader = DataLoader(blocks(file.read(), options.model), batch_size=2, shuffle=True)
    module = LoraModel(options.model)
    trainer = Trainer(
        max_steps=options.steps,
        devices=1,
        logger=CSVLogger(options.output),
        log_every_n_steps=5,
        enable_checkpointing=False,  # the adapter is what counts
        callbacks=[FederatedAveraging(every_n_steps=10)],
    )
    trainer.fit(module, loader)
    module.model.save_pretrained(os.path.join(trainer.log_dir, "adapter"))


if __name__ == "__main__":
    main()
