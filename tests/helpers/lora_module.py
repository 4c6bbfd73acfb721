"""A LightningModule with LoRA on two of its layers, for federations of threads and of processes."""

import threading
from collections import OrderedDict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from party_threads import linear
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pellm_lightning.aggregation import lora_modules
from pellm_lightning.aggregation.lora import find_pairs

A, B, HEAD = "lora_A", "lora_B", "modules_to_save"
"""Parts of names, for ``Tuned.of``."""

building = threading.Lock()


class Tuned(LightningModule):
    """Two layers with LoRA and a head that trains beside them, on the same base at every party."""

    def __init__(self, party: int, optimizer: str = "AdamW", lr: float = 0.05, **config: Any) -> None:
        super().__init__()
        base = nn.Sequential(
            OrderedDict(
                first=linear(8, 16, seed=1),
                tanh=nn.Tanh(),
                second=linear(16, 12, seed=2),
                relu=nn.ReLU(),
                head=linear(12, 3, seed=3),
            )
        )
        config = {"r": 2, "lora_alpha": 4, "modules_to_save": ["head"]} | config
        with building:  # PEFT draws from the global generator, and parties are threads
            torch.manual_seed(100 + party)
            self.model = get_peft_model(base, LoraConfig(target_modules=["first", "second"], **config))
        self.optimizer, self.lr = optimizer, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = list(self.trained().values())
        decay = {"weight_decay": 0.1} if self.optimizer == "AdamW" else {}
        return getattr(torch.optim, self.optimizer)(parameters, lr=self.lr, **decay)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def of(self, *words: str) -> dict[str, Tensor]:
        """Return copies of the trained parameters whose names hold one of the words."""
        return {
            name: p.detach().clone()
            for name, p in self.trained().items()
            if any(word in name for word in words)
        }

    def bases(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters() if "base_layer" in name}

    def weights(self) -> list[Tensor]:
        """Return the effective weights of the two layers, in float64."""
        parameters = {name: p.detach().double() for name, p in self.named_parameters()}
        said = lora_modules(self)
        return [
            said[pair.name].base.double() + said[pair.name].scaling * parameters[pair.b] @ parameters[pair.a]
            for pair in find_pairs(self.trained())
        ]


def assert_same(first: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert first.keys() == other.keys()
    assert [name for name in first if not torch.equal(first[name], other[name])] == []


def differ(first: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether every one of the tensors differs."""
    return bool(first) and not any(torch.equal(first[name], other[name]) for name in first)
