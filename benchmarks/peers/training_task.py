"""The training that all do alike: MiniLM with LoRA and a new head, on a party's own paragraphs.

Plain torch, transformers and PEFT, since it runs in a peer's environment too. Whoever calls it has the same
model, the same first adapter, the same batches in the same order and the same dropout, so that only the
federation differs.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification


@dataclass(frozen=True)
class Training:
    """One run; ``folder`` holds the prepared data, ``out`` takes what comes of it."""

    folder: str
    out: str
    parties: int
    rounds: int
    optimizer: str
    rule: str
    seed: int = 0
    batch_size: int = 16
    num_labels: int = 3

    @classmethod
    def from_env(cls) -> "Training":
        return cls(**json.loads(os.environ["PEERS_TRAINING"]))

    def to_env(self) -> dict[str, str]:
        return {"PEERS_TRAINING": json.dumps(asdict(self))}

    def data(self, name: str) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, (N, T), and ``labels``, (N,), int64."""
        return load_file(f"{self.folder}/{name}.safetensors")

    def model(self) -> nn.Module:
        """Return the model with the first adapter and head, the same ones in each process."""
        torch.manual_seed(self.seed)
        base = AutoModelForSequenceClassification.from_pretrained(
            f"{self.folder}/minilm", num_labels=self.num_labels
        )
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
        return get_peft_model(base, lora)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.1)
        return torch.optim.AdamW(parameters, lr=1e-3)

    def batches(self, data: dict[str, Tensor], party: int, round: int) -> Iterator[dict[str, Tensor]]:
        """Yield the round's batches in an order drawn for it, and seed the dropout."""
        seed = 1_000_000 * self.seed + 1000 * round + party
        order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        for chosen in order.split(self.batch_size):
            yield {name: tensor[chosen] for name, tensor in data.items()}

    def save(self, round: int, tensors: dict[str, Tensor]) -> None:
        """Keep the federation's parameters after a round, 0 before the first, and the time."""
        path = Path(self.out)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path / f"{round}.safetensors"
        )
        (path / f"{round}.time").write_text(str(time.monotonic()))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return what federates: the adapter and the head, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def write_(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite what federates; every name must be there."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != tensors.keys():
        raise ValueError(f"These names differ: {sorted(own.keys() ^ tensors.keys())}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def train_(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, Tensor]]) -> None:
    """Make a local step for each batch."""
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: dict[str, Tensor]) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy."""
    model.eval()
    right = loss = 0.0
    for start in range(0, len(data["labels"]), 64):
        batch = {name: tensor[start : start + 64] for name, tensor in data.items()}
        output = model(**batch)
        right += (output.logits.argmax(-1) == batch["labels"]).sum().item()
        loss += output.loss.item() * len(batch["labels"])
    return right / len(data["labels"]), loss / len(data["labels"])
