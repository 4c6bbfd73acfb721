"""Task for `robust.py`: MiniLM with LoRA on 20 Newsgroups, the labels divided by Dirichlet(0.5)."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import lora_rules_data as data
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pellm_lightning.aggregation import lora_modules
from pellm_lightning.tasks import partition
from pellm_lightning.tensors.selection import select

CACHE = Path.home() / ".cache/pellm_lightning"
DATASET, TEXTS, TOKENS, FROZEN_LAYERS = "20newsgroups", (200, 60), 32, 5
CLASSES, RANK = 20, 8
STEPS, BATCH, LEARNING_RATE = 10, 8, 1e-2
REMEMBERED = 2000
Parameters = dict[str, Tensor]
Result = TypeVar("Result")


class Memory:
    """Results of functions of tensors by the tensors' bits; those that were not asked for the longest go."""

    def __init__(self) -> None:
        self._results: OrderedDict[bytes, Any] = OrderedDict()

    def of(self, tensors: Iterable[Tensor], compute: Callable[[], Result]) -> Result:
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.numpy().tobytes())
        key = digest.digest()
        if key not in self._results:
            self._results[key] = compute()
        self._results.move_to_end(key)
        while len(self._results) > REMEMBERED:
            self._results.popitem(last=False)
        return cast(Result, self._results[key])


class Newsgroups:
    """Texts of twenty labels, and how they are divided; without `skew` each party has all labels alike.

    A round's training starts with a new optimizer, so it is a function of the parameters, the texts and the
    labels: what another rule or attack has computed is not computed again, and has the same bits.
    """

    rounds = 6
    cap = 0.25

    def __init__(self, seed: int, parties: int, *, skew: bool) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        self.train, self.test = data.load(DATASET, CACHE, TEXTS, TOKENS, FROZEN_LAYERS)
        labels = self.train.labels.tolist()
        shards = partition.divide(labels, parties, "dirichlet" if skew else "iid", alpha=0.5, seed=seed)
        self.shards = [torch.tensor(shard) for shard in shards]
        base = data.upper_layers(CLASSES, FROZEN_LAYERS)
        torch.manual_seed(seed)
        config = LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"]
        )
        self.model = get_peft_model(base, config).train()
        self.lora = lora_modules(self.model)
        self.first = {name: q.detach().clone() for name, q in select(self.model).items()}
        self.memory = Memory()

    def weight(self, party: int) -> float:
        return len(self.shards[party])

    def start(self) -> Parameters:
        return {name: q.clone() for name, q in self.first.items()}

    def accuracy(self, p: Parameters) -> float:
        return self.memory.of(p.values(), lambda: self._accuracy(p))

    def _accuracy(self, p: Parameters) -> float:
        self._load(p)
        batches = [self.test[start : start + 100] for start in range(0, len(self.test), 100)]
        right = [logits(self.model, batch).argmax(dim=1) == batch.labels for batch in batches]
        return float(torch.cat(right).float().mean())

    def train_(self, p: Parameters, party: int, generator: torch.Generator, *, flipped: bool) -> None:
        shard = self.shards[party]
        chosen = shard[torch.randint(0, len(shard), (STEPS, BATCH), generator=generator)]
        labels = (self.train.labels[chosen] + flipped) % CLASSES
        trained = self.memory.of((*p.values(), chosen, labels), lambda: self._trained(p, chosen, labels))
        for name, q in p.items():
            q.copy_(trained[name])

    @torch.enable_grad()
    def _trained(self, p: Parameters, chosen: Tensor, labels: Tensor) -> Parameters:
        self._load(p)
        parameters = select(self.model)
        optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE)
        for at, of_labels in zip(chosen, labels, strict=True):
            nn.functional.cross_entropy(logits(self.model, self.train[at]), of_labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: q.detach().clone() for name, q in parameters.items()}

    def _load(self, p: Parameters) -> None:
        with torch.no_grad():
            for name, q in select(self.model).items():
                q.copy_(p[name])


def logits(model: nn.Module, batch: data.Examples) -> Tensor:
    """Return the classifier's logits, (n, classes); of the last layer only the first token's output is used.

    That is all that the classifier reads, so the result is the whole model's, at a fraction of the cost.
    """
    bert, classifier = model.base_model.model.bert, model.base_model.model.classifier
    (layer,) = bert.encoder.layer
    attention, first = layer.attention.self, batch.hidden[:, :1]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = attention.query(first), attention.key(batch.hidden), attention.value(batch.hidden)
        mask = batch.mask[:, None, None].bool()
        context = nn.functional.scaled_dot_product_attention(heads(q), heads(k), heads(v), mask)
        seen = layer.attention.output(context.transpose(1, 2).flatten(2), first)
        pooled = bert.pooler(layer.output(layer.intermediate(seen), seen))
        return cast(Tensor, classifier(pooled)).float()
