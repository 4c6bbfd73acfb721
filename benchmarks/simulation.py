"""Memory of a simulation of many parties at one language model with LoRA, and its overhead.

The model has the shape of SmolLM2-135M, or a small one, with random weights; each party has random tokens.
The same steps are made without a federation at first, which the rest is compared with.

    python benchmarks/simulation.py --model smollm2-135m --rounds 3
"""

import argparse
import json
import resource
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from pellm_lightning import FederatedAveraging, Simulation

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
}


class Model(LightningModule):
    """A causal language model with LoRA of rank 8 on queries and values."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        config = LlamaConfig(**({"vocab_size": 256, "tie_word_embeddings": True} | SHAPES[shape]))
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(LlamaForCausalLM(config), lora)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of tokens."""
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW of the adapter."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Parties(LightningDataModule):
    """Random tokens of each party.

    Args:
        samples: Of each party.
        length: Tokens of a sample.
        vocabulary: Number of tokens.
    """

    def __init__(self, samples: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.samples, self.length, self.vocabulary = samples, length, vocabulary

    def party_dataloader(self, party: int) -> DataLoader[Any]:
        """Return a party's batches."""
        generator = torch.Generator().manual_seed(party)
        tokens = torch.randint(self.vocabulary, (self.samples, self.length), generator=generator)
        return DataLoader(TensorDataset(tokens), batch_size=4)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return one party's batches, which is what training costs without a federation."""
        return self.party_dataloader(0)


def seconds(model: Model, data: Parties, epochs: int, callbacks: list[Any]) -> float:
    """Return how long a fit takes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        began = time.perf_counter()
        trainer.fit(model, datamodule=data)
        return time.perf_counter() - began


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--parties", type=int, default=1000)
    parser.add_argument("--sampled", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    vocabulary = SHAPES[args.model].get("vocab_size", 256)
    data = Parties(4 * args.steps, args.length, vocabulary)
    model = Model(args.model)
    seconds(model, data, 1, [])  # what only the first fit of a process needs
    passes = args.rounds * args.sampled  # as many steps as all parties together make
    bare = seconds(model, data, passes, [])
    base_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    callback = FederatedAveraging(
        every_n_steps=args.steps, simulate=Simulation(args.parties, args.sampled), weighting="uniform"
    )
    simulated = seconds(model, data, args.rounds, [callback])
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    in_rounds = sum(report.seconds for report in callback.rounds)
    figures = {
        "steps": passes * args.steps,
        "bare_s": round(bare, 2),
        "simulated_s": round(simulated, 2),
        "overhead": round(simulated / bare - 1, 4),
        "in_rounds_s": round(in_rounds, 3),
        "peak_mb": round(peak_mb),
        "peak_mb_without": round(base_mb),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    print(json.dumps(vars(args) | figures))


if __name__ == "__main__":
    main()
